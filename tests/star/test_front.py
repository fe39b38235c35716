"""`hf-attn bench front` on a tiny model: every row measured once, what is kept, and the figures against `compare`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import hf_attn_plugins as hap
from hf_attn_plugins import cli
from hf_attn_plugins.commands.bench.front import command as front
from hf_attn_plugins.commands.bench.front.rows import rows_for
from hf_attn_plugins.hf.inputs.texts import prose_tokens
from tests.hf.test_tune import tiny
from tests.star.test_bench import Letters

LENGTH = 512


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tests.hf.test_tune.LENGTH", 2 * LENGTH)
    made = tiny("llama")
    monkeypatch.setattr(front, "load_for", lambda arguments: (made, Letters()))
    return made


def run(folder: Path, *words: object) -> int:
    sizes = ["--lengths", LENGTH, "--texts", 2, "--passkeys", 10, "--rounds", 2, "--targets", "--out", folder]
    return cli.main(["bench", "front", *map(str, sizes), *map(str, words)])


def test_every_row_is_measured_once_and_the_run_goes_on(model, tmp_path: Path, capsys) -> None:
    parts = ["--only", "agreement", "passkeys", "speed"]
    assert run(tmp_path, *parts, "--minutes", 0) == 0
    assert "run the same command to go on" in capsys.readouterr().out
    assert run(tmp_path, *parts) == 0
    done = json.loads((tmp_path / "front.json").read_text())
    names = [row.name for row in rows_for(LENGTH, done)]
    assert any("dense" in name for name in names) and len(set(names)) == len(names)
    for part, baseline in (("agreement", 0), ("passkeys", 1), ("speed", 1)):
        held = done[part][str(LENGTH)]
        assert set(held) == {*names, *["sdpa"][:baseline]} and {len(values) for values in held.values()} == {2}
    capsys.readouterr()
    assert run(tmp_path, *parts) == 0
    assert capsys.readouterr().out.splitlines() == [f"written to {tmp_path / 'front.md'}"]
    table = (tmp_path / "front.md").read_text()
    assert all(f"| {name} |" in table for name in ["sdpa", *names]) and "2 texts, 10 passkeys, 0 needles" in table
    assert (tmp_path / "front.svg").exists()


def test_figures_are_those_of_compare(model, tmp_path: Path) -> None:
    assert run(tmp_path, "--only", "agreement", "--texts", 1) == 0
    done = json.loads((tmp_path / "front.json").read_text())["agreement"][str(LENGTH)]
    ids = prose_tokens(Letters(), LENGTH)[None]
    assert done["tiled"][0]["kl"] < 1e-6 < done["near 64"][0]["kl"]
    for row in rows_for(LENGTH, {"heads": {}, "tuned": {}}):
        if row.attn != "star_attention":
            continue
        found = hap.compare(model, ids, row.attn, baseline="sdpa", repeats=1, **row.options)
        assert done[row.name][0]["kl"] == pytest.approx(found.kl_mean, rel=1e-3, abs=1e-9)
        assert done[row.name][0]["ppl_ratio"] == pytest.approx(found.perplexity_ratio, rel=1e-4)


def test_the_likelihood_of_an_answer_is_that_of_one_dense_forward(model, tmp_path: Path) -> None:
    assert run(tmp_path, "--only", "passkeys", "--passkeys", 5) == 0
    done = json.loads((tmp_path / "front.json").read_text())["passkeys"][str(LENGTH)]
    depths = [0, 0.25, 0.5, 0.75, 1]
    found = front.passkeys(Letters(), prose_tokens(Letters(), LENGTH).tolist(), LENGTH, depths, 0)
    for index, asked in enumerate(found.asked):
        ids = torch.tensor([[*found.document, *asked.prompt, *asked.answer]])
        with torch.no_grad(), hap.use(model, "sdpa"):
            logp = model(ids).logits[0, -len(asked.answer) - 1 : -1].log_softmax(-1)
        wanted = -logp.gather(1, torch.tensor(asked.answer)[:, None]).mean()
        assert done["tiled"][0][index]["nll"] == pytest.approx(float(wanted), rel=1e-4)
        assert done["sdpa"][0][index]["nll"] == pytest.approx(float(wanted), rel=1e-4)
    row, base = (torch.tensor([each["nll"] for each in done[name][0]]).double() for name in ("near 64", "sdpa"))
    more = row - base
    cell = f"| {row.mean():.3f} ({more.mean():+.3f} ± {more.std() / 5**0.5:.3f}) |"
    line = next(line for line in (tmp_path / "front.md").read_text().splitlines() if line.startswith("| near 64 |"))
    assert cell in line


def test_rows_by_name(model, tmp_path: Path, capsys) -> None:
    assert run(tmp_path, "--only", "speed", "--rows", "tiled", "near 64") == 0
    assert set(json.loads((tmp_path / "front.json").read_text())["speed"][str(LENGTH)]) == {"sdpa", "tiled", "near 64"}
    assert run(tmp_path, "--only", "speed", "--rows", "nearby") == 2
    assert "the rows are" in capsys.readouterr().err


def test_a_file_about_another_model_is_refused(model, tmp_path: Path, capsys) -> None:
    (tmp_path / "front.json").write_text(json.dumps({"model": "another", "dtype": "bfloat16"}))
    assert run(tmp_path) == 2
    assert "use another --out" in capsys.readouterr().err


def test_speeds_of_two_machines_are_not_mixed_and_accuracy_names_both(model, tmp_path: Path, capsys) -> None:
    assert run(tmp_path, "--only", "speed", "--rows", "tiled") == 0
    done = json.loads((tmp_path / "front.json").read_text())
    done["hardware"]["processor"] = "another one"
    (tmp_path / "front.json").write_text(json.dumps(done))
    assert run(tmp_path, "--only", "speed", "passkeys") == 2
    assert "another one" in capsys.readouterr().err
    assert run(tmp_path, "--only", "passkeys", "--rows", "tiled") == 0
    assert json.loads((tmp_path / "front.json").read_text())["speed"] == done["speed"]
    line = next(line for line in (tmp_path / "front.md").read_text().splitlines() if line.startswith("Accuracy, in"))
    assert "another one" not in line and line.endswith(f"passkeys at {LENGTH} tokens.")
