"""`hf-attn patch set-attention`: plain from_pretrained selects the plugin, and everything else is untouched."""

from __future__ import annotations

import argparse
import json
import re

import pytest
import torch
from hf_attn_plugins.patches import command
from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaModel

import hf_attn_plugins
from hf_attn_plugins.checkpoint.write import KEPT, RECORD

from .families import FAMILIES, checkpoint, fingerprint


def patch(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(a) for a in arguments]))


def attention(*arguments: object) -> None:
    patch("set-attention", *arguments, "--attn", "tiled_attention")


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_patched_folder_selects_the_plugin(tmp_path, family, sharded):
    source, target = checkpoint(tmp_path / "source", family, sharded), tmp_path / "target"
    before = fingerprint(source)
    attention(source, target, "--kernel", "reference")
    assert fingerprint(source) == before
    after = fingerprint(target)
    assert {name for name in after if after[name] != before.get(name)} == {
        "config.json", "README.md", RECORD, KEPT, f"{KEPT}/1", f"{KEPT}/1/config.json"
    }  # fmt: skip
    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, target))
    assert new.config._attn_implementation == "tiled_attention" != old.config._attn_implementation
    assert new.config.hf_attn_plugins == {"tiled_attention": {"kernel": "reference"}}
    ids = torch.arange(3, 40).unsqueeze(0)
    torch.testing.assert_close(new(ids).logits, old(ids).logits, rtol=1e-3, atol=1e-3)
    assert (
        AutoModelForCausalLM.from_pretrained(target, attn_implementation="sdpa").config._attn_implementation == "sdpa"
    )
    patch("--undo", target)
    assert fingerprint(target) == before


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "flags", "options"),
    [
        ("star_attention", ["--block-size", 8, "--anchor-size", 4, "--query-size", 2], (8, 4, 2)),
        ("cqs_attention", ["--workers", 3], None),
    ],
)
def test_the_methods_run_with_the_options_of_the_folder(tmp_path, capsys, name, flags, options):
    source, target = checkpoint(tmp_path / "source"), tmp_path / "target"
    patch("set-attention", source, target, "--attn", name, *flags)
    assert ("approximates by design" in capsys.readouterr().out) == (name == "star_attention")
    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, target))
    ids = torch.arange(3, 63).unsqueeze(0)
    dense, out = old(ids).logits, new(ids).logits
    if options is None:
        torch.testing.assert_close(out, dense, rtol=1e-3, atol=1e-3)
    else:
        assert (out - dense).abs().max() > 1e-2
        chosen = dict(zip(("block_size", "anchor_size", "query_size"), options, strict=True))
        with hf_attn_plugins.use(old, name, **chosen):
            torch.testing.assert_close(out, old(ids).logits)


def test_in_place_keeps_what_undo_needs(tmp_path):
    source = checkpoint(tmp_path / "source")
    before = fingerprint(source)
    attention(source, "--in-place")
    assert AutoModelForCausalLM.from_pretrained(source).config._attn_implementation == "tiled_attention"
    first = fingerprint(source)
    attention(source, "--in-place", "--kernel", "reference")
    assert (
        json.loads((source / "config.json").read_text())["hf_attn_plugins"]["tiled_attention"]["kernel"] == "reference"
    )
    patch("--undo", source)
    assert fingerprint(source) == first
    patch("--undo", source)
    assert fingerprint(source) == before


def test_a_patched_copy_can_be_patched_again_and_undone_twice(tmp_path):
    source, target, third = checkpoint(tmp_path / "a"), tmp_path / "b", tmp_path / "c"
    before = fingerprint(source)
    attention(source, target)
    attention(target, third, "--kernel", "reference")
    patch("--undo", third)
    patch("--undo", third)
    assert fingerprint(third) == before


def test_dry_run_shows_the_difference_and_writes_nothing(tmp_path, capsys):
    source = checkpoint(tmp_path / "source")
    before = fingerprint(tmp_path)
    attention(source, tmp_path / "target", "--dry-run")
    printed = capsys.readouterr().out
    assert '+  "attn_implementation": "tiled_attention"' in printed and "nothing was written" in printed
    assert fingerprint(tmp_path) == before


