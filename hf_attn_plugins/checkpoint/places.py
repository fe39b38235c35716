"""Where in a model first-layer tables act."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Places:
    """Where in a model the tables act, as module paths.

    Attributes:
        decoder: the module that is called with token ids and owns the layers.
        embedding: the input embedding.
        norm: the norm whose output the projections read, or None where they read the layer's bare input.
        projections: the first layer's query, key and value projections (fused ones count as one).
    """

    decoder: str
    embedding: str
    norm: str | None
    projections: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "projections": list(self.projections)}
