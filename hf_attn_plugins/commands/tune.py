"""`hf-attn tune MODEL`: the best sizes and dense heads of star for a model, a length and a target."""

from __future__ import annotations

import argparse

from hf_attn_plugins.hf.inputs.arguments import add_model_arguments, check_files, check_name
from hf_attn_plugins.ui.progress import terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_model_arguments(parser)
    parser.add_argument("--length", type=int, default=8192, help="tokens of the prompts to tune for")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--min-speedup", type=float, metavar="X", help="prefill at least X times as fast as --baseline")
    target.add_argument("--max-kl", type=float, metavar="NATS", help="mean KL over all positions of at most NATS")
    target.add_argument("--max-share", type=float, metavar="S", help="at most S of the causal pairs")
    parser.add_argument("--baseline", help="what speed and KL are against; the model's default backend if not given")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text; Python's own language reference by default")
    parser.add_argument("--texts", type=int, default=5, help="pieces of the text: 2 of 5 to search on, 3 to report")
    parser.add_argument("--no-heads", action="store_true", help="leave dense heads out")
    parser.add_argument("--exact-heads", action="store_true", help="check the order of heads: a forward for each")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds of timing")
    parser.add_argument("--out", metavar="FILE", help="write the report, for hf-attn patch set-attention --tuned FILE")


def run(arguments: argparse.Namespace) -> None:
    """Check the options, load, tune, print, and write the report."""
    out = arguments.out
    check_files(arguments.text, "--out", out)
    for name, least in (("length", 256), ("texts", 2), ("rounds", 1)):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name} {getattr(arguments, name)}: at least {least} is needed.")
    if arguments.baseline is not None:
        check_name(arguments.baseline)

    from hf_attn_plugins.hf.inputs.load import check_length, load_for, positions
    from hf_attn_plugins.hf.inputs.texts import read_text
    from hf_attn_plugins.hf.tune import USUAL, check_target, tune

    check_target(min_speedup=arguments.min_speedup, max_kl=arguments.max_kl, max_share=arguments.max_share)
    text = None if arguments.text is None else read_text(arguments.text)
    model, tokenizer = load_for(arguments)
    check_length(f"--length {arguments.length}", arguments.length, positions(model.config))
    with terminal() as progress:
        found = tune(
            model,
            length=arguments.length,
            min_speedup=arguments.min_speedup,
            max_kl=arguments.max_kl,
            max_share=arguments.max_share,
            text=text,
            tokenizer=tokenizer,
            texts=arguments.texts,
            baseline=arguments.baseline,
            heads=not arguments.no_heads,
            exact_heads=arguments.exact_heads,
            rounds=arguments.rounds,
            progress=lambda what, done: progress(what, done, max(USUAL, done + 4)),
        )
    print(found)
    if out is not None:
        found.save(out)
        print(f"written to {out}: hf-attn patch set-attention FOLDER --tuned {out}")
