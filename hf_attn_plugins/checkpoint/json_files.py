"""JSON files of a checkpoint, read with suspicion: every refusal is one line that names the file and the field."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LARGEST_JSON = 1 << 26  # bytes; the index of a model of a thousand billion parameters has some ten million
DEEPEST_JSON = 64
# Fields of a config that recipes read, what they may hold, and how that is called.
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


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; FileNotFoundError or ValueError name the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, at most {LARGEST_JSON} are read as JSON.")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_nan)
        json.dumps(found, ensure_ascii=False).encode()  # text that UTF-8 cannot write again is refused here
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a JSON {type(found).__name__}, an object is needed.")
    level: list[Any] = [found]
    depth = 0
    while level:
        depth += 1
        if depth > DEEPEST_JSON:
            raise ValueError(f"{path} nests objects and lists more than {DEEPEST_JSON} deep.")
        level = [child for each in level for child in (each.values() if isinstance(each, dict) else each)
                 if isinstance(child, (dict, list))]  # fmt: skip
    return found


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = sorted({name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1})
        raise ValueError(f"the key {twice[0]!r} occurs twice")
    return found


def _no_nan(text: str) -> float:
    if text == "NaN":
        raise ValueError("NaN is no number that a config can mean")
    return float(text)  # Infinity: some state-space models' configs hold it


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
            text = f"Transformers cannot use this checkpoint ({type(error).__name__}: {text[:400]})"
        if str(folder) not in text:
            text = f"{folder}: {text}"
        raise (FileNotFoundError if isinstance(error, FileNotFoundError) else OSError if isinstance(error, OSError)
               else ValueError)(text) from error  # fmt: skip


def as_json(content: dict[str, Any]) -> bytes:
    """A JSON object as Transformers writes its configs: two spaces, a final newline; the order of keys is kept."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()
