"""`hf-attn bench gpu`, its memory: one JSON file that grows step by step, and the page made from it.

Each step is written when it ends, so a run that is interrupted, killed or out of time leaves what it has. The next run
with the same settings on the same machine goes on behind it. A step during which the process died counts as failed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_attn_plugins.bench.timing import markdown_table
from hf_attn_plugins.commands.bench.gpu.cases import DEFAULT, FLEX, OURS, SDPA, Case
from hf_attn_plugins.core.files import read_json
from hf_attn_plugins.core.staging import put
from hf_attn_plugins.kernels.measured import Row

FORMAT = "hf-attn bench gpu 1"
CHECK, TIME, RANKS = "check", "time", "ranks"  # what steps begin with


class Record:
    """The steps of one run, in the file `gpu.json` of a folder, and the page `gpu.md` beside it.

    Args:
        folder: made if it does not exist.
        facts: hardware and versions; settings: what else makes two runs comparable, as JSON values.
        anew: start again where an earlier run would be continued.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], settings: dict[str, Any], anew: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.page = folder / "gpu.json", folder / "gpu.md"
        self.facts, self.settings = facts, settings
        self.steps: dict[str, dict[str, Any]] = {}
        self.left: list[str] = []  # steps for which there was no time
        self.resumed = 0
        earlier = None if anew else self._earlier()
        if earlier is not None:
            self.steps = earlier["steps"]
            begun = earlier.get("begun")
            if begun and begun not in self.steps:
                self.steps[begun] = {"error": "the process ended during this step"}
            self.resumed = len(self.steps)

    def _earlier(self) -> dict[str, Any] | None:
        try:
            found = read_json(self.path)
        except (OSError, ValueError):  # none yet, or cut short by other hands
            return None
        same = found.get("format") == FORMAT and found.get("hardware") == self.facts
        if not same or found.get("settings") != self.settings or not isinstance(found.get("steps"), dict):
            return None
        return found

    def __contains__(self, step: str) -> bool:
        return step in self.steps

    def begin(self, step: str) -> None:
        """Note that a step begins, in case the process does not live to end it."""
        self._write(step)

    def end(self, step: str, found: dict[str, Any]) -> None:
        """Write a step's result."""
        self.steps[step] = found
        self._write(None)

    def finish(self, left: list[str]) -> None:
        """Write the page once more, with the steps for which no time was left."""
        self.left = left
        self._write(None)

    def _write(self, begun: str | None) -> None:
        whole = {
            "format": FORMAT, "hardware": self.facts, "settings": self.settings, "begun": begun, "left": self.left,
            "steps": self.steps,
        }  # fmt: skip
        put(self.path, lambda staged: staged.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8"))
        put(self.page, lambda staged: staged.write_text("\n".join(self.lines()), encoding="utf-8"))

    def wrong(self) -> list[str]:
        """The checks of our kernels and of the default that were wrong or could not run."""
        return [
            step for step, found in self.steps.items()
            if step.startswith(f"{CHECK}: ") and not found.get("right", False)
        ]  # fmt: skip

    def rows(self) -> list[Row]:
        """The timings as rows of `kernels.measured`; our kernels and FlexAttention only where every check of them was
        right."""
        checked = [name for name in (OURS, FLEX) if any(step.endswith(f", {name}") for step in self.steps)]
        sound = [name for name in checked if not any(step.endswith(f", {name}") for step in self.wrong())]
        rows = []
        for step, found in self.steps.items():
            if not step.startswith(f"{TIME}: ") or "ms" not in found:
                continue
            case = Case(*found["case"])
            if case.what == "forward" and not case.causal:
                continue
            known = (*SDPA, *sound)
            ms = {name: time for name, time in found["ms"].items() if name in known}
            if ms:
                device, under = self.facts["processor"], self.settings["versions"]
                rows.append(Row(device, under, "bfloat16", case.head_dim, case.what, case.length, ms))
        return rows

    def lines(self) -> list[str]:
        """The page."""
        page = ["# Attention on a GPU", "", ", ".join(f"{name} {value}" for name, value in self.facts.items()), ""]
        peak = self.steps.get("peak", {}).get("tflops")
        if peak:
            page += [f"bfloat16 matrix product: {peak:.0f} TFLOP/s.", ""]
        checks = {step: found for step, found in self.steps.items() if step.startswith(f"{CHECK}: ")}
        if checks:
            page += ["## Results, compared with float64", "", *markdown_table(_check_rows(checks)), ""]
        timed = [found for step, found in self.steps.items() if step.startswith(f"{TIME}: ") and "ms" in found]
        for what in dict.fromkeys(found["case"][0] for found in timed):
            rows = [_time_row(found, peak) for found in timed if found["case"][0] == what]
            names = list(dict.fromkeys(name for row in rows for name in row))
            page += [
                f"## Milliseconds: {what}",
                "",
                *markdown_table([{n: row.get(n, "") for n in names} for row in rows]),
                "",
            ]
        ranks = {step: found for step, found in self.steps.items() if step.startswith(RANKS)}
        for step, found in ranks.items():
            page += [f"## {step}", "", "```", json.dumps(found, indent=1), "```", ""]
        failed = [f"* {step}: {found['error']}" for step, found in self.steps.items() if "error" in found]
        failed += [f"* {_name(found)}, {n}: {text}" for found in timed for n, text in found["failed"].items()]
        if failed:
            page += ["## What could not run", "", *failed, ""]
        if self.left:
            page += ["## No time was left for", "", *(f"* {step}" for step in self.left), ""]
        return page


def _name(found: dict[str, Any]) -> str:
    return Case(*found["case"]).name


def _check_rows(checks: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for step, found in checks.items():
        row: dict[str, Any] = {"what": step.removeprefix(f"{CHECK}: ")}
        row["result"] = "right" if found.get("right") else "could not run" if "error" in found else "WRONG"
        for which in ("out", "dq", "dk", "dv"):
            error, limit = found.get("errors", {}).get(which, ("", ""))
            row[which] = f"{error:.1e} of {limit:.1e}" if limit != "" else ""
        rows.append(row)
    return rows


def _time_row(found: dict[str, Any], peak: float | None) -> dict[str, Any]:
    case, ms = Case(*found["case"]), found["ms"]
    row: dict[str, Any] = {
        "tokens": case.length,
        "head_dim": case.head_dim,
        "mask": "causal" if case.causal else "full",
    }
    row |= {name: ms.get(name, "failed") for name in (*ms, *found["failed"])}
    best = min((ms[name] for name in SDPA if name in ms), default=None)
    if case.what == "plan":
        row |= {name: found[name] for name in ("share", "follows") if name in found}
    elif best is not None:
        row |= {f"best SDPA / {name}": best / ms[name] for name in (DEFAULT, OURS) if name in ms}
    if peak and "tflops" in found:
        row["share of peak"] = found["tflops"] / peak
    return row
