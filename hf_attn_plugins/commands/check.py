"""`hf-attn check MODEL --attn NAME`: every attention module honoured, passed through or refused, and why."""

from __future__ import annotations

import argparse
import json

from hf_attn_plugins.hf.inputs.arguments import DEMO, add_trust_argument
from hf_attn_plugins.plugins import PLUGINS, plugin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("model", nargs="?", default=DEMO, help="folder or hub id; only its config is read")
    parser.add_argument("--attn", default=None, help=f"one of {', '.join(PLUGINS)}; all of them by default")
    parser.add_argument("--length", type=int, help="tokens of a prompt: also say what will run for it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    add_trust_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the report; exit status 1 when a plugin is refused."""
    names = [plugin(arguments.attn).name] if arguments.attn else list(PLUGINS)
    if arguments.length is not None and arguments.length < 1:
        raise ValueError(f"--length {arguments.length}: at least 1 token is needed.")
    import dataclasses

    from hf_attn_plugins.hf.check import check
    from hf_attn_plugins.hf.inputs.load import model_without_weights, read_config, source_of

    source = source_of(arguments.model)
    config = read_config(source, revision=arguments.revision, trust_remote_code=arguments.trust_remote_code)
    model = model_without_weights(config, trust_remote_code=arguments.trust_remote_code, attn_implementation="eager")
    reports = [check(model, name, arguments.length) for name in names]
    if arguments.json:
        print(json.dumps([{**dataclasses.asdict(report), "ok": report.ok} for report in reports], indent=2))
    else:
        print("\n".join(str(report) for report in reports))
    return 0 if all(report.ok for report in reports) else 1
