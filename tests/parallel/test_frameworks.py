"""Trainer, DDP and FSDP2 on shards against one process; launches and models that are refused."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

import hf_attn_plugins as hap
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.hf.weights import refuse_placement
from tests.parallel import framework_cases, tensor_cases
from tests.parallel.models import build
from tests.parallel.processes import Ranks
from tests.parallel.processes import ranks as started

pytestmark = [pytest.mark.multi_process, pytest.mark.slow]

CUTS_IN_TRANSFORMERS = importlib.util.find_spec("transformers.distributed.fsdp") is not None
STAR = {"block_size": 5, "anchor_size": 3, "query_size": 4}


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with started(4) as group:
        yield group


@pytest.mark.parametrize("ranks", (None, 2))
@pytest.mark.parametrize("name", ("tiled_attention", "star_attention", "cqs_attention"))
def test_the_loss_curve_of_trainer_is_that_of_one_process(four: Ranks, name: str, ranks: int | None) -> None:
    case: dict[str, Any] = {"name": name, "options": STAR if name == "star_attention" else {}}
    found = four.run(framework_cases.trainer, limit=400, ranks=ranks, **case)
    wanted = framework_cases.trainer(batch=1 if ranks is None else 2, **case)
    assert len(wanted["losses"]) == framework_cases.STEPS
    for result in found:
        assert result["losses"] == pytest.approx(wanted["losses"], abs=2e-6), "Trainer averages losses in float32"
        assert result["weights"] == pytest.approx(wanted["weights"], abs=1e-10)


@pytest.mark.parametrize("wrapper", ("ddp", "fsdp2"))
@pytest.mark.parametrize("name", ("tiled_attention", "star_attention", "cqs_attention"))
def test_two_by_two_is_one_process_with_both_batches(four: Ranks, name: str, wrapper: str) -> None:
    options = STAR if name == "star_attention" else {}
    found = four.run(framework_cases.accelerate, limit=400, wrapper=wrapper, name=name, options=options)
    assert [result["group"] for result in found] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    for result in found:
        assert result["error"] <= 1e-10
        assert "sum_gradients() after averaged=True" in result["refused"]


def test_what_does_not_run_is_said(four: Ranks) -> None:
    for found in four.run(framework_cases.refused, limit=400):
        assert "ranks=3: groups of equal size are needed, and the launch has 4 processes" in found["ranks"]
        assert "ranks=0" in found["none"]
        assert "does not run under DeepSpeed" in found["deepspeed"]
        assert "sharded by FSDP2, which averages gradients: pass averaged=True" in found["fsdp"]


TENSOR: dict[str, dict[str, Any]] = {
    "tiled, gathered, windows": {
        "name": "tiled_attention", "family": "gemma2", "options": {"exchange": "gather", "min_turn": 2},
    },
    "tiled, heads": {"name": "tiled_attention", "options": {"exchange": "heads"}},
    "cqs": {"name": "cqs_attention", "options": {"min_length": 1}},
    "star": {"name": "star_attention", "options": STAR},
    "star, weights cut by Transformers": {
        "name": "star_attention", "options": {**STAR, "halo_size": 2, "anchor": "broadcast"}, "tp_size": 2,
        "dp_replicate_size": 2,
    },
    "tiled, weights cut by Transformers and FSDP2": {"name": "tiled_attention", "tp_size": 2, "fsdp_size": 2},
}  # fmt: skip


@pytest.mark.parametrize("case", TENSOR)
def test_tensor_parallel_weights_give_the_tokens_of_one_process(four: Ranks, case: str) -> None:
    if "tp_size" in TENSOR[case] and not CUTS_IN_TRANSFORMERS:
        pytest.skip("this version of Transformers cuts weights over the whole launch only")
    found = four.run(tensor_cases.generate, limit=400, **TENSOR[case])
    assert [result["place"] for result in found] == [[0, 0], [1, 0], [0, 1], [1, 1]]
    for result in found:
        assert result["tokens"] == found[0]["wanted"] and result["error"] <= 1e-10
        assert min(result["loads"]) > 10, "every rank of a context group stores a part of the keys"
        assert result["from dense"] > 1e-3 or "star" not in case


TENSOR_TRAIN: dict[str, dict[str, Any]] = {
    "tiled, heads, dropout": {"name": "tiled_attention", "options": {"exchange": "heads"}, "dropout": 0.2},
    "cqs, dropout": {"name": "cqs_attention", "dropout": 0.2, "options": {"min_length": 1}},
    "star, FSDP2, dropout": {"name": "star_attention", "options": STAR, "dropout": 0.2, "tp_size": 2, "fsdp_size": 2},
    "tiled, replicated": {"name": "tiled_attention", "tp_size": 2, "dp_replicate_size": 2},
}


@pytest.mark.parametrize("case", TENSOR_TRAIN)
def test_tensor_parallel_weights_get_the_gradients_of_one_process(four: Ranks, case: str) -> None:
    if "tp_size" in TENSOR_TRAIN[case] and not CUTS_IN_TRANSFORMERS:
        pytest.skip("this version of Transformers cuts weights over the whole launch only")
    found = four.run(tensor_cases.train, limit=400, **TENSOR_TRAIN[case])
    assert max(result["error"] for result in found) <= 1e-10
    assert all(result["losses"] == found[0]["losses"] for result in found)


def test_what_does_not_run_with_tensor_parallel_weights(four: Ranks) -> None:
    for rank, found in enumerate(four.run(tensor_cases.refused, limit=400)):
        whole = [0, 1] if rank < 2 else [2, 3]
        for what in ("no group", "the other parts"):
            assert f"sharded by a tensor parallel plan over ranks {whole}" in found[what]
        assert "give all of these ranks the same batches yourself" in found["batches"]
        assert "dense_heads numbers the key heads of a whole layer" in found["heads"]
        assert "ranks=2 and group=...: pass one of them" in found["both"]
        assert "group='context' is no process group" in found["no process group"]
        assert "groups of equal size without a common rank are needed" in found["uneven"]


@pytest.mark.parametrize("name", ("tiled_attention", "star_attention", "cqs_attention"))
def test_offloaded_weights_generate_and_do_not_train(four: Ranks, name: str) -> None:
    for found in four.run(framework_cases.offloaded, limit=400, name=name):
        assert found["found"] == found["wanted"]
        assert "offloaded weights keep no gradients" in found["train"]


def test_models_on_several_devices_of_a_rank_are_refused() -> None:
    model = build("llama")
    places = {"model": 0, "lm_head": 1, "norm": "cpu"}
    cases = {
        "hf_device_map": (places, "spread over cuda:0, cuda:1 in one rank"),
        "_tp_size": (2, "tensor parallel plan"),
    }
    for field, (value, words) in cases.items():
        patched = mock.patch.object(model, field, value, create=True)
        with patched, pytest.raises(NotImplementedError, match=words):
            refuse_placement(model, False)


def test_deepspeeds_engine_and_weights_are_refused() -> None:
    kind = type("DeepSpeedEngine", (torch.nn.Module,), {"__module__": "deepspeed.runtime.engine"})
    engine, divided = kind(), copy.deepcopy(build("llama"))
    engine.module = build("llama")
    next(divided.parameters()).ds_id = 0
    for model in (engine, divided):
        opening = hap.context_parallel(model, "tiled_attention")
        with pytest.raises(NotImplementedError, match="does not run under DeepSpeed"), opening:
            pass


def test_one_process_has_no_groups() -> None:
    with pytest.raises(ValueError, match="ranks=2: groups of equal size are needed, and the launch has 1"):
        Group.join(ranks=2)
