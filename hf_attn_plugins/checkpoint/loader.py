"""Bring first-layer tables back at load: Transformers' own hook for methods named in a config's quantization_config.

A checkpoint whose config names the method "hf_attn_first_layer" is loaded as ever, then the tables are attached and
every trace of quantisation is removed: nothing is quantised. Without this package Transformers warns of an unknown
method and loads the same checkpoint without its tables, with the same outputs.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_attn_plugins.checkpoint import fingerprint
from hf_attn_plugins.checkpoint.attach import attach
from hf_attn_plugins.checkpoint.places import Places
from hf_attn_plugins.hf.compat import quantizer_base, quantizer_tables

logger = logging.getLogger("hf_attn_plugins")
METHOD = "hf_attn_first_layer"
TABLES = "hf_attn_first_layer.safetensors"


class FirstLayerConfig(QuantizationConfigMixin):
    """What config.json holds under quantization_config: the places, and the tables' file and dtype."""

    def __init__(
        self,
        decoder: str,
        embedding: str,
        norm: str | None,
        projections: list[str],
        tables: str = TABLES,
        **kwargs: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        self.decoder, self.embedding, self.norm, self.projections = decoder, embedding, norm, projections
        self.tables = tables

    def places(self) -> Places:
        """The module paths."""
        return Places(self.decoder, self.embedding, self.norm, tuple(self.projections))


class FirstLayerLoader(quantizer_base()):  # type: ignore[misc]
    """Attaches the tables once the weights are loaded."""

    quantization_config: FirstLayerConfig

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        """Leave the skeleton as it is."""

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Attach the tables and leave a plain model behind."""
        for holder, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
            if hasattr(holder, name):
                delattr(holder, name)
        try:
            self._attach(model)
        except (AttributeError, KeyError, OSError, ValueError) as error:
            # The model is right without its tables, only not faster: a load must not fail for their sake.
            logger.warning("first-layer tables not used: %s", error)
        return model

    def _attach(self, model: Any) -> None:
        from safetensors.torch import load_file

        places = self.quantization_config.places()
        path = cached_file(model.name_or_path, self.quantization_config.tables)
        assert path is not None  # cached_file raises OSError unless it is asked not to
        tables = load_file(path)
        missing = [key for key in fingerprint.KEYS if key not in tables]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}: undo the patch and make it anew")
        prefix = model.base_model_prefix + "."
        if not hasattr(model, model.base_model_prefix):  # the bare model of a checkpoint made with a head
            tables = {path.removeprefix(prefix): table for path, table in tables.items()}
            places = Places(
                places.decoder.removeprefix(prefix.rstrip(".")),
                places.embedding.removeprefix(prefix),
                None if places.norm is None else places.norm.removeprefix(prefix),
                tuple(path.removeprefix(prefix) for path in places.projections),
            )
        attach(model, places, tables)

    def is_serializable(self) -> bool:
        """Saving writes the plain model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Training computes without tables."""
        return True


# Transformers refuses a second quantization_config with this name in its one line of text: the name has to be the hint.
FirstLayerConfig.__name__ = (
    "FirstLayerConfig (first-layer tables, no quantisation: `hf-attn patch --undo DIR` takes them out, then quantise)"
)


def register() -> None:
    """Make the method known to Transformers. Idempotent."""
    configs, quantizers = quantizer_tables()
    configs[METHOD], quantizers[METHOD] = FirstLayerConfig, FirstLayerLoader
