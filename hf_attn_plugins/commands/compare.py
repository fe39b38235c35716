"""`hf-attn compare MODEL`: the same real tokens through plugins and through another backend."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hf_attn_plugins.hf.inputs.arguments import (
    Attention,
    add_model_arguments,
    attention,
    check_files,
    check_name,
    split_attn,
    with_options,
)
from hf_attn_plugins.ui.progress import terminal

LIMITS = ("max_kl", "min_top1", "max_perplexity")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_model_arguments(parser)
    parser.add_argument(
        "--attn",
        default="tiled_attention",
        metavar="LIST",
        help="plugins (see hf-attn list), with their options: tiled_attention,star_attention:block_size=512,...",
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the one plugin in --attn"
    )
    parser.add_argument(
        "--baseline",
        default=None,
        help="the backend to compare with; the model's own default (sdpa or eager) if not given",
    )
    parser.add_argument("--length", default="4096", metavar="LIST", help="tokens of the text: 4096, or 1024,2048,...")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text; Python's own language reference by default")
    parser.add_argument(
        "--max-positions", type=int, metavar="N", help="the longest text that the model can take, against its config"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed prefills of each backend, interleaved")
    gate = parser.add_argument_group("limits", "exit status 1 where a plugin breaks one, for scripts and CI")
    gate.add_argument("--max-kl", type=float, metavar="NATS", help="mean KL of the predictions, such as 0.01")
    gate.add_argument("--min-top1", type=float, metavar="SHARE", help="same first choice, such as 0.95 of positions")
    gate.add_argument("--max-perplexity", type=float, metavar="RATIO", help="perplexity over the baseline's, as 1.02")
    parser.add_argument("--json", metavar="FILE", help="write everything to FILE as well ('-' prints it instead)")


def run(arguments: argparse.Namespace) -> int:
    """Check the options, load, compare, print; exit status 1 where a limit is broken."""
    lengths, target = _lengths(arguments.length), arguments.json
    if arguments.repeats < 1:
        raise ValueError(f"--repeats {arguments.repeats}: at least 1 is needed.")
    check_files(arguments.text, "--json", None if target == "-" else target)
    limits = {name: getattr(arguments, name) for name in LIMITS if getattr(arguments, name) is not None}
    attentions = _attentions(arguments)

    from hf_attn_plugins.bench.hardware import describe
    from hf_attn_plugins.hf.agreement import check_limits
    from hf_attn_plugins.hf.compare import compare_all
    from hf_attn_plugins.hf.inputs.load import load_for, positions
    from hf_attn_plugins.hf.inputs.texts import text_tokens

    if limits:
        check_limits(**limits)
    model, tokenizer = load_for(arguments)
    limit = arguments.max_positions or positions(model.config)
    ids = text_tokens(tokenizer, max(lengths), arguments.text, limit).to(model.device)
    named = [(each.implementation, each.options) for each in attentions]
    with terminal() as progress:
        report = compare_all(
            model,
            ids,
            named,
            lengths=lengths,
            baseline=arguments.baseline,
            repeats=arguments.repeats,
            progress=progress,
        )
    found: Any = report[0] if len(report) == 1 else report
    record = {"model": arguments.model, "dtype": arguments.dtype, **describe(model.device), **found.as_dict()}
    if target == "-":
        print(json.dumps(record, indent=2))
    else:
        text = arguments.text or "the Python language reference"
        print(f"{arguments.model}, {text}\n{found}\n{_machine(describe())}")
    if target not in (None, "-"):
        Path(target).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"written to {target}")
    faults = report.faults(**limits) if limits else []
    for fault in faults:
        print(f"hf-attn compare: {fault}.", file=sys.stderr)
    return 1 if faults else 0


def _attentions(arguments: argparse.Namespace) -> list[Attention]:
    """What --attn and --option name, and --baseline, checked before a model is loaded."""
    attentions = with_options([attention(word) for word in split_attn(arguments.attn)], arguments.option)
    if not attentions:
        raise ValueError("--attn is empty: name at least one, such as tiled_attention.")
    if arguments.baseline is not None:
        check_name(arguments.baseline)
    return attentions


def _lengths(text: str) -> list[int]:
    found = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        if not word.isdecimal():
            raise ValueError(f"--length {text}: whole numbers are needed, such as 4096 or 1024,2048.")
        if int(word) < 2:
            raise ValueError(f"--length {word}: at least 2 tokens are needed to compare predictions.")
        found.append(int(word))
    if not found:
        raise ValueError("--length is empty: give at least one, such as 4096.")
    return sorted(set(found))


def _machine(facts: dict[str, Any]) -> str:
    machine = f"{facts['processor']}, {facts['threads']} thread{'s' * (facts['threads'] != 1)}"
    return f"{machine}, torch {facts['torch']}, transformers {facts['transformers']}"
