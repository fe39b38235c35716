"""Sources that are refused, writes that fail half-way, and undoing: nothing else may change."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from hf_attn_plugins.patches import RECIPES, command

from hf_attn_plugins.checkpoint import write
from hf_attn_plugins.checkpoint.source import open_source
from tests.older import needs_choice_in_config
from tests.patches.families import checkpoint, fingerprint

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
OPTIONS = {
    "set-attention": ["--attn", "tiled_attention"],
    "first-layer": [],
    "rope-freeze": ["--max-length", "96"],
}


def patch(*arguments: object) -> None:
    if arguments[:1] == ("set-attention",):
        needs_choice_in_config()
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(a) for a in arguments]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    for sharded in (False, True):
        checkpoint(folder / f"sharded-{sharded}", sharded=sharded, rope_parameters=DYNAMIC)
    return folder


@pytest.fixture
def source(made, tmp_path):
    return Path(shutil.copytree(made / "sharded-False", tmp_path / "source"))


@pytest.fixture
def sharded(made, tmp_path):
    return Path(shutil.copytree(made / "sharded-True", tmp_path / "source"))


def test_every_recipe_is_tried_here():
    assert OPTIONS.keys() == RECIPES.keys()


class Bomb:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def broken_config(source):
    (source / "config.json").write_text("{")


def config_that_is_a_list(source):
    (source / "config.json").write_text("[]")


def no_config(source):
    (source / "config.json").unlink()


def truncated_weights(source):
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def no_weights(source):
    (source / "model.safetensors").unlink()


def pickled_weights(source):
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(source.parent / "exploded")))


def link_out(source):
    (source.parent / "secret").write_text("secret")
    (source / "tokenizer.json").symlink_to(source.parent / "secret")


def link_of_weights(source):
    (source / "model.safetensors").rename(source.parent / "elsewhere")
    (source / "model.safetensors").symlink_to("../elsewhere")


def link_of_a_folder(source):
    (source / "inner").mkdir()
    (source / "more").symlink_to("inner")


def dead_link(source):
    (source / "tokenizer.json").symlink_to("nothing")


BAD = {
    broken_config: (ValueError, "not valid JSON"),
    config_that_is_a_list: (ValueError, "JSON list"),
    no_config: (FileNotFoundError, r"config\.json"),
    truncated_weights: (ValueError, "no whole safetensors file"),
    no_weights: (FileNotFoundError, r"neither model\.safetensors"),
    pickled_weights: (ValueError, r"pytorch_model\.bin is a pickle"),
    link_out: (ValueError, "symlink to .*secret"),
    link_of_weights: (ValueError, "symlink to .*elsewhere"),
    link_of_a_folder: (ValueError, "symlink to a folder"),
    dead_link: (FileNotFoundError, "symlink to nothing"),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__)
def test_bad_sources_are_refused_by_every_recipe(tmp_path, source, spoil, recipe):
    spoil(source)
    before, (error, message) = fingerprint(tmp_path), BAD[spoil]
    for arguments in ([tmp_path / "target"], ["--in-place"]):
        with pytest.raises(error, match=message):
            patch(recipe, source, *arguments, *OPTIONS[recipe])
        assert fingerprint(tmp_path) == before


def test_missing_shards_and_damaged_indices(tmp_path, sharded):
    shards = open_source(sharded).weights
    assert len(shards) > 2
    (sharded / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=shards[1]):
        patch("set-attention", sharded, tmp_path / "target", *OPTIONS["set-attention"])
    (sharded / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        patch("set-attention", sharded, tmp_path / "target", *OPTIONS["set-attention"])
    assert not (tmp_path / "target").exists()


def test_links_within_the_folder_are_followed(tmp_path, source):
    (source / "weights").mkdir()
    (source / "model.safetensors").rename(source / "weights" / "w")
    (source / "model.safetensors").symlink_to("weights/w")
    patch("set-attention", source, tmp_path / "target", *OPTIONS["set-attention"])
    assert not (tmp_path / "target" / "model.safetensors").is_symlink()
    assert (tmp_path / "target" / "model.safetensors").read_bytes() == (source / "weights" / "w").read_bytes()


def test_a_cached_snapshot_by_its_hub_id(tmp_path, source, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--some--model"
    snapshot, commit = repo / "snapshots", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "blobs").mkdir()
    (snapshot / commit).mkdir(parents=True)
    for path in source.iterdir():
        shutil.copyfile(path, repo / "blobs" / path.name)
        (snapshot / commit / path.name).symlink_to(f"../../blobs/{path.name}")
    before = fingerprint(repo)
    patch("set-attention", "some/model", tmp_path / "target", *OPTIONS["set-attention"])
    assert not any(path.is_symlink() for path in (tmp_path / "target").rglob("*"))
    with pytest.raises(ValueError, match="in the hub's cache"):
        patch("set-attention", "some/model", "--in-place", *OPTIONS["set-attention"])
    assert fingerprint(repo) == before
    patch("--undo", tmp_path / "target")
    assert fingerprint(tmp_path / "target") == fingerprint(source)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_snapshot_by_its_path(tmp_path, source, recipe):
    repo = tmp_path / "models--some--model"
    snapshot = repo / "snapshots" / ("0" * 40)
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        shutil.copyfile(path, repo / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    before = fingerprint(repo)
    patch(recipe, snapshot, tmp_path / "target", *OPTIONS[recipe])
    assert not any(path.is_symlink() for path in (tmp_path / "target").rglob("*"))
    with pytest.raises(ValueError, match="in the hub's cache"):
        patch(recipe, snapshot, "--in-place", *OPTIONS[recipe])
    assert fingerprint(repo) == before
    patch("--undo", tmp_path / "target")
    assert fingerprint(tmp_path / "target") == fingerprint(source)
    for elsewhere in (repo / "refs", tmp_path / "secret"):  # only blobs may be linked to
        elsewhere.write_text("secret")
        (snapshot / "tokenizer.json").symlink_to(elsewhere)
        with pytest.raises(ValueError, match="outside of the checkpoint"):
            patch(recipe, snapshot, tmp_path / "other", *OPTIONS[recipe])
        (snapshot / "tokenizer.json").unlink()


def test_in_place_writes_nothing_outside_of_the_folder(tmp_path, source, monkeypatch):
    """A mounted folder is another file system than its parent, which may be read-only, too."""

    def inside(function):
        def checked(first, second=None, *rest, **options):
            for path in (first, second):
                assert path is None or tmp_path / "source" in Path(path).parents, path
            return function(first, *([] if second is None else [second]), *rest, **options)

        return checked

    before = fingerprint(source)
    with monkeypatch.context() as patching:
        for name in ("replace", "rename", "symlink", "link"):
            patching.setattr(os, name, inside(getattr(os, name)))
        patch("set-attention", source, "--in-place", *OPTIONS["set-attention"])
        assert fingerprint(source) != before
        patch("--undo", source)
    assert fingerprint(source) == before


def test_a_file_system_without_links(tmp_path, source, monkeypatch):
    def refused(*_, **__):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refused)
    before = fingerprint(source)
    patch("set-attention", source, "--in-place", *OPTIONS["set-attention"])
    patch("--undo", source)
    assert fingerprint(source) == before
    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(OSError, match="leave --hard-link out"):
        patch("set-attention", source, tmp_path / "target", "--hard-link", *OPTIONS["set-attention"])
    assert not (tmp_path / "target").exists()


def test_first_layer_takes_no_part_in_the_attention_that_a_config_names(tmp_path, source, monkeypatch):
    from transformers import AutoModelForCausalLM

    asked, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: asked.append(k["attn_implementation"]) or load(*a, **k)
    )
    patch("set-attention", source, "--in-place", "--attn", "star_attention")
    patch("first-layer", source, tmp_path / "target")
    assert asked == ["sdpa", "sdpa"]
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "attn_implementation": "some/kernel"}))
    with pytest.raises(ValueError, match="kernel of the hub"):
        patch("first-layer", source, tmp_path / "other")


def test_what_is_neither_a_folder_nor_cached(tmp_path):
    for given, message in (("no/such", "local cache"), (tmp_path / "none", "no checkpoint folder")):
        with pytest.raises(FileNotFoundError, match=message):
            patch("set-attention", given, tmp_path / "target", *OPTIONS["set-attention"])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("source", "within each other"),
        ("source/inside", "within each other"),
        (".", "within each other"),
        ("taken", "exists"),
        ("link", "exists"),
        ("no/parent", "no such folder"),
    ],
)
def test_bad_destinations(tmp_path, source, target, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "link").symlink_to("nothing")
    before = fingerprint(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        patch("set-attention", source, tmp_path / target, *OPTIONS["set-attention"])
    assert fingerprint(tmp_path) == before


def test_a_copy_or_in_place_not_both(tmp_path, source):
    for arguments in ([], [tmp_path / "target", "--in-place"]):
        with pytest.raises(ValueError, match="either a new folder"):
            patch("set-attention", source, *arguments, *OPTIONS["set-attention"])


def test_a_full_disk_is_noticed_first(tmp_path, source, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    before = fingerprint(tmp_path)
    for arguments in ([tmp_path / "target"], ["--in-place"]):
        with pytest.raises(OSError, match="MB are needed"):
            patch("first-layer", source, *arguments)
        assert fingerprint(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
@pytest.mark.parametrize("place", ["copy", "in-place"])
def test_a_failure_at_any_step_leaves_everything_as_it_was(tmp_path, source, monkeypatch, place, error):
    """Fails the n-th file operation for every n, until one run gets through."""
    before, operations = fingerprint(tmp_path), []
    arguments = [tmp_path / "target"] if place == "copy" else ["--in-place"]
    for failing in range(1, 60):
        operations.clear()

        def count(inner, failing=failing):
            def operation(*args, **kwargs):
                operations.append(inner)
                if len(operations) == failing:
                    raise error
                return inner(*args, **kwargs)

            return operation

        with monkeypatch.context() as patched:
            for module, name in ((shutil, "copyfile"), (os, "replace"), (os, "rename"), (os, "symlink")):
                patched.setattr(module, name, count(getattr(module, name)))
            patched.setattr(write, "digest", count(write.digest))
            patched.setattr(write, "as_json", count(write.as_json))
            try:
                patch("set-attention", source, *arguments, *OPTIONS["set-attention"])
            except (OSError, KeyboardInterrupt):
                assert fingerprint(tmp_path) == before, failing
            else:
                break
    assert failing > 8 and fingerprint(tmp_path) != before


class TestUndo:
    def test_nothing_was_patched(self, source):
        with pytest.raises(ValueError, match="was not patched"):
            patch("--undo", source)
        with pytest.raises(FileNotFoundError, match="no such folder"):
            patch("--undo", source / "none")

    @pytest.mark.parametrize("spoil", ["config", "kept", "record"])
    def test_later_changes_are_not_lost(self, source, spoil):
        patch("set-attention", source, "--in-place", *OPTIONS["set-attention"])
        if spoil == "config":
            (source / "config.json").write_text("{}")
        elif spoil == "kept":
            (source / write.KEPT / "1" / "config.json").write_text("{}")
        else:
            (source / write.RECORD).write_text('{"patches": 3}')
        before = fingerprint(source)
        with pytest.raises(ValueError, match=r"nothing done|no list of patches"):
            patch("--undo", source)
        assert fingerprint(source) == before

    def test_a_patch_killed_before_its_last_step_is_undone(self, source):
        """The record is written first: what it names may still be the original."""
        before = fingerprint(source)
        original = (source / "config.json").read_bytes()
        patch("set-attention", source, "--in-place", *OPTIONS["set-attention"])
        (source / "config.json").write_bytes(original)
        patch("--undo", source)
        assert fingerprint(source) == before

    def test_all_recipes_on_top_of_each_other(self, source):
        states = [fingerprint(source)]
        for recipe in ("rope-freeze", "set-attention", "first-layer"):
            patch(recipe, source, "--in-place", *OPTIONS[recipe])
            states.append(fingerprint(source))
        config = json.loads((source / "config.json").read_text())
        assert config["attn_implementation"] == "tiled_attention" and "quantization_config" in config
        for state in reversed(states[:-1]):
            patch("--undo", source)
            assert fingerprint(source) == state


def test_a_command_is_needed(tmp_path):
    with pytest.raises(ValueError, match="name a recipe"):
        patch()
    with pytest.raises(ValueError, match="stands alone"):
        patch("--undo", tmp_path, "list")
