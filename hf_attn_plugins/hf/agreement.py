"""What `compare` found: agreement, cost and plan of one attention, or of several at several lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hf_attn_plugins.plugins import PLUGINS
from hf_attn_plugins.ui.shown import Shown, html_table, text_table


@dataclass(frozen=True)
class Run:
    """One backend's side: median seconds of a prefill, tokens/s, peak memory in bytes above the start, perplexity.

    `repeats` holds the seconds of every timed prefill, in the order in which they ran; `plan` says what a plugin's
    attention really did (`trace`), None for another backend.
    """

    name: str
    options: dict[str, Any]
    seconds: float
    tokens_per_second: float
    peak_bytes: int | None
    perplexity: float
    repeats: tuple[float, ...] = ()
    plan: str | None = None

    @property
    def label(self) -> str:
        """The name with its options: "star_attention block_size=512"."""
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.options.items())])


@dataclass(frozen=True, repr=False)
class Agreement(Shown):
    """Agreement of next-token distributions over all positions of a text.

    Attributes:
        kl_*: KL(baseline || plugin) in nats per position: mean, median, 99.9th percentile, maximum.
        top1: share of positions where both predict the same token.
        max_probability_difference, rms_probability_difference: over all positions and tokens.
        perplexity_ratio: plugin's perplexity over the baseline's, on the same tokens.
        speedup: baseline's seconds over the plugin's.
        within_noise: the two ranges of seconds (min - max over repeats) overlap, or there was one repeat only.
    """

    tokens: int
    kl_mean: float
    kl_median: float
    kl_p999: float
    kl_max: float
    top1: float
    max_probability_difference: float
    rms_probability_difference: float
    perplexity_ratio: float
    speedup: float
    within_noise: bool
    baseline: Run
    plugin: Run

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return dataclasses.asdict(self)

    @property
    def ran_dense(self) -> bool:
        """Whether an approximate plugin saw everything, so that nothing approximate was tested."""
        row = PLUGINS.get(self.plugin.name)
        return row is not None and not row.exact and (self.plugin.plan or "").startswith("dense")

    @property
    def speed(self) -> str:
        """Who is faster, by how much and how surely: "1.43x faster (1.35 - 1.52)", "within noise (0.97 - 1.04)"."""
        times = max(self.speedup, 1 / self.speedup)
        said = f"{times:.2f}x {'faster' if self.speedup >= 1 else 'slower'}"
        base, ours = self.baseline.repeats, self.plugin.repeats
        if min(len(base), len(ours)) < 2:
            return f"{said}, one prefill each: spread unknown"
        # Any repeat of one side over any of the other: 1 lies between the ends just where the ranges overlap.
        ends = (min(base) / max(ours), max(base) / min(ours))
        if self.speedup < 1 and not self.within_noise:
            ends = (1 / ends[1], 1 / ends[0])
        spread = f"({ends[0]:.2f} - {ends[1]:.2f})"
        return f"within noise {spread}" if self.within_noise else f"{said} {spread}"

    def faults(
        self, *, max_kl: float | None = None, min_top1: float | None = None, max_perplexity: float | None = None
    ) -> list[str]:
        """The limits that are broken, one sentence each.

        Args:
            max_kl: the largest mean KL, in nats per position.
            min_top1: the smallest share of positions with the same first choice, 0 to 1.
            max_perplexity: the largest ratio of the perplexities, such as 1.02.

        Raises:
            ValueError: no limit, or one that no result can be measured by.
        """
        check_limits(max_kl=max_kl, min_top1=min_top1, max_perplexity=max_perplexity)
        where = f"{self.plugin.label}, {self.tokens} tokens"
        found = []
        if max_kl is not None and not self.kl_mean <= max_kl:
            found.append(f"{where}: mean KL {self.kl_mean:.3g} nats, at most {max_kl:g} allowed")
        if min_top1 is not None and not self.top1 >= min_top1:
            found.append(f"{where}: same first choice at {self.top1:.4f} of positions, at least {min_top1:g} wanted")
        if max_perplexity is not None and not self.perplexity_ratio <= max_perplexity:
            found.append(
                f"{where}: {self.perplexity_ratio:.4f} times the perplexity, at most {max_perplexity:g} allowed"
            )
        return found

    def assert_close(
        self, *, max_kl: float | None = None, min_top1: float | None = None, max_perplexity: float | None = None
    ) -> None:
        """Raise AssertionError with every limit that is broken; for tests and quality gates. See `faults`."""
        _raise(self.faults(max_kl=max_kl, min_top1=min_top1, max_perplexity=max_perplexity))

    def rows(self) -> list[tuple[str, str]]:
        """What was found as (what, how much), the plan that ran first."""
        base, ours = self.baseline, self.plugin
        found = [] if ours.plan is None else [("what ran", ours.plan)]
        if self.ran_dense:
            found.append(("", "dense: nothing approximate was tested; give more tokens or a block_size"))
        if base.plan is not None:
            found.append((f"{base.name} ran", base.plan))
        found += [
            ("prefill", f"{ours.seconds:.3g} s, {base.name} {base.seconds:.3g} s: {self.speed}"),
            (
                "perplexity",
                f"{ours.perplexity:.4f}, {base.name} {base.perplexity:.4f}: ratio {self.perplexity_ratio:.5f}",
            ),
            ("same first choice", f"{100 * self.top1:.2f} % of {self.tokens} positions"),
            (
                "KL divergence, nats",
                f"mean {self.kl_mean:.2e}, median {self.kl_median:.2e}, 99.9 % {self.kl_p999:.2e}, "
                f"max {self.kl_max:.2e}",
            ),
            (
                "probabilities differ",
                f"max {self.max_probability_difference:.2e}, RMS {self.rms_probability_difference:.2e}",
            ),
        ]
        if base.peak_bytes is not None and ours.peak_bytes is not None:
            ratio = ours.peak_bytes / max(1, base.peak_bytes)
            memory = f"{_mib(ours.peak_bytes)}, {base.name} {_mib(base.peak_bytes)}: {ratio:.2f}x, weights aside"
            found.append(("peak memory", memory))
        return found

    def __str__(self) -> str:
        lines = [f"{self.plugin.label} against {self.baseline.label}, {self.tokens} tokens"]
        return "\n".join([*lines, *(f"  {name:<21}{text}" for name, text in self.rows())])

    __repr__ = __str__


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """Several attentions at several lengths, each an `Agreement` with the same baseline; iterable, by length."""

    agreements: tuple[Agreement, ...]

    def __iter__(self) -> Iterator[Agreement]:
        return iter(self.agreements)

    def __len__(self) -> int:
        return len(self.agreements)

    def __getitem__(self, index: int) -> Agreement:
        return self.agreements[index]

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return {"comparisons": [each.as_dict() for each in self]}

    def faults(
        self, *, max_kl: float | None = None, min_top1: float | None = None, max_perplexity: float | None = None
    ) -> list[str]:
        """The broken limits of every row; see `Agreement.faults`."""
        limits = {"max_kl": max_kl, "min_top1": min_top1, "max_perplexity": max_perplexity}
        return [fault for each in self for fault in each.faults(**limits)]

    def assert_close(
        self, *, max_kl: float | None = None, min_top1: float | None = None, max_perplexity: float | None = None
    ) -> None:
        """Raise AssertionError with every limit that a row breaks; see `Agreement.faults`."""
        _raise(self.faults(max_kl=max_kl, min_top1=min_top1, max_perplexity=max_perplexity))

    @property
    def plans(self) -> list[str]:
        """What ran, one line for each row whose attention is a plugin."""
        return [
            f"{each.plugin.label}, {each.tokens} tokens: {each.plugin.plan}"
            + (" (nothing approximate was tested)" if each.ran_dense else "")
            for each in self
            if each.plugin.plan is not None
        ]

    def _table(self) -> tuple[list[str], list[list[str]]]:
        heads = ["attention", "tokens", "KL, nats", "same first choice", "perplexity ratio", "prefill"]
        rows = [
            [
                each.plugin.label,
                str(each.tokens),
                f"{each.kl_mean:.2e}",
                f"{100 * each.top1:.2f} %",
                f"{each.perplexity_ratio:.4f}",
                each.speed,
            ]
            for each in self
        ]
        return heads, rows

    def __str__(self) -> str:
        names = ", ".join(dict.fromkeys(each.baseline.label for each in self))
        return "\n".join([f"against {names}", "what ran:", *(f"  {line}" for line in self.plans),
                          *text_table(*self._table())])  # fmt: skip

    __repr__ = __str__

    def _repr_html_(self) -> str:
        names = ", ".join(dict.fromkeys(each.baseline.label for each in self))
        return html_table(f"Against {names}", *self._table(), self.plans)


def check_limits(**limits: float | None) -> None:
    """Raise ValueError where no limit is given, or one that is no sensible number."""
    given = {name: value for name, value in limits.items() if value is not None}
    if not given:
        raise ValueError(f"no limit was given: pass {', '.join(limits)}.")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"{name}={value!r}: a number of at least 0 is needed.")
        if name == "min_top1" and value > 1:
            raise ValueError(f"min_top1={value}: a share of 0 to 1 is needed, such as 0.95.")
        if name == "max_perplexity" and value < 1:
            raise ValueError(f"max_perplexity={value}: a ratio of at least 1 is needed, such as 1.02.")


def _raise(faults: Sequence[str]) -> None:
    if faults:
        raise AssertionError("; ".join(faults) + ".")


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
