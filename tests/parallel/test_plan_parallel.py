"""`hf-attn plan parallel`: its rows against the plans and formulas by hand, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_attn_plugins.cli import main
from hf_attn_plugins.cqs.planning.cost import CallShape
from hf_attn_plugins.parallel import heads
from hf_attn_plugins.parallel.costs import costs
from hf_attn_plugins.parallel.forms import ring

CONFIG = {
    "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 2,
    "intermediate_size": 64, "head_dim": 4, "dtype": "bfloat16",
}  # fmt: skip


def test_rows_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """64 tokens on 4 ranks, 16 each. Keys and values of a token: 2 heads x 8 x 2 bytes = 32 bytes a layer."""
    path, out = tmp_path / "config.json", tmp_path / "rows.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    words = ["plan", "parallel", "--length", "64", "--ranks", "4", "--model", str(path), "--json", str(out)]
    assert main([*words, "--block-size", "8", "--link", "0.5"]) == 0
    rows = {row["method"]: row for row in json.loads(out.read_text(encoding="utf-8"))}
    gathered = 3 * 16 * 32 * 3  # from 3 ranks, 16 tokens, in 3 layers
    assert rows["tiled, gather"]["GB moved"] == rows["ring (formula)"]["GB moved"] == gathered / 1e9
    assert rows["tiled, gather"]["link s"] == gathered / 1e9 / 0.5
    # Heads: a rank has 2 of 8 query heads and 1 of 2 key heads. It receives 48 tokens x (2 x 8 + 16) bytes, and for its
    # 16 tokens the results of 6 heads x (8 + 4) bytes.
    assert rows["tiled, heads (Ulysses)"]["GB moved"] == 3 * (48 * 32 + 16 * 72) / 1e9
    assert rows["star, paper"]["pairs"] < 0.5 and [row["exact"] for row in rows.values()] == [True] * 4 + [False] * 2
    said = capsys.readouterr().out
    least = min((row for row in rows.values() if row["exact"]), key=lambda row: row["GB moved"])
    assert f"any exact method: {least['method']}" in said
    for bad in (["--length", "0"], ["--ranks", "0"], ["--link", "-1"]):
        assert main([*words, *bad]) == 2
        assert "positive link" in capsys.readouterr().err


def test_a_form_that_does_not_fit_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    assert main(["plan", "parallel", "--length", "3", "--ranks", "4", "--model", str(path)]) == 0
    assert "3 tokens are too few for tiled_attention to be cut for 4 ranks" in capsys.readouterr().out


def test_rows_of_a_later_turn_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """8 tokens behind 64 on 4 ranks, 2 each. Queries of a token: 8 heads x 4 x 2 bytes; results: 4 more a head."""
    path, out = tmp_path / "config.json", tmp_path / "rows.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    words = ["plan", "parallel", "--length", "64", "--ranks", "4", "--model", str(path), "--json", str(out)]
    assert main([*words, "--turn", "8"]) == 0
    rows = {row["method"]: row for row in json.loads(out.read_text(encoding="utf-8"))}
    everyone, dealt = rows["later turn, by every rank"], rows["later turn, dealt"]
    query, result, layers = 64, 96, 3
    assert everyone["GB moved"] == layers * 3 * 8 * result / 1e9
    assert dealt["GB moved"] == layers * 3 * 2 * (query + result) / 1e9  # 6 tokens of others, for 2 of its own
    assert (everyone["rows"], dealt["rows"]) == (1.0, 0.25)
    assert everyone["cache GB"] == dealt["cache GB"] == layers * 18 * 32 / 1e9
    assert "A later turn takes less time dealt from" in capsys.readouterr().out
    assert main([*words, "--turn", "3"]) == 0
    assert "3 tokens are too few to be dealt over 4 ranks" in capsys.readouterr().out
    assert main([*words, "--turn", "0"]) == 2
    assert "a later turn of at least 1 token" in capsys.readouterr().err


@pytest.mark.parametrize(("sizes", "form"), [((32, 32, 8), "heads"), ((8, 1, 2), "gather"), ((32, 8, 16), "heads")])
def test_tiled_takes_the_form_that_moves_fewer_bytes(sizes: tuple[int, int, int], form: str) -> None:
    num_heads, kv_heads, ranks = sizes
    shape = CallShape(num_heads, kv_heads, 64, 64)
    most = {
        exchange: max(c.sent + c.received for c in costs("tiled_attention", 4096, ranks, shape, exchange=exchange))
        for exchange in ("gather", "heads", "auto")
    }
    assert most["auto"] == most[form] == min(most.values())


def test_every_head_is_dealt_once() -> None:
    for num_heads, kv_heads, ranks in ((9, 3, 4), (8, 2, 3), (4, 4, 7), (32, 8, 5)):
        shares = heads.deal_heads(num_heads, kv_heads, ranks)
        assert [head for share in shares for head in share.query] == list(range(num_heads))
        for share in shares:
            assert sorted({head // share.group for head in share.query}) == list(share.key)


def test_ring_holds_its_shard_and_two_that_pass() -> None:
    shape = CallShape(4, 2, 8, 8, 2)
    (alone,), (one, _) = ring(10, 1, shape), ring(10, 2, shape)
    assert alone.sent == 0 and one.sent == 5 * shape.key_bytes and alone.pairs == 55
    assert one.held == 5 * (shape.query_bytes + 3 * shape.key_bytes + shape.result_bytes)
