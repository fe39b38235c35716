"""docs/compatibility.md and its JSON from the results of a scan."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from hf_attn_plugins.hf.scan.families import KINDS
from hf_attn_plugins.hf.scan.pool import Results
from hf_attn_plugins.hf.scan.trial import OPTIONS

FAILURES = ("WRONG", "RAISED")
WORDS = {
    "exact": "every step that the default backend can run gives its numbers, within float32 rounding",
    "star used": "Star Attention took effect; it never looks ahead, and padding of a neighbour changes nothing",
    "dense": "causal, and Star Attention gave the numbers of full attention",
    "as eager": "Transformers' own backends disagree, and the plugin gives the numbers of `eager`",
    "passed through": "not causal: the exact tiled path ran, and its numbers are the default's",
    "never called": "check found modules that the plugin reaches, and this class's forward calls none of them",
    "refused": "`hap.check` says no, and why",
    "not run": "built, but the scan found no inputs that the default backend runs on",
    "not built": "no tiny model: a package is missing, or the shrinker cannot make its config consistent",
    "WRONG": "**a failure**: `hap.check` said yes and the numbers differ",
    "RAISED": "**a failure**: `hap.check` said yes and the call raises",
}


def versions() -> dict[str, str]:
    """What the results depend on."""
    import importlib.metadata

    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf-attn-plugins": importlib.metadata.version("hf-attn-plugins"),
    }


def verdict_of(result: dict[str, Any], name: str) -> str:
    """The word of `WORDS` for one family under one plugin."""
    return result["plugins"].get(name, {}).get("verdict", "not run") if result["built"] else "not built"


def failures(results: Results) -> list[tuple[str, str, str, str]]:
    """(family, plugin, WRONG or RAISED, why) of every failure."""
    return [
        (family, name, found["verdict"], found["why"])
        for family, result in sorted(results.items())
        for name, found in result["plugins"].items()
        if found["verdict"] in FAILURES
    ]


def to_json(results: Results, versions_of: dict[str, str]) -> str:
    """The results as the text of benchmarks/results/compatibility.json, one line a family."""
    lines = [f"  {json.dumps(name)}: {json.dumps(result, sort_keys=True)}" for name, result in sorted(results.items())]
    head = json.dumps({"versions": versions_of, "options": OPTIONS}, sort_keys=True)
    return head[:-1] + ', "families": {\n' + ",\n".join(lines) + "\n}}\n"


def to_markdown(results: Results, versions_of: dict[str, str]) -> str:
    """The results as the text of docs/compatibility.md."""
    built = sum(result["built"] for result in results.values())
    ran = sum(bool(result.get("inputs")) for result in results.values())
    lines = [
        "# Compatibility with the families of Transformers",
        "",
        "`make compatibility` (`hf-attn scan`) writes this page. It builds a tiny random model of every model type that"
        " "
        "Transformers' auto classes know, runs it with its default backend and then under each plugin, and compares: "
        "the outputs, the outputs with padding, greedy generation through a cache, the gradient of every weight"
        + (", and the graph of `torch.compile`." if _compiled(results) else "."),
        "",
        f"Versions: {', '.join(f'{name} {version}' for name, version in versions_of.items())}; CPU, float32.",
        "",
        f"{len(results)} model types; {built} built; {ran} run with their default backend.",
        "",
        f"| verdict | {' | '.join(f'`{name}`' for name in OPTIONS)} | meaning |",
        f"|---|{'---:|' * len(OPTIONS)}---|",
    ]
    counts = {name: Counter(verdict_of(result, name) for result in results.values()) for name in OPTIONS}
    for word, meaning in WORDS.items():
        lines.append(f"| {word} | {' | '.join(str(counts[name][word]) for name in OPTIONS)} | {meaning} |")
    failed = failures(results)
    lines += ["", "## Failures", "", "" if failed else "None."]
    lines += [f"- `{family}` under `{name}`: {verdict}, {_cell(why)}" for family, name, verdict, why in failed]
    for kind in KINDS:
        rows = [result for _, result in sorted(results.items()) if result["kind"] == kind and result["built"]]
        if rows:
            lines += ["", f"## {kind.capitalize()} ({len(rows)})", ""]
            lines += [f"| model type | class | {' | '.join(f'`{name}`' for name in OPTIONS)} | remarks |"]
            lines += [f"|---|---|{'---|' * len(OPTIONS)}---|"]
            lines += [_row(result) for result in rows]
    missing = [result for _, result in sorted(results.items()) if not result["built"]]
    lines += ["", f"## Not built ({len(missing)})", "", "| model type | class | why |", "|---|---|---|"]
    lines += [f"| `{result['name']}` | {result['class']} | {_cell(result.get('why', ''))} |" for result in missing]
    return "\n".join(lines) + "\n"


def write(results: Results, page: Path | None, data: Path | None) -> None:
    """Write the page, the data, or both."""
    found = versions()
    for path, text in ((page, to_markdown), (data, to_json)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(results, found), encoding="utf-8")


def _compiled(results: Results) -> bool:
    return any("compiled" in f.get("steps", {}) for r in results.values() for f in r["plugins"].values())


def _row(result: dict[str, Any]) -> str:
    words = [verdict_of(result, name) for name in OPTIONS]
    remarks = dict.fromkeys(f["why"] for f in result["plugins"].values() if f.get("why") and f["verdict"] != "not run")
    remarks.pop("not causal", None)
    if result.get("why"):
        remarks[result["why"]] = None
    fails = sorted(result.get("default_fails", {}))
    if fails:
        remarks[f"the default backend fails at: {', '.join(fails)}"] = None
    return f"| `{result['name']}` | {result['class']} | {' | '.join(words)} | {_cell('; '.join(remarks))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
