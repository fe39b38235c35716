"""An export that is killed before any of its steps on the disk: nothing under its name, and the next one goes on."""

from __future__ import annotations

import json
import os
import stat

import pytest

from hf_attn_plugins.hub import repository
from hf_attn_plugins.hub.repository import export
from tests.kills import killed_before

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")


@pytest.fixture
def few_files(monkeypatch):
    monkeypatch.setattr(repository, "exported", lambda entry: {"core/a.py": "a = 1\n", "kernels/b.py": "b = 2\n"})


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("there", [False, True], ids=["a new folder", "an empty folder"])
def test_nothing_is_half_there_and_the_next_export_goes_on(few_files, tmp_path, there):
    export(tmp_path / "whole")
    wanted = contents(tmp_path / "whole")
    for step in range(1, 100):
        place = tmp_path / str(step)
        place.mkdir()
        if there:
            (place / "made").mkdir()
        if not killed_before(step, lambda place=place: export(place / "made")):
            break
        assert not contents(place / "made"), step
        export(place / "made")
        assert contents(place / "made") == wanted, step
        assert [path.name for path in place.iterdir()] == ["made"], "what the killed process left is removed"
    assert step > 12
    assert contents(place / "made") == wanted


def test_an_export_that_fails_leaves_nothing(few_files, tmp_path, monkeypatch):
    def full(stream):
        raise OSError("no space left on device")

    monkeypatch.setattr(repository.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        export(tmp_path / "made")
    assert not list(tmp_path.iterdir())


def test_others_may_read_what_umask_lets_them(few_files, tmp_path):
    before = os.umask(0o022)
    try:
        export(tmp_path / "above" / "made")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "above" / "made").stat().st_mode) == 0o755
    variant = tmp_path / "above" / "made" / "build" / "torch-cpu"
    assert set(json.loads((variant / "metadata.json").read_text())["digest"]["files"]) == {
        path.relative_to(variant).as_posix() for path in variant.rglob("*.py")
    }


def test_the_folder_one_is_in_is_not_replaced(few_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the folder that you are in"):
        export(tmp_path.relative_to(tmp_path))
    assert not list(tmp_path.iterdir())
