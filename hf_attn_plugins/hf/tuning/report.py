"""What `hap.tune` found: a report that prints, saves, and is read by `hf-attn patch set-attention --tuned`."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_attn_plugins.core.options import shown
from hf_attn_plugins.hf.tuning.measuring import Point
from hf_attn_plugins.plugins import plugin
from hf_attn_plugins.ui.shown import Shown

KIND = "hf-attn tune"


@dataclass(frozen=True, repr=False)
class Tuned(Shown):
    """Options for one model and one length of prompts, with what they cost and save.

    Attributes:
        plugin, options: what to set; `options` are JSON-ready.
        length: tokens of the texts.
        target: what was asked for, such as {"min_speedup": 2.0}.
        kl: mean KL(baseline || plugin) in nats over positions of the whole text, for every text that the search did
            not see.
        share: attended over causal pairs.
        baseline: the backend that the speed is against.
        speedups: baseline's seconds over the plugin's, one number a round.
        front: (share, KL on the search's own text, options) of what was tried and nothing tried beats.
        heads: how the order of heads agrees with the exact one, where that was asked for.
        hardware: of the timing.
    """

    plugin: str
    options: dict[str, Any]
    length: int
    target: dict[str, float]
    kl: tuple[float, ...]
    share: float
    baseline: str
    speedups: tuple[float, ...]
    front: tuple[tuple[float, float, dict[str, Any]], ...]
    heads: dict[str, float] | None = None
    hardware: dict[str, Any] = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.speedups)

    @property
    def line(self) -> str:
        """The line that sets these options on a loaded model."""
        words = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f'hap.configure(model, "{self.plugin}", {words})'

    def __str__(self) -> str:
        asked = ", ".join(f"{name} {value:g}" for name, value in self.target.items())
        lines = [
            f"{self.plugin} tuned for {self.length} tokens ({asked})",
            f"  KL     {statistics.fmean(self.kl):.4f} nats a position, {min(self.kl):.4f} to {max(self.kl):.4f} over "
            f"{len(self.kl)} texts that the search did not see",
            f"  speed  {self.speedup:.2f}x of {self.baseline}, {min(self.speedups):.2f} to {max(self.speedups):.2f} "
            f"over {len(self.speedups)} rounds",
            f"  pairs  {self.share:.1%} of the causal ones",
        ]
        if self.heads:
            words = ", ".join(f"{name} {value:.2f}" for name, value in self.heads.items())
            lines.append(f"  heads  {words}")
        lines.append("  front  share, KL on the search's text, options:")
        lines += [f"    {share:6.1%}  {kl:.4f}  {_brief(options)}" for share, kl, options in self.front]
        return "\n".join([*lines, "", self.line])

    __repr__ = __str__

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return {"kind": KIND, **dataclasses.asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        from hf_attn_plugins.core.staging import put

        text = json.dumps(self.as_dict(), indent=1) + "\n"
        put(Path(path), lambda made: made.write_text(text, encoding="utf-8"))


def _brief(options: dict[str, Any]) -> str:
    heads = sum(map(len, options.get("dense_heads") or ()))
    sizes = ", ".join(f"{name.removesuffix('_size')} {options[name]}" for name in options if name != "dense_heads")
    return f"{sizes}, {heads} dense heads"


def front_of(points: list[Point]) -> tuple[tuple[float, float, dict[str, Any]], ...]:
    """The points that no other point beats in both share and KL, by share."""
    kept, least = [], float("inf")
    for point in sorted(points, key=lambda each: (each.share, each.mean_kl)):
        if point.mean_kl < least:
            least = point.mean_kl
            kept.append((point.share, point.mean_kl, point.options))
    return tuple(kept)


def read_options(path: str | Path) -> tuple[str, dict[str, Any]]:
    """(plugin, options) of a saved report.

    Raises:
        ValueError: the file is no report of `hf-attn tune`, or holds options that the plugin does not take.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}. Give a report that `hf-attn tune --out` wrote.") from error
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise ValueError(f"{path} is no report of hf-attn tune: give one that `hf-attn tune --out` wrote.")
    name, options = found.get("plugin"), found.get("options")
    if not isinstance(name, str) or not isinstance(options, dict):
        raise ValueError(
            f"{path}: plugin is {shown(name)} and options {shown(options)}: a name and a mapping are needed."
        )
    return name, plugin(name).options_type().of(options, f"options in {path}").as_dict()
