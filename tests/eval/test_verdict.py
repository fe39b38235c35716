"""The first line of every attention: true, from predictions and likelihood, and short names that stay apart."""

from __future__ import annotations

import pytest
from hf_attn_plugins.eval.records import RunFolder
from hf_attn_plugins.eval.report.charts.sections import block_edges
from hf_attn_plugins.eval.report.summary.summary import summarise_folder
from hf_attn_plugins.eval.report.wording import figures
from hf_attn_plugins.eval.report.wording.names import renamed, short_names
from hf_attn_plugins.eval.report.wording.verdict import verdicts

from . import fabricated

FASTER = {"speed_up": 1.43, "speed_up_low": 1.38, "speed_up_high": 1.5, "speed_length": 4096}
FEW = {"n": 8, "pairs": 8, "changed": 1, "difference": -0.125, "difference_low": -0.25, "difference_high": 0.0}


def said(label="tiled_attention", lengths=(), **row):
    known = {
        "attn": label,
        "kl": None,
        "perplexity_ratio": None,
        "errors": 0,
        "pairs": 0,
        "difference": None,
        "plans": [],
    }
    rows = [
        {"attn": label, "length": length, "kl": {"mean": kl}, "perplexity_ratio": ratio}
        for length, kl, ratio in lengths
    ]
    metrics = {"baseline": "sdpa", "overall": [{**known, **row}], "agreement": rows, "loss": []}
    (found,) = verdicts(metrics)
    return found.grade, found.text


SAME, LOST = {"kl": 0.002, "perplexity_ratio": 1.0002}, {"kl": 0.17, "perplexity_ratio": 1.17}


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({**SAME, **FASTER}, ("safe", "same predictions, 1.43× faster prefill: safe to switch")),
        ({**SAME, **FASTER, **FEW}, ("safe", "same predictions, 1.43× faster prefill: safe to switch")),
        (SAME, ("safe", "same predictions: safe to switch")),
        (
            {**SAME, "speed_up": 1.02, "speed_up_low": 0.9, "speed_up_high": 1.1},
            ("safe", "same predictions, prefill as fast, within noise: safe, but no gain here"),
        ),
        (
            {**SAME, "speed_up": 0.8, "speed_up_low": 0.75, "speed_up_high": 0.85},
            ("safe", "same predictions, 1.25× slower prefill: safe, but no gain here"),
        ),
        (
            {**LOST, **FASTER, **FEW, "changed": 3},
            ("no", "perplexity +17 %, 3 of 8 answers changed, 1.43× faster prefill: not at this length"),
        ),
        (
            {"kl": 0.04, "perplexity_ratio": 1.02, **FASTER},
            ("try", "perplexity +2.0 %, 1.43× faster prefill: try it on your own task first"),
        ),
        (
            {"kl": 0.04, "perplexity_ratio": 1.001},
            ("try", "small differences in the predictions (KL 0.040): try it on your own task first"),
        ),
        (
            {"kl": 0.3, "perplexity_ratio": None},
            ("no", "large differences in the predictions (KL 0.300): not at this length"),
        ),
        (FASTER, ("unknown", "1.43× faster prefill, predictions were not compared")),
    ],
)
def test_what_to_do(row, wanted):
    assert said(**row) == wanted


def test_an_approximate_plugin_is_safe_only_where_it_was_measured():
    near = {"kl": 0.006, "perplexity_ratio": 1.003}
    star, text = "star_attention:block_size=128", "nearly the same predictions (KL 0.006), 1.43× faster prefill"
    assert said(star, **near, **FASTER) == ("safe", f"{text}: safe to switch at this length")
    assert said(**near, **FASTER) == ("safe", f"{text}: safe to switch")
    assert said(star, lengths=[(512, 0.002, 1.0), (1024, 0.006, 1.0)], **near)[1].endswith("at these lengths")


def test_a_score_that_chance_cannot_explain_lowers_the_grade():
    lower = {"n": 40, "pairs": 40, "difference": -0.2, "difference_low": -0.3, "difference_high": -0.1}
    assert said(**SAME, **lower) == ("try", "same predictions, score 20.0 points lower: try it on your own task first")
    chance = {**lower, "difference_high": 0.05}
    assert said(**SAME, **chance)[0] == "safe"
    assert said(**SAME, **{**lower, "pairs": 8})[0] == "safe", "eight pairs are too few"


