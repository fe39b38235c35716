"""The README.md of an exported kernel: what it is, how to load it, what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from hf_attn_plugins._version import __version__

_FRONT = """---
library_name: kernels
license: apache-2.0
tags:
- kernels
- attention
---
"""
_USE = {
    "forward": """`flash_attn_forward` takes Transformers' whole attention call: padding, sliding windows,
sinks, softcap, grouped heads.
In continuous batching it needs a repository with "flash" in its name.""",
    "varlen": """`flash_attn_varlen_func` and `flash_attn_func` have flash-attention's signatures: padding is cut out
before the call.
With "flash" in the repository's name, continuous batching uses sequence lengths instead of a mask.""",
}
_COLUMNS = (
    "dtype",
    "heads",
    "head_dim",
    "rows",
    "keys",
    "mask",
    "kernel",
    "SDPA GFLOP/s",
    "ours GFLOP/s",
    "forward ratio",
)


def card(name: str, version: int, interface: str, ids: dict[str, str], results: Path | None) -> str:
    """The text of the model card.

    Raises:
        ValueError: a file of results that is not a table of `hf-attn bench tiled`.
    """
    variants = "\n".join(f"- `build/torch-{backend}`: `{identity}`" for backend, identity in ids.items())
    return f"""{_FRONT}
# {name}, version {version}

Exact attention for CPUs and GPUs, exported from hf_attn_plugins {__version__}. Forward, backward and decoding.

{_USE[interface]}

```python
model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="OWNER/{name}", allow_all_kernels=True)
```

From a folder, without the Hub: `LOCAL_KERNELS="OWNER/{name}=FOLDER"`, FOLDER being where this file is.

## Variants
{variants}

Both hold the same Python and C sources. On CPUs with AMX, AVX-512 or AVX2 the C sources are compiled on first use, in
about a second, by `cc`, `gcc` or `clang`; other CPUs, and machines without a compiler, use PyTorch's operators and
tiles in Python. `HF_ATTN_PLUGINS_COMPILE=0` keeps the kernel from calling a compiler. GPUs use PyTorch's operators, and
FlexAttention or Triton for what those cannot do. `metadata.json` holds the SHA-256 digest of every file.
Licence: Apache-2.0.

## Measured
{_measured(results)}
"""


def _measured(results: Path | None) -> str:
    if results is None:
        return "Nothing was measured for this export: `hf-attn export-kernel --results FILE` puts a table here."
    try:
        table = json.loads(results.read_text(encoding="utf-8"))
        hardware, rows = table["hardware"], table["rows"]
        lines = [f"| {' | '.join(_cell(row[column]) for column in _COLUMNS)} |" for row in rows if _told(row)]
        where = (
            ", ".join(f"{hardware[key]}{unit}" for key, unit in (("processor", ""), ("threads", " threads")))
            + f", torch {hardware['torch']}"
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{results} is no tiled.json of `hf-attn bench tiled`: {error!r}.") from error
    head = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    return f"One call, against PyTorch's SDPA in the same run; {where}.\n\n" + "\n".join(head + lines)


def _told(row: dict[str, object]) -> bool:
    """The rows of the card: causal, from 1024 keys; the rest is in the project's own tables."""
    return row["mask"] == "causal" and int(str(row["keys"])) >= 1024


def _cell(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
