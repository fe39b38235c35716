"""What a user would start with `accelerate launch`: every rank writes what it got to FOLDER/rank.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import hf_attn_plugins as hap
from tests.parallel.models import build, prompt


def main(folder: str, name: str) -> None:
    model, inputs = build("llama"), prompt(length=23, batch=1)
    options = dict(block_size=5, anchor_size=3, query_size=4) if name == "star_attention" else {}
    with hap.context_parallel(model, name, **options) as cp:
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        found = {
            "rank": cp.rank,
            "size": cp.size,
            "tokens": output.tolist(),
            "prefill": cp.prefill_tokens,
            "cache": cp.cache_bytes,
        }
    with hap.use(model, name, **options):
        found["wanted"] = model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()
    Path(folder, f"{found['rank']}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
