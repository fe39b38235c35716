"""A file is replaced as a whole or not at all."""

from __future__ import annotations

import pytest

from hf_attn_plugins.core.staging import put


def test_a_new_and_an_old_file_are_replaced(tmp_path):
    path = tmp_path / "a.json"
    for text in ("one", "two"):
        put(path, lambda file, text=text: file.write_text(text))
        assert path.read_text() == text
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("error", (OSError("disk full"), KeyboardInterrupt(), ValueError("no JSON")))
def test_an_error_while_writing_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")

    def write(file):
        file.write_text("ne")
        raise error

    with pytest.raises(type(error)):
        put(path, write)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_is_missing_is_an_oserror(tmp_path):
    with pytest.raises(OSError):
        put(tmp_path / "none" / "a", lambda file: file.write_text("x"))
