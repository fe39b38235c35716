"""Hardware and versions of a measurement; every table that a command writes contains them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from hf_attn_plugins.core.cpu import fields


def describe(device: torch.device | None = None) -> dict[str, Any]:
    """Processor, threads, device and versions as JSON values; `device` None is the CPU."""
    on_gpu = device is not None and device.type == "cuda"
    return {
        "processor": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "bf16_products": _bf16(),
        "threads": torch.get_num_threads(),
        "device": str(device or "cpu"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "hf_attn_plugins": _version("hf-attn-plugins"),
    }


def processor() -> str:
    """The name of the CPU; on Linux with its family and model, if known."""
    said = fields()
    if not said:
        return platform.processor() or platform.machine()
    name = said.get("model name", platform.machine())
    return f"{name} (family {said['cpu family']}, model {said['model']})" if "cpu family" in said else name


def _bf16() -> bool:
    from hf_attn_plugins.kernels.choose import cpu_multiplies_bf16

    return cpu_multiplies_bf16()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
