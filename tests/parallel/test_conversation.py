"""A conversation saved per rank goes on with any number of ranks, and a damaged folder is refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import DynamicCache

import hf_attn_plugins as hap
from hf_attn_plugins.parallel import Group
from hf_attn_plugins.parallel.hf.context_parallel import _session
from hf_attn_plugins.parallel.method import method_for
from tests.parallel import conversations
from tests.parallel.models import build, prompt
from tests.parallel.processes import ranks as started


@pytest.fixture(scope="module")
def launches():
    with started(2) as two, started(3) as three:
        yield {2: two, 3: three}


def run(launches, size, function, **arguments):
    if size == 1:
        return [function(0, 1, **arguments)]
    return launches[size].run(function, **arguments)


@pytest.mark.multi_process
@pytest.mark.parametrize(
    ("before", "after", "family", "side"),
    (
        (2, 3, "llama", "left"),
        (1, 2, "gemma2", "left"),
        pytest.param(3, 2, "gemma2", "right", marks=pytest.mark.grid),
        pytest.param(2, 2, "llama", "left", marks=pytest.mark.grid),
        (3, 1, "llama", "left"),
    ),
)
def test_a_conversation_goes_on_with_another_number_of_ranks(launches, tmp_path, before, after, family, side):
    folder, also, wanted = str(tmp_path / "a"), str(tmp_path / "b"), conversations.whole(family, side)
    first = run(launches, before, conversations.start, folder=folder, family=family, side=side)
    assert all(tokens == wanted[:, :28].tolist() for tokens in first)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    keys = {f"keys-{rank:05d}-of-{before:05d}.safetensors" for rank in range(before)}
    assert names == {"conversation.json", "tokens.safetensors"} | keys
    found = run(launches, after, conversations.go_on, folder=folder, family=family, also=also)
    assert all(result["tokens"] == wanted.tolist() for result in found)
    if after > 1 and before != after:
        assert max(found[0]["loads"]) - min(found[0]["loads"]) <= 1, "dealt anew, evenly"
    # The second conversation was saved as well: it is the first one, grown by a turn and its answer.
    manifest = json.loads((tmp_path / "b" / "conversation.json").read_text(encoding="utf-8"))
    assert (manifest["tokens"], manifest["length"], len(manifest["files"])) == (42, 41, after)


@pytest.mark.multi_process
def test_ranks_sample_alike_after_a_restart(launches, tmp_path):
    launches[2].run(conversations.start, folder=str(tmp_path / "a"))
    found = launches[3].run(conversations.go_on, folder=str(tmp_path / "a"), sample=True)
    assert all(result["tokens"] == found[0]["tokens"] for result in found)


@pytest.mark.multi_process
def test_every_rank_names_the_damaged_file(launches, tmp_path):
    whole = tmp_path / "whole"
    launches[2].run(conversations.start, folder=str(whole))

    def refused(size):
        return launches[size].run(conversations.refused, folder=str(folder))

    for name in ("keys-00001-of-00002.safetensors", "tokens.safetensors"):
        folder = shutil.copytree(whole, tmp_path / f"flipped {name}")
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)
        for text in (*refused(2), *refused(3)):
            assert "ValueError" in text and name in text and "its contents are not those" in text
    folder = shutil.copytree(whole, tmp_path / "without")
    (folder / "keys-00000-of-00002.safetensors").unlink()
    assert all("keys-00000-of-00002.safetensors is missing" in text for text in refused(2))
    (folder / "conversation.json").unlink()
    assert all("FileNotFoundError" in text and "there is no conversation.json" in text for text in refused(3))


def session(model, name="star_attention", **options):
    return _session(model, Group.alone(), method_for(name, **options), {})


MANIFESTS = {
    "format 2": (lambda m: m | {"format": 2}, "has format 2, this version reads 1"),
    "a length below": (lambda m: m | {"length": 0}, "length is 0, a whole number of at least 1"),
    "more than there is": (lambda m: m | {"tokens": 3}, "it caches 23 of 3 tokens"),
    "another rank's file": (lambda m: m | {"files": m["files"] * 2}, "is not the file of rank 0 of 2"),
    "no digest": (lambda m: m | {"sha256": "abc"}, "tokens.safetensors has no digest"),
    "places": (lambda m: m | {"files": [m["files"][0] | {"places": 22}]}, "and 22 places are needed"),
    "layers": (lambda m: m | {"layers": 3}, "keys and values of 3 layers are needed"),
    "batch": (lambda m: m | {"batch": 1}, r"input_ids and attention_mask of \(1, 23\) integers"),
    "model": (lambda m: m | {"model": "another"}, "was saved with another model"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, inputs, folder = build("llama"), prompt(23, 2, padding=4), tmp_path_factory.mktemp("saved") / "a"
    with session(model, block_size=5, anchor_size=3, query_size=4) as cp, torch.no_grad():
        cache = model(**inputs).past_key_values
        cp.save(cache, folder, inputs["input_ids"], attention_mask=inputs["attention_mask"])
    return model, inputs, folder


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_no_session_wrote_is_refused(saved, tmp_path, case):
    model, _, whole = saved
    change, message = MANIFESTS[case]
    folder = shutil.copytree(whole, tmp_path / "a")
    path = folder / "conversation.json"
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    with session(model) as cp, pytest.raises(ValueError, match=message) as raised:
        cp.load(folder)
    assert str(folder) in str(raised.value)


def test_what_does_not_fit_the_cache_is_refused(saved, tmp_path):
    model, inputs, folder = saved
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with session(model, block_size=5, anchor_size=3, query_size=4) as cp, torch.no_grad():
        cache = model(**inputs).past_key_values
        with pytest.raises(ValueError, match="a holds a conversation already"):
            cp.save(cache, folder, ids, attention_mask=mask)
        with pytest.raises(ValueError, match=r"shape \(2, 23 or more\).*got \(2, 22\)"):
            cp.save(cache, tmp_path / "b", ids[:, 1:], attention_mask=mask[:, 1:])
        with pytest.raises(ValueError, match="keys of 42 tokens and attention_mask has 46"):
            cp.save(cache, tmp_path / "b", ids)
        with pytest.raises(ValueError, match="calls token 19 of row 0 padding"):
            cp.save(cache, tmp_path / "b", ids, attention_mask=mask.flip(0, 1))
        with pytest.raises(ValueError, match="a DynamicCache: pass the cache"):
            cp.save(DynamicCache(), tmp_path / "b", ids)
        assert not (tmp_path / "b" / "conversation.json").exists()
    with pytest.raises(ValueError, match="min_turn=1"), hap.context_parallel(model, "tiled_attention", min_turn=1):
        pass


def test_one_process_saves_caches_that_keep_all_keys(tmp_path):
    """A sliding layer of a stock cache has dropped keys that other ranks would need."""
    model, inputs = build("gemma2"), prompt(23, 1)
    with hap.context_parallel(model, "tiled_attention") as cp, torch.no_grad():
        cache = model(**inputs, past_key_values=DynamicCache(config=model.config)).past_key_values
        with pytest.raises(NotImplementedError, match="layer 0 of this DynamicCache has not kept exactly its 23"):
            cp.save(cache, tmp_path / "a", inputs["input_ids"])
