"""A star cache's folder that was tampered with or damaged: refused with one line that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hf_attn_plugins import star
from hf_attn_plugins.star.hf import encoder
from hf_attn_plugins.star.hf.manifest import CONSTANT

from .families import tiny, tokens


@pytest.fixture(scope="module", params=[0, 3])
def kept(request, tmp_path_factory):
    """A cache of 29 tokens in files of 8, 8, 8 and 5, without and with a halo, and its model."""
    folder, model = tmp_path_factory.mktemp("kept") / "cache", tiny("llama")
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(encoder, "RUN_TOKENS", 8)
        star.encode(model, tokens(29), block_size=8, anchor_size=4, halo_size=request.param, resume=folder)
    return folder, model


def changed(field, value):
    def spoil(folder):
        manifest = json.loads((folder / "star.json").read_text())
        manifest[field] = value
        (folder / "star.json").write_text(json.dumps(manifest))

    return spoil


def files(change):
    def spoil(folder):
        manifest = json.loads((folder / "star.json").read_text())
        change(manifest["files"])
        (folder / "star.json").write_text(json.dumps(manifest))

    return spoil


def outside(folder):
    shutil.copy(folder / "tokens-000000000-000000008.safetensors", folder.parent / "outside.safetensors")
    files(lambda f: f[0].update(name="../outside.safetensors"))(folder)


def linked(folder):
    path = folder / "tokens-000000000-000000008.safetensors"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to("../elsewhere")


def rewritten(change, digest=True):
    """A file with other tensors; with its new digest written into the manifest, as a forger would."""

    def spoil(folder):
        path = folder / "tokens-000000008-000000016.safetensors"
        metadata = {name: json.dumps(value) for name, value in json.loads((folder / "star.json").read_text()).items()}
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata)
        if digest:
            import hashlib

            known = hashlib.sha256(path.read_bytes()).hexdigest()
            files(lambda f: f[1].update(sha256=known))(folder)

    return spoil


def swap(f):
    f[0]["name"], f[1]["name"] = f[1]["name"], f[0]["name"]


def other_values(t):
    t["key.0"] = t["key.0"] + 1


SPOILED = {
    "files in another order": (files(lambda f: f.reverse()), r"star\.json is damaged, a file of tokens 24 to 29"),
    "names in another order": (files(swap), r"star\.json is damaged, .* is not the name"),
    "a gap": (files(lambda f: f.pop(1)), r"a file of tokens 16 to 24 follows 8"),
    "an end cut off": (files(lambda f: f.pop()), r"hold 24 tokens of 29"),
    "a file twice": (files(lambda f: f.append(f[-1])), "follows 29 tokens"),
    "a name outside": (outside, "is not the name of a file"),
    "a link": (linked, "missing, or no regular file"),
    "no digest": (files(lambda f: f[0].pop("sha256")), "has no digest"),
    "another digest": (files(lambda f: f[0].update(sha256="0" * 64)), "contents are not those"),
    "changed values": (rewritten(other_values, digest=False), r"000016\.safetensors is damaged: its contents"),
    "ids beyond the vocabulary": (rewritten(lambda t: t["input_ids"].fill_(10**6)), "outside of the vocabulary"),
    "negative ids": (rewritten(lambda t: t["input_ids"].fill_(-1)), "outside of the vocabulary"),
    "ids of another type": (rewritten(lambda t: t.update(input_ids=t["input_ids"].double())), "input_ids"),
    "too few keys": (rewritten(lambda t: t.update({"key.0": t["key.0"][:, :, :3].contiguous()})), r"key\.0 is"),
    "heads of another width": (
        rewritten(lambda t: t.update({n: t[n][..., :2].contiguous() for n in t if n != "input_ids"})), "do not fit"
    ),
    "a layer missing": (rewritten(lambda t: [t.pop("key.1"), t.pop("value.1")]), "a key and a value"),
    "a value missing": (rewritten(lambda t: t.pop("value.1")), "a key and a value"),
    "another tensor": (rewritten(lambda t: t.update(other=torch.zeros(1))), "a key and a value"),
    "whole numbers for keys": (rewritten(lambda t: t.update({"key.0": t["key.0"].long()})), "no floating-point"),
    "cut short": (lambda f: (f / "tokens-000000000-000000008.safetensors").write_bytes(b"x"), "contents are not those"),
    "block_size 0": (changed("block_size", 0), "block_size is 0"),
    "block_size as text": (changed("block_size", "8"), "block_size is '8'"),
    "block_size true": (changed("block_size", True), "block_size is True"),
    "another block_size": (changed("block_size", 16), "was written with block_size=8"),
    "anchor_size -1": (changed("anchor_size", -1), "anchor_size is -1"),
    "a long anchor": (changed("anchor_size", 12), "larger than block_size 8 and halo_size"),
    "halo_size -1": (changed("halo_size", -1), "halo_size is -1"),
    "halo_size null": (changed("halo_size", None), "halo_size is None"),
    "another halo_size": (changed("halo_size", 5), r"was written with halo_size=[03], star\.json says 5"),
    "a huge halo_size": (changed("halo_size", 10**30), "was written with halo_size"),
    "another length": (changed("length", 30), "hold 29 tokens of 30"),
    "another batch": (changed("batch", 2), "was written with batch=1"),
    "no batch": (changed("batch", None), "batch is None"),
    "max_length as list": (changed("max_length", []), r"max_length is \[\]"),
    "model as number": (changed("model", 3), "fingerprint"),
    "complete as text": (changed("complete", "yes"), "truth value"),
    "files as object": (changed("files", {}), "files no list"),
    "files of text": (changed("files", ["a"]), "names no file"),
    "a list": (lambda f: (f / "star.json").write_text("[]"), "JSON list"),
    "no JSON": (lambda f: (f / "star.json").write_text("{"), "not valid JSON"),
    "nested": (lambda f: (f / "star.json").write_text("[" * 10**5), "not valid JSON"),
    "not UTF-8": (lambda f: (f / "star.json").write_bytes(b"\xff\xfe"), "not valid JSON"),
    "the key twice": (lambda f: (f / "star.json").write_text('{"format": 1, "format": 1}'), "occurs twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_what_is_spoiled_is_refused(kept, tmp_path, case):
    folder = Path(shutil.copytree(kept[0], tmp_path / "cache"))
    spoil, message = SPOILED[case]
    spoil(folder)
    with pytest.raises(ValueError, match=message) as refusal:
        star.load(folder, kept[1])
    assert str(folder) in str(refusal.value)


def test_the_fixture_loads(kept):
    assert star.load(*kept).get_seq_length() == 29


def test_a_folder_without_halo_size_has_none(kept, tmp_path):
    """Folders of 0.1 name no halo, neither in the manifest nor in the files; one that had a halo is refused."""
    folder = Path(shutil.copytree(kept[0], tmp_path / "cache"))
    manifest = json.loads((folder / "star.json").read_text())
    halo = manifest.pop("halo_size")
    (folder / "star.json").write_text(json.dumps(manifest))
    if halo:
        with pytest.raises(ValueError, match="was written with halo_size=3"):
            star.load(folder, kept[1])
        return
    rewritten(lambda t: None)(folder)  # the metadata of one file is the manifest's: without halo_size
    assert star.load(folder, kept[1]).star.halo_size == 0


VALUES = st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=8)
VALUES = VALUES | st.lists(VALUES, max_size=3) | st.dictionaries(st.text(max_size=4), VALUES, max_size=2)


def _fuzz(kept, folder, fields, entries):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept[0], folder)
    manifest = json.loads((folder / "star.json").read_text())
    manifest.update(fields)
    for (place, name), value in entries.items():
        if isinstance(manifest["files"], list) and place < len(manifest["files"]):
            manifest["files"][place][name] = value
    (folder / "star.json").write_text(json.dumps(manifest))
    untouched = json.loads((kept[0] / "star.json").read_text())
    try:
        cache = star.load(folder, kept[1])
    except (ValueError, OSError) as error:
        assert str(folder) in str(error)
    else:  # only what is not read for a question may differ
        same = (*CONSTANT, "length", "complete", "format")
        assert all(manifest[name] == untouched[name] for name in same) and cache.get_seq_length() == 29


FIELDS = st.sampled_from([*CONSTANT, "format", "length", "complete", "tokenizer", "rope"])
FUZZED = {
    "fields": st.dictionaries(FIELDS, VALUES, max_size=3),
    "entries": st.dictionaries(
        st.tuples(st.integers(0, 3), st.sampled_from(["name", "first", "end", "sha256"])), VALUES, max_size=2
    ),
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**FUZZED)
def test_any_manifest(kept, tmp_path, fields, entries):
    _fuzz(kept, tmp_path / "cache", fields, entries)


@pytest.mark.grid
@settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**FUZZED)
def test_any_manifest_at_length(kept, tmp_path, fields, entries):
    _fuzz(kept, tmp_path / "cache", fields, entries)


def test_a_save_that_was_killed_goes_on(tmp_path, monkeypatch):
    from hf_attn_plugins.star.hf.store import Store

    model = tiny("llama")
    cache = star.encode(model, tokens(29), block_size=8, anchor_size=4)

    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patching:
        patching.setattr(Store, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            star.save(cache, tmp_path / "cache")
    with pytest.raises(ValueError, match="unfinished"):
        star.load(tmp_path / "cache", model)
    star.save(cache, tmp_path / "cache")
    assert star.load(tmp_path / "cache", model).get_seq_length() == 29
