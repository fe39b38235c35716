"""`hf-attn bench tiled`: its rows, the ratios against another library, and what it says where that is missing."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.nn import functional

from hf_attn_plugins import cli
from hf_attn_plugins.bench.timing import spread
from hf_attn_plugins.commands.bench import tiled

WORDS = [
    "bench",
    "tiled",
    "--lengths",
    "16",
    "--short",
    "8",
    "--head-dims",
    "8",
    "--decode-keys",
    "24",
    "--repeats",
    "1",
]


CASES = list(itertools.product(("bfloat16", "float32"), ("8:8", "9:3")))  # dtypes and heads


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "PRODUCT", 8)


def test_every_row_has_its_ratio_spread_and_product(small: None, tmp_path: Path, capsys: Any) -> None:
    assert cli.main([*WORDS, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "tiled.json").read_text())["rows"]
    assert {(row["dtype"], row["heads"], row["rows"], row["keys"], row["mask"]) for row in rows} == {
        *((d, h, n, n, m) for d, h in CASES for n in (8, 16) for m in ("full", "causal")),
        *((d, h, 1, 24, "causal") for d, h in CASES),
    }
    for row in rows:
        low, high = map(float, row["spread"].split(" - "))
        assert low <= high and row["forward ratio"] > 0 and row["product GFLOP/s"] >= 0
        assert bool(row["spread, both"]) == (row["rows"] == 16)
    assert "over zentorch" not in (tmp_path / "tiled.md").read_text()


def test_one_dtype_alone(small: None, tmp_path: Path) -> None:
    assert cli.main([*WORDS, "--dtypes", "float32", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "tiled.json").read_text())["rows"]
    assert {row["dtype"] for row in rows} == {"float32"} and len(rows) == 2 * 2 * 2 + 2


def test_another_library_stands_beside(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def rival(query, key, value, causal):  # heads are repeated for it, so nothing has to be grouped
        asked.append((query.shape, key.shape, causal))
        return functional.scaled_dot_product_attention(query, key, value, is_causal=causal)

    monkeypatch.setattr(tiled, "_rival", lambda name: rival)
    monkeypatch.setattr(tiled, "version", lambda name: "0.0")
    assert cli.main([*WORDS, "--against", "zentorch", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "tiled.json").read_text())["rows"]
    assert all(row["over zentorch"] > 0 for row in rows)
    assert all(query[1] == key[1] and (not causal or query[2] == key[2]) for query, key, causal in asked)
    assert {query[1] for query, _, _ in asked} == {8, 9}


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "zentorch", None)
    assert cli.main([*WORDS, "--against", "zentorch", "--out", str(tmp_path)]) == 2
    assert "hf-attn-plugins[bench]" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_spread_is_of_single_rounds() -> None:
    assert spread([2.0, 3.0, 4.0], [1.0, 2.0, 1.0]) == "1.50 - 4.00"
