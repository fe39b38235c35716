"""metrics.json against numbers worked out by hand."""

from __future__ import annotations

import math
import random

import pytest
from hf_attn_plugins.eval.records import Agreement, Generation, Loss, RunFolder, Sample, Speed
from hf_attn_plugins.eval.report.summary.answers import first_divergence
from hf_attn_plugins.eval.report.summary.intervals import estimate, exponential, weighted_mean_interval
from hf_attn_plugins.eval.report.summary.summary import summarise, summarise_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from . import fabricated

CONFIG = {"attn": [{"label": "sdpa"}, {"label": "star"}], "baseline": "sdpa"}


def samples(*tasks: tuple[str, int, int], depths: tuple[float | None, ...] = (None,)) -> dict[str, Sample]:
    made = [
        Sample(f"ruler/{task}/{length}/{index:04d}", task, "ruler", length, length, depths[index % len(depths)])
        for task, length, count in tasks
        for index in range(count)
    ]
    return {one.sample: one for one in made}


def scored(known: dict[str, Sample], label: str, scores: list[float | None]) -> list[Generation]:
    return [Generation(name, label, score=score, token_ids=[1]) for name, score in zip(known, scores)]


def row(rows: list[dict], **wanted):
    found = [one for one in rows if all(one[name] == value for name, value in wanted.items())]
    assert len(found) == 1, f"{len(found)} rows fit {wanted}"
    return found[0]


def test_mean_standard_error_and_paired_difference():
    known = samples(("vt", 1024, 4))
    answers = scored(known, "sdpa", [1, 1, 0, 1]) + scored(known, "star", [1, 0, 0, 0])
    metrics = summarise(CONFIG, known, answers)
    base, star = (row(metrics["scores"], attn=label) for label in ("sdpa", "star"))
    assert (base["n"], base["mean"], star["mean"]) == (4, 0.75, 0.25)
    # variance with n - 1: three ones and a zero have 3 * 0.0625 + 0.5625 = 0.75 over 3; se = sqrt(0.25 / 4)
    assert base["se"] == pytest.approx(0.25)
    # differences 0, -1, 0, -1: mean -0.5, variance 4 * 0.25 / 3, se = sqrt(1 / 12): smaller than unpaired sqrt(1 / 8)
    assert star["difference"] == -0.5 and star["difference_se"] == pytest.approx(math.sqrt(1 / 12))
    assert -1 <= star["difference_low"] < -0.5 < star["difference_high"] <= 0
    assert base["difference"] == base["difference_low"] == base["difference_high"] == 0


def test_differences_take_only_samples_that_both_answered():
    known = samples(("vt", 1024, 4))
    star = scored(known, "star", [0, 1, 1, 1])
    star[3] = Generation(list(known)[3], "star", error="RuntimeError: out of memory")
    metrics = summarise(CONFIG, known, scored(known, "sdpa", [1, None, 1, 0]) + star)
    found = row(metrics["scores"], attn="star")
    assert (found["n"], found["errors"], found["pairs"]) == (3, 1, 2)
    assert found["mean"] == pytest.approx(2 / 3) and found["difference"] == -0.5
    assert metrics["errors"] == 1 and row(metrics["overall"], attn="star")["errors"] == 1


def test_every_task_and_length_counts_alike():
    known = samples(("vt", 1024, 2), ("cwe", 1024, 4), ("cwe", 2048, 2))
    names = list(known)
    base = [Generation(name, "sdpa", score=1.0) for name in names]
    low = [Generation(n, "star", score=0.0 if "/vt/" in n else 0.5 if "2048" in n else 1.0) for n in names]
    metrics = summarise(CONFIG, known, base + low)
    assert row(metrics["lengths"], attn="star", length=1024)["mean"] == 0.5  # not (2 * 0 + 4 * 1) / 6
    overall = row(metrics["overall"], attn="star")
    assert overall["score"] == pytest.approx(0.5) and overall["difference"] == pytest.approx(-0.5)
    assert (overall["cells"], overall["n"], overall["pairs"]) == (3, 8, 8)


def test_depths_are_a_grid_or_go_into_fifths():
    known = samples(("niah", 1024, 4), depths=(0.0, 1.0))
    rows = summarise(CONFIG, known, scored(known, "sdpa", [1, 0, 0, 0]))["depths"]
    found = [(one["begin"], one["end"], one["n"], one["mean"]) for one in rows]
    assert found == [(0.0, 0.0, 2, 0.5), (1.0, 1.0, 2, 0.0)]
    odd = samples(("niah", 1024, 4), depths=(0.0, 0.19, 0.2, 1.0))
    rows = summarise(CONFIG, odd, scored(odd, "sdpa", [1.0, 0.0, 1.0, 1.0]))["depths"]
    found = [(one["begin"], one["end"], one["n"], one["mean"]) for one in rows]
    assert found == [(0.0, 0.2, 2, 0.5), (0.2, 0.4, 1, 1.0), (0.8, 1.0, 1, 1.0)]


