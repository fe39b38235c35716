"""Indexed attention on a text: one vector per word, trained so that a misspelt word is closest to the correct word."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_attn_plugins.bench.timing import spread
from hf_attn_plugins.commands.bench.indexed.timing import interleaved
from hf_attn_plugins.indexed.modules import WordEncoder
from hf_attn_plugins.indexed.words import Vocabulary, by_frequency, misspell, words_of


def read_text(path: Path | None) -> tuple[str, str]:
    """A user's text, or the Python language reference that CPython ships; with the name to report.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no UTF-8 text.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(topics.values()), "the Python language reference (pydoc_data.topics)"
    if not path.is_file():
        raise FileNotFoundError(f"--text {path}: no such file.")
    try:
        return path.read_text(encoding="utf-8"), path.name
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path}: not UTF-8 text ({error}).") from error


def nearest(vectors: Tensor, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` rows of `vectors` (V, D) closest to each of `queries` (Q, D), by cosine.

    Returns:
        Cosines and row indices, each (Q, min(count, V)), the closest first.
    """
    scores = F.normalize(queries, dim=-1) @ F.normalize(vectors, dim=-1).T
    return scores.topk(min(count, len(vectors)), dim=-1)


def train(
    encoder: WordEncoder, vocabulary: Vocabulary, words: Sequence[str], steps: int, batch: int = 512, seed: int = 0
) -> list[float]:
    """Train the encoder so that a word and its misspelling have similar vectors; returns the losses.

    Each step takes `batch` words and misspells each anew. The loss is InfoNCE (arXiv 1807.03748) at temperature 0.05:
    all other words of the batch are wrong answers. Gradients flow through the tables.
    """
    generator, losses = random.Random(seed), []
    optimiser = torch.optim.AdamW((p for p in encoder.parameters() if p.requires_grad), lr=2e-3)
    encoder.train()
    for _ in range(steps):
        chosen = generator.sample(words, min(batch, len(words)))
        vectors = encoder(vocabulary.encode(chosen + [misspell(word, generator) for word in chosen]))
        right, wrong = F.normalize(vectors, dim=-1).chunk(2)
        loss = F.cross_entropy(wrong @ right.T / 0.05, torch.arange(len(chosen)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@dataclass(frozen=True)
class Settings:
    """Sizes of the demonstration.

    Attributes:
        width, heads: of the `WordEncoder`.
        steps: training steps.
        held_out: words that training does not see, at most a fifth of all.
        repeats: turns per form; the median counts.
        seed: random seed of weights, misspellings and held-out words.
    """

    width: int = 256
    heads: int = 4
    steps: int = 150
    held_out: int = 500
    repeats: int = 5
    seed: int = 0


def accuracy(encoder: WordEncoder, vocabulary: Vocabulary, words: list[str], held_out: list[str], seed: int) -> float:
    """The share (0 .. 1) of held-out words that are the nearest of all `words` to their own misspelling."""
    generator = random.Random(seed)
    place = {word: i for i, word in enumerate(words)}
    wanted = torch.tensor([place[word] for word in held_out])
    vectors = encoder(vocabulary.encode(words))
    _, found = nearest(vectors, encoder(vocabulary.encode([misspell(word, generator) for word in held_out])), 1)
    return (found[:, 0] == wanted).float().mean().item()


def run(text: str, queries: Sequence[str], settings: Settings | None = None) -> dict[str, Any]:
    """Encode every distinct word of `text`; time it, train on misspellings, and look for neighbours.

    Returns:
        Counts; seconds of the three forms for all distinct words; the largest difference between the direct form and
        the tables; the accuracy on words that training never saw; the nearest words of each query.

    Raises:
        ValueError: the text has fewer than 10 distinct words of three characters or more.
    """
    settings = settings or Settings()
    torch.manual_seed(settings.seed)
    all_words = words_of(text)
    distinct = [word for word in by_frequency(word.lower() for word in all_words) if len(word) >= 3]
    if len(distinct) < 10:
        raise ValueError(f"the text has {len(distinct)} distinct words of 3 characters or more: 10 are needed.")
    vocabulary = Vocabulary(length=min(32, max(map(len, distinct)) + 1))
    encoder = WordEncoder(vocabulary.size, vocabulary.length, settings.width, settings.heads, combiner="concatenate")
    held_out = random.Random(settings.seed).sample(distinct, min(settings.held_out, len(distinct) // 5))
    taught = sorted(set(distinct) - set(held_out))
    with torch.no_grad():
        before = accuracy(encoder.freeze(), vocabulary, distinct, held_out, settings.seed + 1)
    encoder.unfreeze()
    start = time.perf_counter()
    losses = train(encoder, vocabulary, taught, settings.steps, seed=settings.seed)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        after = accuracy(encoder.freeze(), vocabulary, distinct, held_out, settings.seed + 1)
        vectors = encoder(vocabulary.encode(distinct))
        scores, found = nearest(vectors, encoder(vocabulary.encode(list(queries))), 6)
        timing = _throughput(encoder, vocabulary.encode(distinct), settings.repeats)
    neighbours = {
        query: [(distinct[int(i)], round(float(s), 3)) for s, i in zip(row_scores, rows, strict=True)]
        for query, row_scores, rows in zip(queries, scores, found, strict=True)
    }
    return {
        "words": len(all_words),
        "distinct": len(distinct),
        "characters": vocabulary.size,
        "length": vocabulary.length,
        "width": settings.width,
        "heads": settings.heads,
        "steps": settings.steps,
        "train_seconds": seconds,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "held_out": len(held_out),
        "accuracy_before": before,
        "accuracy_after": after,
        "neighbours": neighbours,
        **timing,
    }


def _throughput(encoder: WordEncoder, indices: Tensor, repeats: int) -> dict[str, Any]:
    attention = encoder.attention

    def direct() -> Tensor:
        attention.form = "direct"
        # In pieces, because the direct form's query, key and value of all words would take gigabytes.
        return torch.cat([encoder(piece) for piece in indices.split(512)])

    def tables() -> Tensor:
        attention.form = "tables"
        attention.unfreeze()
        return encoder(indices)

    def frozen() -> Tensor:
        attention.form = "tables"
        if not attention.frozen:
            attention.freeze()
        return encoder(indices)

    error = (direct() - tables()).abs().max().item()
    found: dict[str, Any] = {}
    pairs = {"tables": tables, "frozen": frozen}
    for name, form in pairs.items():
        fast, slow = interleaved([form, direct], repeats)
        found[f"{name}_seconds"], found[f"direct_seconds_beside_{name}"] = map(statistics.median, (fast, slow))
        found[f"spread_{name}"] = spread(slow, fast)
    attention.form = "auto"
    return {**found, "error": error}
