"""`hf-attn check MODEL --attn NAME`: every attention module honoured, passed through or refused, and why."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from hf_attn_plugins.hf.check import check
from hf_attn_plugins.hf.inputs.load import DEMO, add_trust_argument, demo_folder, model_without_weights, read_config
from hf_attn_plugins.plugins import PLUGINS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("model", nargs="?", default=DEMO, help="folder or hub id; only its config is read")
    parser.add_argument("--attn", default=None, help=f"one of {', '.join(PLUGINS)}; all of them by default")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    add_trust_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the report; exit status 1 when a plugin is refused."""
    source = demo_folder() if arguments.model == DEMO else arguments.model
    try:
        config = read_config(source, revision=arguments.revision, trust_remote_code=arguments.trust_remote_code)
    except (OSError, ValueError) as error:
        if "--trust-remote-code" in str(error):
            raise
        where = "" if Path(str(source)).exists() else " (no such folder, and not in the local cache)"
        raise ValueError(
            f"cannot read the config of {arguments.model!r}{where}: {str(error).splitlines()[0]}"
        ) from error
    model = model_without_weights(config, trust_remote_code=arguments.trust_remote_code, attn_implementation="eager")
    reports = [check(model, name) for name in ([arguments.attn] if arguments.attn else PLUGINS)]
    if arguments.json:
        print(json.dumps([{**dataclasses.asdict(report), "ok": report.ok} for report in reports], indent=2))
    else:
        print("\n".join(str(report) for report in reports))
    return 0 if all(report.ok for report in reports) else 1
