"""What `compare` gives back: several attentions at once, limits, speeds with their spread, and how it all prints."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import hf_attn_plugins as hap
from hf_attn_plugins.hf.agreement import Agreement, Run
from tests.families import build


def agreement(**changes) -> Agreement:
    base = Run("sdpa", {}, 2.0, 512.0, 2**20, 10.0, (2.0, 2.1, 1.9))
    ours = Run("star_attention", {"block_size": 64}, 1.0, 1024.0, 2**19, 10.5, (1.0, 1.1, 0.9), "star: blocks 16")
    known = dict(tokens=1024, kl_mean=0.02, kl_median=0.01, kl_p999=0.5, kl_max=1.0, top1=0.97,
                 max_probability_difference=0.2, rms_probability_difference=1e-3, perplexity_ratio=1.05, speedup=2.0,
                 within_noise=False, baseline=base, plugin=ours)  # fmt: skip
    return Agreement(**{**known, **changes})


def timed(base, ours, **changes) -> Agreement:
    found = agreement(**changes)
    return dataclasses.replace(
        found,
        baseline=dataclasses.replace(found.baseline, repeats=base),
        plugin=dataclasses.replace(found.plugin, repeats=ours),
    )


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (timed((2.0, 2.2), (1.0, 1.0)), "2.00x faster (2.00 - 2.20)"),
        (timed((1.0, 1.1), (2.0, 2.0), speedup=0.5), "2.00x slower (1.82 - 2.00)"),
        (timed((2.0, 2.2), (2.1, 1.9), speedup=1.05, within_noise=True), "within noise (0.95 - 1.16)"),
        # In both rounds ours was the faster one, and yet the ranges overlap: what is printed straddles 1.
        (timed((1.2, 3.0), (1.0, 2.0), speedup=1.4, within_noise=True), "within noise (0.60 - 3.00)"),
        (timed((1.0,), (2.0,), speedup=0.5, within_noise=True), "2.00x slower, one prefill each: spread unknown"),
    ],
)
def test_a_speed_is_said_with_its_spread(found, said):
    assert found.speed == said


def test_limits_name_what_broke_them():
    found = agreement()
    found.assert_close(max_kl=0.02, min_top1=0.97, max_perplexity=1.05)
    with pytest.raises(
        AssertionError, match=r"star_attention block_size=64, 1024 tokens: mean KL 0.02 .* 0.01 .*first"
    ):
        found.assert_close(max_kl=0.01, min_top1=0.98)
    assert len(found.faults(max_kl=0.01, min_top1=0.98, max_perplexity=1.01)) == 3
    assert len(agreement(kl_mean=float("nan")).faults(max_kl=1.0)) == 1, "what is no number is within no limit"
    for limits, message in ((dict(), "no limit"), (dict(min_top1=95), "a share"), (dict(max_kl=-1.0), "at least 0")):
        with pytest.raises(ValueError, match=message):
            found.assert_close(**limits)


def test_the_plan_stands_before_the_numbers():
    lines = str(agreement()).splitlines()
    assert lines[0] == "star_attention block_size=64 against sdpa, 1024 tokens" and "star: blocks 16" in lines[1]
    assert repr(agreement()) == str(agreement()) and agreement()._repr_html_().startswith("<pre>star_attention")
    dense = agreement()
    dense = dataclasses.replace(dense, plugin=dataclasses.replace(dense.plugin, plan="dense: 1024 tokens, below 2048"))
    assert dense.ran_dense and "nothing approximate was tested" in str(dense)


def test_several_attentions_at_several_lengths():
    model, ids, steps = build("llama"), torch.randint(5, 97, (1, 96)), []
    report = hap.compare_all(
        model,
        ids,
        ["tiled_attention:kernel=aten", ("star_attention", {"block_size": 16, "anchor_size": 4, "query_size": 8})],
        lengths=[48, 96],
        repeats=1,
        progress=lambda what, done, total: steps.append((done / total, what)),
    )
    assert [(each.tokens, each.plugin.name) for each in report] == [
        (48, "tiled_attention"), (48, "star_attention"), (96, "tiled_attention"), (96, "star_attention"),
    ]  # fmt: skip
    alone = hap.compare(model, ids, "star_attention", block_size=16, anchor_size=4, query_size=8, repeats=1)
    assert report[3].kl_mean == pytest.approx(alone.kl_mean) and report[3].top1 == alone.top1
    assert max(report[0].kl_max, report[2].kl_max) < 1e-5 < report[3].kl_mean
    shares = [share for share, _ in steps]
    assert shares == sorted(shares) and shares[-1] == 1 and any(what.startswith("prefill 2 of 3") for _, what in steps)
    assert str(report).splitlines()[1] == "what ran:" and "star: blocks" in str(report)
    assert "<table>" in report._repr_html_() and len(report.as_dict()["comparisons"]) == 4
    with pytest.raises(AssertionError, match="star_attention"):
        report.assert_close(max_kl=1e-5)
    bad = (([1], ["tiled_attention"], "length 1"), ([200], ["tiled_attention"], "2 to 96"), (None, [], "is empty"))
    for lengths, attentions, message in bad:
        with pytest.raises(ValueError, match=message):
            hap.compare_all(model, ids, attentions, lengths=lengths)


def test_progress_in_python_is_a_bar_where_somebody_looks(monkeypatch, capsys):
    from hf_attn_plugins.ui import progress

    with progress.python(None) as quiet:
        quiet("prefill", 1, 2)
    assert capsys.readouterr() == ("", ""), "pytest's streams are no terminal"
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    for given, shown in ((None, True), (False, False), (True, True)):
        with progress.python(given) as report:
            report("prefill 1 of 4", 1, 4)
        assert ("prefill 1 of 4" in capsys.readouterr().err) == shown
    called = []
    with progress.python(lambda *words: called.append(words)) as report:
        report("prefill", 1, 2)
    assert called == [("prefill", 1, 2)]


def test_plugins_caches_and_sessions_print_what_they_are(capsys):
    table = hap.plugins()
    assert str(table).splitlines()[0].startswith("attn_implementation=") and "block_size" in repr(table)
    assert all(
        name in str(table) and f'<td style="text-align:left">{name}</td>' in table._repr_html_() for name in hap.PLUGINS
    )
    model = build("llama")
    cache = hap.star.encode(model, torch.arange(5, 69)[None], block_size=16, anchor_size=4)
    assert str(cache).startswith(
        "StarCache: 64 tokens in 4 blocks of 16, anchor 4, halo 0; 0 tokens behind them; 2 layers"
    )
    assert cache._repr_html_() == f"<pre>{cache}</pre>"
    with hap.context_parallel(model, "star_attention") as session:
        assert session.summary() == "one process: plain star_attention, nothing is sent"
        assert str(session) == f"context_parallel with star_attention: {session.summary()}"
    check = hap.check(model, "tiled_attention")
    assert repr(check) == str(check) and "LlamaAttention" in check._repr_html_()
    assert {"check", "compare", "compare_all", "star", "tune", "use"} <= set(dir(hap)) and "Any" not in dir(hap)
