"""The page that `hf-attn bench star` writes from its measurements."""

from __future__ import annotations

import statistics
from typing import Any

from hf_attn_plugins.bench.timing import markdown_table
from hf_attn_plugins.star.plan import Plan

TEXTS, SCORED = 2, 128  # texts a row of agreement is measured on, and their last tokens that are compared

INTRODUCTION = """What Star Attention costs and saves on a real model with real prose. Rows are block, anchor and
query sizes in tokens; `default` is what `star_attention` does when no size is given, `1024, 0, 128` has no anchor."""

AGREEMENT = """`KL` (nats, mean), `top-1` and `perplexity` (a ratio) compare the last {scored} tokens of {texts} texts
of {length} tokens with SDPA in the same dtype. `NLL` is the mean negative log-likelihood of a five-digit number hidden
in the prose, over {depths} depths; `exact` counts the prompts where greedy decoding gives it. `dense` is
`tiled_attention`."""

SPEED = """Ratios are medians over {rounds} round(s) of (seconds of the other / seconds of this row) within a round;
above 1 is faster. `peak` is the peak memory above the loaded model, as a share of that of `tiled_attention`."""

CALLS = """One causal attention call, 9 query and 3 key heads of 64, bfloat16, block 1024, query 128. `attended` is the
share of the causal pairs, `time` that of the time of `tiled_attention`, and `factor` is time / attended."""


def report(done: dict[str, Any]) -> str:
    """Markdown of everything measured so far."""
    facts = done["hardware"]
    page = [
        f"# Star Attention on {done['model']}",
        "",
        f"{facts['processor']}, {facts['threads']} threads; Python {facts['python']}, torch {facts['torch']}, "
        f"transformers {facts['transformers']}; {done['dtype']}. Written by `hf-attn bench star`.",
        "",
        INTRODUCTION,
    ]
    for before in done.get("earlier", []):
        page[-1] += (
            f"\nRows that stood here already were measured with torch {before['torch']} and transformers "
            f"{before['transformers']} on {before['processor']}."
        )
    for title, rows, notes in (
        ("Agreement with dense attention", _agreement(done), AGREEMENT),
        ("Prefill of a whole model", _speed(done), SPEED),
        ("One attention call", _calls(done), CALLS),
    ):
        if rows:
            page += ["", f"## {title}", "", *markdown_table(rows), "", notes.format(**_counts(done))]
    return "\n".join(page) + "\n"


def _counts(done: dict[str, Any]) -> dict[str, int]:
    depths = [len(scores) for lengths in done["passkey"].values() for scores in lengths.values()]
    rounds = [len(rows) for rows in done["speed"].values()]
    length = done.get("agreement_length", 0)
    return {
        "scored": SCORED,
        "texts": TEXTS,
        "length": length,
        "depths": max(depths, default=0),
        "rounds": max(rounds, default=0),
    }


def _agreement(done: dict[str, Any]) -> list[dict[str, Any]]:
    lengths = sorted({int(length) for scores in done["passkey"].values() for length in scores})
    rows = []
    for name in {**done["passkey"], **done["agreement"]}:
        row: dict[str, Any] = {"block, anchor, query": name.replace(",", ", ")}
        agreement = done["agreement"].get(name, {})
        for column, field in (("KL", "kl"), ("top-1", "top1"), ("perplexity", "perplexity_ratio")):
            row[column] = f"{agreement[field]:.4f}" if field in agreement else ""
        for length in lengths:
            scores = done["passkey"].get(name, {}).get(str(length), [])
            row[f"NLL at {length}"] = f"{statistics.mean(one['nll'] for one in scores):.3f}" if scores else ""
            row[f"exact at {length}"] = f"{sum(one['exact'] for one in scores)}/{len(scores)}" if scores else ""
        rows.append(row)
    return rows


def _speed(done: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for length, rounds in sorted(done["speed"].items(), key=lambda item: int(item[0])):
        for name in rounds[0]:
            if name == "sdpa":
                continue
            peaks = [
                one[name]["peak"] / one["tiled"]["peak"] for one in rounds if one[name]["peak"] and one["tiled"]["peak"]
            ]
            row = {
                "tokens": length,
                "block, anchor, query": "tiled_attention" if name == "tiled" else name.replace(",", ", "),
            }
            for other in ("sdpa", "tiled"):
                ratio = statistics.median(one[other]["seconds"] / one[name]["seconds"] for one in rounds)
                row[f"against {other}"] = f"{ratio:.2f}x"
            rows.append({**row, "peak": f"{statistics.median(peaks):.2f}" if peaks else ""})
    return rows


def _calls(done: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for length, rounds in sorted(done["calls"].items(), key=lambda item: int(item[0])):
        for anchor in (name for name in rounds[0] if name != "tiled"):
            plan = Plan(int(length), 1024, int(anchor), 128)
            attended = plan.attended_pairs() / plan.causal_pairs()
            time = statistics.median(one[anchor] / one["tiled"] for one in rounds)
            rows.append(
                {"tokens": length, "anchor": anchor, "attended": attended, "time": time, "factor": time / attended}
            )
    return rows
