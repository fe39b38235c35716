"""`hf-attn bench star` on a tiny model: prompts, what is kept, where it goes on, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_attn_plugins.eval.tasks.needles import hide, passkey, passkeys

from hf_attn_plugins import cli
from hf_attn_plugins.commands.bench.star import command as bench_star
from hf_attn_plugins.commands.bench.star.command import score

from .families import tiny


class Letters:
    """A tokenizer of one token a character."""

    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True, return_tensors: str | None = None) -> Any:
        ids = [3 + ord(letter) % 94 for letter in text]
        found = {"input_ids": torch.tensor([ids]) if return_tensors else ids}
        return type("Encoding", (dict,), {"input_ids": property(lambda self: self["input_ids"])})(found)

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(32 + (i - 3 - 32) % 94) for i in ids)


def test_a_passkey_prompt_word_by_word() -> None:
    """Results that are kept ask the same question in later releases."""
    tokenizer = Letters()
    task = passkey(tokenizer, tokenizer("One. Two. Three. Four. " * 9)["input_ids"], 300, 0.5, 0)
    assert tokenizer.decode(task.prompt) + tokenizer.decode(task.answer) == (  # an "h" is a line's end
        "Somewhere in the text below a secret magic number is hidden. Read the text and remember the number.hhOne. "
        "Two. Three. Four. One. Two. Three. The secret magic number for Cairo is 79444. Four. One. Two. Three. Four. "
        "One.hhWhat is the secret magic number for Cairo?hhThe secret magic number for Cairo is 79444"
    )


def test_passkey_prompts_have_their_exact_length() -> None:
    tokenizer = Letters()
    haystack = tokenizer("Some prose. " * 200)["input_ids"]
    seen = set()
    for depth in (0.1, 0.5, 0.9):
        task = passkey(tokenizer, haystack, 900, depth, 0)
        text = tokenizer.decode(task.prompt)
        number = tokenizer.decode(task.answer)
        assert len(task.prompt) == 900 and text.count(number) == 1 and number.strip().isdigit()
        assert text.endswith(" is") and "secret magic number" in text
        place = text.index(number) / 900
        assert abs(place - depth) < 0.25
        seen.add(place)
    assert len(seen) == 3
    assert passkey(tokenizer, haystack, 900, 0.5, 0) == passkey(tokenizer, haystack, 900, 0.5, 0)
    with pytest.raises(ValueError, match="cannot be made"):
        passkey(tokenizer, haystack[:100], 900, 0.5, 0)


def test_a_document_hides_a_number_at_every_depth() -> None:
    tokenizer, depths = Letters(), [0, 0.25, 0.5, 0.75, 1]
    found = passkeys(tokenizer, tokenizer("Some prose. " * 300)["input_ids"], 2000, depths, 3)
    text = tokenizer.decode(found.document)
    assert max(len(found.document) + len(each.prompt) for each in found.asked) == 2000
    assert len({tokenizer.decode(each.prompt) for each in found.asked}) == 5
    for depth, each in zip(depths, found.asked, strict=True):
        question, number = tokenizer.decode(each.prompt), tokenizer.decode(each.answer)
        city = question.rsplit(" for ", 1)[1].removesuffix(" is")
        assert question.count(city) == 2 and text.count(number) == 1
        assert f"The secret magic number for {city} is{number}." in text
        assert abs(text.index(number) / len(text) - depth) < 0.15
    with pytest.raises(ValueError, match="cannot be made"):
        passkeys(tokenizer, [5] * 100, 2000, depths, 3)


def test_score_is_that_of_one_forward() -> None:
    model = tiny("llama")
    tokenizer = Letters()
    task = passkey(tokenizer, tokenizer("Some prose. " * 50)["input_ids"], 250, 0.5, 1)
    with torch.no_grad():
        logits = model(torch.tensor([task.prompt + task.answer])).logits[0, len(task.prompt) - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits.float(), torch.tensor(task.answer)).item()
    assert score(model, task)[0] == pytest.approx(expected, rel=1e-5)


def test_needles_stand_in_front_of_their_places() -> None:
    assert hide("abc", ["xy"], [1]) == list("axybc")
    assert hide("abc", ["x", "y", "z"], [3, 0, 2]) == list("yabzcx")
    assert hide("ab", ["x", "y"], [1, 1]) == list("ayxb")


WORDS = ["bench", "star", "--lengths", "300", "--depths", "2", "--agreement-length", "70", "--speed-lengths", "200",
         "--call-lengths", "256", "--rounds", "2", "--sizes", "32,8,8", "32,0,8"]  # fmt: skip


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_star, "load_for", lambda *_: (tiny("gpt2", torch.float32, "sdpa"), Letters()))
    monkeypatch.setattr(bench_star, "SPEED", ((32, 8, 8),))


def test_everything_is_measured_once_and_reported(
    tiny_model: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [*WORDS, "--out", str(tmp_path)]
    words[words.index("300")] = "250"
    assert cli.main([*words, "--minutes", "0"]) == 0
    assert "are left" in capsys.readouterr().out
    assert cli.main(words) == 0
    done = json.loads((tmp_path / "star.json").read_text())
    assert set(done["passkey"]) == {"dense", "32,8,8", "32,0,8"}
    assert all(len(scores["250"]) == 2 for scores in done["passkey"].values())
    assert len(done["speed"]["200"]) == 2 and len(done["calls"]["256"]) == 2
    assert done["agreement"]["32,8,8"]["kl"] > 0 and 0 <= done["agreement"]["32,8,8"]["top1"] <= 1
    page = (tmp_path / "star.md").read_text()
    for word in ("| 32, 0, 8 |", "NLL at 250", "against sdpa", "factor", "no anchor"):
        assert word in page
    capsys.readouterr()
    before = (tmp_path / "star.json").read_text()
    assert cli.main(words) == 0 and (tmp_path / "star.json").read_text() == before


def test_refused(tiny_model: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["bench", "star", "--sizes", "32,64,8", "--out", str(tmp_path)]) == 2
    assert "anchor_size <= block_size" in capsys.readouterr().err
    assert cli.main(["bench", "star", "--sizes", "32", "--out", str(tmp_path)]) == 2
    assert "block,anchor,query" in capsys.readouterr().err
    (tmp_path / "star.json").write_text(json.dumps({"model": "other", "dtype": "float32"}))
    assert cli.main(["bench", "star", "--out", str(tmp_path)]) == 2
    assert "use another --out" in capsys.readouterr().err
