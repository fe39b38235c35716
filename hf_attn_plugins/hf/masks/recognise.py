"""What a mask function of Transformers means: read from its closures, or, while a graph is traced, from a few pairs.

Transformers composes masks from closures without public names (`masking_utils.and_masks`, `or_masks`, overlays). They
are told apart by their qualified names and read by the names of their cells, in `hf.masks.compat`. torch.compile cannot
look into closures; there the maker's arguments and the pairs next to the diagonal tell the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask, Predicate
from hf_attn_plugins.hf.masks import compat
from hf_attn_plugins.hf.models import families

MaskFunction = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class Recognised:
    """A mask function as a `Mask` without offset and padding.

    Attributes:
        mask: the pairs it shows; what is not understood is a predicate.
        is_causal: whether it is causal, perhaps with further pairs beside (an image's own tokens).
        names: what was understood; empty where nothing was.
    """

    mask: Mask
    is_causal: bool
    names: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where the queries and keys of a call stand: lengths, and the index of the first of each."""

    batch: int
    queries: int
    keys: int
    query_offset: int | Tensor
    key_offset: int
    use_vmap: bool
    device: Any = None

    def query_index(self) -> Tensor:
        """(Q,) absolute indices of the queries."""
        return torch.arange(self.queries, device=self.device) + self.query_offset

    def key_index(self) -> Tensor:
        """(K,) absolute indices of the keys."""
        return torch.arange(self.keys, device=self.device) + self.key_offset

    def on_cpu(self) -> Place:
        """The same place for a dry run, whose offset has no value if it is a tensor: 0."""
        start = 0 if isinstance(self.query_offset, Tensor) else self.query_offset
        return dataclasses.replace(self, device="cpu", query_offset=start)


def recognise(function: MaskFunction, place: Place) -> Recognised:
    """Read a mask function of Transformers, part by part; what is not understood stays a predicate."""
    known = _known(function, place)
    return known or Recognised(Mask(predicate=shifted(function, place)), False, ())


def _known(function: MaskFunction, place: Place) -> Recognised | None:
    causal, bidirectional = compat.plain_masks()
    if function is causal:
        return Recognised(Mask(causal=True), True, ("causal",))
    if function is bidirectional:
        return Recognised(Mask(), False, ("full",))
    read = compat.mask_parts(function)
    if read is None:
        return None
    maker, cells = read
    if maker == "and_masks":
        return _intersection([recognise(part, place) for part in cells["mask_functions"]], place)
    if maker == "or_masks":
        return _union(function, cells["mask_functions"], place)
    if maker == "sliding_window_overlay":
        size = cells["sliding_window"]
        return Recognised(Mask(window=(size - 1, None)), False, (f"window {size}",))
    if maker == "sliding_window_bidirectional_overlay":
        size = cells["sliding_window"]
        return Recognised(Mask(window=(size, size)), False, (f"window {size} on both sides",))
    if maker == "chunked_overlay":
        size, padding = cells["chunk_size"], cells["left_padding"]
        if padding.is_meta:  # a dry run: an unpadded prompt at the start of its cache; a plan reads where chunks end
            padding, place = torch.zeros_like(padding, device="cpu"), place.on_cpu()
        queries, keys = (
            torch.div(index - padding.view(-1, 1), size, rounding_mode="floor")
            for index in (place.query_index().to(padding.device), place.key_index().to(padding.device))
        )
        return Recognised(Mask(query_segments=queries, key_segments=keys), False, (f"chunks of {size}",))
    if maker == "packed_sequence_mask_function":
        segments = cells["packed_sequence_mask"]
        if segments.shape[-1] == place.queries == place.keys and not place.key_offset:
            return Recognised(Mask(query_segments=segments, key_segments=segments), False, ("packed",))
    if maker == "remap_positions_for_packed_sequence":
        inner = recognise(cells["mask_function"], place)
        # Inside a packed sequence positions count up by one, so distances are those of the indices.
        if inner.mask.has_no_tensors():
            return inner
    return None


def _intersection(parts: Sequence[Recognised], place: Place) -> Recognised:
    """All parts hold. What one `Mask` cannot hold twice becomes a predicate."""
    whole = Mask()
    for part in (part.mask for part in parts):
        twice = whole.query_segments is not None and part.query_segments is not None
        (left, right), (other_left, other_right) = whole.window, part.window
        predicates = [p for p in (whole.predicate, part.predicate) if p is not None]
        if twice:
            predicates.append(_same_segment(part.query_segments, part.key_segments, place))
        whole = Mask(
            causal=whole.causal or part.causal,
            window=(_least(left, other_left), _least(right, other_right)),
            query_segments=whole.query_segments if whole.query_segments is not None else part.query_segments,
            key_segments=whole.key_segments if whole.key_segments is not None else part.key_segments,
            predicate=_all(predicates),
            beside=_any([p for p in (whole.beside, part.beside) if p is not None]),
        )
    names = tuple(name for part in parts for name in (part.names or ("a condition of the model's own",)))
    return Recognised(whole, any(part.is_causal for part in parts), names)


def _union(function: MaskFunction, functions: Sequence[MaskFunction], place: Place) -> Recognised | None:
    """One part holds. A causal part with others beside it stays causal: the others are the model's own rule."""
    parts = [recognise(part, place) for part in functions]
    others = [shifted(f, place) for f, part in zip(functions, parts, strict=True) if not part.is_causal]
    if len(others) == len(parts):
        return None
    if not others and all(part.mask.has_no_tensors() and part.mask.window == (None, None) for part in parts):
        return parts[0]
    names = tuple(name for part in parts if part.is_causal for name in part.names)
    whole = Mask(predicate=shifted(function, place), beside=_any(others))
    return Recognised(whole, True, (*names, "tokens that see each other both ways"))


def recognise_traced(
    function: MaskFunction, place: Place, *, is_causal: bool, local_size: int | None, skippable: bool, config: Any
) -> Recognised:
    """The same while torch.compile traces, which cannot look into closures.

    A maker of Transformers composes a causal (or full) mask with a window or chunks of `local_size`, with packed
    sequences, and with blocks that see each other both ways. Packed sequences and chunks show in the pairs (t, t - 1),
    blocks in the pairs (t, t + 1). With functions of a user's own (`use_vmap`) nothing can be told.

    Args:
        is_causal: whether a causal maker was called.
        local_size, skippable: as the maker passed them; a skippable mask is packed by nothing and has no blocks.
    """
    causal, bidirectional = compat.plain_masks()
    if function is causal or function is bidirectional:
        plain = function is causal
        return Recognised(Mask(causal=plain), plain, ("causal" if plain else "full",))
    chunk, window = getattr(config, "attention_chunk_size", None), getattr(config, "sliding_window", None)
    ambiguous = local_size is not None and (local_size == chunk) == (local_size == window)
    square = place.keys == place.queries and not place.key_offset
    chunked = local_size is not None and local_size == chunk
    if place.use_vmap or ambiguous or (not square and (chunked or not skippable)):
        return Recognised(Mask(predicate=shifted(function, place)), is_causal, ())
    names, mask = ["causal" if is_causal else "full"], Mask(causal=is_causal)
    if local_size is not None and not chunked:
        reach = local_size - 1 if is_causal else local_size
        mask, names = mask.replace(window=(reach, None if is_causal else reach)), [*names, f"window {local_size}"]
    if skippable and not chunked:
        return Recognised(mask, is_causal, tuple(names))
    segments = _runs(function, place, -1)
    mask, names = mask.replace(query_segments=segments, key_segments=segments), [*names, "packed"]
    if families.makes_blocks(type(config).__module__):
        runs = _runs(function, place, 1)
        mask = Mask(predicate=shifted(function, place), beside=_same_segment(runs, runs, place))
        names = [names[0], "tokens that see each other both ways"]
    return Recognised(mask, is_causal, tuple(names))


def _runs(function: MaskFunction, place: Place, step: int) -> Tensor:
    """(B, T) numbers of runs of tokens; a token is in its predecessor's run when the pair between them is visible."""
    b = torch.arange(place.batch, device=place.device)[:, None]
    later = torch.arange(1, place.queries, device=place.device)[None]
    query, key = (later, later - 1) if step < 0 else (later - 1, later)
    joined = function(b, torch.zeros_like(b), query, key).expand(place.batch, -1)
    return torch.nn.functional.pad((~joined).long().cumsum(1), (1, 0))


def shifted(function: MaskFunction, place: Place) -> Predicate:
    """The function over our indices, where key 0 is the first key of the cache; vmapped if it takes plain numbers."""
    offset, use_vmap = place.key_offset, place.use_vmap

    def predicate(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if not use_vmap:
            return function(b, h, q + offset, k + offset)
        mapped: Any = function
        for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
            mapped = torch.vmap(mapped, in_dims=dims)
        return mapped(b.flatten(), h.flatten(), q.flatten() + offset, k.flatten() + offset)

    return predicate


def _same_segment(queries: Tensor | None, keys: Tensor | None, place: Place) -> Predicate:
    assert queries is not None and keys is not None
    start = place.query_offset - place.key_offset  # position of row 0 on the key axis

    def same(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return queries[b % len(queries), q - start] == keys[b % len(keys), k]

    return same


def _least(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)


def _all(predicates: Sequence[Predicate]) -> Predicate | None:
    return _joined(predicates, torch.logical_and)


def _any(predicates: Sequence[Predicate]) -> Predicate | None:
    return _joined(predicates, torch.logical_or)


def _joined(predicates: Sequence[Predicate], join: Callable[[Tensor, Tensor], Tensor]) -> Predicate | None:
    if len(predicates) < 2:
        return predicates[0] if predicates else None

    def joined(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = predicates[0](b, h, q, k)
        for predicate in predicates[1:]:
            seen = join(seen, predicate(b, h, q, k))
        return seen

    return joined
