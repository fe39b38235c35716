"""Defaults under YAML under flags; the entries of --attn; how work is dealt to processes."""

from __future__ import annotations

import pytest
from hf_attn_plugins.eval.configuration import Attention, attentions, configuration, split_attn
from hf_attn_plugins.eval.running.plan import units
from hf_attn_plugins.eval.tasks import GROUPS, TASKS, names_of
from hypothesis import given, settings
from hypothesis import strategies as st


def test_flags_go_over_yaml_and_yaml_over_defaults(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("lengths: [512, 1024]\nsamples: 3\nattn: [sdpa, 'star_attention:block_size=64']\ntasks: [vt]\n")
    made = configuration(str(path), {"samples": 5, "tasks": None, "lengths": "2048"})
    assert (made.lengths, made.samples, made.tasks, made.seed) == ((2048,), 5, ("vt",), 42)
    assert made.attn[1] == Attention("star_attention:block_size=64", "star_attention", {"block_size": 64})
    assert made.baseline == "sdpa" and made.out == "runs/mine"
    assert configuration(str(path), {"baseline": "star_attention:block_size=64"}).baseline.startswith("star")


@pytest.mark.parametrize("name", ["default", "demo"])
def test_the_packages_own_configurations_are_valid(name):
    made = configuration(name, {})
    assert made.model == "smollm2-135m" and made.baseline == "sdpa" and made.out == f"runs/{name}"
    assert {a.implementation for a in made.attn} >= {"sdpa", "tiled_attention", "star_attention", "cqs_attention"}


def test_attn_entries_hold_commas_of_their_own():
    text = "sdpa,star_attention:block_size=512,anchor_size=0,sliding_window:window=1024,attention_sink:window=8,sinks=4"
    assert split_attn(text) == [
        "sdpa",
        "star_attention:block_size=512,anchor_size=0",
        "sliding_window:window=1024",
        "attention_sink:window=8,sinks=4",
    ]
    made = attentions(split_attn(text))
    assert made[1].options == {"block_size": 512, "anchor_size": 0} and made[3].options == {"window": 8, "sinks": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lengthes: [1]", "no key lengthes"),
        ("- 1", "keys and values"),
        ("a: [", "while parsing"),
        ("samples: many", "samples='many'"),
        ("samples: true", "samples=True"),
        ("dtype: int8", "dtype='int8'"),
        ("online: maybe", "online='maybe'"),
        ("attn: []", "at least one"),
        ("tasks: []", "no tasks"),
        ("lengths: {a: 1}", "a list is needed"),
        ("max_new_tokens: 0", "max_new_tokens=0"),
        ("model: [a]", r"model=\['a'\]: text"),
        ("model: &a [*a]", "model=.*: text"),
        ("model:", "model=None: text"),
        ("revision: 1.0", "revision=1.0: text"),
        ("out: 3", "out=3: text"),
        ("device_map: 0", "device_map=0"),
        ("lengths: [64.5]", r"lengths=64.5: a whole number"),
        ("lengths: [true]", "lengths=True: a whole number"),
        ("1: 2", "no key 1"),
        ("samples: 2\nsamples: 3", "samples is there twice"),
    ],
)
def test_bad_configurations_are_named(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        configuration(str(path), {})


def test_groups_are_written_out_once():
    assert names_of(["vt", "ruler", "vt"]) == ["vt", *[name for name in GROUPS["ruler"] if name != "vt"]]
    assert all(name in TASKS for group in GROUPS.values() for name in group)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 4), st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True), st.integers(1, 5), st.data()
)
def test_processes_share_every_unit_once_and_evenly(tasks, lengths, processes, data):
    counts = {(t, n): data.draw(st.integers(0, 5)) for t in range(tasks) for n in lengths}
    parts = [units(tasks, lengths, lambda t, n: counts[t, n], p, processes) for p in range(processes)]
    every = [unit for part in parts for unit in part]
    assert sorted(every) == sorted((t, n, i) for (t, n), count in counts.items() for i in range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
