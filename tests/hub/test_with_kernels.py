"""An exported folder through the package `kernels`, and by name through Transformers' `from_pretrained`."""

from __future__ import annotations

import json

import pytest
import torch

from hf_attn_plugins.hf.compat import forget_attention
from hf_attn_plugins.hub.repository import export
from hf_attn_plugins.testing import assert_close_to_reference
from tests.families import build, padded_batch

kernels = pytest.importorskip("kernels", minversion="0.17")
NAMES = {"forward": "our-lab/hf-attn-plugins", "varlen": "our-lab/hf-attn-flash"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {kind: tmp_path_factory.mktemp("hub") / kind for kind in NAMES}
    for kind, folder in made.items():
        export(folder, interface=kind, name=NAMES[kind].partition("/")[2])
    return made


@pytest.fixture
def by_name(folders, monkeypatch):
    """Both folders under names of the Hub, offline; Transformers 5.24 asks for a newer `kernels` than 0.17."""
    from transformers import modeling_flash_attention_utils as flash
    from transformers.integrations import hub_kernels

    monkeypatch.setenv("LOCAL_KERNELS", ":".join(f"{NAMES[kind]}={folder}" for kind, folder in folders.items()))
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda *_: True)
    monkeypatch.setattr(hub_kernels, "get_kernel_hub", kernels.get_kernel, raising=False)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    yield NAMES
    for name in NAMES.values():
        forget_attention(name)


def test_kernels_loads_the_folder_and_its_digests_hold(folders):
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    for kind, folder in folders.items():
        for backend in ("cpu", "cuda"):
            variant = folder / "build" / f"torch-{backend}"
            metadata = Metadata.read_from_file(variant / "metadata.json")
            assert metadata.license == "Apache-2.0" and metadata.version == 1 and metadata.python_depends == []
            metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
        kernel = kernels.get_local_kernel(folder, backend="cpu")
        assert hasattr(kernel, "flash_attn_varlen_func") == (kind == "varlen")
        assert kernel.__name__ == json.loads((folder / "build/torch-cpu/metadata.json").read_text())["id"]


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


# GPT-OSS lists the names with "flash" that it takes; Transformers replaces any other by one of them.
CASES = [(f, kind) for f in ("llama", "gemma3", "gpt_oss") for kind in NAMES if (f, kind) != ("gpt_oss", "varlen")]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_from_pretrained_equals_the_models_own_attention(family, kind, by_name, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path)
    ours = type(model).from_pretrained(tmp_path, attn_implementation=by_name[kind], allow_all_kernels=True).eval()
    assert ours.config._attn_implementation == by_name[kind]
    exact = build(family, torch.float64)
    if family == "gpt_oss":
        exact.set_experts_implementation("eager")  # the default one takes no float64
    ids, mask = padded_batch()
    for inputs in ({"input_ids": ids[:1]}, {"input_ids": ids, "attention_mask": mask}):
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        out, low, ref = (logits(m, **inputs)[real] for m in (ours, model, exact))
        assert_close_to_reference(out, low, ref, factor=3.0)
    wanted, got = (
        m.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (model, ours)
    )
    assert torch.equal(got, wanted)
