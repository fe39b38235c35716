"""Configs and indexes as anybody may have written them: every recipe gives a result or one line that names the file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_attn_plugins.checkpoint.source import open_source
from hf_attn_plugins.checkpoint.write import patches_of, undo
from hf_attn_plugins.cli import main
from tests.patches.families import checkpoint, fingerprint

OPTIONS = {
    "set-attention": ["--attn", "tiled_attention"],
    "first-layer": [],
    "rope-freeze": ["--max-length", "96"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    checkpoint(folder / "one", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0})
    checkpoint(folder / "sharded", sharded=True)
    return folder


def text(content):
    return lambda folder: (folder / "config.json").write_text(content)


def fields(**changes):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return spoil


CONFIGS = {
    "nested objects": (text('{"a":' * 100_000), "not valid JSON"),
    "nested lists": (text("[" * 500 + "]" * 500), "list"),
    "nested in a field": (text('{"a": ' + "[" * 300 + "]" * 300 + "}"), "more than 64 deep"),
    "a long number": (text('{"a": ' + "9" * 5000 + "}"), "not valid JSON"),
    "NaN": (text('{"rms_norm_eps": NaN}'), "NaN is no number"),
    "a key twice": (text('{"hidden_size": 1, "hidden_size": 2}'), "'hidden_size' occurs twice"),
    "half a character": (text('{"a": "\\ud800"}'), "not valid JSON"),
    "plugins as list": (fields(hf_attn_plugins=[1]), "hf_attn_plugins is [1]"),
    "plugins as text": (fields(hf_attn_plugins="star"), 'hf_attn_plugins is "star"'),
    "options as number": (fields(hf_attn_plugins={"tiled_attention": 3}), "'tiled_attention' 3"),
    "options of a part": (fields(text_config={"hf_attn_plugins": 3}), "text_config.hf_attn_plugins"),
    "quantisation as text": (fields(quantization_config="int8"), "quantization_config"),
    "no heads": (fields(num_attention_heads=0), "num_attention_heads is 0"),
    "layers as text": (fields(num_hidden_layers="2"), 'num_hidden_layers is "2"'),
    "layers without end": (fields(num_hidden_layers=10**9), "at most 10000 are allowed"),
    "layers as truth": (fields(num_hidden_layers=True), "num_hidden_layers is true"),
    "a width below zero": (fields(hidden_size=-32), "hidden_size is -32"),
    "model_type as list": (fields(model_type=["llama"]), "model_type is"),
    "architectures as text": (fields(architectures="Llama"), "architectures is"),
    "rope as list": (fields(rope_parameters=[1]), "rope_parameters is"),
    "a kernel of the hub": (fields(attn_implementation="some/kernel"), "kernel of the hub"),
    "one for a part": (fields(attn_implementation={"": "sdpa", "text_config": "a/b"}), "kernel of the hub"),
    "attention as number": (fields(attn_implementation=3), "attn_implementation is 3"),
}


def run(capsys, *words):
    try:
        status = main(["patch", *map(str, words)])
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr()


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_are_refused_in_one_line(tmp_path, made, capsys, case):
    folder = Path(shutil.copytree(made / "one", tmp_path / "source"))
    spoil, message = CONFIGS[case]
    spoil(folder)
    before = fingerprint(tmp_path)
    for recipe, options in OPTIONS.items():
        status, captured = run(capsys, recipe, folder, tmp_path / "target", *options)
        lines = captured.err.strip().splitlines()
        assert status == 2 and len(lines) == 1 and "config.json" in lines[0] and message in lines[0], captured.err
        assert fingerprint(tmp_path) == before


UNUSABLE = {
    "shapes that do not fit": dict(hidden_size=64),
    "heads that do not divide": dict(num_attention_heads=7, head_dim=None),
    "an unknown activation": dict(hidden_act="nonesuch"),
    "an unknown family": dict(model_type="nonesuch"),
    "text for a number": dict(rms_norm_eps="small"),
    "another number of layers": dict(num_hidden_layers=3, layer_types=["full_attention"]),
    "rope of text": dict(rope_parameters={"rope_type": "dynamic", "rope_theta": "x", "factor": None}),
    "rope of nothing": dict(rope_parameters={"rope_type": "longrope"}),
    "a remote class": dict(model_type="other", auto_map={"AutoConfig": "code.Config"}),
}


@pytest.mark.parametrize("recipe", OPTIONS)
@pytest.mark.parametrize("case", UNUSABLE)
def test_configs_that_transformers_cannot_use(tmp_path, made, capsys, case, recipe):
    folder = Path(shutil.copytree(made / "one", tmp_path / "source"))
    fields(**UNUSABLE[case])(folder)
    before = fingerprint(tmp_path)
    status, captured = run(capsys, recipe, folder, tmp_path / "target", *OPTIONS[recipe])
    assert "Traceback" not in captured.err and ".hf-attn." not in captured.err
    if status == 2:
        lines = [line for line in captured.err.splitlines() if line.startswith("hf-attn patch:")]
        assert len(lines) == 1 and str(folder) in lines[0], captured.err
        assert fingerprint(tmp_path) == before
    else:
        assert status == 0 and patches_of(tmp_path / "target")


INDEXES = {
    "a number": 3, "null": None, "a list": ["a"], "an object": {}, "a name outside": "../model.safetensors",
    "an absolute name": "/etc/passwd", "nothing": "", "a folder": ".",
}  # fmt: skip


@pytest.mark.parametrize("case", INDEXES)
@pytest.mark.parametrize("whole", [False, True])
def test_indexes_are_refused(tmp_path, made, case, whole):
    folder = Path(shutil.copytree(made / "sharded", tmp_path / "source"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    if whole:
        index["weight_map"] = INDEXES[case]
    else:
        index["weight_map"][next(iter(index["weight_map"]))] = INDEXES[case]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, OSError), match=r"model\.safetensors\.index\.json"):
        open_source(folder)


def test_pipes_and_circles_are_refused(tmp_path, made):
    folder = Path(shutil.copytree(made / "one", tmp_path / "source"))
    os.mkfifo(folder / "pipe")
    with pytest.raises(ValueError, match="pipe is no regular file"):
        open_source(folder)
    (folder / "pipe").unlink()
    (folder / "circle").symlink_to("circle")
    with pytest.raises((ValueError, OSError), match="circle"):
        open_source(folder)


RECORDS = [
    "3", "[]", '{"patches": 3}', '{"patches": [3]}', '{"patches": [{}]}', '{"patches": [{"number": 1, "files": []}]}',
]  # fmt: skip


@pytest.mark.parametrize("change", [
    *RECORDS, ("number", "../1"), ("number", True), ("number", -1), ("time", 3), ("files", {"../../other": {}}),
    ("files", {"/etc/passwd": {}}), ("files", {"config.json": {"before": 3}}), ("files", {"config.json": 3}),
    ("files", {"config.json": {"before": "x"}}), ("files", {"": {}}),
])  # fmt: skip
def test_records_that_no_patch_wrote(tmp_path, made, capsys, change):
    folder = Path(shutil.copytree(made / "one", tmp_path / "source"))
    assert run(capsys, "set-attention", folder, "--in-place", *OPTIONS["set-attention"])[0] == 0
    record = folder / "hf_attn_patches.json"
    if isinstance(change, str):
        record.write_text(change)
    else:
        found = json.loads(record.read_text())
        found["patches"][0][change[0]] = change[1]
        record.write_text(json.dumps(found))
    before = fingerprint(tmp_path)
    for words in (
        ["--undo", folder],
        ["show", folder],
        ["set-attention", folder, "--in-place", "--attn", "cqs_attention"],
    ):
        status, captured = run(capsys, *words)
        assert status == 2 and len(captured.err.splitlines()) == 1 and record.name in captured.err
        assert fingerprint(tmp_path) == before


def test_originals_behind_a_link_are_not_touched(tmp_path, made, capsys):
    folder = Path(shutil.copytree(made / "one", tmp_path / "source"))
    assert run(capsys, "set-attention", folder, "--in-place", *OPTIONS["set-attention"])[0] == 0
    (folder / "hf_attn_patches").rename(tmp_path / "elsewhere")
    (folder / "hf_attn_patches").symlink_to("../elsewhere")
    before = fingerprint(tmp_path)
    with pytest.raises(ValueError, match="is a symlink"):
        undo(folder)
    assert fingerprint(tmp_path) == before


JSON = st.none() | st.booleans() | st.integers(-2, 200) | st.floats() | st.text(max_size=6)
JSON = st.recursive(JSON, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3))
NAMES = st.sampled_from([
    "hf_attn_plugins", "quantization_config", "model_type", "architectures", "num_attention_heads", "hidden_size",
    "num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size", "rope_parameters", "rope_scaling",
    "attn_implementation", "layer_types", "dtype", "torch_dtype", "text_config", "hidden_act", "sliding_window",
    "max_position_embeddings", "tie_word_embeddings", "auto_map", "pad_token_id", "attention_bias",
])  # fmt: skip


def _patched_or_refused(folder, target, recipe, options):
    """Through the recipe itself, without the command line's own handling of errors."""
    import argparse

    from hf_attn_plugins.patches import command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    before = fingerprint(folder)
    try:
        command.run(parser.parse_args([recipe, str(folder), str(target), *options]))
    except (ValueError, OSError) as error:
        assert str(folder) in str(error) and not target.exists()
    else:
        assert patches_of(target)
    assert fingerprint(folder) == before


def _any_config(made, tmp_path, changes, recipe):
    shutil.rmtree(tmp_path, ignore_errors=True)
    folder = Path(shutil.copytree(made / "one", tmp_path / "source"))
    fields(**changes)(folder)
    _patched_or_refused(folder, tmp_path / "target", recipe, OPTIONS[recipe])


FUZZ = {"changes": st.dictionaries(NAMES, JSON, min_size=1, max_size=3), "recipe": st.sampled_from([*OPTIONS])}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**FUZZ)
def test_any_config(made, tmp_path, changes, recipe):
    _any_config(made, tmp_path, changes, recipe)


@pytest.mark.grid
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**FUZZ)
def test_any_config_at_length(made, tmp_path, changes, recipe):
    _any_config(made, tmp_path, changes, recipe)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    index=JSON | st.fixed_dictionaries({"weight_map": JSON | st.dictionaries(st.text(max_size=4), JSON, max_size=3)})
)
def test_any_index(made, tmp_path, index):
    shutil.rmtree(tmp_path, ignore_errors=True)
    folder = Path(shutil.copytree(made / "sharded", tmp_path / "source"))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, OSError), match=r"model\.safetensors\.index\.json"):
        open_source(folder)
