"""One prompt over all processes of a launch: each reads its part of the prompt and keeps that part's keys and values.

accelerate launch --num_processes 4 examples/several_devices.py                # GPUs
accelerate launch --multi_gpu --num_processes 2 examples/several_devices.py    # CPUs: Accelerate wants the flag
python examples/several_devices.py                                             # one process, the same lines
"""

from __future__ import annotations

import argparse

import accelerate
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_attn_plugins as hap


def main(argv: list[str] | None = None) -> str:
    """Read a long prompt and continue it; the new text, the same on every rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; the small real model by default")
    parser.add_argument("--dtype", default="float32", help="bfloat16 on a GPU, or on a CPU with AVX512-BF16 or AMX")
    parser.add_argument("--attn", default="star_attention", choices=list(hap.PLUGINS))
    parser.add_argument("--length", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    arguments = parser.parse_args(argv)

    state = accelerate.PartialState()  # one process per device
    with state.main_process_first():  # the small model is converted once
        path = arguments.model or hap.demo_folder()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=arguments.dtype).to(state.device)
    text = prose()[: 16 * arguments.length]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : arguments.length].to(state.device)

    options = {"block_size": 512, "anchor_size": 128} if arguments.attn == "star_attention" else {}
    with hap.context_parallel(model, arguments.attn, **options) as cp:
        output = model.generate(ids, max_new_tokens=arguments.max_new_tokens, do_sample=False)
        text = tokenizer.decode(output[0, ids.shape[1] :])
        if cp.rank == 0:
            print(text)
        print(cp.summary())
    return text


def prose() -> str:
    """English prose that Python itself carries."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


if __name__ == "__main__":
    main()
