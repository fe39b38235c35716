"""`hf-attn deactivate`: take back what `hf-attn activate` has written."""

from __future__ import annotations

import argparse

from hf_attn_plugins.commands.activate import site_packages, written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options: the environment is that of the Python that runs this."""


def run(arguments: argparse.Namespace) -> None:
    """Remove the files, the .pth first: without its module it would be an error at every start."""
    found = written()
    for path in found:
        path.unlink()
    print("\n".join(f"removed: {path}" for path in found) or f"nothing is activated in {site_packages()}.")
