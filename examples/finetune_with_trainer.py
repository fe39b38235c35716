"""Fine-tune a causal language model with the Trainer: the attention's name is the only difference to any other script.

The plugin gains in bfloat16, forward and backward, where the hardware multiplies bfloat16: pass --bf16 there. The
weights stay float32 (autocast). In float32 on a CPU it computes the same at the same speed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_attn_plugins as hap


def main(argv: list[str] | None = None) -> list[float]:
    """Train for a few steps; the losses that were logged."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or hub id; the small real model by default")
    parser.add_argument("--attn", default="tiled_attention")
    parser.add_argument("--text", type=Path, help="UTF-8 text to train on; prose that Python carries by default")
    parser.add_argument("--length", type=int, default=1024, help="tokens of one training example")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bf16", action="store_true", help="autocast: on a GPU, or a CPU with AVX512-BF16 or AMX")
    parser.add_argument("--out", default="runs/finetuned", help="folder for the model")
    arguments = parser.parse_args(argv)

    path = arguments.model or hap.demo_folder()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32", attn_implementation=arguments.attn)

    ids = tokenizer(arguments.text.read_text(encoding="utf-8") if arguments.text else prose()).input_ids
    pieces = [ids[i : i + arguments.length] for i in range(0, len(ids) - arguments.length + 1, arguments.length)]
    examples = [{"input_ids": piece, "labels": piece} for piece in pieces]

    options = TrainingArguments(
        output_dir=arguments.out,
        max_steps=arguments.steps,
        per_device_train_batch_size=1,
        learning_rate=5e-5,
        bf16=arguments.bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model=model, args=options, train_dataset=examples)
    with hap.trace(model) as seen:
        trainer.train()
    print(seen)  # what ran, per layer
    trainer.save_model(arguments.out)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def prose() -> str:
    """English prose that Python itself carries."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
