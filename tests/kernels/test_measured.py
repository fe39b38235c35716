"""The table of measurements: which rows count, and files that are damaged or somebody else's."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from hf_attn_plugins.core.warn import forget_warnings
from hf_attn_plugins.kernels import measured
from hf_attn_plugins.kernels.measured import Row

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "name_of", lambda device: "a GPU")
    measured.forget()
    forget_warnings()
    yield tmp_path
    measured.forget()


def row(length=8192, head_dim=128, kind="forward", device="a GPU", under=None, **ms):
    return Row(device, under or measured.versions(), "bfloat16", head_dim, kind, length, ms)


def fastest(able=("flash", "flex", "triton"), head_dim=128, kind="forward", length=8192, dtype=torch.bfloat16):
    return measured.fastest(DEVICE, dtype, head_dim, kind, length, able)


def test_nothing_is_shipped_and_nothing_known():
    assert measured.SHIPPED == () and not measured.has_rows() and fastest() is None


def test_the_fastest_of_those_that_can():
    measured.save([row(flash=3.0, flex=2.0, triton=1.0, cudnn=0.1)])
    assert measured.has_rows() and fastest() == "triton" and fastest(("flash", "flex")) == "flex"
    assert fastest(("flash",)) == "flash" and fastest(("efficient",)) is None and fastest(()) is None


@pytest.mark.parametrize(
    "other",
    [dict(device="another GPU"), dict(under="torch 1.0"), dict(head_dim=64), dict(kind="decode")],
    ids=lambda change: next(iter(change)),
)
def test_rows_of_something_else_do_not_count(other):
    measured.save([row(**{"flash": 2.0, "triton": 1.0, **other})])
    assert fastest() is None


def test_the_dtype_counts():
    measured.save([row(flash=2.0, triton=1.0)])
    assert fastest(dtype=torch.float16) is None and fastest() == "triton"


def test_the_nearest_length_decides_and_the_longest_in_a_graph():
    measured.save([row(1024, flash=1.0, triton=2.0), row(16384, flash=2.0, triton=1.0)])
    assert [fastest(length=n) for n in (1, 3000, 5000, 10**6, None)] == ["flash", "flash", "triton", "triton", "triton"]


def test_the_default_stays_for_a_small_gain():
    measured.save([row(flash=1.04, triton=1.0)])
    assert fastest() == "flash"


def test_shipped_rows_count_until_the_user_measures(monkeypatch):
    monkeypatch.setattr(measured, "SHIPPED", (row(flash=2.0, triton=1.0),))
    assert fastest() == "triton"
    measured.save([row(flash=1.0, triton=2.0)])
    assert fastest() == "flash"


def test_saving_adds_and_replaces(folder):
    measured.save([row(flash=2.0), row(1024, flash=1.0)])
    path = measured.save([row(flash=3.0)])
    assert path == folder / "hf_attn_plugins" / "measurements.json" and not path.stat().st_mode & 0o022
    assert sorted((r.length, r.ms["flash"]) for r in measured.of_user()) == [(1024, 1.0), (8192, 3.0)]


DAMAGED = {
    "cut short": '{"format": "hf_attn_plugins measurements 1", "rows": [{"dev',
    "no JSON": "\x00\x01",
    "foreign": '{"rows": []}',
    "a newer format": '{"format": "hf_attn_plugins measurements 2", "rows": []}',
    "a list": "[]",
    "no rows": '{"format": "hf_attn_plugins measurements 1"}',
    "an unknown field": json.dumps({"format": measured.FORMAT, "rows": [row()._asdict() | {"more": 1}]}),
    "a missing field": json.dumps({"format": measured.FORMAT, "rows": [{"device": "a GPU"}]}),
    "text for a time": json.dumps({"format": measured.FORMAT, "rows": [row(flash="fast")._asdict()]}),
    "no time": json.dumps({"format": measured.FORMAT, "rows": [row(flash=0.0)._asdict()]}),
    "an unknown kind": json.dumps({"format": measured.FORMAT, "rows": [row(kind="forwards", flash=1.0)._asdict()]}),
    "a length of nothing": json.dumps({"format": measured.FORMAT, "rows": [row(0, flash=1.0)._asdict()]}),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_damaged_and_foreign_files_are_ignored_with_one_warning(text, caplog):
    path = measured.user_file()
    path.parent.mkdir()
    path.write_bytes(text.encode("utf-8"))
    with caplog.at_level(logging.WARNING, "hf_attn_plugins"):
        for _ in range(2):
            measured.forget()
            assert fastest() is None and not measured.has_rows()
    assert len(caplog.records) == 1 and "are ignored" in caplog.text and "bench gpu --save" in caplog.text
    measured.save([row(flash=2.0, triton=1.0)])
    assert fastest() == "triton"


def test_torch_compile_reads_the_table_as_a_constant():
    measured.save([row(flash=2.0, triton=1.0)])

    @torch.compile(backend="eager", fullgraph=True)
    def chosen(x):
        if not measured.has_rows():
            return x
        name = measured.fastest(DEVICE, torch.bfloat16, 128, "forward", None, ("flash", "triton"))
        return x + 1 if name == "triton" else x - 1

    assert chosen(torch.zeros(1)).item() == 1
