"""Indexed attention as modules. In training the tables are built at every call; for inference they can be frozen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_attn_plugins.core.compat import version_of
from hf_attn_plugins.core.gradient import needs_gradient
from hf_attn_plugins.indexed.attention import indexed_attention
from hf_attn_plugins.indexed.combine import Concatenate, Stack2D
from hf_attn_plugins.indexed.direct import direct_attention
from hf_attn_plugins.indexed.plan import CallSizes, prefers_tables
from hf_attn_plugins.indexed.tables import Projections, Tables, build_tables, sinusoids

FORMS = ("auto", "tables", "direct")


class _Kept(NamedTuple):
    """Frozen tables, the tensors that they were built from, and the version counters of these tensors."""

    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]
    tables: Tables


class IndexedCharacterAttention(nn.Module):
    """Multi-head ISDPA over the characters of words; each head's vector is its mean over the word's positions.

    Args:
        width: d, columns of the character and position tables.
        heads: H.
        head_dim: columns of a head; None means d // H.
        tie_positions: project positions with the weights of the characters; False gives positions their own weights.
        padding_index: the padding character, which is left out; None treats it as any other character.
        form: "tables", "direct", or "auto" for the cheaper of the two by `plan.prefers_tables`.

    Raises:
        ValueError: an unknown form, or a width that the heads do not divide while head_dim is None.
    """

    def __init__(
        self,
        width: int,
        heads: int = 1,
        head_dim: int | None = None,
        *,
        tie_positions: bool = False,
        padding_index: int | None = 0,
        form: str = "auto",
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form={form!r} is unknown: choose one of {', '.join(FORMS)}.")
        self.width, self.heads, self.head_dim = width, heads, CallSizes(0, 1, 1, width, heads, head_dim).dim
        self.padding_index, self.form, self.frozen = padding_index, form, False
        columns = heads * self.head_dim
        self.query, self.key, self.value = (nn.Linear(width, columns, bias=False) for _ in range(3))
        self.position_query = self.position_key = self.position_value = None
        if not tie_positions:
            self.position_query, self.position_key, self.position_value = (
                nn.Linear(width, columns, bias=False) for _ in range(3)
            )
        self._kept: _Kept | None = None

    def weights(self) -> tuple[Projections, Projections | None]:
        """The projections of characters, and those of positions (None when tied)."""
        own = Projections(self.query.weight, self.key.weight, self.value.weight)
        if self.position_query is None or self.position_key is None or self.position_value is None:
            return own, None
        return own, Projections(self.position_query.weight, self.position_key.weight, self.position_value.weight)

    def freeze(self) -> IndexedCharacterAttention:
        """Keep the tables between calls that need no gradient. They are built again after a weight has changed.

        The version counter or the storage of a tensor shows a change: optimizer steps, `load_state_dict`, `.to()` and
        in-place edits are noticed. An edit through `weight.data` is not: call `freeze()` again after it.
        """
        self.frozen, self._kept = True, None
        return self

    def unfreeze(self) -> IndexedCharacterAttention:
        """Undo `freeze`: build the tables at every call."""
        self.frozen, self._kept = False, None
        return self

    def forward(self, indices: Tensor, characters: Tensor, positions: Tensor) -> Tensor:
        """Attend within each word.

        Args:
            indices: (W, L') integers in [0, n), L' <= L.
            characters: (n, d) character table.
            positions: (L, d) position table.

        Returns:
            (W, H, head_dim); zeros for a word of padding only.

        Raises:
            ValueError: words longer than L, or indices that are no integer matrix.
        """
        own, of_positions = self.weights()
        sources = (characters, positions, *own, *(of_positions or ()))
        frozen = self.frozen and not needs_gradient(*sources) and not torch.compiler.is_compiling()
        length = len(positions) if indices.ndim != 2 else min(max(indices.shape[1], 1), len(positions))
        sizes = CallSizes(len(indices), length, len(characters), self.width, self.heads, self.head_dim)
        if self.form == "direct" or (self.form == "auto" and not prefers_tables(sizes, frozen)):
            return direct_attention(
                characters, positions, indices, own, of_positions, heads=self.heads, padding_index=self.padding_index
            )
        if frozen:
            tables = self._kept_tables(sources, own, of_positions)
        else:
            tables = build_tables(characters, positions[:length], own, of_positions, heads=self.heads)
        return indexed_attention(tables, indices, padding_index=self.padding_index)

    def _kept_tables(self, sources: tuple[Tensor, ...], own: Projections, of_positions: Projections | None) -> Tables:
        # Tensors made in inference mode have no version counter. A change would go unnoticed, so tables are not reused.
        versions = tuple(map(version_of, sources))
        kept = self._kept
        if kept is not None and -1 not in versions and versions == kept.versions:
            # `kept.sources` keeps its storage alive, so that an equal address means the same storage.
            same = (a.data_ptr() == b.data_ptr() and a.dtype == b.dtype for a, b in zip(sources, kept.sources))
            if all(same):
                return kept.tables
        with torch.no_grad():
            tables = build_tables(sources[0], sources[1], own, of_positions, heads=self.heads)
        self._kept = _Kept(tuple(tensor.detach() for tensor in sources), versions, tables)
        return tables

    def __getstate__(self) -> dict[str, object]:
        """Leave the tables out of copies and pickles; they are built again at the first call."""
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        """The sizes and settings for `print(module)`."""
        padding, form, frozen = self.padding_index, self.form, self.frozen
        return f"heads={self.heads}, head_dim={self.head_dim}, padding_index={padding}, form={form!r}, frozen={frozen}"


class WordEncoder(nn.Module):
    """From character indices to one vector per word: embedding, positions, indexed attention, combiner.

    Args:
        characters: n, padding included.
        length: L, the longest word in characters.
        width: d.
        heads, head_dim, tie_positions, padding_index, form: as in `IndexedCharacterAttention`.
        combiner: "concatenate" (vectors of `width`) or "stack" (`combine.Stack2D`, vectors of head_dim * outputs).
        hidden, outputs: the 2-D stack's sizes.
        learned_positions: train the positions instead of keeping the sinusoids.

    Raises:
        ValueError: an unknown combiner or form, or sizes that do not fit.
    """

    def __init__(
        self,
        characters: int,
        length: int,
        width: int,
        heads: int = 1,
        head_dim: int | None = None,
        *,
        combiner: str = "stack",
        hidden: int = 16,
        outputs: int = 1,
        learned_positions: bool = False,
        tie_positions: bool = False,
        padding_index: int | None = 0,
        form: str = "auto",
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width, padding_idx=padding_index)
        self.positions = nn.Parameter(sinusoids(length, width), requires_grad=learned_positions)
        self.attention = IndexedCharacterAttention(
            width, heads, head_dim, tie_positions=tie_positions, padding_index=padding_index, form=form
        )
        self.combiner: nn.Module
        if combiner == "stack":
            self.combiner, self.output_size = Stack2D(heads, hidden, outputs), self.attention.head_dim * outputs
        elif combiner == "concatenate":
            self.combiner, self.output_size = Concatenate(heads, self.attention.head_dim, width), width
        else:
            raise ValueError(f"combiner={combiner!r} is unknown: choose 'stack' or 'concatenate'.")

    def forward(self, indices: Tensor) -> Tensor:
        """Encode (W, L') integer indices into (W, output_size)."""
        return self.combiner(self.attention(indices, self.embedding.weight, self.positions))

    def freeze(self) -> WordEncoder:
        """Evaluation mode with frozen tables; see `IndexedCharacterAttention.freeze`."""
        self.eval()
        self.attention.freeze()
        return self

    def unfreeze(self) -> WordEncoder:
        """Undo `freeze`; the module stays in evaluation mode."""
        self.attention.unfreeze()
        return self
