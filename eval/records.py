"""The run folder of `hf-attn eval`: its records, how they are written so that nothing is lost, and how they are read.

config.json, environment.json and metrics.json are whole files, replaced at once. samples.jsonl and predictions.jsonl
are append-only, one JSON object a line, each line on disk before the next sample starts. Under `accelerate launch`
every process appends to files of its own: process 0 to samples.jsonl and predictions.jsonl, process r to
samples-r.jsonl and predictions-r.jsonl; reading merges them. Where a (sample, attn) was recorded twice, the later line
counts.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from hf_attn_plugins.core.staging import put

PROMPT_TAIL = 600  # characters of a prompt's end that are kept; the context itself is never stored


@dataclass(frozen=True)
class Sample:
    """What was asked: one line of samples.jsonl.

    Attributes:
        sample: "suite/task/length/index", unique in a run.
        length: tokens asked for, the generation budget included where the suite counts it so.
        tokens: tokens of the prompt.
        depth: place of the needle in the context, 0.0 (head) - 1.0 (tail), or None.
        metric: name of the function in `metrics.METRICS` that scores a prediction, "" where nothing is scored.
        digest: sha256 of the prompt's token ids.
    """

    sample: str
    task: str
    suite: str
    length: int
    tokens: int
    depth: float | None = None
    references: list[str] = field(default_factory=list)
    prompt_tail: str = ""
    metric: str = ""
    max_new_tokens: int = 0
    digest: str = ""


@dataclass(frozen=True)
class Prediction:
    """What came back for one (sample, attn): base of the four kinds. With an `error`, the other fields are empty.

    plan: what the attention did, in words, such as "dense: 1024 tokens, below 2048"; None where it is not known.
    """

    kind: ClassVar[str] = ""
    sample: str
    attn: str
    error: str | None = None
    plan: str | None = field(default=None, kw_only=True)

    def as_dict(self) -> dict[str, Any]:
        """The line of predictions.jsonl, JSON-ready."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Generation(Prediction):
    """Greedy tokens and their score, 0.0 - 1.0; seconds: prefill, first_token, decode, total.

    `first_token` is the time to the first token (prefill included), `decode` the time of all later ones.
    `reference_nll` is the negative log-likelihood in nats of the sample's reference answer behind the same prompt,
    summed over its `reference_tokens` tokens; None where it was not measured.
    """

    kind: ClassVar[str] = "generation"
    prediction: str | None = None
    token_ids: list[int] = field(default_factory=list)
    score: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    new_tokens: int = 0
    prompt_tokens: int = 0
    peak_bytes: int | None = None
    reference_nll: float | None = None
    reference_tokens: int = 0


