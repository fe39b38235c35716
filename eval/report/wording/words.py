"""What the words of a report mean, for those who meet them the first time."""

from __future__ import annotations

MEANINGS = {
    "score": "share of right answers, mean over tasks and lengths; below ten samples a count, because a percentage of "
    "so few says little.",
    "difference": "score less the baseline's on the same prompts, in points (hundredths), with its 95 % interval; zero "
    "inside the interval means that chance can explain it.",
    "reference less likely": "by how much a token of the right answer loses log-likelihood (nats) against the "
    "baseline. 0.01 is nothing, 0.1 is about 10 % less likely.",
    "KL": "how far the predicted probabilities are from the baseline's, in nats, mean over all positions of a text. 0 "
    "is equal, 0.002 is what rounding to bfloat16 makes, below 0.01 answers rarely change, above 0.1 they do.",
    "perplexity": "how surprised the model is by a real text; lower is better. Its ratio to the baseline's: 1.02 is "
    "2 % worse.",
    "speed-up": "seconds of the baseline over seconds of this attention in the same round; above 1 is faster. In "
    "brackets the slowest and the fastest round: where they lie on both sides of 1, the difference is within noise.",
    "prefill": "reading the prompt, before the first token is generated; decoding is everything after it.",
}

# Beginnings of task names and what is asked there; the first that fits counts.
TASKS = (
    ("niah_single", "one number hidden in a long text"),
    ("niah_multikey", "one number hidden among many others"),
    ("niah_multivalue", "several numbers hidden under one name"),
    ("niah_multiquery", "several hidden numbers are asked for"),
    ("passkey", "one number hidden in a long text"),
    ("vt", "assignments of variables followed through a long text"),
    ("cwe", "the most common words of a long list"),
    ("fwe", "the most frequent invented words"),
    ("qa_", "a question, its answer in one of many documents"),
    ("ppl", "predict a real text"),
    ("agreement", "predict a real text"),
)


def task_meaning(name: str) -> str:
    """What a task asks, in a few words; empty where it is not known."""
    return next((meaning for beginning, meaning in TASKS if name.startswith(beginning)), "")
