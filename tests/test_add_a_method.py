"""docs/add_a_method.md runs as it stands, and what it says is true; the door it uses, `register_plugin`, holds."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_attn_plugins.eval import baselines
from transformers import AttentionInterface, AttentionMaskInterface

import hf_attn_plugins as hap
from hf_attn_plugins import cli
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.options import Options
from hf_attn_plugins.hf.register import registered
from hf_attn_plugins.testing import dense_attention, sharp_inputs
from tests.docs.blocks import run
from tests.eval.tiny import model_folder
from tests.families import build

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "add_a_method.md"
WINDOW = baselines.BASELINES["sliding_window"]


def named() -> tuple[set[str], set[str], dict[str, hap.Plugin]]:
    """All that registration may change."""
    return set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping), dict(hap.PLUGINS)


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = named()
    yield
    for name in set(hap.PLUGINS) - set(before[2]):
        hap.unregister(name)
    hap.register()
    assert named() == before


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names that the page's blocks define, after all of them ran in order; what they printed; both registries."""
    place = tmp_path_factory.mktemp("page")
    names = {"folder": model_folder(place / "model"), "runs": place / "runs"}
    before, seen = named(), []
    printed = run(PAGE, names, after=lambda names: seen.append(named()) if "hap" in names else None)
    return {**names, "printed": printed, "before": before, "between": seen[0], "after": named()}


def test_the_page_registers_its_method_and_takes_it_out(page):
    assert page["before"] == page["after"]
    assert [a - b for a, b in zip(page["between"][:2], page["before"][:2], strict=True)] == [{"sliding_window"}] * 2
    assert list(page["between"][2]) == [*page["before"][2], "sliding_window"]
    with pytest.raises(KeyError, match="sliding_window"):
        page["model"](page["ids"])
    page["model"].set_attn_implementation("sdpa")
    torch.testing.assert_close(page["model"](page["ids"]).logits, page["by_default"], atol=1e-4, rtol=1e-4)


def test_the_pages_function_is_a_sliding_window(page):
    query, key, value = sharp_inputs(1, 4, 2, 20, 20, 8)
    distance = torch.arange(20)[:, None] - torch.arange(20)
    ref = dense_attention(query, key, value, (distance >= 0) & (distance < 5))[0]
    got = page["sliding_window"](
        query, key, value, Mask(causal=True), scale=8**-0.5, softcap=None, dropout=0.0,
        options=page["WindowOptions"](window=5),
    )  # fmt: skip
    torch.testing.assert_close(got.out, ref, atol=1e-5, rtol=1e-5)


def test_what_the_page_says_of_its_window(page):
    narrow, whole = page["narrow"], page["by_default"]
    torch.testing.assert_close(narrow[:, :16], whole[:, :16], atol=1e-4, rtol=1e-4)
    assert (narrow[:, 17:] - whole[:, 17:]).abs().amax(-1).min() > 1e-3
    assert page["verdicts"].ok and "honoured" in str(page["verdicts"])
    assert page["report"].kl_mean > 1e-4 and page["report"].plugin.options == {"window": 16}


