"""`hf-attn plan tiled`: text, JSON, pictures and one-line refusals."""

import argparse
import json

import pytest

from hf_attn_plugins.tiled import animate, command
from hf_attn_plugins.tiled.plan import TilePlan


def run(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args(words))


def test_text_has_plan_steps_and_checks(capsys):
    run("--length", "7", "--head-dim", "2", "--sram", "20", "--causal", "--steps", "3")
    text = capsys.readouterr().out
    assert "Bc = ceil(M / 4d) = ceil(20 / 8) = 3" in text and "Br = min(Bc, d) = min(3, 2) = 2" in text
    assert text.count("Step ") == 3 and "hidden" in text and "and 5 more" in text and "nan" not in text


@pytest.mark.parametrize("order", ["keys-outer", "rows-outer"])
def test_json_is_the_plan_the_steps_and_checks_that_pass(capsys, order):
    run("--length", "7", "--head-dim", "2", "--sram", "20", "--causal", "--order", order, "--json", "--steps", "99")
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["plan"]["tiles"] == {"computed": 8, "masked": 3, "skipped": 4}
    assert len(found["steps"]) == 8 and found["steps"][0]["max_before"] == [None, None]
    checks = found["checks"]
    slips = {name for name in checks if name.startswith("un")}
    assert len(slips) == 4 and all(checks[name] > 0.05 for name in slips)
    assert len(checks) == 10 and all(checks[name] < 1e-12 for name in checks.keys() - slips)


def test_the_sizes_of_a_number_scale_the_bytes(capsys):
    totals = []
    for size in ("2", "4"):
        run("--bytes", size, "--json")
        totals.append(json.loads(capsys.readouterr().out)["plan"]["bytes"])
    assert totals[1] == {name: 2 * value for name, value in totals[0].items()}


def test_one_token_and_one_dimension(capsys, tmp_path):
    run("--length", "1", "--head-dim", "1", "--sram", "4", "--draw", str(tmp_path / "a.png"))
    run("--length", "1", "--head-dim", "1", "--sram", "4", "--animate", str(tmp_path / "a.gif"))
    assert "nan" not in capsys.readouterr().out


def test_long_plans_are_counted_without_numbers(capsys):
    run("--length", "100000", "--head-dim", "64", "--sram", "25600", "--causal")
    text = capsys.readouterr().out
    assert "No steps and no checks" in text and "1,000 key blocks" in text


def test_pictures(capsys, tmp_path):
    image = pytest.importorskip("PIL.Image")
    png, gif = tmp_path / "tiles.png", tmp_path / "tiles.gif"
    run("--length", "5", "--causal", "--draw", str(png), "--animate", str(gif), "--json")
    assert json.loads(capsys.readouterr().out)["files"] == [str(png), str(gif)]
    with image.open(png) as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 20)) > 3
    with image.open(gif) as film:
        frames = set()
        for index in range(film.n_frames):
            film.seek(index)
            frames.add(film.convert("RGB").tobytes())
        # Equal frames (the end is shown for a while) are joined into one when written.
        assert film.format == "GIF" and len(frames) == film.n_frames
        assert film.n_frames == animate.num_frames(TilePlan(5, 3, 24, causal=True)) - animate.LAST_FRAMES + 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--length", "0"], "length=0"),
        (["--length", "-4"], "length=-4"),
        (["--head-dim", "0"], "head_dim=0"),
        (["--sram", "11"], "sram=11"),
        (["--bytes", "0"], "--bytes 0"),
        (["--steps", "-1"], "--steps -1"),
        (["--draw", "tiles.bmp"], "must end in .png"),
        (["--animate", "tiles.png"], "must end in .gif"),
        (["--length", "49", "--animate", "tiles.gif"], "at most 48 rows, not 49"),
        (["--length", "40", "--animate", "tiles.gif"], "frames"),
        (["--length", "1000", "--draw", "tiles.png"], "500 x 500 tiles"),
        (["--length", "999999999", "--sram", "12"], "row blocks"),
    ],
)
def test_bad_input_is_one_clear_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        run(*words)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_pictures_that_cannot_be_written(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run("--draw", str(tmp_path / "nowhere" / "tiles.png"))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="is a directory"):
        run("--draw", str(tmp_path / "folder.png"))
    assert not capsys.readouterr().out


def test_a_file_that_the_system_refuses(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Figure, "savefig", refuse)
    with pytest.raises(ValueError, match=r"tiles\.png: cannot be written \(Permission denied\)"):
        run("--draw", str(tmp_path / "tiles.png"))