def test_hard_links_share_the_unchanged_files_only(tmp_path):
    source, target = checkpoint(tmp_path / "source"), tmp_path / "target"
    attention(source, target, "--hard-link")
    for name in ("model.safetensors", "notes.txt"):
        assert (source / name).samefile(target / name)
    assert not (source / "config.json").samefile(target / "config.json")
    patch("--undo", target)
    assert fingerprint(target) == fingerprint(source)


def llava(folder):
    text = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    LlavaModel(LlavaConfig(text_config=text, vision_config=vision, image_token_index=63)).save_pretrained(folder)
    return folder


def test_parts_of_a_composite_model(tmp_path):
    source = llava(tmp_path / "source")
    attention(source, tmp_path / "text", "--part", "text", "--kernel", "reference")
    config = AutoModel.from_pretrained(tmp_path / "text").config
    assert config.text_config._attn_implementation == "tiled_attention"
    assert config.vision_config._attn_implementation != "tiled_attention"
    assert config.text_config.hf_attn_plugins == {"tiled_attention": {"kernel": "reference"}}
    assert not hasattr(config.vision_config, "hf_attn_plugins")
    attention(source, tmp_path / "all", "--kernel", "reference")
    config = AutoModel.from_pretrained(tmp_path / "all").config
    for part in (config, config.text_config, config.vision_config):
        assert part._attn_implementation == "tiled_attention"
        assert part.hf_attn_plugins == {"tiled_attention": {"kernel": "reference"}}


def test_list_and_show(tmp_path, capsys):
    source, target = checkpoint(tmp_path / "source"), tmp_path / "target"
    attention(source, target)
    capsys.readouterr()
    patch("list")
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("set-attention", "first-layer", "rope-freeze"))
    patch("show", target)
    assert 'set-attention {"attn": "tiled_attention"' in capsys.readouterr().out
    patch("show", source)
    assert "never patched" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attn", "nonesuch"], "'nonesuch' is no plugin"),
        (["--attn", "tiled_attention", "--kernel", "nonesuch"], "kernel='nonesuch'"),
        (["--attn", "tiled_attention", "--part", "vision"], "--part vision"),
        (["--attn", "tiled_attention", "--block-size", "8"], "does not take --block-size"),
        (["--attn", "star_attention", "--block-size", "many"], "block_size='many'"),
    ],
)
def test_bad_choices_are_refused(tmp_path, arguments, message):
    source = checkpoint(tmp_path / "source")
    before = fingerprint(tmp_path)
    with pytest.raises(ValueError) as refusal:
        patch("set-attention", source, tmp_path / "target", *arguments)
    assert message in str(refusal.value)
    assert fingerprint(tmp_path) == before


def test_a_family_that_never_asks_the_registry_is_refused(tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    source = tmp_path / "source"
    BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(source)
    before = fingerprint(tmp_path)
    with pytest.raises(ValueError, match="cannot be used with Bloom"):
        attention(source, tmp_path / "target")
    assert fingerprint(tmp_path) == before


def test_the_plugins_are_known():
    assert "tiled_attention" in hf_attn_plugins.PLUGINS


def test_a_tuned_report_is_carried(tmp_path):
    report = tmp_path / "report.json"
    options = {"block_size": 64, "halo_size": 128, "dense_heads": [[1], []]}
    report.write_text(json.dumps({"kind": "hf-attn tune", "plugin": "star_attention", "options": options}))
    source = checkpoint(tmp_path / "source")
    patch("set-attention", source, tmp_path / "target", "--tuned", report, "--query-size", 32)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "target").config
    assert config._attn_implementation == "star_attention"
    assert config.hf_attn_plugins == {"star_attention": {**options, "query_size": 32}}
    report.write_text("{}")
    with pytest.raises(ValueError, match="no report of hf-attn tune"):
        patch("set-attention", source, tmp_path / "other", "--tuned", report)
    assert not (tmp_path / "other").exists()


def saved(model, folder):
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return config.get("attn_implementation"), AutoModel.from_pretrained(folder)


def test_the_choice_survives_load_and_save(tmp_path):
    attention(checkpoint(tmp_path / "source"), tmp_path / "target", "--kernel", "reference")
    model = AutoModel.from_pretrained(tmp_path / "target")
    for generation in ("one", "two"):
        written, model = saved(model, tmp_path / generation)
        assert written == model.config._attn_implementation == "tiled_attention"
        assert model.config.hf_attn_plugins == {"tiled_attention": {"kernel": "reference"}}
        assert not hasattr(model.config, "attn_implementation"), "the config in memory is as before"


