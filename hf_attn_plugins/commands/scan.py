"""`hf-attn scan`: every family of Transformers, tiny and random, under every plugin against its default backend."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

from hf_attn_plugins.plugins import PLUGINS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="model types, such as llama; all by default")
    parser.add_argument("--page", type=Path, help="write the results as Markdown to this file")
    parser.add_argument("--json", type=Path, help="write the results as JSON to this file, family by family; one that "
                        "exists is gone on with")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="scan what the JSON file holds already, too")
    parser.add_argument("--compiled", nargs="*", choices=list(PLUGINS), default=[], metavar="PLUGIN",
                        help="plugins to compare under torch.compile as well")  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, help="families at a time, one core each (default 1)")
    parser.add_argument("--seconds", type=int, default=120, help="limit of one family (default 120)")
    parser.add_argument("--gigabytes", type=int, default=6, help="address space of one family (default 6)")


def run(arguments: argparse.Namespace) -> int:
    """Scan, write, and print the failures; exit status 1 when there are any."""
    from hf_attn_plugins.hf.scan import pool, report
    from hf_attn_plugins.hf.scan.families import families
    from hf_attn_plugins.hf.scan.trial import trial

    for name in ("workers", "seconds", "gigabytes"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)}: a whole number of at least 1 is needed.")
    known = {family.name: family for family in families()}
    unknown = sorted(set(arguments.families) - set(known))
    if unknown:
        raise ValueError(f"no model type of this Transformers: {', '.join(unknown)}.")
    chosen = [known[name] for name in arguments.families] or list(known.values())
    results: pool.Results = pool.load(arguments.json) if arguments.json else {}
    if arguments.again:
        for family in chosen:
            results.pop(family.name, None)

    def save(found: pool.Results) -> None:
        report.write(found, None, arguments.json)

    def say(result: dict[str, Any]) -> None:
        words = [f"{name.split('_')[0]}: {report.verdict_of(result, name)}" for name in PLUGINS]
        done = f"{len(results)}/{len(known)}"
        print(f"{done:>8}  {result['name']:<28} {', '.join(words)}  {result.get('why', '')[:90]}", file=sys.stderr)

    pool.scan(
        chosen,
        functools.partial(trial, compiled=tuple(arguments.compiled)),
        workers=arguments.workers,
        seconds=arguments.seconds,
        gigabytes=arguments.gigabytes,
        results=results,
        save=save,
        say=say,
    )
    report.write(results, arguments.page, arguments.json)
    built = sum(result["built"] for result in results.values())
    failed = report.failures(results)
    for model_type, name, verdict, why in failed:
        print(f"{verdict}: {model_type} under {name}: {why}")
    print(f"{len(results)} model types, {built} built, {len(failed)} failures.")
    return 1 if failed else 0
