"""`hf-attn look MODEL --text FILE`: how far heads look in a text, and where predictions change, as one offline page."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_attn_plugins.hf.inputs.arguments import add_model_arguments, attention, check_files, check_name, split_attn
from hf_attn_plugins.ui.progress import terminal

STAR = "star_attention"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_model_arguments(parser)
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text; Python's own language reference by default")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the text that are looked at")
    parser.add_argument(
        "--attn",
        default=STAR,
        metavar="LIST",
        help="plugins whose predictions are compared, with options: tiled_attention,star_attention:block_size=512,...; "
        "the first star_attention says what counts as hidden",
    )
    parser.add_argument("--baseline", help="what predictions are against; the model's default backend if not given")
    parser.add_argument("--out", default="look.html", metavar="FILE", help="the page")


def run(arguments: argparse.Namespace) -> None:
    """Check the options, load, look, and write the page."""
    out = Path(arguments.out)
    check_files(arguments.text, "--out", out)
    if arguments.length < 2:
        raise ValueError(f"--length {arguments.length}: at least 2 tokens are needed.")
    attentions = [attention(label) for label in split_attn(arguments.attn)]
    if arguments.baseline is not None:
        check_name(arguments.baseline)

    import torch

    from hf_attn_plugins.bench.hardware import describe
    from hf_attn_plugins.commands.look_page import changed, hidden, page
    from hf_attn_plugins.core.staging import put
    from hf_attn_plugins.hf.inputs.load import load_for, positions
    from hf_attn_plugins.hf.inputs.texts import text_tokens
    from hf_attn_plugins.hf.look.by_token import changes
    from hf_attn_plugins.hf.look.reach import reach
    from hf_attn_plugins.hf.models.evaluating import evaluating
    from hf_attn_plugins.hf.models.families import own_backend
    from hf_attn_plugins.hf.predictions import backbone
    from hf_attn_plugins.star.options import StarOptions

    model, tokenizer = load_for(arguments)
    ids = text_tokens(tokenizer, arguments.length, arguments.text, positions(model.config)).to(model.device)
    star = next((each.options for each in attentions if each.implementation == STAR), {})
    options = StarOptions(**star)
    steps = len(attentions) + 2
    with terminal() as progress, evaluating(model), torch.inference_mode():
        progress("how far heads look", 0, steps)
        base = backbone(model)
        heads = reach(model, lambda: base(ids, use_cache=False), options)
        done = iter(range(1, steps))
        found = changes(
            model,
            ids,
            arguments.baseline or own_backend(model),
            [(each.label, each.implementation, each.options) for each in attentions],
            lambda what: progress(what, next(done), steps),
        )
    tokens = [tokenizer.decode([token]) for token in ids[0].tolist()]
    machine = describe(model.device)
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "hf_attn_plugins"))
    facts = {"model": arguments.model, "dtype": arguments.dtype, "tokens": f"{len(tokens):,} tokens"}
    facts |= {"processor": str(machine["processor"]), "versions": versions}
    choices = {token: tokenizer.decode([token]) for each in found.values() for token in each.choices()}
    plan = options.plan_of(len(tokens))
    text = page(facts, tokens, heads, plan, found, choices)
    put(out, lambda path: path.write_text(text, encoding="utf-8"))
    print("\n".join([hidden(heads, plan), *(f"{label}: {changed(each)}" for label, each in found.items())]))
    print(f"written to {out}")