@pytest.mark.parametrize(
    ("ours", "theirs", "place"),
    [([1, 2], [1, 2], None), ([1, 3], [1, 2], 1), ([1], [1, 2], 1), ([], [4], 0), ([], [], None)],
)
def test_first_divergence(ours, theirs, place):
    assert first_divergence(ours, theirs) == first_divergence(theirs, ours) == place


def test_generation_agreement_counts_tokens_not_text():
    known = samples(("vt", 1024, 3))
    tokens = {"sdpa": [[1, 2, 3], [1, 2, 3], [1, 2, 3]], "star": [[1, 2, 3], [1, 9, 3], [1, 2, 3, 4]]}
    answers = [
        Generation(name, label, prediction="same text", token_ids=ids)
        for label, answers in tokens.items()
        for name, ids in zip(known, answers)
    ]
    metrics = summarise(CONFIG, known, answers)
    found = row(metrics["generation"], attn="star")  # the baseline has no row of its own
    assert found["n"] == 3 and found["exact_match"] == pytest.approx(1 / 3)
    assert found["first_divergence_median"] == 2  # of 1 and 3
    assert metrics["scores"] == [] and row(metrics["overall"], attn="star")["score"] is None


def test_perplexity_comes_from_sums_over_texts():
    known = samples(("ppl", 1024, 2))
    first, second = known
    bucket = {"begin": 0, "end": 100, "count": 100}
    found = [
        Loss(first, "sdpa", nll_sum=100.0, count=100, buckets=[{**bucket, "nll_sum": 100.0}]),
        Loss(second, "sdpa", nll_sum=300.0, count=300, buckets=[{**bucket, "nll_sum": 200.0}]),
        Loss(first, "star", nll_sum=110.0, count=100),
        Loss(second, "star", nll_sum=300.0, count=300),
    ]
    metrics = summarise(CONFIG, known, found)
    base, star = (row(metrics["loss"], attn=label) for label in ("sdpa", "star"))
    assert base["perplexity"] == pytest.approx(math.e) and base["tokens"] == 400
    assert base["buckets"] == [{**bucket, "count": 200, "nll": 1.5, "perplexity": pytest.approx(math.exp(1.5))}]
    assert star["ratio"] == pytest.approx(math.exp(10 / 400))
    assert star["ratio_low"] == pytest.approx(1.0) and star["ratio_high"] == pytest.approx(math.exp(10 / 100))
    assert row(metrics["overall"], attn="star")["perplexity_ratio"] == pytest.approx(math.exp(10 / 400))


def test_perplexity_beyond_all_bounds_is_none_not_an_error():
    known = samples(("ppl", 1024, 1))
    metrics = summarise(CONFIG, known, [Loss(next(iter(known)), "sdpa", nll_sum=1e6, count=2)])
    assert row(metrics["loss"], attn="sdpa")["perplexity"] is None
    nan = summarise(CONFIG, known, [Loss(next(iter(known)), "sdpa", nll_sum=math.nan, count=2)])
    assert row(nan["loss"], attn="sdpa")["n"] == 0


def test_agreement_is_weighted_by_positions():
    known = samples(("agreement", 1024, 2))
    first, second = known
    bucket = {"begin": 0, "end": 50, "top1": 1.0, "nll": 2.0, "baseline_nll": 1.0}
    kl = {"mean": 0.1, "median": 0.05, "p99": 1.0, "max": 2.0}
    found = [
        Agreement(first, "star", None, 100, kl, 0.9, 0.3, 0.02, 0.003, [{**bucket, "kl": 0.1, "count": 50}]),
        Agreement(
            second,
            "star",
            None,
            300,
            {"mean": 0.5, "median": 0.15, "p99": 3.0, "max": 1.0},
            0.5,
            0.1,
            0.06,
            0.004,
            [{**bucket, "kl": 0.4, "count": 150}],
        ),
    ]
    metrics = summarise(CONFIG, known, found)
    star = row(metrics["agreement"], attn="star")
    assert star["kl"] == pytest.approx({"mean": 0.4, "median": 0.1, "p99": 2.5, "max": 2.0})
    assert star["top1"] == pytest.approx(0.6) and star["rms_dp"] == pytest.approx(math.sqrt((0.09 + 3 * 0.01) / 4))
    assert star["log_ppl_ratio"] == pytest.approx(0.05)
    assert star["log_ppl_ratio_se"] == pytest.approx(math.hypot(0.3, 1.2) / 400)
    assert star["buckets"][0]["kl"] == pytest.approx((0.1 * 50 + 0.4 * 150) / 200)
    assert star["buckets"][0]["baseline_perplexity"] == pytest.approx(math.e)
    overall = row(metrics["overall"], attn="star")
    assert overall["kl"] == pytest.approx(0.4) and overall["perplexity_ratio"] == pytest.approx(math.exp(0.05))


