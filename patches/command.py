"""`hf-attn patch`: change a checkpoint by a recipe, list the recipes, show what was done, take it back."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
from pathlib import Path
from types import ModuleType

from hf_attn_plugins.patches.recipes import RECIPES

from hf_attn_plugins.checkpoint.source import CONFIG, Source, as_json, open_source
from hf_attn_plugins.checkpoint.write import (
    Patch,
    interrupted,
    patches_of,
    refuse_in_place,
    undo,
    write_copy,
    write_in_place,
)
from hf_attn_plugins.hf.inputs.arguments import DEMO
from hf_attn_plugins.ui.suggest import did_you_mean, nearest


def recipe(name: str) -> ModuleType:
    """The module of a recipe."""
    return importlib.import_module(f"hf_attn_plugins.patches.{RECIPES[name]}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --undo and one sub-command a recipe, beside `list` and `show`."""
    parser.add_argument("--undo", type=Path, metavar="DIR", help="take back the last patch of a folder, bit for bit")
    commands = parser.add_subparsers(dest="recipe", metavar="RECIPE | list | show")
    commands.add_parser("list", help="the recipes")
    show = commands.add_parser("show", help="what has been done to a checkpoint")
    show.add_argument("folder", type=Path, metavar="DIR")
    for name in RECIPES:
        module = recipe(name)
        own = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        own.add_argument("source", metavar="SRC", help=f"a checkpoint folder, a hub id in the local cache, or {DEMO}")
        own.add_argument("destination", type=Path, nargs="?", metavar="DST", help="a new folder")
        own.add_argument(
            "--in-place", action="store_true", help="change SRC itself; what is replaced is kept for --undo"
        )
        own.add_argument("--dry-run", action="store_true", help="show what would change, write nothing")
        own.add_argument(
            "--hard-link",
            action="store_true",
            help="share unchanged files with SRC instead of copying: saving over DST later would change SRC too",
        )
        module.add_arguments(own)


def run(arguments: argparse.Namespace) -> None:
    """Do what was asked and say what was done.

    Raises:
        ValueError, FileNotFoundError, OSError: bad input, or a write that failed; source and destination are then as
            they were.
    """
    if arguments.undo is not None:
        if arguments.recipe is not None:
            raise ValueError("--undo DIR stands alone: name no recipe beside it.")
        entry = undo(arguments.undo)
        print(f"{arguments.undo}: {entry['recipe']} of {entry['time']} undone, every file is as it was.")
    elif arguments.recipe is None:
        raise ValueError(f"name a recipe ({', '.join(RECIPES)}), list, show DIR, or --undo DIR.")
    elif arguments.recipe == "list":
        for name in RECIPES:
            print(f"{name:<15} {recipe(name).SUMMARY}")
    elif arguments.recipe == "show":
        _show(arguments.folder)
    else:
        _patch(arguments)


def _patch(arguments: argparse.Namespace) -> None:
    if arguments.in_place == (arguments.destination is not None) and not arguments.dry_run:
        raise ValueError("give either a new folder DST or --in-place.")
    if arguments.source == DEMO:
        from hf_attn_plugins.hf.inputs.load import demo_folder

        if arguments.in_place:
            raise ValueError(f"{DEMO} is the copy that all commands share: write to a new folder DST.")
        arguments.source = str(demo_folder())
    source = _opened(arguments.source)
    if arguments.in_place:
        refuse_in_place(source)
        if not arguments.dry_run and interrupted(source.folder):
            entry = undo(source.folder)
            print(f"{source.folder}: {entry['recipe']} of {entry['time']} had been interrupted and was taken back.")
            source = open_source(arguments.source)
    patch: Patch = recipe(arguments.recipe).plan(source, arguments)
    for note in patch.notes:
        print(note)
    if arguments.dry_run:
        print(_diff(source, patch))
    elif arguments.in_place:
        write_in_place(source, patch)
        print(f"{source.folder}: patched in place; `hf-attn patch --undo {source.folder}` restores it.")
    else:
        write_copy(source, arguments.destination, patch, hard_link=arguments.hard_link)
        print(f"{arguments.destination}: written; {source.folder} is untouched.")


def _opened(given: str) -> Source:
    try:
        return open_source(given)
    except FileNotFoundError as error:
        if nearest(str(given), [DEMO]) is None or Path(given).exists():
            raise
        raise FileNotFoundError(f"{str(error).rstrip('.')}{did_you_mean(str(given), [DEMO])}.") from error


def _diff(source: Source, patch: Patch) -> str:
    before = (source.folder / CONFIG).read_text(encoding="utf-8").splitlines()
    after = as_json(patch.config).decode().splitlines()
    lines = list(difflib.unified_diff(before, after, f"a/{CONFIG}", f"b/{CONFIG}", lineterm=""))
    lines += [f"+++ b/{name}: new, {size / 1e6:.1f} MB" for name, (_, size) in patch.extra.items()]
    for name, content in patch.rewritten.items():
        old = (source.folder / name).read_text(encoding="utf-8") if name in source.files else ""
        new = content.decode("utf-8").splitlines()
        lines += difflib.unified_diff(old.splitlines(), new, f"a/{name}", f"b/{name}", lineterm="")
    return "\n".join([*lines, "dry run: nothing was written."])


def _show(folder: Path) -> None:
    entries = patches_of(folder)
    if not entries:
        print(f"{folder}: never patched by hf-attn.")
    for entry in entries:
        print(f"{entry['number']}. {entry['recipe']} {json.dumps(entry.get('options'))}")
        print(f"   {entry['time']}, transformers {entry['transformers']}, torch {entry['torch']}")
        for name, file in entry["files"].items():
            print(f"   {name}: {'added' if file['before'] is None else 'changed, the original is kept'}")
    if entries and interrupted(folder):
        print(f"   interrupted before its end: `hf-attn patch --undo {folder}` takes it back.")
