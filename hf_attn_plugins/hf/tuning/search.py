"""The search of `hap.tune`: sizes and dense heads with the least KL at a share of pairs, or the least share at a KL.

At one share, near tokens and dense heads compete: a longer halo for all heads, or everything for a few. Which of the
two is worth more differs from model to model, so mixes of both are measured at the share that is asked for.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_attn_plugins.hf.tuning.heads import listed
from hf_attn_plugins.hf.tuning.measuring import Measuring, Point
from hf_attn_plugins.star.options import StarOptions

BLOCK, ANCHOR = 128, 64  # the largest sizes that the search begins with; others are tried at the end
STEP = 64  # halos of long prompts are multiples of it: the compiled CPU kernels' tile of rows
CORRECTIONS = 3  # times that a measured speed moves the share
ALMOST_DENSE = 0.95  # a share beyond which tiled_attention, which is exact, is the better choice
NEAR = 0.02  # a speed this close to the one that was asked for is met


def first_sizes(length: int) -> tuple[int, int]:
    """(block, anchor) in tokens that a search over prompts of `length` tokens begins with."""
    block = min(BLOCK, max(16, length // 32))
    return block, min(ANCHOR, block // 2)


@dataclass
class Search:
    """One search over the options of star.

    Attributes:
        measuring: what measures a choice.
        order: (layer, key head), the one that loses most first; empty leaves dense heads out.
        total_heads: key heads in all layers.
        length: tokens of the texts.
        tick: called with a word on what is measured next.
        texts: indices of the texts that choices are measured on.
    """

    measuring: Measuring
    order: list[tuple[int, int]]
    total_heads: int
    length: int
    tick: Callable[[str], None]
    texts: Sequence[int] = (0,)
    points: list[Point] = field(default_factory=list)

    @property
    def block(self) -> int:
        """Tokens of a block to begin with."""
        return first_sizes(self.length)[0]

    @property
    def anchor(self) -> int:
        """Tokens of the anchor to begin with."""
        return first_sizes(self.length)[1]

    @property
    def step(self) -> int:
        """What halos are multiples of."""
        return min(STEP, self.block)

    def halos(self) -> list[int]:
        """Halos to begin with: a 32nd of the length to half of it."""
        step = self.step
        return sorted({max(step, self.length // part // step * step) for part in (32, 16, 8, 4, 2)})

    def options(self, halo: int, heads: int, block: int, anchor: int) -> dict[str, Any]:
        """Options with the `heads` most sensitive key heads dense."""
        sizes = {"block_size": block, "anchor_size": min(anchor, block + halo), "halo_size": halo}
        return {**sizes, "dense_heads": listed(self.order[:heads])}

    def measured(self, halo: int, heads: int, block: int | None = None, anchor: int | None = None) -> Point:
        """A point of the front; measured once."""
        block, anchor = block or self.block, self.anchor if anchor is None else anchor
        options = self.options(halo, heads, block, anchor)
        known = next((point for point in self.points if point.options == options), None)
        if known is not None:
            return known
        self.tick(f"halo {halo}, block {block}, anchor {anchor}, {heads} dense heads")
        point = self.measuring.point(options, self.texts)
        self.points.append(point)
        return point

    def sparse_share(self, halo: int, block: int | None = None, anchor: int | None = None) -> float:
        """Attended over causal pairs without dense heads, from the plan."""
        block, anchor = block or self.block, self.anchor if anchor is None else anchor
        plan = StarOptions(block, min(anchor, block + halo), None, halo).plan_of(self.length)
        return plan.attended_pairs() / plan.causal_pairs()

    def heads_for(self, share: float, halo: int, block: int | None = None, anchor: int | None = None) -> int | None:
        """How many heads may be dense at a share; None where the halo alone is beyond it."""
        sparse = self.sparse_share(halo, block, anchor)
        if sparse > share:
            return None
        return min(len(self.order), int((share - sparse) / max(1e-9, 1 - sparse) * self.total_heads))

    def at_share(self, share: float) -> Point:
        """The point with the least KL whose share is at most `share`.

        Raises:
            ValueError: even the shortest halo attends to more.
        """
        block, anchor = self.block, self.anchor
        first = self._mixes(share, [(halo, block, anchor) for halo in self.halos()])
        if not first:
            least = self.sparse_share(self.halos()[0])
            raise ValueError(
                f"a share of {share:.3f} of the pairs was asked for, the sparsest plan that is tried at {self.length} "
                f"tokens has {least:.3f}: ask for {least:.2f} or more (or a lower speed)."
            )
        best = min(first, key=lambda point: point.mean_kl)
        halo = best.options["halo_size"]
        nearby = [round(halo * factor / self.step) * self.step for factor in (0.7, 1.4)]
        best = min([best, *self._mixes(share, [(h, block, anchor) for h in nearby if h])], key=lambda p: p.mean_kl)
        halo = best.options["halo_size"]
        others = [(halo, block, a) for a in (anchor // 4, 4 * anchor)]
        others += [(halo, b, anchor) for b in (block // 2, 2 * block)]
        return min([best, *self._mixes(share, others)], key=lambda point: point.mean_kl)

    def _mixes(self, share: float, sizes: list[tuple[int, int, int]]) -> list[Point]:
        found = []
        for halo, block, anchor in sizes:
            heads = self.heads_for(share, halo, block, anchor)
            if heads is not None and halo < self.length:
                found.append(self.measured(halo, heads, block, anchor))
        return found

    def at_kl(self, kl: float) -> Point:
        """The point with the least share whose KL is at most `kl`.

        Raises:
            ValueError: no mix reaches it.
        """
        best: Point | None = None
        for halo in self.halos():
            if best is not None and self.sparse_share(halo) >= best.share:
                continue
            found = self._fewest_heads(halo, kl, best.share if best else 1.0)
            if found is not None and (best is None or found.share < best.share):
                best = found
        if best is None or best.share > ALMOST_DENSE:
            least = min(
                (point for point in self.points if point.share <= ALMOST_DENSE), key=lambda point: point.mean_kl
            )
            raise ValueError(
                f"a KL of {kl} was asked for, the nearest plan that was tried has {least.mean_kl:.4f} at "
                f"{least.share:.0%} of the pairs: ask for more, or use tiled_attention, which is exact."
            )
        return best

    def _fewest_heads(self, halo: int, kl: float, share: float) -> Point | None:
        """Of one halo the point with the fewest dense heads that has the KL; only shares below `share` count."""
        low, high = 0, self.heads_for(share, halo) or 0
        point = self.measured(halo, low)
        if point.mean_kl <= kl or not high:
            return point if point.mean_kl <= kl else None
        found = self.measured(halo, high)
        if found.mean_kl > kl:
            return None
        while high - low > max(1, self.total_heads // 24):
            middle = (low + high) // 2
            point = self.measured(halo, middle)
            if point.mean_kl <= kl:
                high, found = middle, point
            else:
                low = middle
        return found

    def at_speed(self, speedup: float, rounds: int) -> tuple[Point, list[float]]:
        """The point with the least KL at a speed against the baseline, and that speed round by round.

        Time is taken to grow evenly with the share between two plans that were timed, first the dense and the sparsest
        one. Where the choice misses the speed, it takes the place of one of the two, and the share moves.

        Raises:
            ValueError: exact attention is as fast, or no plan is.
        """
        dense = self.measuring.point({"block_size": self.length, "anchor_size": 0}, self.texts)
        sparsest = self.measured(self.halos()[0], 0)
        self.points.append(dense)
        timed = [(each, self._timed(each, rounds)) for each in (sparsest, dense)]
        fastest, exact = (statistics.median(ratios) for _, ratios in timed)
        if exact >= speedup:
            raise ValueError(
                f"min_speedup={speedup}: tiled_attention, which is exact, is as fast at {self.length} tokens "
                f"({exact:.2f}x): use it, or ask for more."
            )
        if fastest < speedup:
            raise ValueError(
                f"min_speedup={speedup}: the sparsest plan that is tried gives {fastest:.2f}x at {self.length} tokens: "
                "ask for less, or tune for longer prompts."
            )
        best: Point | None = None
        for _ in range(1 + CORRECTIONS):
            share = _between(timed, speedup * (1 + NEAR))
            chosen = self.at_share(share) if best is None else self._moved(best, share)
            if chosen is None or any(chosen.options == each.options for each, _ in timed):
                break
            best = chosen
            timed.append((best, self._timed(best, rounds)))
            if 0 <= statistics.median(timed[-1][1]) / speedup - 1 <= 2 * NEAR:
                break
        met = [each for each in timed if statistics.median(each[1]) >= speedup]
        return min(met, key=lambda each: each[0].mean_kl)

    def _timed(self, point: Point, rounds: int) -> list[float]:
        self.tick("timing against the baseline")
        return self.measuring.interleaved(point.options, rounds)

    def _moved(self, point: Point, share: float) -> Point | None:
        """The same sizes at another share: fewer or more dense heads, then another halo."""
        block, anchor, halo = (point.options[name] for name in ("block_size", "anchor_size", "halo_size"))
        heads = self.heads_for(share, halo, block, anchor)
        while heads is None and halo > self.step:
            halo -= self.step
            heads = self.heads_for(share, halo, block, anchor)
        while not self.order and self.sparse_share(halo + self.step, block, anchor) <= share:
            halo += self.step
        return None if heads is None else self.measured(halo, heads, block, anchor)


def _between(timed: list[tuple[Point, list[float]]], speedup: float) -> float:
    """The share at which a speed is expected: between the slowest plan that has it and the fastest that has not."""
    line = sorted((point.share, 1 / statistics.median(ratios)) for point, ratios in timed)
    enough = [each for each in line if each[1] <= 1 / speedup] or line[:1]
    short = [each for each in line if each[1] > 1 / speedup and each[0] > enough[-1][0]] or line[-1:]
    (low, fast), (high, slow) = enough[-1], short[0]
    return low + (high - low) * min(1.0, max(0.0, (1 / speedup - fast) / max(1e-9, slow - fast)))