def test_the_pages_trace_counts_the_pairs_that_it_attends(page):
    pairs = sum(min(position + 1, 16) for position in range(64))
    prompts = [call for call in page["seen"].calls if call.causal]
    assert {(call.method, call.attended, call.causal) for call in prompts} == {("sliding_window", pairs, 64 * 65 // 2)}
    assert page["seen"].methods == {"sliding_window": 2, "decode": 6}  # two layers, three tokens behind the first
    assert {tuple(call.plan.items()) for call in page["seen"].calls} == {(("window", 16),)}


def test_the_pages_commands_know_the_method(page):
    assert re.search(r"^sliding_window$(\n  .*)*\n  source .*arXiv", page["printed"], re.MULTILINE), (
        "no row in `hf-attn list`"
    )
    assert page["status"] == 0
    metrics = (page["runs"] / "metrics.json").read_text(encoding="utf-8")
    assert "sliding_window:window=16" in metrics and (page["runs"] / "report.md").is_file()


def test_the_page_is_refused_by_context_parallel_with_the_reason(page):
    assert re.search("sliding_window.*does not run on several ranks.*tiled_attention", page["refusal"])


def test_the_page_names_fields_and_files_that_exist():
    text = PAGE.read_text(encoding="utf-8")
    fields = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert set(fields) == {field.name for field in dataclasses.fields(hap.Plugin)} - {
        "name", "summary", "exact", "source",
    }  # fmt: skip
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (PAGE.parent / link).exists(), link


@pytest.mark.parametrize("name", [
    "flash_mine", "my_flash", "my_sdpa", "flex_attention_2", "paged|mine", "org/kernel", "a:b", "a,b", "a=b", "a b", "",
    "1st", None,
])  # fmt: skip
def test_names_with_a_meaning_of_their_own_are_refused(name):
    with pytest.raises(ValueError, match="cannot name a plugin"):
        hap.register_plugin(dataclasses.replace(WINDOW, name=name))


@pytest.mark.parametrize("name", ["eager", "star_attention", "theirs", "twice", "star"])
def test_names_that_are_taken_are_refused(name):
    hap.register_plugin(dataclasses.replace(WINDOW, name="twice"))
    AttentionInterface.register("theirs", lambda *_, **__: None)
    try:
        before = named()
        with pytest.raises(ValueError, match=r"taken|both 'star'") as raised:
            hap.register_plugin(dataclasses.replace(WINDOW, name=name))
        assert named() == before
        assert ("unregister" in str(raised.value)) == (name == "twice"), "advice that cannot be followed"
    finally:
        del AttentionInterface._global_mapping["theirs"]


@dataclasses.dataclass(frozen=True)
class Required(Options):
    size: int


@pytest.mark.parametrize(("field", "named_wrongly"), [
    ("entry", "no.such.module:attention"), ("entry", "hf_attn_plugins.star.entry:no_such"), ("entry", "colonless"),
    ("entry", 3), ("decide", "hf_attn_plugins.star.entry:no_such"), ("ranks", "no.such:Ranks"), ("command", "no.such"),
    ("bench", "no.such"), ("options", dict), ("options", "hf_attn_plugins.core.mask:Mask"), ("options", Required),
])  # fmt: skip
def test_a_row_that_would_fail_later_fails_now_and_leaves_nothing(field, named_wrongly):
    before = named()
    with pytest.raises(ValueError, match=r"'mine'.*(option|entry|decide|ranks|command|bench)"):
        hap.register_plugin(dataclasses.replace(WINDOW, name="mine", **{field: named_wrongly}))
    assert named() == before


def test_unregistering_what_is_not_there():
    for name in ("sliding_window", "sdpa"):
        with pytest.raises(ValueError, match="no plugin"):
            hap.unregister(name)


def test_unregister_all_takes_added_rows_and_keeps_the_packages_own():
    own = dict(hap.PLUGINS)
    hap.register_plugin(WINDOW)
    hap.unregister()
    assert own == hap.PLUGINS
    assert not ({*own, WINDOW.name} & (named()[0] | named()[1]))
    hap.register()
    assert set(own) <= named()[0] and WINDOW.name not in named()[0]


def test_an_added_row_survives_the_withdrawal_of_all_others():
    hap.unregister()
    hap.register_plugin(WINDOW)
    assert WINDOW.name in named()[0] and "star_attention" not in named()[0]


def test_a_while_ends_in_order_even_when_it_was_ended_inside_and_when_it_fails():
    with registered(WINDOW):
        hap.unregister(WINDOW.name)
    with pytest.raises(RuntimeError, match="inside"), registered(WINDOW):
        raise RuntimeError("inside")
    twice = dataclasses.replace(WINDOW, name="star_attention")
    with pytest.raises(ValueError, match="taken"), registered(WINDOW, twice):
        pass
    assert WINDOW.name not in hap.PLUGINS


def test_the_users_own_row_of_a_baselines_name_counts_in_an_evaluation():
    mine = dataclasses.replace(WINDOW, summary="mine")
    hap.register_plugin(mine)
    with baselines.registered():
        assert hap.PLUGINS["sliding_window"] is mine and "attention_sink" in hap.PLUGINS
    assert hap.PLUGINS["sliding_window"] is mine and "attention_sink" not in hap.PLUGINS


def test_the_list_shows_the_row_in_every_form(capsys):
    with registered(WINDOW):
        for form in ([], ["--json"], ["--markdown"]):
            assert cli.main(["list", *form]) == 0
            text = capsys.readouterr().out
            assert "sliding_window" in text and "star_attention" in text
            if form == ["--json"]:
                row = json.loads(text)[-1]
                assert row["entry"].endswith(":sliding_window") and row["options"].endswith(":WindowOptions")
    assert cli.main(["list"]) == 0 and "sliding_window" not in capsys.readouterr().out


def test_a_method_of_its_own_plan_runs_in_a_compiled_graph(page):
    row = dataclasses.replace(WINDOW, decide=page["decide"])
    model = build("llama")
    ids = torch.arange(5, 45).unsqueeze(0)
    with registered(row), hap.use(model, row.name, window=7), torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)


EARLY = """
import sys
import torch, transformers
import hf_attn_plugins as hap
from hf_attn_plugins.core.options import Options

def attention(query, key, value, mask, **options):
    from hf_attn_plugins.kernels import attend
    return attend(query, key, value, mask=mask)

def plugin(name):
    return hap.Plugin(name, "early", False, "here", attention, Options)

modeling = "transformers.modeling_utils"
hap.register_plugin(plugin("early"))
hap.register_plugin(plugin("gone"))
hap.unregister("gone")
hap.unregister("cqs_attention")
assert modeling not in sys.modules, "registration must wait for the modeling code"
from transformers import AttentionInterface, AttentionMaskInterface
for registry in (AttentionInterface, AttentionMaskInterface):
    known = set(registry._global_mapping)
    assert {"early", "star_attention"} <= known and not {"gone", "cqs_attention"} & known, known
hap.register()
assert "cqs_attention" in AttentionInterface._global_mapping
hap.unregister("early")
assert "early" not in AttentionInterface._global_mapping and "early" not in hap.PLUGINS
"""


def test_registered_before_transformers_modeling_code_is_there():
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
