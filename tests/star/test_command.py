"""What `hf-attn plan star` prints, draws and refuses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from hf_attn_plugins.star import command, cost, draw
from hf_attn_plugins.star.plan import Plan

LLAMA_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "torch_dtype": "bfloat16",
}


def run(*words: str) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args(words))


def test_the_example_of_the_documentation(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    image = tmp_path / "plan.png"
    run("--length", "40", "--block-size", "8", "--anchor-size", "4", "--query-size", "4", "--draw", str(image))
    out = capsys.readouterr().out
    assert "36 tokens in 5 blocks of 8, anchor 4, query 4" in out
    assert "block 4" in out and "32 .. 35" in out and "36 .. 39" in out
    assert f"attended pairs {Plan(40, 8, 4, 4).attended_pairs()}" in out
    assert image.read_bytes()[:4] == b"\x89PNG"


def test_the_image_has_both_phases_in_their_colours(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    draw.picture(Plan(40, 8, 4, 4), tmp_path / "plan.png")
    colours = {colour for _, colour in image.open(tmp_path / "plan.png").convert("RGB").getcolors(2**24)}
    for name in ("block", "anchor", "query", "hidden"):
        assert tuple(bytes.fromhex(draw._COLOURS[name][1:])) in colours


def test_text_is_the_plan() -> None:
    plan = Plan(7, 3, 1, 1)
    assert draw.text(plan).splitlines() == ["#", "##", "###", "a..#", "a..##", "a..###", "qqqqqqq"]


def test_a_model_adds_its_cost(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    run(
        "--length",
        str(2**17),
        "--block-size",
        "8192",
        "--anchor-size",
        "1024",
        "--query-size",
        "0",
        "--model",
        str(tmp_path),
    )
    out = capsys.readouterr().out
    assert "FLOPs" in out and f"{2 * 32 * 8 * 128 * 2 * 2**17:,}" in out
    assert "expected gain of the prefill: 2.9" in out  # 2.91 by hand from the paper's formulas


@pytest.mark.parametrize(
    ("length", "block", "anchor", "recomputed", "reused"),
    [(32, 8, 8, 0.72, 1.17), (128, 32, 32, 0.92, 1.36), (128, 8, 8, 1.37, 2.40), (1024, 32, 32, 4.73, 7.37)],
)
def test_gains_computed_by_hand(length: int, block: int, anchor: int, recomputed: float, reused: float) -> None:
    price = cost.cost(Plan(length * 1024, block * 1024, anchor * 1024), cost.ModelShape.of(LLAMA_8B))
    assert price.dense / price.recomputed == pytest.approx(recomputed, abs=0.006)
    assert price.gain == pytest.approx(reused, abs=0.006)


def test_sliding_layers_cost_their_window() -> None:
    sliding = cost.ModelShape.of(LLAMA_8B | {"sliding_window": 1024})
    assert sliding.attention_flops(10**12, 8192) == 32 * 4 * 4096 * (1024 * 8192 - 1024 * 1023 // 2)
    off = cost.ModelShape.of(LLAMA_8B | {"sliding_window": 1024, "use_sliding_window": False})
    assert off.windows == (None,) * 32
    with pytest.raises(ValueError, match="not a decoder"):
        cost.ModelShape.of({})


@pytest.mark.parametrize(
    ("plan", "word"),
    [
        (Plan(16384, 4, 4), "Did you mean block_size=4096"),
        (Plan(512, 512, 128), "one block"),
        (Plan(512, 128, 128), "below"),
        (Plan(16384, 4096, 0), "no anchor"),
        (Plan(16384, 1024, 1024), "16 blocks"),
    ],
)
def test_warnings(plan: Plan, word: str) -> None:
    assert any(word in warning for warning in cost.warnings(plan))


def test_no_warning_where_nothing_is_wrong() -> None:
    plan = Plan(32768, 8192, 2048, 256)
    price = cost.cost(plan, cost.ModelShape.of(LLAMA_8B))
    assert cost.warnings(plan, price.gain) == []
    assert any("small" in warning for warning in cost.warnings(plan, 1.02))


def test_user_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="anchor_size"):
        run("--length", "40", "--block-size", "4", "--anchor-size", "8")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        run("--length", "40", "--model", str(tmp_path))
    with pytest.raises(ValueError, match="scale"):
        draw.picture(Plan(5000, 1000, 100), tmp_path / "x.png")
