"""What a run is: defaults, under a YAML file, under the command line's flags; checked before work begins."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from hf_attn_plugins.hf.inputs.arguments import DEMO, DTYPES, Attention, attention, split_attn
from hf_attn_plugins.hf.inputs.texts import read_text

from .arguments import CHATS
from .baselines import BASELINES
from .tasks import names_of
from .tasks.paths import split_paths


@dataclass(frozen=True)
class Configuration:
    """Everything that decides a run's results, and where they go.

    Attributes:
        attn: the implementations; `baseline` is the label of the one the others are compared with.
        samples: of each task at each length, as far as a data set has them; text_samples: windows of a text.
        rounds: timed rounds of the task speed, decode_tokens: tokens generated in each.
        max_new_tokens: generation budget for all tasks, in place of each benchmark's own.
        text: source of the text tasks; haystack: of essays and documents, several with commas; data: suite -> source.
        chat: "auto" (the chat template where the tokenizer has one), "yes" or "no".
        template_args: variables of the chat template, such as {"enable_thinking": False}.
        device_map, revision, trust_remote_code: how the model is loaded, as in `from_pretrained`.
        max_positions: the longest text that the model can take, where its config says less.
        context_parallel: one sample over all processes, instead of samples dealt to processes.
        online: whether models and data sets may be downloaded.
    """

    model: str = DEMO
    dtype: str = "bfloat16"
    device: str | None = None
    attn: tuple[Attention, ...] = (Attention("sdpa", "sdpa"), Attention("tiled_attention", "tiled_attention"))
    baseline: str = ""
    tasks: tuple[str, ...] = ("ruler", "ppl", "agreement", "speed")
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    samples: int = 20
    text_samples: int = 4
    rounds: int = 3
    decode_tokens: int = 32
    seed: int = 42
    max_new_tokens: int | None = None
    text: str | None = None
    haystack: str | None = None
    data: dict[str, str] = field(default_factory=dict)
    chat: str = "auto"
    template_args: dict[str, Any] = field(default_factory=dict)
    device_map: str | dict[str, Any] | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    max_positions: int | None = None
    context_parallel: bool = False
    online: bool = False
    out: str = "runs/eval"

    def __post_init__(self) -> None:
        for name in ("model", "device", "baseline", "text", "haystack", "revision", "out"):
            value = getattr(self, name)
            if not isinstance(value, str | os.PathLike) and not (value is None and name not in ("model", "out")):
                raise ValueError(f"{name}={value!r}: text is needed; in YAML, in quotes.")
        if not isinstance(self.device_map, str | Mapping | None):
            raise ValueError(f"device_map={self.device_map!r}: a word, or modules and their devices, are needed.")
        for name in ("samples", "text_samples", "rounds", "max_new_tokens"):
            _whole(name, getattr(self, name), 1, name == "max_new_tokens")
        _whole("decode_tokens", self.decode_tokens, 2)
        _whole("max_positions", self.max_positions, 2, optional=True)
        _whole("seed", self.seed, 0)
        for length in self.lengths:
            _whole("lengths", length, 2)
        if not self.lengths or not self.attn:
            raise ValueError("lengths and attn need at least one entry each.")
        for name, allowed in (("dtype", DTYPES), ("chat", CHATS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(allowed)}.")
        labels = [attention.label for attention in self.attn]
        if len(set(labels)) < len(labels):
            raise ValueError(f"attn names {', '.join(labels)}: each can be evaluated once.")
        if self.baseline and self.baseline not in labels:
            raise ValueError(f"baseline={self.baseline!r} is not among attn: {', '.join(labels)}.")
        object.__setattr__(self, "baseline", self.baseline or labels[0])
        object.__setattr__(self, "tasks", tuple(names_of(list(self.tasks))))
        object.__setattr__(self, "lengths", tuple(dict.fromkeys(self.lengths)))

    def as_dict(self) -> dict[str, Any]:
        """config.json; `out` is left out, so that a run folder can be moved."""
        value = dataclasses.asdict(self)
        del value["out"]
        return {name: list(v) if isinstance(v, tuple) else v for name, v in value.items()}


def configuration(file: str | None, flags: Mapping[str, Any]) -> Configuration:
    """A configuration from a YAML file and flags; a flag that is None was not given.

    Args:
        file: a path, or the name of a configuration that the package carries ("default", "demo").

    Raises:
        ValueError: an unknown key or a bad value; the message says which.
    """
    values = dict(_yaml(file)) if file else {}
    if file and "out" not in values:
        values["out"] = f"runs/{Path(file).stem}"
    values |= {name: value for name, value in flags.items() if value is not None}
    known = {f.name: f for f in dataclasses.fields(Configuration)}
    unknown = sorted(str(name) for name in values if name not in known)
    if unknown:
        raise ValueError(f"configuration has no key {', '.join(unknown)}: known are {', '.join(known)}.")
    values = {name: _value(name, value) for name, value in values.items()}
    return Configuration(**values)


def attentions(words: Sequence[Any]) -> tuple[Attention, ...]:
    """Entries of --attn: "name" or "name:option=value,option=value".

    Raises:
        ValueError: an unknown implementation, option or value.
    """
    return tuple(attention(str(word), BASELINES) for word in words)


def _value(name: str, value: Any) -> Any:
    """A value of the configuration from what YAML or a flag holds."""
    if name == "attn":
        return attentions(split_attn(value) if isinstance(value, str) else _list(name, value))
    if name in ("tasks", "lengths"):
        words = [part.strip() for part in value.split(",")] if isinstance(value, str) else _list(name, value)
        return tuple(_number(name, word) if name == "lengths" else str(word) for word in words if word != "")
    if name == "haystack" and isinstance(value, list):
        return ",".join(map(str, value))
    if name == "data":
        return _sources(value)
    if name == "template_args":
        return _template_args(value)
    if name in ("context_parallel", "online", "trust_remote_code") and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: true or false is needed.")
    return value


def _sources(value: Any) -> dict[str, str]:
    if isinstance(value, Mapping):
        found = {str(suite): str(source) for suite, source in value.items()}
    else:
        pairs = [word.partition("=") for word in split_paths(str(value)) if word]
        if not all(sign and source for _, sign, source in pairs):
            raise ValueError(f"data={value!r}: write suite=folder, for example longbench=data/LongBench.")
        found = {suite: source for suite, _, source in pairs}
    suites = ("longbench", "longbench_v2", "infinitebench", "babilong")
    unknown = sorted(set(found) - set(suites))
    if unknown:
        raise ValueError(f"data names the suite {', '.join(unknown)}: known are {', '.join(suites)}.")
    return found


def _template_args(value: Any) -> dict[str, Any]:
    """Words name=value, or a mapping: numbers, true, false, null, lists and objects as in JSON, the rest as text."""
    if isinstance(value, Mapping):
        return {str(name): one for name, one in value.items()}
    found: dict[str, Any] = {}
    for word in value if isinstance(value, list) else [value]:
        name, sign, text = str(word).partition("=")
        if not sign or not name.isidentifier():
            raise ValueError(f"--template-arg {word}: write NAME=VALUE, for example enable_thinking=false.")
        try:
            found[name] = json.loads(text.lower() if text.lower() in ("true", "false") else text)
        except ValueError:
            found[name] = None if text == "None" else text
    return found


def _list(name: str, value: Any) -> list[Any]:
    if isinstance(value, int):
        return [value]
    if not isinstance(value, list):
        raise ValueError(f"{name}={value!r}: a list is needed.")
    return value


def _number(name: str, word: Any) -> int:
    try:
        if isinstance(word, int | str) and not isinstance(word, bool):
            return int(word)
    except ValueError:
        pass
    raise ValueError(f"{name}={word!r}: a whole number is needed.")


def _whole(name: str, value: Any, least: int, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: a whole number of at least {least} is needed.")


def _refuse_duplicates(node: Any) -> None:
    """Raise ValueError where the outermost mapping of a YAML tree names a key twice: YAML would take the last."""
    pairs = node.value if getattr(node, "id", None) == "mapping" else []
    names = [key.value for key, _ in pairs if isinstance(key.value, str)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is there twice: keep one.")


def _yaml(file: str) -> Mapping[str, Any]:
    import yaml

    path: Any = Path(file)
    if not path.is_file() and "/" not in file and "." not in file:
        path = files(__package__).joinpath(f"{file}.yaml")
    if not path.is_file():
        carried = sorted(p.name[:-5] for p in files(__package__).iterdir() if p.name.endswith(".yaml"))
        raise ValueError(f"--config {file}: no such file; the package itself carries {', '.join(carried)}.")
    try:
        text = read_text(path)
        _refuse_duplicates(yaml.compose(text, yaml.SafeLoader))
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"--config {file}: {error}") from error
    if not isinstance(value, Mapping):
        raise ValueError(f"--config {file}: keys and values are needed, such as 'lengths: [1024, 2048]'.")
    return value