def test_another_attention_set_since_is_not_overruled(tmp_path):
    attention(checkpoint(tmp_path / "source"), tmp_path / "target")
    for model in (
        AutoModel.from_pretrained(tmp_path / "target", attn_implementation="sdpa"),
        AutoModel.from_pretrained(tmp_path / "source", attn_implementation="tiled_attention"),
    ):
        written, again = saved(model, tmp_path / "saved")
        assert written is None and again.config._attn_implementation == "sdpa"


def test_the_choice_of_one_part_survives_load_and_save(tmp_path):
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    vision = CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=32, **small)
    text = LlamaConfig(vocab_size=99, num_key_value_heads=2, **small)
    LlavaModel(LlavaConfig(vision_config=vision, text_config=text, image_token_index=98)).save_pretrained(
        tmp_path / "a"
    )
    attention(tmp_path / "a", tmp_path / "b", "--part", "text")
    written, model = saved(AutoModel.from_pretrained(tmp_path / "b"), tmp_path / "c")
    assert written == {"text_config": "tiled_attention"}
    assert model.config.text_config._attn_implementation == "tiled_attention"
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_unregistered_plugins_leave_saving_alone(tmp_path):
    attention(checkpoint(tmp_path / "source"), tmp_path / "target")
    model = AutoModel.from_pretrained(tmp_path / "target")
    hf_attn_plugins.unregister()
    try:
        model.save_pretrained(tmp_path / "saved")
    finally:
        hf_attn_plugins.register()
    assert "attn_implementation" not in json.loads((tmp_path / "saved" / "config.json").read_text())


@pytest.mark.parametrize("odd", (None, "sdpa", "org/kernel", ["x"], {"text_config": "tiled_attention"}, {"": 3}, 7))
def test_an_odd_choice_in_a_config_is_no_choice(tmp_path, odd):
    config = LlamaConfig(attn_implementation="sdpa", hf_attn_plugins_choice=odd)
    config.save_pretrained(tmp_path)
    assert "attn_implementation" not in json.loads((tmp_path / "config.json").read_text())


def test_the_model_card_says_what_the_checkpoint_needs(tmp_path):
    source, target = checkpoint(tmp_path / "source"), tmp_path / "target"
    attention(source, target)
    card = (target / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    for words in ("pip install hf-attn-plugins", "import hf_attn_plugins", "`tiled_attention`", "hf-attn activate"):
        assert words in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(code, "card", "exec")


def test_a_card_that_is_there_keeps_its_words_and_comes_back(tmp_path):
    folder = checkpoint(tmp_path / "source")
    own = "---\nlicense: mit\n---\n# Mine\n\nA model of mine, naïve.\n"
    (folder / "README.md").write_text(own, encoding="utf-8")
    before = fingerprint(folder)
    attention(folder, "--in-place")
    patch("set-attention", folder, "--in-place", "--attn", "star_attention", "--block-size", 8)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith(own.rstrip()) and card.count("## Attention: ") == 1, "one section, the last patch's"
    assert "## Attention: star_attention" in card and '{"block_size": 8}' in card and "by design" in card
    patch("--undo", folder)
    assert "## Attention: tiled_attention" in (folder / "README.md").read_text(encoding="utf-8")
    patch("--undo", folder)
    assert fingerprint(folder) == before
    attention(folder, "--in-place")
    (folder / "README.md").write_text("edited since", encoding="utf-8")
    patch("--undo", folder)  # what somebody wrote is not lost, and is no obstacle
    assert (folder / "README.md").read_text(encoding="utf-8") == "edited since"
    assert fingerprint(folder)["config.json"] == before["config.json"]


def test_a_card_that_cannot_be_read_stops_the_patch(tmp_path):
    folder = checkpoint(tmp_path / "source")
    (folder / "README.md").write_bytes(b"\xff\xfe\x00")
    before = fingerprint(folder)
    with pytest.raises(ValueError, match=r"README\.md is no UTF-8"):
        attention(folder, "--in-place")
    assert fingerprint(folder) == before


def test_a_dry_run_shows_the_card(tmp_path, capsys):
    attention(checkpoint(tmp_path / "source"), "--dry-run")
    assert "+++ b/README.md" in capsys.readouterr().out and not (tmp_path / "source" / "README.md").exists()
