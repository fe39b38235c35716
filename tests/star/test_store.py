"""Star caches on disk: what is written comes back, what does not fit is refused, what was interrupted goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hf_attn_plugins import star
from hf_attn_plugins.star.hf import encoder
from hf_attn_plugins.star.hf.cache import layers_of
from hf_attn_plugins.star.plan import Plan

from .families import tiny, tokens

SIZES = {"block_size": 8, "anchor_size": 4}


class Words:
    """As much of a tokenizer as a fingerprint looks at."""

    all_special_tokens = ["<s>"]

    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}


def assert_same(one: object, other: object) -> None:
    for (key, value), (other_key, other_value) in zip(layers_of(one), layers_of(other), strict=True):
        assert torch.equal(key, other_key) and torch.equal(value, other_value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny("mistral", dtype)
    cache = star.encode(model, tokens(29), **SIZES)
    grown = star.branch(cache)
    model.generate(input_ids=tokens(33), past_key_values=grown, max_new_tokens=3, do_sample=False)
    star.save(grown, tmp_path / "kept", model=model, tokenizer=Words("a", "b"))
    loaded = star.load(tmp_path / "kept", model, tokenizer=Words("a", "b"))
    assert_same(cache, loaded)
    assert loaded.get_seq_length() == 29 and star.plan_of(loaded) == star.plan_of(cache)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    one, other = (star.ask(model, c, [tokens(5, seed=1)[0]], **options)[0] for c in (cache, loaded))
    assert torch.equal(one, other)
    longer = star.append(model, loaded, tokens(9, seed=2))
    assert longer.get_seq_length() == 38
    (file,) = (tmp_path / "kept").glob("*.safetensors")
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    assert json.loads(metadata["block_size"]) == 8 and json.loads(metadata["model"]) == cache.star.model
    assert {"tokenizer", "rope", "anchor_size", "max_length"} <= set(metadata)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    cache = star.encode(model, tokens(29), **SIZES)
    star.save(cache, tmp_path / "kept", tokenizer=Words("a", "b"))
    with pytest.raises(ValueError, match="holds a star cache already"):
        star.save(cache, tmp_path / "kept")
    with pytest.raises(ValueError, match="another tokenizer"):
        star.load(tmp_path / "kept", model, tokenizer=Words("b", "a"))
    with pytest.raises(ValueError, match="another model"):
        star.load(tmp_path / "kept", tiny("qwen3"))
    changed = tiny("llama")
    changed.model.layers[1].self_attn.k_proj.weight.data.mul_(1.5)
    with pytest.raises(ValueError, match="another model"):
        star.load(tmp_path / "kept", changed)
    with pytest.raises(ValueError, match="another model"):
        star.load(tmp_path / "kept", tiny("llama", torch.float32))
    with pytest.raises(FileNotFoundError, match="no star cache"):
        star.load(tmp_path, model)
    manifest = tmp_path / "kept" / "star.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(ValueError, match="format 99"):
        star.load(tmp_path / "kept", model)
    manifest.write_text(manifest.read_text().replace('"format": 99', '"format": 1'))
    next((tmp_path / "kept").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="damaged"):
        star.load(tmp_path / "kept", model)


def test_an_interrupted_encoding_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model = tiny("llama")
    ids = tokens(45)

    def stop(done: int, total: int) -> None:
        if done == 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        star.encode(model, ids, **SIZES, progress=stop, resume=tmp_path / "part")
    with pytest.raises(ValueError, match="unfinished"):
        star.load(tmp_path / "part", model)
    with pytest.raises(ValueError, match="block_size=8"):
        star.encode(model, ids, block_size=16, anchor_size=4, resume=tmp_path / "part")
    with pytest.raises(ValueError, match="another context"):
        star.encode(model, tokens(45, seed=9), **SIZES, resume=tmp_path / "part")
    seen: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    resumed = star.encode(model, ids, **SIZES, resume=tmp_path / "part")
    hook.remove()
    assert seen == [8, 8, 5]
    whole = star.encode(model, ids, **SIZES)
    assert_same(resumed, whole)
    assert_same(star.load(tmp_path / "part", model), whole)
    # A folder of a shorter context serves a longer one that begins with it.
    longer = star.encode(model, torch.cat([ids, tokens(7, seed=3)], 1), **SIZES, resume=tmp_path / "part")
    assert longer.get_seq_length() == 52
    assert star.load(tmp_path / "part", model).get_seq_length() == 52


@pytest.mark.parametrize("halo", [3, 11])
def test_a_halo_is_kept_and_goes_on(halo: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between two runs of blocks and finished, then loaded and appended to within its last block."""
    monkeypatch.setattr(encoder, "RUN_TOKENS", 16)
    model, ids, sizes = tiny("mistral"), tokens(52), {**SIZES, "halo_size": halo}

    def stop(done: int, total: int) -> None:
        if done == 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        star.encode(model, ids[:, :45], **sizes, progress=stop, resume=tmp_path / "part")
    with pytest.raises(ValueError, match=f"halo_size={halo}, asked for 0"):
        star.encode(model, ids[:, :45], **SIZES, resume=tmp_path / "part")
    steps: list[int] = []
    resumed = star.encode(
        model, ids[:, :45], **sizes, progress=lambda done, total: steps.append(done), resume=tmp_path / "part"
    )
    assert steps == [32, 45]
    assert_same(resumed, star.encode(model, ids[:, :45], **sizes))
    star.save(resumed, tmp_path / "kept")
    for folder in ("part", "kept"):
        loaded = star.load(tmp_path / folder, model)
        assert_same(loaded, resumed)
        assert star.plan_of(loaded) == Plan(45, 8, 4, halo_size=halo)
        longer, whole = star.append(model, loaded, ids[:, 45:]), star.encode(model, ids, **sizes)
        for pair, other in zip(layers_of(longer), layers_of(whole), strict=True):
            torch.testing.assert_close(pair, other, rtol=1e-10, atol=1e-10)


def test_files_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    model = tiny("llama")
    real = safetensors.torch.save_file

    def torn(tensors: dict, path: Path, metadata: dict) -> None:
        real(tensors, path, metadata)
        path.write_bytes(path.read_bytes()[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", torn)
    with pytest.raises(OSError, match="no space"):
        star.encode(model, tokens(29), **SIZES, resume=tmp_path / "part")
    assert [path.name for path in (tmp_path / "part").iterdir()] == ["star.json"]
    monkeypatch.undo()
    assert star.encode(model, tokens(29), **SIZES, resume=tmp_path / "part").get_seq_length() == 29
