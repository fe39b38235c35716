"""`hf-attn export-kernel DIR`: the exact kernels as a repository for the `kernels` package."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_attn_plugins.hub.repository import INTERFACES, export

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "tiled.json"  # in a checkout only


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("folder", type=Path, help="where to write; must not exist, or be empty")
    parser.add_argument("--name", default="hf-attn-plugins", help="the kernel's name: lower case, digits, dashes")
    parser.add_argument("--version", type=int, default=1, help="whole number; branch v<version> on the Hub")
    parser.add_argument(
        "--interface", default="forward", choices=list(INTERFACES),
        help="forward: Transformers' whole call, masks as for sdpa; varlen: flash-attention's functions",
    )  # fmt: skip
    parser.add_argument("--results", type=Path, help="a tiled.json of `hf-attn bench tiled` for the model card")


def run(arguments: argparse.Namespace) -> None:
    """Write the repository and say how to load it."""
    results = arguments.results or (RESULTS if RESULTS.is_file() else None)
    made = export(
        arguments.folder, name=arguments.name, version=arguments.version, interface=arguments.interface, results=results
    )
    for backend, identity in made.ids.items():
        print(f"build/torch-{backend}: {made.files[backend]} files, {identity}")
    where = arguments.folder.resolve()
    print(f'try it: LOCAL_KERNELS="OWNER/{arguments.name}={where}", attn_implementation="OWNER/{arguments.name}"')
