"""Patches, undos and star caches, killed before any step that touches the disk: the next run goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_attn_plugins.patches import command

from hf_attn_plugins.checkpoint.source import open_source
from hf_attn_plugins.checkpoint.write import Patch, interrupted, patches_of, undo, write_copy, write_in_place
from hf_attn_plugins.core.staging import exclusive, put, staging_name, sweep
from tests.kills import killed_before
from tests.patches.families import checkpoint, fingerprint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("made") / "source")


def add_tables(folder: Path) -> Patch:
    """A patch that changes the config and adds two files, as the largest recipe does."""
    source = open_source(folder)
    config = {**source.config, "changed": True}
    extra = {name: (lambda path: path.write_bytes(b"0" * 1000), 1000) for name in ("tables.a", "tables.b")}
    return Patch("test", {}, config, [], extra)


def in_place(folder: Path) -> None:
    if interrupted(folder):
        undo(folder)
    write_in_place(open_source(folder), add_tables(folder))


def copied(folder: Path) -> None:
    write_copy(open_source(folder), folder.with_name("target"), add_tables(folder))


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def test_patches_in_place(tmp_path, made):
    folder = Path(shutil.copytree(made, tmp_path / "0"))
    before = fingerprint(folder)
    write_in_place(open_source(folder), add_tables(folder))
    after = {name: content for name, content in fingerprint(folder).items() if "patches" not in name}
    for step in range(1, 200):
        shutil.rmtree(tmp_path, ignore_errors=True)
        folder, other = (Path(shutil.copytree(made, tmp_path / name)) for name in ("one", "other"))
        if not killed_before(step, lambda folder=folder: in_place(folder)):
            break
        now = fingerprint(folder)
        assert now["config.json"] in (before["config.json"], after["config.json"])
        assert all(now[name] == content for name, content in before.items() if name != "config.json")
        shutil.rmtree(other)
        shutil.copytree(folder, other, symlinks=True)
        # Undoing takes back what there is to take back; nothing of it stands in a later patch's way.
        if patches_of(folder):
            undo(folder)
        else:
            with pytest.raises(ValueError, match="was not patched"):
                undo(folder)
        # Patching again goes on as if nothing had been.
        for each in (folder, other):
            if each == other and patches_of(each) and not interrupted(each):
                undo(each)
            in_place(each)
            assert {k: v for k, v in fingerprint(each).items() if "patches" not in k} == after, step
            assert len(patches_of(each)) == 1
            undo(each)
            assert fingerprint(each) == before, step
    assert step > 12


def test_undos(tmp_path, made):
    before = fingerprint(made)
    for step in range(1, 200):
        shutil.rmtree(tmp_path, ignore_errors=True)
        folder = Path(shutil.copytree(made, tmp_path / "one"))
        in_place(folder)
        if not killed_before(step, lambda folder=folder: undo(folder)):
            break
        if patches_of(folder):
            undo(folder)
        in_place(folder)
        undo(folder)
        assert fingerprint(folder) == before, step
    assert step > 6


def test_copies(tmp_path, made):
    before = fingerprint(made)
    for step in range(1, 200):
        shutil.rmtree(tmp_path, ignore_errors=True)
        folder = Path(shutil.copytree(made, tmp_path / "source"))
        if not killed_before(step, lambda folder=folder: copied(folder)):
            break
        assert fingerprint(folder) == before
        target = tmp_path / "target"
        assert not target.exists()
        copied(folder)
        assert not hidden(tmp_path) and patches_of(target)
        undo(target)
        assert fingerprint(target) == before
    assert step > 6


def test_a_killed_patch_is_neither_copied_nor_taken_for_part_of_the_checkpoint(tmp_path, made):
    folder = Path(shutil.copytree(made, tmp_path / "source"))
    before = fingerprint(folder)
    leftover = folder / "hf_attn_patches" / "1"
    leftover.mkdir(parents=True)
    (leftover / "config.json").write_text("{}")
    dead = folder / staging_name("source").replace(f".{os.getpid()}.", f".{ended_process()}.")
    dead.mkdir()
    (dead / "model.safetensors").write_bytes(b"half")
    copied(folder)
    undo(tmp_path / "target")
    assert fingerprint(tmp_path / "target") == before
    in_place(folder)
    undo(folder)
    assert fingerprint(folder) == before


def test_the_command_takes_an_interrupted_patch_back_before_it_patches_again(tmp_path, made, capsys):
    import argparse

    def patch(*words: object) -> None:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        command.run(parser.parse_args([str(word) for word in words]))

    folder = Path(shutil.copytree(made, tmp_path / "source"))
    before = fingerprint(folder)
    patch("set-attention", folder, "--in-place", "--attn", "tiled_attention")
    (folder / "config.json").write_bytes(before["config.json"])  # as if killed before its last step
    patch("show", folder)
    assert "interrupted" in capsys.readouterr().out
    patch("set-attention", folder, "--in-place", "--attn", "cqs_attention")
    assert "was taken back" in capsys.readouterr().out and len(patches_of(folder)) == 1
    patch("--undo", folder)
    assert fingerprint(folder) == before


def test_originals_come_back_whole_or_not_at_all(tmp_path, made, monkeypatch):
    folder = Path(shutil.copytree(made, tmp_path / "source"))
    before = fingerprint(folder)
    in_place(folder)
    patched, whole = fingerprint(folder), Path.write_bytes

    def torn(path: Path, content: bytes) -> int:
        whole(path, content[: len(content) // 2])
        raise OSError("no space left on device")

    with monkeypatch.context() as patching:
        patching.setattr(Path, "write_bytes", torn)
        with pytest.raises(OSError, match="no space"):
            undo(folder)
    assert fingerprint(folder) == patched
    undo(folder)
    assert fingerprint(folder) == before


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        return process.pid


class TestSweep:
    def test_what_is_removed_and_what_is_not(self, tmp_path):
        mine, dead = staging_name("a"), staging_name("b").replace(f".{os.getpid()}.", f".{ended_process()}.")
        foreign = ".c.hf-attn.00000000.1.00000000"
        for name in (mine, dead, foreign, ".tokens-1.tmp", ".b.hf-attn"):
            (tmp_path / name).write_text("x")
        (tmp_path / dead.replace(".b.", ".folder.")).mkdir()
        (tmp_path / f".tokens-000-008.safetensors.{ended_process()}.tmp").write_text("x")
        assert sweep(tmp_path) == [tmp_path / foreign]
        assert {path.name for path in tmp_path.iterdir()} == {mine, foreign, ".tokens-1.tmp", ".b.hf-attn"}

    def test_a_link_is_removed_and_not_followed(self, tmp_path):
        (tmp_path / "kept").mkdir()
        (tmp_path / "kept" / "file").write_text("x")
        name = staging_name("b").replace(f".{os.getpid()}.", f".{ended_process()}.")
        (tmp_path / name).symlink_to("kept")
        sweep(tmp_path)
        assert [path.name for path in tmp_path.rglob("*")] == ["kept", "file"]


def test_a_file_is_replaced_in_one_step(tmp_path):
    (tmp_path / "file").write_text("old")

    def torn(path: Path) -> None:
        path.write_text("ne")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        put(tmp_path / "file", torn)
    assert fingerprint(tmp_path) == {"file": b"old"}
    assert killed_before(2, lambda: put(tmp_path / "file", lambda path: path.write_text("new")))
    assert (tmp_path / "file").read_text() == "old"
    sweep(tmp_path)
    assert fingerprint(tmp_path) == {"file": b"old"}


def test_two_at_once_are_refused(tmp_path):
    script = "import sys; from pathlib import Path; from hf_attn_plugins.core.staging import exclusive\n"
    script += "with exclusive(Path(sys.argv[1])): pass"
    with exclusive(tmp_path):
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "another hf-attn is changing this folder" in done.stderr
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == 0


@pytest.mark.parametrize("complete", [False, True])
def test_star_caches(tmp_path, complete):
    from hf_attn_plugins import star
    from hf_attn_plugins.star.hf.cache import layers_of
    from tests.star.families import tiny, tokens

    model, ids = tiny("llama"), tokens(29)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has no thread pool, and sums differ with the number of threads
    try:
        whole = star.encode(model, ids, block_size=8, anchor_size=4)
        for step in range(1, 100):
            folder = tmp_path / f"{step}"
            kept = {"block_size": 8, "anchor_size": 4, "resume": folder}
            if complete:
                star.encode(model, ids[:, :16], **kept)
            if not killed_before(step, lambda kept=kept: star.encode(model, ids, **kept)):
                break
            again = star.encode(model, ids, **kept)
            for pair, other in zip(layers_of(again), layers_of(whole), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(pair, other, strict=True))
            star.load(folder, model)
            assert not hidden(folder), step
    finally:
        torch.set_num_threads(threads)
    assert step > 8
