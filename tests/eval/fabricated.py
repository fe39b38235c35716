"""Run folders made up for the tests of the report: the contract's files, with answers that no model gave."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_attn_plugins.eval.records import Agreement, Generation, Loss, Prediction, Sample, Speed

ATTENTIONS = (
    "sdpa",
    "tiled_attention",
    "cqs_attention:workers=7",
    "star_attention:block_size=512",
    "star_attention:block_size=256,anchor_size=64",
)
TASKS = ("niah_single_1", "niah_multikey_2", "vt", "cwe")
HOSTILE = '</script><script>document.title="broken"</script><!-- {{data}} \u2028 & "quoted" \\u003c'


def attention(label: str) -> dict[str, Any]:
    implementation, _, options = label.partition(":")
    pairs = (option.split("=") for option in options.split(",") if "=" in option)
    return {"label": label, "implementation": implementation, "options": {name: int(value) for name, value in pairs}}


def write(
    folder: Path,
    samples: Sequence[Sample],
    predictions: Sequence[Prediction],
    labels: Sequence[str] = ATTENTIONS,
    **config: Any,
) -> Path:
    """A run folder of these records."""
    folder.mkdir(parents=True, exist_ok=True)
    lengths, tasks = sorted({one.length for one in samples}), sorted({one.task for one in samples})
    filled = {"model": "tiny-model", "dtype": "bfloat16", "attn": [attention(label) for label in labels]}
    filled |= {"baseline": labels[0], "tasks": tasks, "lengths": lengths, "samples": 20, "seed": 0, **config}
    hardware = {"processor": "a processor", "threads": 2, "device": "cpu"}
    versions = {"python": "3.11", "torch": "2.8.0", "transformers": "5.0.0", "hf_attn_plugins": "0.1.0"}
    environment = {"hardware": hardware, "versions": versions, "threads": 2, "processes": 1}
    environment |= {"date": "2026-01-02T03:04:05", "command": ["hf-attn", "eval", "--model", "tiny-model"]}
    (folder / "config.json").write_text(json.dumps(filled), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    lines = {
        "samples": [dataclasses.asdict(one) for one in samples],
        "predictions": [one.as_dict() for one in predictions],
    }
    for name, records in lines.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def full(
    folder: Path,
    *,
    tasks: Sequence[str] = TASKS,
    lengths: Sequence[int] = (1024, 2048, 4096),
    count: int = 12,
    labels: Sequence[str] = ATTENTIONS,
    speed: bool = True,
    agreement: bool = True,
    seed: int = 0,
) -> Path:
    """A run of every kind of record: exact attentions repeat the baseline's answers, star fails more at length."""
    chance = random.Random(seed)
    samples: list[Sample] = []
    predictions: list[Prediction] = []
    for task in tasks:
        for length in lengths:
            for index in range(count):
                depth = round(index % 5 / 4, 2) if task.startswith("niah") else None
                samples.append(question(task, length, index, depth, chance))
                predictions += answers(samples[-1], labels, chance)
    if agreement:
        for length in lengths:
            samples += [
                Sample(f"text/{kind}/{length}/0000", kind, "text", length, length) for kind in ("ppl", "agreement")
            ]
            predictions += texts(length, labels)
    if speed:
        predictions += timings(lengths, labels, chance)
    return write(folder, samples, predictions, labels)


def question(task: str, length: int, index: int, depth: float | None, chance: random.Random) -> Sample:
    number = str(chance.randrange(10**6, 10**7))
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 5
    tail = f"{noise}\nWhat is the special magic number for wandering-{index}? The special magic number is"
    name = f"ruler/{task}/{length}/{index:04d}"
    return Sample(
        name, task, "ruler", length, length - 130 - index, depth, [number], tail[-600:], "all", 128, f"d{index}"
    )


def answers(sample: Sample, labels: Sequence[str], chance: random.Random) -> list[Generation]:
    hard = {"vt": 0.25, "cwe": 0.45}.get(sample.task, 0.05) + sample.length / 40000
    right = chance.random() > hard
    made = []
    for label in labels:
        kept = right
        if label.startswith("star"):
            kept = right and chance.random() > 0.08 + sample.length / 25000 * (2 if "256" in label else 1)
        number = sample.references[0] if kept else sample.references[0][:3] + "9999"
        tokens = [100, 101, *(200 + int(digit) for digit in number)]
        seconds = {"prefill": sample.length / 2000, "first_token": sample.length / 2000, "decode": 1.0, "total": 2.0}
        text = f" {number}. The special magic number mentioned in the text is {number}, as it was written there."
        made.append(
            Generation(
                sample.sample, label, None, text, tokens, float(kept), seconds, len(tokens), sample.tokens, 2**28
            )
        )
    return made


def texts(length: int, labels: Sequence[str]) -> list[Prediction]:
    made: list[Prediction] = []
    edges = [(at, at + length // 8) for at in range(0, length, length // 8)]
    for label in labels:
        worse = 0.12 if label.startswith("star") else 0.0
        losses = [2.9 - 0.05 * index + worse * (index > 1) for index in range(8)]
        buckets = [
            {"begin": a, "end": b, "nll_sum": nll * (b - a), "count": b - a} for nll, (a, b) in zip(losses, edges)
        ]
        total = sum(bucket["nll_sum"] for bucket in buckets)
        made.append(Loss(f"text/ppl/{length}/0000", label, None, total, length, buckets, {"prefill": length / 2000}))
        if label != labels[0]:
            kl = {"mean": worse or 1.9e-3, "median": 1e-3, "p99": 0.02, "max": 0.5 + worse}
            close = [
                {
                    "begin": a,
                    "end": b,
                    "kl": (worse * (1 + i / 8)) or 2e-3,
                    "top1": 0.97,
                    "nll": nll,
                    "baseline_nll": nll - worse,
                    "count": b - a,
                }
                for i, (nll, (a, b)) in enumerate(zip(losses, edges))
            ]
            made.append(
                Agreement(f"text/agreement/{length}/0000", label, None, length, kl, 0.97, 0.01, worse, 0.002, close)
            )
    return made


def timings(lengths: Sequence[int], labels: Sequence[str], chance: random.Random) -> list[Speed]:
    made = []
    for length in lengths:
        for round_ in range(3):
            for label in labels:
                factor = {"tiled": 1.2, "star_": 1.1 + length / 3500, "cqs_a": 0.95}.get(
                    label[:5], 1.0
                ) * chance.uniform(0.97, 1.03)
                seconds = {
                    "prefill": length / 1800 / factor,
                    "first_token": length / 1800 / factor + 0.05,
                    "decode_per_token": 0.04,
                }
                name = f"speed/speed/{length}/{round_:04d}"
                made.append(Speed(name, label, None, length, round_, seconds, int(2**20 * (200 + length / 8 / factor))))
    return made
