"""The section of a model card (README.md) that tells whoever receives a patched checkpoint what it needs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = "README.md"
BEGIN, END = "<!-- hf-attn-plugins: begin -->", "<!-- hf-attn-plugins: end -->"
NEW = "---\nlibrary_name: transformers\ntags:\n- hf-attn-plugins\n---\n"  # front matter of a card that is not there yet
INSTALL = """\
```
pip install hf-attn-plugins
```

```python
import hf_attn_plugins  # before from_pretrained
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder or its id")
```
"""


def needs_import(name: str, exact: bool, options: Mapping[str, Any]) -> str:
    """The section of a checkpoint that names an attention plugin."""
    kind = "computes what full attention computes" if exact else "approximates full attention by design"
    chosen = f" with the options `{json.dumps(dict(options))}`" if options else ""
    return (
        f"## Attention: {name}\n\n"
        f"This checkpoint runs the attention `{name}` of the package hf-attn-plugins{chosen}; it {kind}.\n"
        "Install the package and import it before the model is loaded:\n\n"
        f"{INSTALL}\n"
        "Without the import, `from_pretrained` stops with an error that does not know the name. "
        '`from_pretrained(..., attn_implementation="sdpa")` loads the checkpoint without the package.\n'
        "Programs that cannot be changed: `hf-attn run -- COMMAND`, or once in an environment `hf-attn activate`.\n"
    )


def needs_tables() -> str:
    """The section of a checkpoint with first-layer tables."""
    return (
        "## First-layer tables\n\n"
        "This checkpoint holds tables that replace the projections of its first layer. Install the package "
        "hf-attn-plugins and import it before the model is loaded:\n\n"
        f"{INSTALL}\n"
        "Without the import, Transformers does not know the `quantization_config` of this checkpoint; remove that "
        "entry of config.json to load it without tables.\n"
    )


def with_section(folder: Path, title: str, section: str) -> dict[str, bytes]:
    """{"README.md": the card with the section}: at its end, or in the place of an earlier section of this title.

    Args:
        title: what a later patch finds the section by.

    Raises:
        ValueError: the folder's card is no UTF-8.
    """
    path = folder / CARD
    try:
        before = path.read_text(encoding="utf-8") if path.is_file() else NEW
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8.") from error
    begin = BEGIN.replace("begin", f"{title}, begin")
    whole = f"{begin}\n{section}{END}\n"
    old = re.compile(re.escape(begin) + r"\n.*?" + re.escape(END) + r"\n?", re.DOTALL)
    text = old.sub(lambda _: whole, before) if old.search(before) else f"{before.rstrip()}\n\n{whole}"
    return {CARD: text.encode("utf-8")}