def test_the_worst_length_counts_and_the_longest_good_one_is_named():
    lengths = [(1024, 0.002, 1.0), (2048, 0.17, 1.17)]
    grade, text = said(kl=0.08, perplexity_ratio=1.08, lengths=lengths)
    assert grade == "no" and text == "perplexity +17 %: only up to 1,024 tokens, where predictions are the same"
    assert said(kl=0.2, perplexity_ratio=1.2, lengths=[(64, 0.2, 1.2), (128, 0.3, 1.3)])[1].endswith("at these lengths")


def test_an_approximate_plugin_that_ran_dense_was_not_tested():
    dense = ["dense: 1024 tokens, below 2048"]
    assert (
        said("star_attention", **SAME, plans=dense)[0] == "unknown"
        and "nothing approximate was tested" in said("star_attention", **SAME, plans=dense)[1]
    )
    assert said("star_attention", **SAME, plans=[*dense, "star: blocks 4, block_size 512"])[0] == "safe"
    assert said("tiled_attention", **SAME, plans=["tiled"])[0] == "safe"
    for short in ("star", "star block 512"):  # as the page and the terminal call it
        assert said(short, **SAME, plans=dense)[0] == "unknown"
    assert said("tiled", **SAME, plans=["dense"])[0] == "safe"


def test_the_verdicts_of_a_whole_run(tmp_path):
    found = verdicts(summarise_folder(RunFolder(fabricated.full(tmp_path / "run", lengths=[1024]))))
    assert [one.attn for one in found] == list(fabricated.ATTENTIONS[1:])
    assert [one.grade for one in found] == ["safe", "safe", "no", "no"]


def test_rounds_give_a_speed_its_spread(tmp_path):
    metrics = summarise_folder(RunFolder(fabricated.full(tmp_path / "run", tasks=["vt"], lengths=[1024], count=1)))
    for row in metrics["speed"]:
        assert row["speed_up_low"] <= row["speed_up"] <= row["speed_up_high"]
    star = next(row for row in metrics["overall"] if row["attn"].startswith("star"))
    assert star["speed_up_low"] < star["speed_up_high"] and "(" in figures.speed(star)
    assert figures.within_noise({"speed_up": 1.2, "speed_up_low": 0.9, "speed_up_high": 1.4})
    assert not figures.within_noise({"speed_up": 1.2, "speed_up_low": 1.1, "speed_up_high": 1.4})
    assert figures.within_noise({"speed_up": 1.03}) and not figures.within_noise({"speed_up": 1.5})
    assert figures.change(1.1749) == "+17 %" and figures.change(0.985) == "−1.5 %" and figures.change(1.02) == "+2.0 %"


def test_names_are_short_and_apart():
    assert short_names(fabricated.ATTENTIONS) == dict(
        zip(fabricated.ATTENTIONS, ["sdpa", "tiled", "cqs", "star block 512", "star block 256, anchor 64"])
    )
    assert short_names(["sdpa (A)", "star_attention:block_size=4 (A)", "star_attention:block_size=8 (B)"]) == {
        "sdpa (A)": "sdpa (A)",
        "star_attention:block_size=4 (A)": "star (A)",
        "star_attention:block_size=8 (B)": "star (B)",
    }
    twice = ["x_attention", "x"]
    assert list(short_names(twice).values()) == twice, "names that would be equal stay long"
    metrics = {name: [{"attn": "x_attention"}] for name in ("overall", "scores", "lengths", "depths", "generation")}
    metrics |= {"loss": [], "agreement": [], "speed": [], "baseline": "x_attention"}
    assert renamed(metrics, {"x_attention": "x"})["overall"] == [{"attn": "x"}]


def test_edges_of_blocks_come_from_the_plan_that_ran():
    row = {"length": 2048, "plans": ["star: blocks 4, block_size 512, anchor_size 128; 60% of the causal pairs"]}
    assert block_edges(row) == [512, 1024, 1536]
    assert block_edges({**row, "plans": ["dense: below 2048"]}) == [] == block_edges({**row, "plans": []})
    assert block_edges({**row, "plans": ["star: blocks 64, block_size 32"]}) == [], "a hatching tells nothing"
