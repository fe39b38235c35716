"""The rows of `hf-attn bench front`: star's plans, what `hap.tune` chose, and the baselines."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from hf_attn_plugins.hf.tuning.heads import listed

HALOS = (32, 16, 8, 16 / 3, 4)  # a halo is the length divided by these
DENSE_PARTS = (8, 4)  # of the key heads, one in so many is dense
WINDOWS = (16, 8)  # a window is the length divided by these


@dataclass(frozen=True)
class Row:
    """One line of the table: its name, an attention implementation, its options, and what kind it is in the chart."""

    name: str
    attn: str
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "dense"

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON-ready values."""
        return dataclasses.asdict(self)


def rows_for(length: int, done: dict[str, Any]) -> list[Row]:
    """All rows at a length; those with dense heads follow the order that was measured, if it was."""
    found = [Row("tiled", "tiled_attention"), Row("star, default", "star_attention", {}, "default")]
    for block in (length // 4, length // 8):
        sizes = {"block_size": block, "anchor_size": block // 4, "halo_size": 0}
        found.append(Row(f"paper's star, blocks of {block}", "star_attention", sizes, "paper's star"))
    halos = list(dict.fromkeys(max(64, round(length / part / 64) * 64) for part in HALOS))
    for halo in halos:
        found.append(Row(f"near {halo}", "star_attention", near(halo), "near tokens"))
    order = [tuple(pair) for pair in done["heads"].get(str(length), [])]
    for part in DENSE_PARTS if order else ():
        heads = listed(order[: len(order) // part])
        for halo in halos[1:4:2]:
            name = f"near {halo}, 1/{part} of the heads dense"
            found.append(Row(name, "star_attention", {**near(halo), "dense_heads": heads}, "dense heads"))
    for target, tuned in sorted(done["tuned"].get(str(length), {}).items()):
        if "options" in tuned:
            found.append(Row(f"tuned for {target}x", "star_attention", tuned["options"], "tuned"))
    for part in WINDOWS:
        window = length // part
        found.append(Row(f"sliding window {window}", "sliding_window", {"window": window}, "windows"))
        found.append(Row(f"attention sinks, {window}", "attention_sink", {"window": window, "sinks": 4}, "windows"))
    return found


def near(halo: int) -> dict[str, Any]:
    """Small blocks with a halo."""
    return {"block_size": 128, "anchor_size": 64, "halo_size": halo}