def test_speed_ratios_are_medians_within_a_round():
    rounds = [
        ("sdpa", 0, 2.0),
        ("star", 0, 1.0),
        ("sdpa", 1, 9.0),
        ("star", 1, 3.0),
        ("sdpa", 2, 2.0),
        ("star", 2, 4.0),
    ]
    found = [
        Speed(
            f"speed/speed/1024/{number}",
            label,
            None,
            1024,
            number,
            {"prefill": seconds},
            100 if label == "sdpa" else 50,
        )
        for label, number, seconds in rounds
    ]
    star = row(summarise(CONFIG, {}, found)["speed"], attn="star")
    assert star["prefill"] == 3.0 and star["speed_up"] == 2.0  # of 2, 3 and 0.5; not median 2 / median 3
    assert star["memory_ratio"] == 0.5 and star["decode_speed_up"] is None and star["source"] == "speed"


def test_without_timed_rounds_the_answers_own_seconds_count():
    known = samples(("vt", 1024, 1), ("vt", 2048, 1))
    found = [
        Generation(name, label, score=1.0, seconds={"prefill": seconds, "decode": 3.0}, new_tokens=4, peak_bytes=None)
        for label, seconds in (("sdpa", 4.0), ("star", 1.0))
        for name in known
    ]
    metrics = summarise(CONFIG, known, found)
    star = row(metrics["speed"], attn="star", length=1024)
    assert (star["speed_up"], star["decode_per_token"], star["source"]) == (4.0, 1.0, "generation")
    assert row(metrics["overall"], attn="star")["speed_length"] == 2048


def test_one_value_has_no_interval_and_none_has_no_mean():
    assert estimate([0.5]) == estimate([0.5], []) and estimate([0.5]).se is None and estimate([0.5]).low is None
    assert estimate([]).mean is None and estimate().n == 0
    assert weighted_mean_interval([1.0], [2]) == (None, None)
    assert exponential(None) is None and exponential(1e4) is None


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=60), st.floats(-2, 2, width=32))
def test_intervals_lie_within_the_values_and_move_with_them(values, shift):
    found, moved = estimate(values), estimate([value + shift for value in values])
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert found.low == estimate(values).low, "the seed is fixed"
    assert moved.mean == pytest.approx(found.mean + shift, abs=1e-6)
    if len({value + shift for value in values}) == len(set(values)):
        assert (moved.low, moved.high) == pytest.approx((found.low + shift, found.high + shift), abs=1e-6)


def test_interval_is_that_of_drawing_samples_again():
    """Against drawing indices one by one, the textbook form; two bootstraps differ by their own noise only."""
    chance = random.Random(3)
    values = [chance.choice((0.0, 0.0, 0.5, 1.0)) for _ in range(40)]
    drawn = sorted(sum(chance.choices(values, k=40)) / 40 for _ in range(4000))
    found = estimate(values)
    assert found.low == pytest.approx(drawn[100], abs=0.03) and found.high == pytest.approx(drawn[3900], abs=0.03)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    chance, inside = random.Random(0), 0
    for _ in range(200):
        found = estimate([float(chance.random() < 0.7) for _ in range(60)])
        inside += found.low <= 0.7 <= found.high
    assert 0.88 <= inside / 200 <= 0.99


def test_a_folder_without_predictions_keeps_its_metrics(tmp_path):
    folder = RunFolder(fabricated.full(tmp_path / "run", tasks=["vt"], lengths=[1024], count=2))
    metrics = summarise_folder(folder)
    folder.write_json("metrics", metrics)
    for name in ("samples.jsonl", "predictions.jsonl"):
        (folder.path / name).unlink()
    assert summarise_folder(folder) == metrics
    (folder.path / "metrics.json").unlink()
    with pytest.raises(ValueError, match="no predictions yet"):
        summarise_folder(folder)


def test_exact_attentions_are_at_zero_and_star_is_not(tmp_path):
    metrics = summarise_folder(RunFolder(fabricated.full(tmp_path / "run", lengths=[4096])))
    for label in fabricated.ATTENTIONS[1:3]:
        found = row(metrics["overall"], attn=label)
        assert found["difference"] == found["difference_low"] == found["difference_high"] == 0
        assert found["exact_match"] == 1
    star = row(metrics["overall"], attn=fabricated.ATTENTIONS[3])
    assert star["difference_high"] < 0 and star["exact_match"] < 1 and star["speed_up"] > 1.5
