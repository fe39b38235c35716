"""First-layer tables: a row per token id in place of the first layer's projections."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from hf_attn_plugins.checkpoint.card import needs_tables, with_section
from hf_attn_plugins.checkpoint.config import naming
from hf_attn_plugins.checkpoint.places import Places
from hf_attn_plugins.checkpoint.source import Source
from hf_attn_plugins.checkpoint.write import Patch

SUMMARY = "add a table row per token that replaces the first layer's projections"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --text."""
    parser.add_argument("--text", type=Path, help="UTF-8 text to verify on, where the checkpoint has a tokenizer")


def plan(source: Source, arguments: argparse.Namespace) -> Patch:
    """Audit the model, compute its tables, and verify them in the folder as it will be loaded.

    Raises:
        ValueError: the audit refuses the model, or the patched logits break the error rule.
        FileNotFoundError: there is no such text.
    """
    from hf_attn_plugins.checkpoint import fingerprint, first_layer

    if arguments.text is not None and not arguments.text.is_file():
        raise FileNotFoundError(f"--text {arguments.text}: no such file.")
    if source.config.get("quantization_config"):
        method = source.config["quantization_config"].get("quant_method")
        raise ValueError(
            f"{source.folder} already has a quantization_config ({method}): it cannot take tables as well."
        )
    named = _kernel_name(source.config)
    if named is not None:
        raise ValueError(f"{source.folder} names the attention {named!r}, code of a hub: name another one first.")
    with naming(source.folder):
        original, absent = _load(source.folder)
    audit = first_layer.audit(original)
    places = audit.require()
    _refuse_missing(source.folder, places, absent)
    tables = first_layer.build(original, places)
    tables.update(fingerprint.take(original, places, tables))
    gain = first_layer.gain(original, places)
    config = copy.deepcopy(source.config)
    from hf_attn_plugins.checkpoint.loader import METHOD, TABLES

    config["quantization_config"] = {"quant_method": METHOD, **places.as_dict(), "tables": TABLES}
    text = None if arguments.text is None else arguments.text.read_text(encoding="utf-8")
    size = sum(table.nbytes for table in tables.values())

    def write(path: Path) -> None:
        from safetensors.torch import save_file

        save_file(tables, path, metadata={"format": "pt"})

    return Patch(
        "first-layer",
        {"places": places.as_dict(), "bytes_added": gain.bytes_added, "flops_saved": gain.flops_saved},
        config,
        [*audit.reasons, *gain.lines()],
        {TABLES: (write, size + 4096)},
        partial(_verify, original, text),
        with_section(source.folder, "tables", needs_tables()),
    )


def _kernel_name(config: Any) -> str | None:
    """The attention implementation that a config or a sub-config names as a hub's repository, if any."""
    for key, value in config.items():
        if key.lstrip("_") == "attn_implementation":
            names = value.values() if isinstance(value, dict) else [value]
            found = next((name for name in names if isinstance(name, str) and "/" in name), None)
        else:
            found = _kernel_name(value) if isinstance(value, dict) else None
        if found is not None:
            return found
    return None


def _refuse_missing(folder: Path, places: Places, absent: Iterable[str]) -> None:
    """Raise ValueError where a weight that tables are made from is not in the checkpoint: its values are made up."""
    parts = tuple(f"{path}." for path in (places.embedding, places.norm, *places.projections) if path)
    made_up = sorted(name for name in absent if name.startswith(parts))
    if made_up:
        raise ValueError(f"{folder}: the weights hold no {', '.join(made_up)}, which the tables would be made from.")


def _load(folder: Path) -> tuple[Any, set[str]]:
    """The model with plain attention, and the names of the weights that its checkpoint lacks.

    What its config names (a plugin, a kernel of the hub) has no part in tables.
    """
    from transformers import AutoModelForCausalLM

    # The families without "sdpa" say so when they are loaded; what else is wrong is found again with "eager".
    for implementation in ("sdpa", "eager"):
        try:
            model, said = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto",
                attn_implementation=implementation,
                trust_remote_code=False,
                output_loading_info=True,
            )
            return model.eval(), set(said["missing_keys"])
        except ValueError as error:
            if implementation == "eager" or "scaled_dot_product_attention" not in str(error):
                raise
    raise AssertionError  # not reached


def _verify(original: Any, text: str | None, folder: Path) -> None:
    from hf_attn_plugins.checkpoint import loader
    from hf_attn_plugins.checkpoint.attach import ATTRIBUTE
    from hf_attn_plugins.checkpoint.verify import compare, samples

    loader.register()
    patched, _ = _load(folder)
    layer = getattr(patched, ATTRIBUTE, None)
    if layer is None:
        raise ValueError("the tables did not attach when the patched folder was loaded.")
    compared = samples(folder, original.config.get_text_config().vocab_size, text)
    lines = compare(original, patched, compared)
    if layer.looked_up != len(compared):
        raise ValueError(f"the patched model does not use its tables: {'; '.join(sorted(layer.said))}.")
    for line in lines:
        print(line)
