"""What the plugins are compared with: a sliding window, and a window with attention sinks (StreamingLLM's pattern).

They are plugins like the others, built from masks and `kernels.attend`, but registered only while an evaluation runs.
Unlike StreamingLLM's cache, tokens keep their own positions.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.options import Options
from hf_attn_plugins.core.partial import Partial, merge
from hf_attn_plugins.hf import register
from hf_attn_plugins.kernels import attend
from hf_attn_plugins.plugins import PLUGINS, Plugin


@dataclass(frozen=True)
class WindowOptions(Options):
    """Options of `sliding_window`: a token sees the last `window` tokens, itself included."""

    window: int = 1024

    def __post_init__(self) -> None:
        self._positive("window")


@dataclass(frozen=True)
class SinkOptions(Options):
    """Options of `attention_sink`: a token sees the first `sinks` tokens and the last `window`, itself included."""

    window: int = 1024
    sinks: int = 4

    def __post_init__(self) -> None:
        self._positive("window", "sinks")


def sliding_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
    dropout: float,
    options: WindowOptions,
) -> Partial:
    """Attention to the last tokens only; arguments as for every method."""
    mask = _windowed(mask, options.window)
    return attend(query, key, value, mask=mask, scale=scale, softcap=softcap, dropout=dropout)


def attention_sink(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
    dropout: float,
    options: SinkOptions,
) -> Partial:
    """Attention to the first tokens and to the last (arXiv 2309.17453), as a merge of two pieces."""
    sinks, start = min(options.sinks, key.shape[2]), mask.start(query.shape[2], key.shape[2])
    first, rest = slice(0, sinks), slice(sinks, key.shape[2])

    def part(keys: slice, seen: Mask) -> Partial:
        found = key[:, :, keys], value[:, :, keys]
        return attend(query, *found, mask=seen, scale=scale, softcap=softcap, dropout=dropout)

    pieces = [part(first, mask.over_keys(first).replace(offset=start))]
    if rest.start < rest.stop:
        pieces.append(part(rest, _windowed(mask.over_keys(rest), options.window).replace(offset=start - sinks)))
    return merge(pieces)


def _windowed(mask: Mask, window: int) -> Mask:
    left, right = mask.window  # a layer's own window may be the narrower one
    return mask.replace(window=(window - 1 if left is None else min(left, window - 1), right))


BASELINES: dict[str, Plugin] = {
    row.name: row
    for row in (
        Plugin(
            "sliding_window",
            "the last tokens only",
            False,
            "arXiv 1904.10509, 2004.05150",
            sliding_window,
            WindowOptions,
        ),
        Plugin(
            "attention_sink",
            "the first tokens and the last",
            False,
            "StreamingLLM, arXiv 2309.17453",
            attention_sink,
            SinkOptions,
        ),
    )
}


def registered() -> contextlib.AbstractContextManager[None]:
    """The baselines as plugins for a while; a plugin registered by the user under such a name stays."""
    return register.registered(*(row for name, row in BASELINES.items() if name not in PLUGINS))
