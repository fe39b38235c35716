"""`hf-attn bench indexed`: the speed of indexed attention and of the direct form, printed and written."""

from __future__ import annotations

import argparse
import json
from typing import Any

from hf_attn_plugins.commands.bench.arguments import INDEXED_PARTS as PARTS
from hf_attn_plugins.commands.bench.indexed import demo
from hf_attn_plugins.commands.bench.indexed import timing as bench
from hf_attn_plugins.indexed.plan import CallSizes


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the tables, and write them when `--output` is given.

    Raises:
        ValueError: a size or the repeats are below 1, the file is no text, or the text has too few words.
        FileNotFoundError: the text or the output folder does not exist.
    """
    if arguments.repeats < 1 or arguments.steps < 0:
        raise ValueError(
            f"--repeats {arguments.repeats} --steps {arguments.steps}: at least 1 and at least 0 are needed."
        )
    if arguments.output is not None and not arguments.output.is_dir():
        raise FileNotFoundError(f"--output {arguments.output}: no such folder, create it first.")
    parts = [arguments.only] if arguments.only else list(PARTS)
    sizes = CallSizes(arguments.words, arguments.length, arguments.characters, arguments.width)
    found: dict[str, Any] = {"machine": bench.machine(), "repeats": dict.fromkeys(parts, arguments.repeats)}
    if "stages" in parts:
        timings = bench.time_stages(sizes, arguments.repeats)
        found["sizes"] = {name: getattr(sizes, name) for name in ("words", "length", "characters", "width")}
        found["stages"] = [{**vars(timing), "ratio": timing.ratio} for timing in timings]
    if "scaling" in parts:
        found["scaling"] = bench.time_scaling(sizes, arguments.repeats)
    if "text" in parts:
        text, name = demo.read_text(arguments.text)
        settings = demo.Settings(steps=arguments.steps, repeats=arguments.repeats)
        found["text"] = {"name": name, **demo.run(text, arguments.query, settings)}
    if arguments.output is not None and (arguments.output / "indexed.json").is_file():
        # Parts that this run did not measure are kept, if they come from the same machine and versions.
        earlier = json.loads((arguments.output / "indexed.json").read_text(encoding="utf-8"))
        if earlier["machine"] == found["machine"]:
            found = {**earlier, **found, "repeats": {**earlier["repeats"], **found["repeats"]}}
    report = render(found)
    print(report)
    if arguments.output is not None:
        (arguments.output / "indexed.md").write_text(report + "\n", encoding="utf-8")
        (arguments.output / "indexed.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def render(found: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    on = found["machine"]
    turns = ", ".join(f"{part}: {repeats} turns" for part, repeats in found["repeats"].items())
    lines = [
        "# Indexed attention against the direct form",
        "",
        f"{on['processor']}, {on['cores']} cores, {on['threads']} threads; torch {on['torch']}, Python {on['python']}; "
        f"float32. Medians; both forms run in turns in one process ({turns}). Read the ratios, not the seconds.",
    ]
    if "stages" in found:
        lines += ["", *_stages(found)]
    if "scaling" in found:
        lines += ["", *_scaling(found["scaling"])]
    if "text" in found:
        lines += ["", *_text(found["text"])]
    return "\n".join(lines)


def _stages(found: dict[str, Any]) -> list[str]:
    sizes = found["sizes"]
    return [
        f"## Stages: {sizes['words']} words x {sizes['length']} characters out of {sizes['characters']}, "
        f"d = {sizes['width']}, one head",
        "",
        "Tables are built in every call unless the row says otherwise. The rows Q K^T and whole include the "
        "projections, on both sides.",
        "",
        "| stage | direct, ms | tables, ms | ratio | of one turn | largest difference |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['name']} | {1e3 * row['direct']:.2f} | {1e3 * row['tables']:.2f} | {row['ratio']:.1f}x "
            f"| {row.get('spread', '')} | {row['error']:.1e} |"
            for row in found["stages"]
        ),
    ]


def _scaling(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Scaling: one size varied at a time, the whole with V never built",
        "",
        'Below 1 the direct form is faster. The forecast is that of `indexed.plan`, by which `form="auto"` decides.',
        "",
        "| varied | value | direct, ms | tables, ms | ratio | of one turn | forecast | frozen, ms | ratio "
        "| of one turn | forecast |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        direct, tables, frozen = (1e3 * row[name] for name in ("direct", "tables", "frozen"))
        lines.append(
            f"| {row['varied']} | {row['value']} | {direct:.2f} | {tables:.2f} | {direct / tables:.2f}x "
            f"| {row.get('spread', '')} | {row['forecast']:.2f}x | {frozen:.2f} | {direct / frozen:.2f}x "
            f"| {row.get('spread_frozen', '')} | {row['forecast_frozen']:.2f}x |"
        )
    return lines


def _text(found: dict[str, Any]) -> list[str]:
    words, lines = found["distinct"], []
    before, after = found["accuracy_before"], found["accuracy_after"]
    for name in ("tables", "frozen"):
        fast, slow = found[f"{name}_seconds"], found[f"direct_seconds_beside_{name}"]
        turns = found.get(f"spread_{name}", "")
        lines.append(f"| {name} | {words / slow:,.0f} | {words / fast:,.0f} | {slow / fast:.1f}x | {turns} |")
    return [
        f"## A real text: {found['name']}",
        "",
        f"{found['words']:,} words, {words:,} distinct ones of three characters or more (lower case), "
        f"{found['characters']} characters, {found['length']} positions, d = {found['width']}, {found['heads']} heads, "
        f"concatenated. Largest difference between the forms: {found['error']:.1e}.",
        "",
        "| every distinct word once | direct, words/s | words/s | ratio | of one turn |",
        "|---|---|---|---|---|",
        *lines,
        "",
        f"{found['steps']} training steps through the tables ({found['train_seconds']:.1f} s) move the vector of a "
        f"misspelt word towards that of the word meant. {found['held_out']} words that training never saw are misspelt "
        f"at random. The nearest of all {words:,} words is the right one for {before:.1%} of them before training and "
        f"for {after:.1%} after it.",
        "",
        "| query | cosine neighbours |",
        "|---|---|",
        *(
            f"| {query} | {', '.join(f'{word} {score:.2f}' for word, score in near)} |"
            for query, near in found["neighbours"].items()
        ),
    ]
