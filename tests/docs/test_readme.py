"""The README is short, its example runs as it stands, and what it says that the example prints is what it prints."""

from __future__ import annotations

import re

import pytest

from tests.docs.blocks import ROOT, blocks, run

README = ROOT / "README.md"


def shown() -> str:
    """What the README says that its example prints."""
    text = README.read_text(encoding="utf-8")
    return re.search(r"It prints.*?```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[1]


def test_the_readme_is_short_and_has_one_short_example():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
    (example,) = blocks(README)
    assert len(example.splitlines()) <= 14


def test_the_example_prints_lines_of_the_form_that_the_readme_shows(tiny_demo, capsys):
    def form(text: str) -> str:
        return re.sub(r"\d[\d.]*", "N", text)

    (example,) = blocks(README)
    exec(example, {})
    assert form(capsys.readouterr().out) == form(shown())


@pytest.mark.slow
def test_the_example_prints_the_numbers_of_the_readme():
    """All but the speed, with room for another CPU's rounding."""

    def numbers(text: str) -> list[tuple[float, float]]:
        found = re.findall(r"KL ([\d.]+), same next token ([\d.]+)%", text)
        return [(float(kl), float(top1)) for kl, top1 in found]

    printed = run(README, {})
    assert len(numbers(printed)) == 2
    for (kl, top1), (said_kl, said_top1) in zip(numbers(printed), numbers(shown()), strict=True):
        assert kl == pytest.approx(said_kl, rel=0.2, abs=5e-4) and top1 == pytest.approx(said_top1, abs=1)
    assert re.findall("what ran: .*", printed) == re.findall("what ran: .*", shown())
