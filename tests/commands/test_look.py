"""`hf-attn look`: the sentences of its page, and the page of a tiny model from the command line."""

from __future__ import annotations

import pytest
import torch

from hf_attn_plugins import cli
from hf_attn_plugins.commands import look_page
from hf_attn_plugins.hf.look.by_token import Changes
from hf_attn_plugins.hf.look.reach import WINDOWS, HeadReach
from hf_attn_plugins.star.plan import Plan
from tests.eval.tiny import model_folder

PLAN = Plan(8, 2, 1, 1, 2)


def head(index: int, hidden: float, dense: bool = False) -> HeadReach:
    return HeadReach(0, index, (0.5,) * len(WINDOWS), 0.1, hidden, dense)


def made(kl: list[float], first: list[int], other: list[int]) -> Changes:
    return Changes(
        torch.tensor(kl, dtype=torch.float64), torch.tensor(first), torch.tensor(other), "star: blocks 3", 0.5
    )


def test_the_verdict_names_the_heads_that_lose_and_counts_what_changes():
    said = look_page.hidden([head(0, 0.05), head(1, 0.3), head(2, 0.9, dense=True)], PLAN)
    assert "1 of 2 key heads lose a tenth or more: layer 0 head 1 (30%)." in said and "17.5% of an average" in said
    assert "No head loses a tenth" in look_page.hidden([head(0, 0.05)], PLAN)
    assert "hides nothing of these 8 tokens" in look_page.hidden([head(0, 0.0)], Plan(8, 8, 0))
    found = made([0, 0, 3, 1, 0, 0, 0, 0], [-1, 1, 2, 3, 4, 5, 6, 7], [-1, 1, 9, 3, 4, 5, 6, 7])
    assert look_page.changed(found).startswith(
        "star: blocks 3. The first choice is another one for 1 of 7 tokens; mean KL"
    )
    assert "half of it in 1 token (12.5% of the text)" in look_page.changed(found)
    small = made([0, 0.002, 0.001], [-1, 1, 2], [-1, 1, 3])
    assert look_page.changed(small).endswith("mean KL 0.0015 nats: no more than rounding to bfloat16 changes.")
    assert look_page.changed(made([0, 0], [-1, 1], [-1, 1])).endswith("nothing changes.")


def test_a_text_can_put_nothing_into_the_page():
    found = made([0, 0.02, 2.0] + [0.0] * 5, [-1, 1, 2, 0, 0, 0, 0, 0], [-1, 1, 3, 0, 0, 0, 0, 0])
    tokens = ["<script>alert(1)</script>", "&", '"x"', "d", "e", "f", "g", "h"]
    page = look_page.page({"model": "<b>"}, tokens, [head(0, 0.2)], PLAN, {"star<": found}, {2: '"><i>', 3: "no"})
    body = page[page.index("<main>") :]
    assert (
        "<script>alert" not in body
        and "&lt;script&gt;alert" in body
        and "<b>" not in body
        and 'title="KL 2.000' in body
    )
    assert '<span class="k1"' in body and '<span class="k3"' in body and "<u>&quot;x&quot;</u>" in body
    assert body.count("<i></i>") == 3 and "://" not in page.replace("http://www.w3.org", "")


def test_the_attention_that_changes_most_is_the_open_one():
    little, much = (made([0, kl] + [0.0] * 6, [-1, *range(1, 8)], [-1, *range(1, 8)]) for kl in (0.01, 0.5))
    page = look_page.page({"model": "m"}, list("abcdefgh"), [head(0, 0.2)], PLAN, {"one": little, "two": much}, {})
    assert "<details open><summary>two<" in page and "<details><summary>one<" in page


def test_from_the_command_line(tmp_path, capsys):
    model, out = model_folder(tmp_path / "model"), tmp_path / "look.html"
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    words = ["look", str(model), "--dtype", "float32", "--text", str(tmp_path / "text.txt"), "--length", "96"]
    star = "star_attention:block_size=16,halo_size=8,query_size=8"
    assert cli.main([*words, "--attn", f"tiled_attention,{star}", "--out", str(out)]) == 0
    page = out.read_text()
    assert star in page and "blocks of 16, halo 8, 24 first tokens" in page and page.count('class="text"') == 2
    said = capsys.readouterr().out
    assert said.startswith("Star's plan (blocks of 16") and f"\n{star}: star: blocks" in said and "written to" in said
    for wrong, message in (
        (["--length", "1"], "at least 2 tokens"),
        (["--attn", "star"], "star"),
        (["--out", "no/x"], "--out"),
    ):
        assert cli.main([*words, *wrong]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("length", [2, 3])
def test_short_plans_draw(length):
    found = made([0.0] * length, [-1] * length, [-1] * length)
    assert look_page.page({"model": "m"}, ["a"] * length, [head(0, 0)], Plan(length, 64, 0), {"t": found}, {})
