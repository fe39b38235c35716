"""What the steps of a trial add up to: exact, star used, passed through, WRONG, RAISED."""

from __future__ import annotations

from typing import Any


def verdict(found: dict[str, Any], allowances: dict[str, float], name: str) -> dict[str, Any]:
    """The verdict on one plugin in one family, from the deviations and errors of its steps, and why."""
    steps = found["steps"]
    for step in steps.values():
        step.pop("values", None)
    errors = {step: value["error"] for step, value in steps.items() if "error" in value}
    if errors:
        return {
            "verdict": "RAISED",
            "why": "; ".join(
                f"{', '.join(s for s in errors if errors[s] == e)}: {e}" for e in dict.fromkeys(errors.values())
            ),
        }
    star = name == "star_attention" and found["causal"]
    tolerance = {**allowances, "compiled": allowances["forward"]}
    compared = {s: v for s, v in steps.items() if not star or s == "compiled"}
    wrong = {s: v for s, v in compared.items() if v["off"] > tolerance[s]}
    if wrong:
        why = "; ".join(
            f"{s} off by {v['off']:.2g} ({v['where']}), allowed {tolerance[s]:.2g}" for s, v in wrong.items()
        )
        return {"verdict": "WRONG", "why": why}
    if not found["calls"]:
        return {"verdict": "never called", "why": "the forward makes no call"}
    if not star:
        passed = name != "tiled_attention" and not found["causal"]
        return {"verdict": "passed through" if passed else "exact", "why": "not causal" if passed else ""}
    allowed = tolerance["forward"] + 1e-4
    for key, what in (
        ("leak", "later tokens change earlier outputs by"),
        ("full_row", "a padded neighbour changes a full row by"),
        ("oracle", "differs from the same mask under the default backend by"),
    ):
        if found.get(key) is not None and found[key] > allowed:
            return {"verdict": "WRONG", "why": f"{what} {found[key]:.2g}, allowed {allowed:.2g}"}
    if steps["forward"]["off"] <= tolerance["forward"]:
        return {"verdict": "dense", "why": "the output is that of full attention"}
    return {"verdict": "star used", "why": "equals its mask" if found.get("oracle") is not None else ""}
