"""What was measured on a GPU: rows of milliseconds that let `choose` prefer another kernel than its default.

No rows for GPUs are shipped, because no GPU has run this code. `hf-attn bench gpu --save` writes the user's own to
`measurements.json` in the user's cache folder. A row counts on the kind of GPU, under the versions, for the dtype and
the head_dim that it names, and on nothing else.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_attn_plugins.core.files import cache_folder, read_json
from hf_attn_plugins.core.gpu import name_of
from hf_attn_plugins.core.staging import put
from hf_attn_plugins.core.warn import warn_once

FORMAT = "hf_attn_plugins measurements 1"
KINDS = ("forward", "backward", "decode", "plan")
GAIN = 1.05  # another kernel than the default has to be so many times faster: less may be noise
SHIPPED: tuple[Row, ...] = ()


class Row(NamedTuple):
    """One measured shape.

    Attributes:
        device: the GPU's name (`core.gpu.name_of`).
        versions: of torch, triton and hf_attn_plugins, as `versions` gives them.
        dtype: such as "bfloat16".
        head_dim: elements per head.
        kind: one of `KINDS`; "backward" is forward and backward together, "plan" a list of rectangles.
        length: tokens.
        ms: milliseconds by contender: "flash", "cudnn", "efficient" (PyTorch's operators), "flex", "triton".
    """

    device: str
    versions: str
    dtype: str
    head_dim: int
    kind: str
    length: int
    ms: dict[str, float]


@functools.cache
def versions() -> str:
    """The versions under which a measurement counts."""
    found = [f"torch {torch.__version__}"]
    for package in ("triton", "hf-attn-plugins"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} -")
    return ", ".join(found)


def user_file() -> Path:
    """Where `hf-attn bench gpu --save` writes."""
    return cache_folder() / "measurements.json"


@torch.compiler.assume_constant_result
def fastest(
    device: torch.device, dtype: torch.dtype, head_dim: int, kind: str, length: int | None, able: Sequence[str]
) -> str | None:
    """The fastest of the contenders `able` on this kind of GPU, or None where nothing was measured.

    Args:
        device, dtype, head_dim, kind: name the rows; all must agree.
        length: tokens; the row with the nearest length decides (in octaves), None takes the longest.
        able: those that can compute the call, the default first. It is replaced for a gain of `GAIN` only.
    """
    rows = table().get((name_of(device), versions(), str(dtype).removeprefix("torch."), head_dim, kind))
    if not rows or not able:
        return None
    row = max(rows, key=lambda row: row.length) if length is None else min(
        rows, key=lambda row: (abs(math.log2(row.length) - math.log2(max(1, length))), row.length)
    )  # fmt: skip
    times = {name: row.ms[name] for name in able if name in row.ms}
    if not times:
        return None
    best = min(times, key=lambda name: times[name])
    default = able[0]
    return default if default in times and times[default] <= GAIN * times[best] else best


@torch.compiler.assume_constant_result
def has_rows() -> bool:
    """Whether anything was measured at all."""
    return bool(table())


@functools.cache
def table() -> dict[tuple[str, str, str, int, str], list[Row]]:
    """All rows, shipped and of the user, by (device, versions, dtype, head_dim, kind); the user's come instead."""
    found: dict[tuple[str, str, str, int, str], dict[int, Row]] = {}
    for row in (*SHIPPED, *of_user()):
        found.setdefault(row[:5], {})[row.length] = row
    return {key: list(rows.values()) for key, rows in found.items()}


def of_user() -> list[Row]:
    """The rows of `user_file`; none, after one warning, where it is damaged or not ours."""
    try:
        path = user_file()
        if not path.exists():
            return []
        stored = read_json(path)
        if stored.get("format") != FORMAT:
            raise ValueError(f"{path} does not say {FORMAT!r} under 'format'.")
        return [_row(each, path) for each in stored["rows"]]
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:  # RuntimeError: no home folder
        warn_once(
            f"the measurements of this machine's GPU are ignored: {error} Measure again with "
            "`hf-attn bench gpu --save`, or remove the file."
        )
        return []


def _row(stored: Any, path: Path) -> Row:
    row = Row(**stored)
    texts = all(isinstance(text, str) for text in (row.device, row.versions, row.dtype))
    counts = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in (row.head_dim, row.length))
    if not (texts and counts and row.kind in KINDS and isinstance(row.ms, dict)):
        raise ValueError(f"{path} holds a row that is none: {str(stored)[:120]}.")
    if not all(isinstance(ms, int | float) and 0 < ms < math.inf for ms in row.ms.values()):
        raise ValueError(f"{path} holds times that are no milliseconds: {str(row.ms)[:120]}.")
    return row


def save(rows: Sequence[Row]) -> Path:
    """Add rows to `user_file`; those of the same shape, device and versions are replaced.

    Raises:
        OSError: the folder cannot be written.
    """
    path = user_file()
    kept = {row[:6]: row for row in (*of_user(), *rows)}
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "rows": [row._asdict() for row in kept.values()]}, indent=1) + "\n"
    put(path, lambda staged: staged.write_text(text, encoding="utf-8"))
    forget()
    return path


def forget() -> None:
    """Read the files again at the next question."""
    table.cache_clear()
