"""`make readme`: put the generated plugin table into README.md, between its two markers."""

from __future__ import annotations

import re
from pathlib import Path

from hf_attn_plugins.commands.list import markdown

README = Path(__file__).resolve().parent.parent / "README.md"

if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    table = f"<!-- plugins -->\n{markdown()}\n<!-- /plugins -->"
    README.write_text(
        re.sub(r"<!-- plugins -->.*?<!-- /plugins -->", lambda _: table, text, flags=re.S), encoding="utf-8"
    )
