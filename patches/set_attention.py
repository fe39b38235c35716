"""Choose the attention plugin, with its options, in config.json: plain from_pretrained then selects it."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

from hf_attn_plugins.checkpoint.card import CARD, needs_import, with_section
from hf_attn_plugins.checkpoint.source import Source
from hf_attn_plugins.checkpoint.write import Patch
from hf_attn_plugins.hf.inputs.arguments import add_trust_argument
from hf_attn_plugins.hf.register import register
from hf_attn_plugins.hf.saved_choice import FIELD
from hf_attn_plugins.plugins import PLUGINS, plugin
from hf_attn_plugins.ui.suggest import did_you_mean

SUMMARY = "write attn_implementation and the plugin's options into config.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --attn, --tuned, --part, --trust-remote-code, and one option for every option that some plugin has."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--attn", metavar="NAME", help=f"one of {', '.join(PLUGINS)}")
    source.add_argument("--tuned", metavar="FILE", help="plugin and options of a report that hf-attn tune --out wrote")
    parser.add_argument(
        "--part",
        action="append",
        metavar="NAME",
        help="only this part of a composite model (text, vision, encoder, decoder, ...); may be repeated",
    )
    takers: dict[str, list[str]] = {}
    for name, each in PLUGINS.items():
        for option in dataclasses.fields(each.options_type()):
            takers.setdefault(option.name, []).append(name)
    for option_name, names in takers.items():
        flag = "--" + option_name.replace("_", "-")
        parser.add_argument(flag, dest=f"option_{option_name}", type=_value, help=f"of {', '.join(names)}")
    add_trust_argument(parser)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def plan(source: Source, arguments: argparse.Namespace) -> Patch:
    """The config with the plugin chosen.

    Raises:
        ValueError: an unknown plugin, option, value or part, or a model in which the plugin could not take effect.
    """
    from hf_attn_plugins.hf.tuning.report import read_options

    name, tuned = (arguments.attn, {}) if arguments.tuned is None else read_options(arguments.tuned)
    chosen = plugin(name)
    given = {k.removeprefix("option_"): v for k, v in vars(arguments).items() if k.startswith("option_")}
    given = {name: value for name, value in given.items() if value is not None}
    taken = chosen.options_type().names()
    unknown = sorted(set(given) - set(taken))
    if unknown:
        flags = ", ".join("--" + name.replace("_", "-") for name in unknown)
        hint = did_you_mean(unknown[0], taken).replace("_", "-")
        raise ValueError(f"{chosen.name} does not take {flags}{hint}.")
    options = chosen.options_type()(**{**tuned, **given}).as_dict()
    config = copy.deepcopy(source.config)
    parts = [_part(config, name) for name in arguments.part or ()]
    if parts:
        current = config.get("attn_implementation")
        by_part = dict(current) if isinstance(current, dict) else ({} if current is None else {"": current})
        config["attn_implementation"] = {**by_part, **dict.fromkeys(parts, chosen.name)}
    else:
        config["attn_implementation"] = chosen.name
    config[FIELD] = config["attn_implementation"]  # what saving the loaded model again goes by
    # A plugin reads its options from the config of the module it runs in, which in a composite model is a part's.
    for holder in [config[part] for part in parts] or [config, *_parts(config).values()]:
        holder["hf_attn_plugins"] = {**(holder.get("hf_attn_plugins") or {}), chosen.name: options}
    where = f"in {', '.join(parts)}" if parts else "everywhere"
    notes = [
        f"attention: {chosen.name} {where}, {'options ' + json.dumps(options) if options else 'default options'}.",
        "Needs `import hf_attn_plugins` before from_pretrained; an explicit attn_implementation= there still wins.",
        f"{CARD} tells whoever receives the checkpoint what to install and import.",
        "save_pretrained keeps the choice where hf_attn_plugins is imported, unless another attention was set since.",
    ]
    if not chosen.exact:
        notes.append(f"{chosen.name} approximates by design: outputs differ from full attention.")

    def verify(folder: Path) -> None:
        _verify(folder, chosen.name, parts, options, arguments.trust_remote_code)

    asked = {"attn": chosen.name, "parts": parts, "options": options}
    card = with_section(source.folder, "attention", needs_import(chosen.name, chosen.exact, options))
    return Patch("set-attention", asked, config, notes, verify=verify, rewritten=card)


def _parts(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {k: v for k, v in config.items() if isinstance(v, dict) and ("model_type" in v or k.endswith("_config"))
            and k != "quantization_config"}  # fmt: skip


def _part(config: dict[str, Any], name: str) -> str:
    parts = _parts(config)
    for candidate in (name, f"{name}_config"):
        if candidate in parts:
            return candidate
    raise ValueError(f"--part {name}: the config has {', '.join(parts) or 'no parts, leave --part out'}.")


def _verify(folder: Path, name: str, parts: list[str], options: dict[str, Any], trust: bool) -> None:
    """Build the model without weights from the new config and see that the plugin and its options reach it."""
    from hf_attn_plugins.hf.check import check
    from hf_attn_plugins.hf.compat import config_carries_attention, implementation_of
    from hf_attn_plugins.hf.inputs.load import model_without_weights, read_config

    if not config_carries_attention():
        raise ValueError(
            "this version of Transformers does not read attn_implementation from config.json (5.4 and later do): "
            f"upgrade it, or load the model with attn_implementation={name!r}."
        )
    register()
    config = read_config(folder, trust_remote_code=trust)
    model = model_without_weights(config, trust_remote_code=trust)
    targets = [getattr(model.config, part) for part in parts] or [model.config]
    for target in targets:
        stored = (getattr(target, "hf_attn_plugins", None) or {}).get(name)
        if implementation_of(target) != name or stored != options:
            raise ValueError(
                f"{type(target).__name__} reads attn_implementation={implementation_of(target)!r} with options "
                f"{stored}: this model's config does not carry the choice, use set_attn_implementation in your code."
            )
    wanted = {id(target) for target in targets}
    for module in model.modules() if parts else [model]:
        if not parts or (hasattr(module, "get_input_embeddings") and id(module.config) in wanted):
            check(module, name).raise_if_refused()
            break
