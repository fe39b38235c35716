"""`tune`: sizes and dense heads of star for a model, a length and a target, found by measuring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.bench.hardware import describe
from hf_attn_plugins.hf.check import check
from hf_attn_plugins.hf.configure import use
from hf_attn_plugins.hf.inputs.texts import prose_tokens
from hf_attn_plugins.hf.models.evaluating import evaluating
from hf_attn_plugins.hf.models.families import own_backend
from hf_attn_plugins.hf.models.unwrap import language_model
from hf_attn_plugins.hf.tuning.heads import exact_losses, losses, order_of, rank_correlation
from hf_attn_plugins.hf.tuning.measuring import Measuring
from hf_attn_plugins.hf.tuning.report import Tuned, front_of
from hf_attn_plugins.hf.tuning.search import Search, first_sizes
from hf_attn_plugins.star.options import StarOptions
from hf_attn_plugins.ui.progress import python as shown

TUNABLE = "star_attention"
Progress = Callable[[str, int], None]
USUAL = 16  # measurements of a search; a bar's end moves where there are more


def tune(
    model: nn.Module,
    name: str = TUNABLE,
    *,
    length: int,
    min_speedup: float | None = None,
    max_kl: float | None = None,
    max_share: float | None = None,
    text: str | Tensor | Sequence[int] | None = None,
    tokenizer: Any = None,
    texts: int = 5,
    baseline: str | None = None,
    heads: bool = True,
    exact_heads: bool = False,
    rounds: int = 3,
    progress: Progress | bool | None = None,
) -> Tuned:
    """Choose block, halo, anchor and dense heads of star for a model, and store them in its config.

    One forward orders the key heads, some ten to twenty more find the mix of near tokens and dense heads with the
    least KL at the target, all on the first texts; the other texts tell what the choice costs. A target in speed is
    timed against `baseline` in interleaved rounds and corrected. The attention implementation is not changed.

    Args:
        model: a causal language model whose attention `check` honours; wrappers are looked through.
        name: "star_attention", the one plugin with something to tune.
        length: tokens of the prompts to tune for.
        min_speedup, max_kl, max_share: exactly one target: seconds of the baseline over the plugin's; mean KL in nats
            over all positions; attended over causal pairs.
        text: a string or token ids (T,) of at least 2 x length tokens to measure on; None takes the prose that
            Python carries.
        tokenizer: for strings and Python's prose; None loads the model's own by `config._name_or_path`.
        texts: pieces of the text, `searched(texts)` for the search (2 of 5) and the others for the report; fewer where
            the text is shorter.
        baseline: what the KL and the speed are against; None: the model's default backend.
        heads: False leaves dense heads out.
        exact_heads: also measure every head by a forward of its own, and report how the two orders agree.
        rounds: interleaved rounds of timing.
        progress: called with what is measured next and how many measurements are done; None for a bar in notebooks and
            terminals, False for none.

    Returns:
        `Tuned`; its options are stored in the model's configs, beside what was stored there.

    Raises:
        ValueError: no or several targets, a text that is too short, or a target out of reach; the message says what is
            in reach. The model's options are then as they were.

    Source: one-forward order of heads and front of halo against dense heads: this package's own measurements
    (docs/tuning.md); heads that need everything: DuoAttention, arXiv 2410.10819.
    """
    target = check_target(min_speedup=min_speedup, max_kl=max_kl, max_share=max_share)
    if name != TUNABLE:
        raise ValueError(f"{name!r} has nothing to tune: {TUNABLE} is the one approximate method here.")
    if length < 256:
        raise ValueError(f"length={length}: at least 256 tokens are needed; star is for long prompts.")
    if rounds < 1 or texts < 2:
        raise ValueError(f"rounds={rounds}, texts={texts}: at least 1 round and 2 texts are needed.")
    inner = language_model(model)
    check(inner, name).raise_if_refused()
    pieces = _pieces(inner, text, tokenizer, length, texts)
    baseline, done = baseline or own_backend(inner), 0

    def tick(what: str) -> None:
        nonlocal done
        if callable(progress):
            progress(what, done)
        else:
            bar(what, done, max(USUAL, done + 4))
        done += 1

    given = False if callable(progress) else progress
    with shown(given) as bar, torch.inference_mode(), evaluating(inner), use(inner, name):
        measuring = Measuring(inner, name, baseline, pieces)
        tick(f"{len(pieces)} texts with {baseline}")
        measuring.begin()
        order: list[tuple[int, int]] = []
        agreement = None
        total = 1
        if heads:
            tick("order of heads")
            block, anchor = first_sizes(length)
            probed = StarOptions(block, anchor, None, max(block, length // 16))
            found = losses(inner, measuring.run, name, probed)
            order, total = order_of(found), sum(map(len, found.values()))
            if exact_heads:
                agreement = _agreement(measuring, found, probed, tick)
        used = searched(len(pieces))
        search = Search(measuring, order, total, length, tick, range(used))
        if min_speedup is not None:
            best, ratios = search.at_speed(min_speedup, rounds)
        else:
            best = search.at_share(max_share) if max_share is not None else search.at_kl(max_kl or 0.0)
            tick("timing against the baseline")
            ratios = measuring.interleaved(best.options, rounds)
        tick("texts that the search did not see")
        unseen = measuring.point(best.options, range(used, len(pieces)))
    stored = StarOptions(**best.options).as_dict()
    measuring.set(stored)
    return Tuned(
        name, stored, length, target, unseen.kl, unseen.share, baseline, tuple(ratios), front_of(search.points),
        agreement, describe(pieces[0].device),
    )  # fmt: skip


def searched(texts: int) -> int:
    """How many of `texts` pieces a search measures on: one text alone can prefer a mix that others do not."""
    return max(1, (texts - 1) // 2)


def check_target(**targets: float | None) -> dict[str, float]:
    """The one target that was given, {"min_speedup": 2.0} for example.

    Raises:
        ValueError: none or several, or one that is no number in its range.
    """
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"one target is needed, got {given or 'none'}: pass min_speedup, max_kl or max_share.")
    ((name, value),) = given.items()
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{name}={value!r}: a number above 0 is needed.")
    if name == "max_share" and value >= 1:
        raise ValueError(f"max_share={value}: a share below 1 is needed; tiled_attention sees everything.")
    return given


def _pieces(model: Any, text: Any, tokenizer: Any, length: int, texts: int) -> list[Tensor]:
    """(1, length) token ids each: the search's text first."""
    if text is None or isinstance(text, str):
        if tokenizer is None:
            tokenizer = _tokenizer_of(model)
        ids = prose_tokens(tokenizer, texts * length) if text is None else tokenizer(text)["input_ids"]
        text = ids
    ids = torch.as_tensor(text).flatten()
    if ids.is_floating_point():
        raise ValueError(f"text holds {ids.dtype}: token ids are whole numbers.")
    count = min(texts, len(ids) // length)
    if count < 2:
        raise ValueError(
            f"the text has {len(ids)} tokens: length={length} needs at least {2 * length}, one piece to search on and "
            "one to report."
        )
    return [ids[None, i * length : (i + 1) * length].to(model.device) for i in range(count)]


def _tokenizer_of(model: Any) -> Any:
    from transformers import AutoTokenizer

    path = getattr(model.config, "_name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise ValueError(
            f"no tokenizer was found for this model ({path!r}): pass tokenizer=..., or text= as token ids."
        ) from error


def _agreement(
    measuring: Measuring, found: dict[int, list[float]], probed: StarOptions, tick: Callable[[str], None]
) -> dict[str, float]:
    """How the order from one forward agrees with the exact one: rank correlation, and how much of the KL it holds."""
    sizes = {name: value for name, value in probed.as_dict().items() if name != "dense_heads"}

    def kl_of(heads: list[list[int]] | None) -> float:
        tick("one head by itself")
        return measuring.point({**sizes, "dense_heads": heads}).mean_kl

    exact = exact_losses(found, kl_of)
    quarter = max(1, sum(map(len, found.values())) // 4)
    ours, theirs = order_of(found)[:quarter], order_of(exact)[:quarter]
    held = sum(exact[layer][head] for layer, head in ours) / max(1e-12, sum(exact[i][j] for i, j in theirs))
    return {
        "rank correlation with the exact order": rank_correlation(found, exact),
        "same heads in the first quarter": len(set(ours) & set(theirs)) / quarter,
        "loss held by the first quarter": held,
    }
