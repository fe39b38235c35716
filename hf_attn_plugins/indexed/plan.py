"""The costs of the direct form and of the table form of indexed attention, and which form is cheaper. Integers only."""

from __future__ import annotations

from dataclasses import dataclass

# Reading or writing one element by an index takes the time of about this many multiply-adds of a matrix product
# (measured on CPUs with AVX-512: 0.25 ns against 95e9 multiply-adds per second).
MOVE = 20


@dataclass(frozen=True)
class CallSizes:
    """The sizes of one call of indexed attention.

    Attributes:
        words: W, rows of character indices.
        length: L, characters of a word, padding included; also the number of positions.
        characters: n, rows of the character table.
        width: d, columns of the character table and of the positions.
        heads: H.
        head_dim: columns of one head's query, key and value; None means d // H.
    """

    words: int
    length: int
    characters: int
    width: int
    heads: int = 1
    head_dim: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("words", 0), ("length", 1), ("characters", 1), ("width", 1), ("heads", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least} is needed.")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width={self.width} is no multiple of heads={self.heads}: pass head_dim as well.")

    @property
    def dim(self) -> int:
        """Columns of one head."""
        return self.head_dim or self.width // self.heads

    @property
    def rows(self) -> int:
        """n + L, the rows of every table: characters first, then positions."""
        return self.characters + self.length


@dataclass(frozen=True)
class Cost:
    """The cost of one call.

    Attributes:
        projections, scores, values: multiply-adds of the matrix products of each stage.
        moves: elements read or written by index.
    """

    projections: int
    scores: int
    values: int
    moves: int

    @property
    def total(self) -> int:
        """Multiply-adds, with each moved element counted as `MOVE` multiply-adds."""
        return self.projections + self.scores + self.values + MOVE * self.moves


def direct_cost(sizes: CallSizes) -> Cost:
    """Index first: all W x L characters are projected; then W x L x L scores and one pooled row per word and head."""
    s, tokens = sizes, sizes.words * sizes.length
    return Cost(
        projections=3 * tokens * s.width * s.heads * s.dim,
        scores=tokens * s.length * s.heads * s.dim,
        values=tokens * s.heads * s.dim,
        moves=tokens * s.width,
    )


def table_cost(sizes: CallSizes, frozen: bool = False) -> Cost:
    """Project first: n + L rows are projected once (not at all if `frozen`); scores and pooled values are looked up."""
    s, tokens, build = sizes, sizes.words * sizes.length, 0 if frozen else 1
    moves_per_row = min(s.rows + s.length, 6 * s.length)  # whole rows are copied, or single scores are looked up
    return Cost(
        projections=build * 3 * s.rows * s.width * s.heads * s.dim,
        scores=build * s.rows * s.rows * s.heads * s.dim,
        values=s.words * s.heads * s.rows * s.dim,
        moves=tokens * s.heads * moves_per_row,
    )


def prefers_tables(sizes: CallSizes, frozen: bool = False) -> bool:
    """Whether the table form costs less. The direct form costs less for few words and for large character sets."""
    return table_cost(sizes, frozen).total < direct_cost(sizes).total
