"""Tensors of a GPU that is not there: a CPU build of PyTorch makes none that an operator would take."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

NAME = "NVIDIA H100 80GB HBM3"


@dataclass
class StandIn:
    """What a choice asks a tensor for; it has no elements."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = field(default_factory=lambda: torch.device("cuda", 0))
    requires_grad: bool = False

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    def numel(self) -> int:
        return torch.Size(self.shape).numel()


def tensors(
    rows: int = 4096, keys: int | None = None, head_dim: int = 128, *, heads: tuple[int, int] = (8, 2), **more: object
) -> tuple[StandIn, StandIn, StandIn]:
    """Query, key and value of batch 2."""
    keys = rows if keys is None else keys
    key = StandIn((2, heads[1], keys, head_dim), **more)  # type: ignore[arg-type]
    return StandIn((2, heads[0], rows, head_dim), **more), key, key  # type: ignore[arg-type]


def pretend(monkeypatch: pytest.MonkeyPatch, arch: str = "sm90", name: str = NAME) -> None:
    """Answer questions about a GPU as one of this architecture would, and let no Triton kernel be tested on it."""
    for module in ("aten.gpu", "aten.attend.gpu", "triton.support"):
        monkeypatch.setattr(f"hf_attn_plugins.kernels.{module}.arch_of", lambda device: arch)
    monkeypatch.setattr(
        "hf_attn_plugins.kernels.measured.name_of", lambda device: name if device.type == "cuda" else device.type
    )
    monkeypatch.setattr("hf_attn_plugins.kernels.on_device.triton_passes", lambda *call, plan=False: True)
    monkeypatch.setattr("hf_attn_plugins.kernels.flex.attend.INSTALLED", True)
    monkeypatch.setattr("hf_attn_plugins.kernels.triton.support.INSTALLED", True)
