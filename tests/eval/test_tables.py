"""Numbers as text, axes, and the tables of the terminal and of report.md."""

from __future__ import annotations

import io
import itertools

import pytest
from hf_attn_plugins.eval.records import RunFolder
from hf_attn_plugins.eval.report import tables
from hf_attn_plugins.eval.report.charts import axes
from hf_attn_plugins.eval.report.summary.summary import summarise_folder
from hf_attn_plugins.eval.report.wording import figures, findings
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from . import fabricated


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    return summarise_folder(RunFolder(fabricated.full(tmp_path_factory.mktemp("runs") / "run")))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (figures.percent(0.875), "87.5"),
        (figures.points(-0.125), "−12.5"),
        (figures.points(0.004), "+0.4"),
        (figures.points(0.0), "0"),
        (figures.points(-1e-9), "−0.0"),
        (figures.ratio(2.0734), "2.07×"),
        (figures.nats(0.0019), "1.9e−3"),
        (figures.nats(0.1234), "0.123"),
        (figures.nats(0.0), "0"),
        (figures.seconds(0.0451), "45.1 ms"),
        (figures.seconds(3.214), "3.21 s"),
        (figures.size(1.5 * 2**30), "1.5 GiB"),
        (figures.size(700 * 2**20), "700 MiB"),
        (figures.size(5000), "5 KiB"),
        (figures.memory({"peak_bytes": 2**28, "memory_ratio": 0.5}), "256 MiB (0.50×)"),
        (figures.score({"mean": 0.5, "se": 0.0321}), "50.0 ± 3.2"),
        (figures.score({"mean": 0.5, "se": None}), "50.0"),
        (figures.difference({"difference": -0.05, "difference_low": -0.1, "difference_high": 0}), "−5.0 [−10.0, 0]"),
        (figures.difference({"difference": -0.05, "difference_low": None, "difference_high": None}), "−5.0"),
        (figures.count(2000, "sample"), "2,000 samples"),
    ],
)
def test_numbers_as_text(text, wanted):
    assert text.replace(figures.SPACE, " ") == wanted


def test_what_is_not_known_is_a_dash():
    for say in (figures.percent, figures.points, figures.ratio, figures.nats, figures.seconds, figures.size):
        assert say(None) == figures.NOTHING


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(-1e6, 1e6).map(lambda value: round(value, 9)), min_size=1, max_size=8))
def test_a_linear_axis_holds_its_values_between_few_round_ticks(values):
    axis = axes.linear("y", values, str)
    slack = 1e-8 * (axis.high - axis.low)  # rounding of the ticks' own arithmetic
    assert axis.low <= min(values) + slack and max(values) <= axis.high + slack
    assert 2 <= len(axis.ticks) <= 8
    places = [axis.place(value) for value, _ in axis.ticks]
    assert places[0] == pytest.approx(0) and places[-1] == pytest.approx(1) and places == sorted(places)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=8))
def test_decades_hold_zeros_at_the_floor(values):
    axis = axes.decades("kl", values, floor=1e-8)
    assert axis.high > axis.low >= 0.999e-8 and all(0 <= axis.place(value) <= 1 for value in values)
    assert axis.place(0.0) == 0 and len(axis.ticks) <= 7
    assert axis.ticks[0][1].startswith("≤") == (min(values) <= 1e-8)


@pytest.mark.parametrize(
    ("count", "text"), [(512, "512"), (1024, "1k"), (1536, "1.5k"), (131072, "128k"), (4000, "4k"), (1023, "1023")]
)
def test_token_counts_are_short(count, text):
    assert axes.short(count) == text


def test_an_exact_attention_reads_as_zero(metrics):
    said = dict(findings.sentences(metrics))
    assert set(said) == set(fabricated.ATTENTIONS[1:])
    assert said["tiled_attention"].startswith("predicts what the baseline predicts (KL 1.9e−3 nats")
    assert "scores exactly what the baseline scores (difference 0, 144 pairs)" in said["tiled_attention"]
    assert "points below the baseline (95 % interval −" in said["star_attention:block_size=512"]
    table = tables.headline(metrics)
    column = table.heads.index("difference to sdpa")
    assert [row[column].replace(figures.SPACE, " ") for row in table.rows[:3]] == ["baseline", "0 [0, 0]", "0 [0, 0]"]


def test_columns_without_a_number_are_left_out(tmp_path):
    run = fabricated.full(tmp_path / "run", tasks=["vt"], lengths=[1024], count=3, agreement=False)
    table = tables.headline(summarise_folder(RunFolder(run)))
    assert not {"KL, nats", "perplexity", "perplexity ratio", "errors"} & set(table.heads)
    assert all(len(row) == len(table.heads) for row in table.rows)


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_table_fits(metrics, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(tables.terminal(tables.brief(metrics)))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    assert "−17.4 [−23.6, −11.8]" in text.replace(figures.SPACE, " ")


def test_markdown_tables_have_equal_rows_and_no_loose_bars(metrics):
    config = {"model": "a|b", "attn": [{"label": "sdpa"}]}
    page = tables.markdown("A run", config, {"command": ["/home/me/bin/hf-attn", "eval"]}, metrics, ["a\nb | c"] * 30)
    assert page.startswith("# A run\n") and "/home/me" not in page and "- command: hf-attn eval" in page
    assert page.count("- a b \\| c") == tables.LISTED_ERRORS
    bars = [line.replace("\\|", "").count("|") for line in page.splitlines()]
    for before, after in itertools.pairwise(bars):
        assert not (before and after) or before == after
    for title in ("Overview", "Scores", "Agreement with the baseline", "Perplexity", "Speed and memory"):
        assert f"\n## {title}\n" in page
