"""Attention kernels: `attend` for one call, `attend_rectangles` for a plan of many, by device, dtype and shape.

See README.md beside this file for which kernel does what, and for the order to read the files in.
"""

from __future__ import annotations

from hf_attn_plugins.core.options import KERNELS
from hf_attn_plugins.kernels.attend import attend
from hf_attn_plugins.kernels.attend_rectangles import attend_rectangles
from hf_attn_plugins.kernels.varlen import attend_varlen

__all__ = ["KERNELS", "attend", "attend_rectangles", "attend_varlen"]
