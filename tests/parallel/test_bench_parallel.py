"""The table of costs over ranks: counted figures, by hand where they are simple, and what the command refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_attn_plugins.cli import main
from hf_attn_plugins.commands.bench.parallel import prompt, training
from hf_attn_plugins.commands.bench.parallel.rank import visible_pairs
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.cqs.planning.cost import CallShape
from hf_attn_plugins.parallel.costs import costs

SHAPE = CallShape(heads=8, kv_heads=2, head_dim=64, head_dim_v=64, itemsize=2)
TOKENS = 960


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("name", ["star_attention", "cqs_attention", "tiled_attention"])
def test_counts_over_ranks(name: str, ranks: int) -> None:
    found = costs(name, TOKENS, ranks, SHAPE, **({"block_size": 120} if name == "star_attention" else {}))
    assert len(found) == ranks
    assert sum(c.sent for c in found) == sum(c.received for c in found)
    assert sum(c.cache for c in found) == TOKENS * SHAPE.key_bytes, "every token is kept once"
    share = -(-7 // ranks) * 120 + 128 if name == "star_attention" else -(-TOKENS // ranks) + ranks
    assert max(c.cache for c in found) <= share * SHAPE.key_bytes
    assert {c.decode for c in found} == {(ranks - 1) * 8 * (64 * 2 + 4)}
    pairs = sum(c.pairs for c in found)
    if name == "star_attention":
        assert pairs < TOKENS * (TOKENS + 1) // 2
    else:
        assert pairs == TOKENS * (TOKENS + 1) // 2 and sum(c.rows for c in found) == TOKENS
    if ranks == 1:
        assert found[0].sent == 0


def test_dense_by_hand() -> None:
    """12 tokens on 2 ranks, in runs of 3: rows 0-2 and 9-11, rows 3-8; each gets the other's 6 keys and values."""
    early, middle = costs("tiled_attention", 12, 2, SHAPE)
    assert (early.pairs, middle.pairs) == (1 + 2 + 3 + 10 + 11 + 12, 4 + 5 + 6 + 7 + 8 + 9)
    assert early.sent == middle.received == 6 * 2 * (64 + 64) * 2


def test_too_short_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="3 tokens are too few for cqs_attention to be cut for 4 ranks"):
        costs("cqs_attention", 3, 4, SHAPE)


def test_visible_pairs() -> None:
    assert visible_pairs(Mask(causal=True), 700, 700) == 700 * 701 // 2
    assert visible_pairs(Mask(), 600, 3) == 1800
    assert visible_pairs(Mask(causal=True, window=(1, None), offset=2), 4, 6) == 8


def test_the_command_counts_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "bench",
        "parallel",
        "--length",
        "512",
        "--ranks",
        "1",
        "4",
        "--measure-up-to",
        "0",
        "--only",
        "volumes",
        "--out",
        str(tmp_path),
    ]
    assert main(words) == 0
    record = json.loads((tmp_path / "parallel.json").read_text(encoding="utf-8"))
    assert [(row["method"], row["ranks"]) for row in record["rows"]][-1] == ("cqs", 4)
    assert "torch" in record["hardware"] and "| cqs | 8:2 | 4 |" in (tmp_path / "parallel.md").read_text(
        encoding="utf-8"
    )
    assert main(words) == 0, "everything is there: nothing is measured again"
    for bad, said in (
        (["--length", "1024"], "was measured with other about: start again with --anew"),
        (["--prompt-ranks", "1"], "--prompt-ranks 1: at least 2"),
        (["--training", "8192:half"], "write TOKENS or TOKENS:checkpointing"),
        (["--length", "0"], "--length 0"),
        (["--ranks", "0"], "--ranks [0]"),
        (["--workers", "2"], "workers=2"),
        (["--kv-heads", "3"], "no multiple"),
    ):
        assert main([*words, *bad]) == 2
        assert said in capsys.readouterr().err


def run_of(seconds: float, peak: int, tokens: tuple[int, ...] = (5, 6)) -> dict[str, object]:
    found = {"prefill_s": seconds, "cpu_s": seconds / 2, "waits_s": 0.5, "peak": peak * 2**20}
    return {**found, "tokens": list(tokens), "cache": 3 * 2**20, "received": 7 * 2**20}


def test_rows_of_a_prompt_by_hand() -> None:
    first = {
        "link": "memory",
        "one": {"overlapped": run_of(12.0, 100)},
        "ranks": [
            {"overlapped": run_of(8.0, 50), "in turn": run_of(9.0, 90)},
            {"overlapped": run_of(7.0, 60), "in turn": run_of(9.5, 90)},
        ],
    }
    second = {
        "link": "memory",
        "one": {"overlapped": run_of(10.0, 110)},
        "ranks": [
            {"in turn": run_of(6.0, 55), "overlapped": run_of(5.0, 99)},
            {"in turn": run_of(6.5, 56), "overlapped": run_of(6.0, 99, (5, 7))},
        ],
    }
    one, rank_0, rank_1 = prompt.rows({"tiled_attention": [first, second]})
    assert (one["prefill s"], one["of one process"], one["peak MiB"], one["gain"]) == (10.0, 1.0, 110, "")
    assert (rank_0["prefill s"], rank_0["of one process"], rank_0["in turn s"], rank_0["gain"]) == (
        5.0,
        0.5,
        6.0,
        "1.200x",
    )
    assert rank_0["peak MiB"] == 55, "the second run of a process does not count"
    assert (rank_0["tokens"], rank_1["tokens"]) == ("same", "other")


def test_rows_of_training_by_hand() -> None:
    case = {"name": "cqs_attention", "length": 8, "checkpointing": True}
    report = {"peak": 100 * 2**20, "loss": 2.0, "layers": 30}
    done = {
        "one": {**case, "ranks": 1, "reports": [report]},
        "two": {**case, "ranks": 2, "reports": [{**report, "peak": 40 * 2**20}, {**report, "peak": 30 * 2**20}]},
        "other": {**case, "length": 9, "ranks": 2, "reports": [report, report]},
    }
    assert [row["of one process"] for row in training.rows(done)] == [1.0, 0.4, ""]
