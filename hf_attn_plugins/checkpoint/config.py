"""A checkpoint's config.json, read with suspicion: every refusal is one line that names the file and the field."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Fields of a config that recipes read, what they may hold, and the words for it in an error.
FIELDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "hf_attn_plugins": (dict, "an object, plugin names to options,"),
    "quantization_config": (dict, "an object"),
    "rope_parameters": (dict, "an object"),
    "rope_scaling": (dict, "an object"),
    "model_type": (str, "a name"),
    "architectures": (list, "a list of names"),
    "attn_implementation": ((str, dict), "a name, or an object of names by part,"),
}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim",
         "max_position_embeddings")  # fmt: skip
POSITIVE = ("hidden_size", "num_attention_heads", "vocab_size")
MOST_LAYERS = 10_000  # building more, weights or not, takes minutes


def check_config(path: Path, config: dict[str, Any]) -> None:
    """Refuse a config.json whose fields are not of the kind that every recipe relies on.

    Raises:
        ValueError: names the file, the field, and what is allowed.
    """
    for place, part in [("", config), *((f"{k}.", v) for k, v in config.items() if isinstance(v, dict))]:
        for name, (kinds, wanted) in FIELDS.items():
            value = part.get(name)
            if value is not None and not isinstance(value, kinds):
                raise ValueError(f"{path}: {place}{name} is {json.dumps(value)[:80]}, {wanted} is needed.")
        for name in SIZES:
            value = part.get(name)
            if value is None or isinstance(value, (list, dict)):  # some families write a list, one number a layer
                continue
            if isinstance(value, (str, bool)) or value % 1 != 0 or (name in POSITIVE and value < 1):
                least = "of at least 1 " if name in POSITIVE else ""
                raise ValueError(f"{path}: {place}{name} is {json.dumps(value)[:80]}, a whole number {least}is needed.")
            if name == "num_hidden_layers" and value > MOST_LAYERS:
                raise ValueError(
                    f"{path}: {place}{name} is {json.dumps(value)[:80]}, at most {MOST_LAYERS} are allowed."
                )
        for name in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
            value = part.get(name)
            for each in value.values() if isinstance(value, dict) else [value]:
                if each is not None and not isinstance(each, str):
                    raise ValueError(f"{path}: {place}{name} holds {json.dumps(each)[:80]}, a name is needed.")
                if each is not None and "/" in each:
                    raise ValueError(
                        f"{path}: {place}{name} is {each!r}, a kernel of the hub, which loading would download and "
                        "run: remove it from the config."
                    )
        for name, options in (part.get("hf_attn_plugins") or {}).items():
            if not isinstance(options, dict):
                raise ValueError(
                    f"{path}: {place}hf_attn_plugins gives {name!r} {json.dumps(options)[:80]}, an object of options "
                    "is needed."
                )


@contextlib.contextmanager
def naming(folder: Path, stage: Path | None = None) -> Iterator[None]:
    """Turn whatever Transformers raises on a checkpoint it cannot use into one line that names the checkpoint.

    Args:
        stage: where a patched copy is tried; messages name `folder` in its place.

    Raises:
        ValueError, OSError: in place of any other exception, which stays its cause. ImportError passes.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if stage is not None:
            text = text.replace(str(stage), str(folder))
        if not isinstance(error, (ValueError, OSError, NotImplementedError)):
            text = f"the config does not describe a model that can be used ({type(error).__name__}: {text[:400]})"
        if str(folder) not in text:
            text = f"{folder}: {text}"
        raise (FileNotFoundError if isinstance(error, FileNotFoundError) else OSError if isinstance(error, OSError)
               else ValueError)(text) from error  # fmt: skip


def as_json(content: dict[str, Any]) -> bytes:
    """A JSON object as Transformers writes its configs: two spaces, a final newline; the order of keys is kept."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
