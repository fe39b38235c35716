"""The table and the chart of `hf-attn bench front`, from what it measured."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

COLOURS = {
    "dense": "#444444",
    "default": "#111111",
    "paper's star": "#c0504d",
    "near tokens": "#3b6fb6",
    "dense heads": "#5fa08f",
    "tuned": "#8064a2",
    "windows": "#b0b0b0",
}
HEADER = (
    "| {length} tokens | speed | pairs | KL | KL, last 128 | perplexity | passkey NLL | found | needles NLL | found |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def report(done: dict[str, Any], folder: Path) -> Path:
    """Write front.md and, where there is something to show and matplotlib is installed, front.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    other = done.get("elsewhere", {})
    lines = [
        "# Accuracy against speed: star's plans and what a user might take instead",
        "",
        f"`hf-attn bench front`: {done['model']} in {done['dtype']}. {described(done['hardware'])}.",
        *(f"Accuracy, in part or whole, on {machine}: {', '.join(parts)}." for machine, parts in other.items()),
        "",
        "Speed: sdpa's seconds for a prefill over the row's, medians over rounds in which all rows run one after "
        "another in an order drawn anew (from the row's longest time to its shortest). Pairs: attended over causal "
        "ones. KL: nats against sdpa, mean over 2048 positions spread evenly over each text (smallest to largest "
        "text). Perplexity: ratio to sdpa's, at the same positions. NLL: mean negative log-likelihood of an answer's "
        "tokens; in brackets what it adds to sdpa's, with the standard error of the paired difference. Found: answers "
        "all of whose tokens are the first choice. Passkeys: five numbers in a document, each asked for by itself over "
        "one prefill. Needles: RULER's niah_multikey_2 and vt in turns. Heads and tuned options were chosen on other "
        "texts.",
        "",
    ]
    for length, rows in done["rows"].items():
        lines += table(done, length, rows)
    path = folder / "front.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    chart(done, folder / "front.svg")
    return path


def described(hardware: dict[str, Any]) -> str:
    """Hardware and versions in one line."""
    return ", ".join(f"{name} {value}" for name, value in hardware.items())


def table(done: dict[str, Any], length: str, rows: list[dict[str, Any]]) -> list[str]:
    """The lines of one length; a cell without a measurement is empty."""
    lines = [HEADER[0].format(length=length), HEADER[1]]
    names = [row["name"] for row in rows]
    for name in ["sdpa", *names]:
        cells = [name, speed(done, length, name), *agreement(done, length, name)]
        for part in ("passkeys", "needles"):
            asked = answers(done, part, length, name)
            found = f"{sum(each['exact'] for each in asked)}/{len(asked)}" if asked else ""
            cells += [likelihood(asked, [] if name == "sdpa" else answers(done, part, length, "sdpa")), found]
        lines.append("| " + " | ".join(cells) + " |")
    counts = {"texts": len(done["agreement"].get(length, {}).get(names[0], []))}
    counts |= {part: len(answers(done, part, length, "sdpa")) for part in ("passkeys", "needles")}
    counts["rounds"] = len(done["speed"].get(length, {}).get("sdpa", []))
    said = ", ".join(f"{count} {part}" for part, count in counts.items())
    lines += ["", f"{length} tokens: {said}.", ""]
    for target, tuned in sorted(done["tuned"].get(length, {}).items()):
        lines += [f"Tuned for {target}x: {_found(tuned)}", ""]
    return lines


def _found(tuned: dict[str, Any]) -> str:
    """What `hap.tune` said, on its own texts."""
    if "refused" in tuned:
        return f"refused: {tuned['refused']}"
    options = {name: value for name, value in tuned["options"].items() if name != "dense_heads"}
    heads = sum(map(len, tuned["options"].get("dense_heads") or ()))
    kl = ", ".join(f"{each:.4f}" for each in tuned["kl"])
    return f"{options}, {heads} dense heads; KL {kl} on texts that its search did not see."


def answers(done: dict[str, Any], part: str, length: str, name: str) -> list[dict[str, Any]]:
    """What a row's answers were like, those of all documents in one list; empty while it was asked less than sdpa."""
    held = done[part].get(length, {})
    documents = held.get(name, [])
    return [each for document in documents for each in document] if len(documents) >= len(held.get("sdpa", [])) else []


def likelihood(asked: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    """The mean of a row's answers, and what it adds to that of the same answers of `base`, with the standard error."""
    if not asked:
        return ""
    mean = f"{statistics.fmean(each['nll'] for each in asked):.3f}"
    more = [mine["nll"] - theirs["nll"] for mine, theirs in zip(asked, base, strict=False)]
    if len(more) < 2:
        return mean
    return f"{mean} ({statistics.fmean(more):+.3f} ± {statistics.stdev(more) / math.sqrt(len(more)):.3f})"


def speeds(done: dict[str, Any], length: str, name: str) -> list[float]:
    """The median of sdpa's seconds over the row's median, its longest and its shortest time; empty without timing."""
    held = done["speed"].get(length, {})
    base, own = held.get("sdpa", []), held.get(name, [])
    if not own:
        return []
    return [statistics.median(base) / seconds for seconds in (statistics.median(own), max(own), min(own))]


def speed(done: dict[str, Any], length: str, name: str) -> str:
    found = speeds(done, length, name)
    return "{:.2f} ({:.2f} - {:.2f})".format(*found) if found else ""


def agreement(done: dict[str, Any], length: str, name: str) -> list[str]:
    found = done["agreement"].get(length, {}).get(name, [])
    if not found:
        return ["1.000", "", "", ""] if name == "sdpa" else [""] * 4
    kl = [each["kl"] for each in found]
    means = {key: statistics.fmean(each[key] for each in found) for key in ("share", "kl_tail", "ppl_ratio")}
    return [
        f"{means['share']:.3f}",
        f"{statistics.fmean(kl):.4f} ({min(kl):.4f} - {max(kl):.4f})",
        f"{means['kl_tail']:.4f}",
        f"{means['ppl_ratio']:.3f}",
    ]


def chart(done: dict[str, Any], path: Path) -> None:
    """KL against speed, a panel for each length: the lower right corner wins."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return
    lengths = [length for length in done["rows"] if done["speed"].get(length) and done["agreement"].get(length)]
    if not lengths:
        return
    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "front"}):
        figure = Figure(figsize=(5.2 * len(lengths), 4.2))
        for axes, length in zip(figure.subplots(1, len(lengths), squeeze=False)[0], lengths, strict=True):
            for kind, colour in COLOURS.items():
                points = [
                    (speeds(done, length, row["name"])[0], _kl(done, length, row["name"]))
                    for row in done["rows"][length]
                    if row["kind"] == kind and speeds(done, length, row["name"])
                ]
                points = [(x, y) for x, y in sorted(points) if y is not None]
                line = "-" if kind in ("near tokens", "paper's star", "dense heads", "tuned") else "none"
                if points:
                    axes.plot(*zip(*points, strict=True), linestyle=line, marker="o", color=colour, label=kind)
            axes.set(yscale="log", xlabel="prefill, times as fast as sdpa", title=f"{length} tokens")
            axes.set_ylabel("KL to dense, nats a position (lower is better)")
            axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})


def _kl(done: dict[str, Any], length: str, name: str) -> float | None:
    found = done["agreement"].get(length, {}).get(name, [])
    return statistics.fmean(each["kl"] for each in found) if found else None
