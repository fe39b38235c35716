"""The plugin table, and its registration into Transformers: everything that lists plugins reads `PLUGINS`."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_attn_plugins.late import forget, when_imported

if TYPE_CHECKING:
    from hf_attn_plugins.options import Options

MODELING = "transformers.modeling_utils"


@dataclass(frozen=True)
class Plugin:
    """One attention implementation that Transformers can be asked for by name.

    Attributes:
        name: what goes into `attn_implementation=`.
        summary: one line on what it does.
        exact: whether its outputs equal the default backend's up to rounding.
        source: where the method comes from.
        entry: "module:function" of the method's `attention`, imported on first use.
        options: name of the options' dataclass in `options.py`.
    """

    name: str
    summary: str
    exact: bool
    source: str
    entry: str
    options: str

    def attention(self) -> Callable[..., Any]:
        """The method's function: (query, key, value, mask, *, scale, softcap, dropout, options) -> Partial."""
        module, function = self.entry.split(":")
        return getattr(importlib.import_module(module), function)

    def options_type(self) -> type[Options]:
        """The dataclass that validates this plugin's options."""
        return getattr(importlib.import_module("hf_attn_plugins.options"), self.options)


PLUGINS: dict[str, Plugin] = {
    plugin.name: plugin
    for plugin in (
        Plugin(
            name="tiled_attention",
            summary="FlashAttention-style tiles: never holds a score matrix; bfloat16 products on CPUs",
            exact=True,
            source="FlashAttention, arXiv 2205.14135 and 2307.08691",
            entry="hf_attn_plugins.tiled:attention",
            options="TiledOptions",
        ),
        Plugin(
            name="star_attention",
            summary="Star Attention: blocks and an anchor for the context, everything for query and answer",
            exact=False,
            source="Star Attention, arXiv 2411.17116",
            entry="hf_attn_plugins.star.attention:attention",
            options="StarOptions",
        ),
        Plugin(
            name="cqs_attention",
            summary="independent workers, each pair of token groups computed by exactly one; bounded memory per worker",
            exact=True,
            source="CQS-Attention, IEEE Access 13 (2025) 35527",
            entry="hf_attn_plugins.cqs.plugin:attention",
            options="CQSOptions",
        ),
    )
}


def plugin(name: str) -> Plugin:
    """The plugin called `name`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in PLUGINS:
        raise ValueError(f"{name!r} is no plugin of hf_attn_plugins: choose one of {', '.join(PLUGINS)}.")
    return PLUGINS[name]


# Once the module on the left has been imported, the function on the right is called.
REGISTRATIONS = (
    (MODELING, "hf_attn_plugins.registry:register_attention"),
    ("transformers.pipelines", "hf_attn_plugins.star_pipeline:register_pipeline"),
    ("transformers.models.auto.configuration_auto", "hf_attn_plugins.indexed_config:register"),
    ("transformers.models.auto.modeling_auto", "hf_attn_plugins.indexed_model:register"),
    ("transformers.quantizers.auto", "hf_attn_plugins.checkpoint.loader:register"),
)


def register() -> None:
    """Make everything of this package known to Transformers, each part as soon as it is imported. Idempotent."""
    for module, action in REGISTRATIONS:
        when_imported(module, functools.partial(_call, action))


def unregister() -> None:
    """Take every attention implementation of this package out of Transformers again."""
    for module, _ in REGISTRATIONS:
        forget(module)
    if MODELING in sys.modules:
        from hf_attn_plugins.hf.compat import forget_attention

        for name in PLUGINS:
            forget_attention(name)


def register_attention() -> None:
    """Register every plugin's attention function and the mask function, under one name each.

    Raises:
        ImportError: Transformers is older than this package supports.
    """
    import transformers

    from hf_attn_plugins.hf.compat import refuse_old

    refuse_old(transformers.__version__)  # first: older versions lack what is imported next
    from transformers import AttentionInterface, AttentionMaskInterface

    from hf_attn_plugins.interface import attention_function
    from hf_attn_plugins.structure import mask_function

    for name in PLUGINS:
        # Both under one name: without a mask function Transformers hands over None and padding is lost silently.
        AttentionInterface.register(name, attention_function(name))
        AttentionMaskInterface.register(name, mask_function)


def _call(action: str) -> None:
    module, function = action.split(":")
    getattr(importlib.import_module(module), function)()
