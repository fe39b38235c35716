"""The first use of the Triton kernels on a GPU: one small call with the same features, compared with PyTorch.

No GPU has run these kernels while they were written. So a process compares each combination of features once, before it
computes with it. The small call compiles the same kernels as the real one, and takes well under a second beyond that.
What passed is kept in the user's cache, by the kind of GPU, the versions and the kernels' sources. After a mismatch the
kernels are off for that kind of GPU in this process, and a warning says what to report.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core.compat import is_fake, is_transforming
from hf_attn_plugins.core.files import cache_folder, read_json
from hf_attn_plugins.core.gpu import name_of
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.core.staging import put
from hf_attn_plugins.core.warn import warn_once
from hf_attn_plugins.kernels.measured import versions
from hf_attn_plugins.kernels.triton import trial as small
from hf_attn_plugins.kernels.triton.trial import Trial, trial_of

SWITCH = "HF_ATTN_PLUGINS_SELF_TEST"  # "0" turns the test off
FORMAT = "hf_attn_plugins self-tests 1"
# Largest error, as a share of the largest element: a wrong mask, scale or head order gives some 100 times as much.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 5e-4}

_seen: dict[str, bool] = {}  # global state: trials of this process and whether they passed
_off: set[str] = set()  # and the kinds of GPU on which one did not


def passes(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, softcap: float | None, dropout: float, plan: bool = False
) -> bool:
    """Whether the kernels may compute such a call on the GPU of `query`: from memory, from the cache, or tested now."""
    if torch.compiler.is_compiling():  # while a graph is traced nothing can be tested; eager calls of it have been
        return _known_good(query.device)
    if os.environ.get(SWITCH) == "0" or is_fake(query) or is_transforming():
        return True
    if query.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return name_of(query.device) not in _off
    return passes_trial(trial_of(query, key, value, mask, softcap, dropout, plan), query.device)


@torch.compiler.assume_constant_result
def _known_good(device: torch.device) -> bool:
    return name_of(device) not in _off


def passes_trial(trial: Trial, device: torch.device) -> bool:
    """`passes`, of features."""
    name = name_of(device)
    if name in _off:
        return False
    label = f"{name} | {versions()} | {_sources()} | {os.environ.get('HF_ATTN_PLUGINS_TUNING', '')} | {trial.words()}"
    if label not in _seen:
        _seen[label] = label in _kept()
        if not _seen[label]:
            try:
                wrong = mismatch(trial, device)
            except torch.OutOfMemoryError:
                del _seen[label]
                return True  # says nothing about the kernels; the next call tests
            except Exception as error:  # whatever a compiler or a driver raises
                wrong = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            _seen[label] = wrong is None
            if wrong is not None:
                _off.add(name)
                warn_once(
                    f"the Triton kernels of hf_attn_plugins failed their self-test on {name} ({versions()}; "
                    f"{trial.words()}): {wrong}. They are off on this GPU in this process, and PyTorch computes "
                    "instead. Please report this line, with the page that `hf-attn bench gpu` writes. "
                    f"{SWITCH}=0 turns the self-test off."
                )
                return False
            _keep(label)
    return _seen[label]


def mismatch(trial: Trial, device: torch.device) -> str | None:
    """What differs between the kernels and PyTorch in float64, on a small call with these features; None if nothing.

    No random state of the process is changed.
    """
    # Outside of whatever mode the caller is in.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        if trial.dropout:
            return _dropout_mismatch(trial, device)
        rows, keys = small.sizes(trial)
        mask, plan, seen = small.masks(trial, rows, keys, device)
        inputs = small.inputs(trial, rows, keys, device)
        softcap, bias = (15.0 if trial.softcap else None), mask.bias if trial.bias == "float" else None
        ours = _with_gradients(trial, inputs, lambda q, k, v: _ours(q, k, v, mask, softcap, 0.0, plan))
        wide = [x.double() for x in inputs]
        bias = None if bias is None else bias.double()
        ref = _with_gradients(trial, wide, lambda q, k, v: small.exact(q, k, v, seen, softcap=softcap, bias=bias))
        tolerance = TOLERANCE[inputs[0].dtype]
        names = ("out", "lse", "dq", "dk", "dv")
        for name, found, right in zip(names, ours, ref, strict=False):
            allowed = tolerance * max(1.0, float(right.nan_to_num(0, 0, 0).abs().max()))
            error = (found.double() - right).nan_to_num(torch.inf, torch.inf, torch.inf).abs()
            error[found.double() == right] = 0  # -inf, the lse of rows without keys
            if float(error.max()) > allowed:
                return f"{name} differs by {float(error.max()):.1e}, allowed {allowed:.1e}"
    return None


def _ours(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, softcap: float | None, dropout: float,
    plan: list[list[Rectangle]],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from hf_attn_plugins.kernels.triton.attend import triton_rectangles

    return triton_rectangles(query, key, value, mask, query.shape[-1] ** -0.5, softcap, dropout, plan)


def _with_gradients(trial: Trial, inputs: list[Tensor], run: Callable[..., Any]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(trial.backward) for x in inputs]
    out, lse = run(*leaves)
    if not trial.backward:
        return [out, lse]
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape)
    loss = (out.double() * weight).sum() + torch.where(lse > -torch.inf, lse, 0).double().sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def _dropout_mismatch(trial: Trial, device: torch.device) -> str | None:
    """With values of 1, out is 1 on average whatever was dropped, and gradients of values are those of the weights."""
    rows, keys = small.sizes(trial)
    query, key, value = small.inputs(trial, rows, keys, device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        out, _ = _ours(query * 0, key, torch.ones_like(value), Mask(), None, 0.5, [])
    mean = float(out.float().mean())
    return None if abs(mean - 1) < 0.1 else f"out under dropout is {mean:.2f} on average, 1 is right"


@functools.cache
def _sources() -> str:
    """A digest of the kernels' sources: another release may not have what this one has."""
    hasher = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        hasher.update(path.read_bytes())
    return hasher.hexdigest()[:16]


def _file() -> Path:
    return cache_folder() / "self_tests.json"


@functools.cache
def _kept() -> frozenset[str]:
    """What passed in earlier processes; nothing where the file is missing, damaged or not ours."""
    try:
        stored = read_json(_file())
        passed = stored["passed"] if stored.get("format") == FORMAT else []
        return frozenset(each for each in passed if isinstance(each, str))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return frozenset()


def _keep(label: str) -> None:
    """Add to the file; a cache that cannot be written costs the next process a test."""
    _kept.cache_clear()
    try:
        _file().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, "passed": sorted(_kept() | {label})}, indent=1) + "\n"
        put(_file(), lambda staged: staged.write_text(text, encoding="utf-8"))
    except (OSError, RuntimeError):
        pass
    _kept.cache_clear()


def forget() -> None:
    """Forget what this process has tested; for tests."""
    _seen.clear()
    _off.clear()
    _kept.cache_clear()