@dataclass(frozen=True)
class Loss(Prediction):
    """Negative log-likelihood in nats, summed over `count` predicted tokens.

    buckets: {"begin", "end", "nll_sum", "count"} by position of the predicting token; seconds: prefill.
    """

    kind: ClassVar[str] = "loss"
    nll_sum: float | None = None
    count: int = 0
    buckets: list[dict[str, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Agreement(Prediction):
    """Next-token distributions against the baseline's, at every position of one text.

    Attributes:
        kl: KL(baseline || attn) in nats: mean, median, p99, max. top1: share of positions with the same first choice.
        rms_dp: root mean square difference of the probability of the true next token.
        log_ppl_ratio: mean over tokens of log p_baseline - log p_attn, and its standard error.
        buckets: {"begin", "end", "kl", "top1", "nll", "baseline_nll", "count"}, means by position.
    """

    kind: ClassVar[str] = "agreement"
    positions: int = 0
    kl: dict[str, float] = field(default_factory=dict)
    top1: float | None = None
    rms_dp: float | None = None
    log_ppl_ratio: float | None = None
    log_ppl_ratio_se: float | None = None
    buckets: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Speed(Prediction):
    """One timed round; seconds: prefill, first_token (prefill included), decode_per_token."""

    kind: ClassVar[str] = "speed"
    length: int = 0
    round: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None


KINDS: dict[str, type[Prediction]] = {kind.kind: kind for kind in (Generation, Loss, Agreement, Speed)}


class RunFolder:
    """The files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read_json(self, name: str) -> dict[str, Any]:
        """The whole of `name`.json.

        Raises:
            ValueError: the folder has no such file, or it holds no JSON object.
        """
        path = self.path / f"{name}.json"
        try:
            value = json.loads(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError as error:
            raise ValueError(f"{self.path} is no folder of an evaluation: {path.name} is missing.") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}.") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path} holds no JSON object.")
        return value

    def write_json(self, name: str, value: Mapping[str, Any]) -> Path:
        """Replace `name`.json as a whole."""
        return self.write_text(f"{name}.json", json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> Path:
        """Replace the file `name` as a whole: a reader sees the old text or the new one, never a part."""
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / name
        put(path, lambda file: file.write_text(text, encoding="utf-8"))
        return path

    def samples(self) -> dict[str, Sample]:
        """Every sample by its name, in the order of their names."""
        found = {}
        for line in self._lines("samples"):
            sample = _record(Sample, line)
            found[sample.sample] = sample
        return dict(sorted(found.items()))

    def predictions(self) -> dict[tuple[str, str], Prediction]:
        """Every prediction by (sample, attn), in the order of the samples' names and as they were recorded."""
        found: dict[tuple[str, str], Prediction] = {}
        for line in self._lines("predictions"):
            kind = line.pop("kind", None)
            if kind not in KINDS:
                raise ValueError(f"{self.path}: a prediction of kind {kind!r}; known are {', '.join(KINDS)}.")
            prediction = _record(KINDS[kind], line)
            found[prediction.sample, prediction.attn] = prediction
        return dict(sorted(found.items(), key=lambda item: item[0][0]))

    def appender(self, name: str, process: int = 0) -> Appender:
        """The file that process number `process` appends "samples" or "predictions" to."""
        self.path.mkdir(parents=True, exist_ok=True)
        return Appender(self.path / (f"{name}-{process}.jsonl" if process else f"{name}.jsonl"))

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        parts = [p for p in self.path.glob(f"{name}-*.jsonl") if p.stem.removeprefix(f"{name}-").isdigit()]
        for path in (self.path / f"{name}.jsonl", *sorted(parts)):
            if path.is_file():
                yield from read_lines(path)


class Appender:
    """Context manager that appends JSON lines; each is on disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Appender:
        _drop_torn_line(self.path)
        self._file = open(self.path, "a", encoding="utf-8")
        return self

    def append(self, record: Sample | Prediction) -> None:
        """Write one line and wait until it is on disk."""
        value = record.as_dict() if isinstance(record, Prediction) else dataclasses.asdict(record)
        self._file.write(json.dumps(value, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line; a torn last line, left by an interruption, is dropped.

    Raises:
        ValueError: a line before the last is no JSON object; the message says which.
    """
    lines = path.read_bytes().split(b"\n")
    whole = lines[:-1]  # what follows the last newline is either nothing or torn
    for number, line in enumerate(whole, 1):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            if number == len(whole):
                return
            raise ValueError(f"{path}, line {number}: {error}.") from error
        yield value


def _drop_torn_line(path: Path) -> None:
    if not path.is_file():
        return
    kept = sum(1 for _ in read_lines(path))
    data = path.read_bytes()
    end = 0
    for _ in range(kept):
        end = data.index(b"\n", end) + 1
    if end < len(data):
        with open(path, "r+b") as file:
            file.truncate(end)


def _record(kind: type[Any], line: Mapping[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(kind)}
    try:
        return kind(**{name: value for name, value in line.items() if name in known})
    except TypeError as error:
        raise ValueError(f"a {kind.__name__} record lacks fields: {error}.") from error
