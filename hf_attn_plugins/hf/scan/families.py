"""The families: every model type that Transformers' auto classes know, each with the one class that does most."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

# The first table that holds a model type gives its class: a head that generates before one that does not.
TABLES = {
    "SEQ_TO_SEQ_CAUSAL_LM": "seq2seq",
    "SPEECH_SEQ_2_SEQ": "seq2seq",
    "TEXT_TO_WAVEFORM": "audio",
    "TEXT_TO_SPECTROGRAM": "audio",
    "IMAGE_TEXT_TO_TEXT": "multimodal",
    "MULTIMODAL_LM": "multimodal",
    "MASKED_LM": "masked",
    "CAUSAL_LM": "causal",
    "CTC": "audio",
    "RNNT": "audio",
    "TDT": "audio",
    "AUDIO_XVECTOR": "audio",
    "AUDIO_FRAME_CLASSIFICATION": "audio",
    "AUDIO_CLASSIFICATION": "audio",
    "OBJECT_DETECTION": "vision",
    "ZERO_SHOT_OBJECT_DETECTION": "multimodal",
    "UNIVERSAL_SEGMENTATION": "vision",
    "MASK_GENERATION": "vision",
    "DEPTH_ESTIMATION": "vision",
    "MASKED_IMAGE_MODELING": "vision",
    "IMAGE_CLASSIFICATION": "vision",
    "VIDEO_CLASSIFICATION": "vision",
    "ZERO_SHOT_IMAGE_CLASSIFICATION": "multimodal",
    "TIME_SERIES_PREDICTION": "time series",
    "SEQUENCE_CLASSIFICATION": "masked",
    "TOKEN_CLASSIFICATION": "masked",
    "QUESTION_ANSWERING": "masked",
}
KINDS = ("causal", "masked", "seq2seq", "multimodal", "vision", "audio", "time series", "other")


@dataclass(frozen=True)
class Family:
    """A model type of Transformers, the class scanned for it and what kind of model it is (one of `KINDS`)."""

    name: str
    model_class: str
    kind: str


def families() -> list[Family]:
    """Every model type that some auto class builds, sorted by name."""
    from transformers.models.auto import configuration_auto, modeling_auto

    tables: dict[str, dict[str, Any]] = {
        table.removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES"): dict(getattr(modeling_auto, table))
        for table in dir(modeling_auto)
        if table.startswith("MODEL_") and table.endswith("_MAPPING_NAMES")
    }
    order = [*TABLES, *sorted(set(tables) - set(TABLES) - {"MODEL_MAPPING_NAMES"}), "MODEL_MAPPING_NAMES"]
    found = []
    for name in sorted(configuration_auto.CONFIG_MAPPING_NAMES):
        table = next((table for table in order if name in tables.get(table, {})), None)
        if table is not None:
            cls = tables[table][name]
            cls = cls if isinstance(cls, str) else cls[0]
            found.append(Family(name, cls, TABLES.get(table) or _kind(name, cls)))
    return found


def _kind(name: str, cls: str) -> str:
    """What a type without a head is, by its name: most are the towers of composite models."""
    words = f"{name} {cls}".lower()
    for kind, pattern in {
        "vision": "vision|image|vit|swin|dino|video|visual|backbone|resnet|sam|depth|pixel|ocr|seg|det",
        "audio": "audio|speech|wav|codec|encodec|mimi|codes|acoustic|vocoder|hifigan",
        "causal": "text|decoder|llm|language",
    }.items():
        if re.search(pattern, words):
            return kind
    return "other"


def config_class(family: Family) -> Any:
    """The family's config class."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[family.name]


def model_class(family: Family) -> Any:
    """The family's model class.

    Raises:
        ValueError: Transformers names a class that it does not have, or that needs a package that is not installed.
    """
    import transformers

    cls = getattr(transformers, family.model_class, None)
    if cls is None:
        raise ValueError(f"this Transformers names {family.model_class} but does not have it.")
    return cls
