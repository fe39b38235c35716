"""The compiler's view of the kernels: a small grid in every run, the required one under `grid`."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from hf_attn_plugins.kernels.triton.support import INSTALLED

pytestmark = pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")

COMMAND = (
    "import argparse\n"
    "from hf_attn_plugins.commands.bench import arguments, triton as triton_bench\n"
    "parser = argparse.ArgumentParser()\n"
    "arguments.triton(parser)\n"
    "raise SystemExit(triton_bench.run(parser.parse_args()))\n"
)


def start(folder, target, *words):
    """The command, without the interpreter that the other tests of this process need."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMMAND, "--static", "--out", str(folder), "--targets", target, "--dtypes", "bf16"]
    return subprocess.Popen(
        [*command, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def rows_of(folder, process):
    output = process.communicate()[0]
    assert process.returncode == 0, output[-4000:]
    assert "rows x keys" in (folder / "triton_static.md").read_text()
    return json.loads((folder / "triton_static.json").read_text())["rows"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Rows of the command for a few kernels; the compilers run beside each other."""
    cases = {
        "forward and decode": ("sm90", "64", "forward", "decode", "merge"),
        "backward": ("sm90", "128", "dq", "dkdv"),
        "AMD": ("gfx942", "64", "forward"),
    }
    started = {}
    for name, (target, head_dim, *kernels) in cases.items():
        folder = tmp_path_factory.mktemp("static")
        words = ["--head-dims", head_dim, "--masks", "causal", "--kernels", *kernels]
        started[name] = folder, start(folder, target, *words)
    return {name: rows_of(*each) for name, each in started.items()}


def test_forward_and_decode_compile_for_hopper_without_spills(compiled):
    plain, with_tma, *others = compiled["forward and decode"]
    assert "TMA" in with_tma["tile"] and with_tma["spilled"] == 0 and with_tma["matrix"] == plain["matrix"]
    rows = {row["kernel"]: row for row in (plain, *others)}
    assert set(rows) == {"forward", "decode", "merge"}
    assert rows["forward"]["spilled"] == 0 and rows["forward"]["matrix"]["HGMMA"] > 0
    assert 32 <= rows["forward"]["registers"] <= 255 and rows["forward"]["resident"] >= 1
    assert rows["decode"]["matrix"] and rows["merge"]["floor_ms"] is None
    # 4 D flops for half of T x T pairs of every head at 989 TFLOP/s
    assert rows["forward"]["floor_ms"] == pytest.approx(4 * 64 * 16384**2 / 2 * 32 / 989e12 * 1e3, rel=1e-3)


def test_backward_compiles_for_hopper_without_spills(compiled):
    rows = compiled["backward"]
    assert [row["kernel"] for row in rows] == ["dq", "dkdv"] and all(row["spilled"] == 0 for row in rows)


def test_forward_compiles_for_amd(compiled):
    (row,) = compiled["AMD"]
    assert row["matrix"]["v_mfma"] > 0 and row["shared"] <= 65536 and row["resident"] is None


def test_problems_name_what_is_not_met():
    pytest.importorskip("triton")
    from hf_attn_plugins.kernels.triton.static import Resources, problems

    fine = Resources("forward", "sm90", "bf16", 64, True, "", 200, 0, 65536, {"HGMMA": 1}, 1, 1.0)
    assert problems([fine]) == []
    assert "spilled" in problems([dataclasses.replace(fine, spilled=8)])[0]
    assert "HGMMA" in problems([dataclasses.replace(fine, matrix={"HMMA": 4})])[0]
    assert "shared" in problems([dataclasses.replace(fine, shared=240 * 1024)])[0]
    assert problems([dataclasses.replace(fine, kernel="dkdv", target="sm80", spilled=8)]) == []
    assert "spilled" in problems([dataclasses.replace(fine, kernel="dkdv", spilled=8)])[0]


def test_recorded_launches_are_those_of_a_real_call():
    from hf_attn_plugins.kernels.triton import device as triton_device
    from hf_attn_plugins.kernels.triton.static import record

    launches = record("sm90", torch.bfloat16, 128, True)
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["forward_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel", "decode_kernel", "merge_kernel"]
    assert triton_device._recording is None


FEATURES = """
import sys, torch
from hf_attn_plugins.kernels.triton.static import compile_launch, record
from hf_attn_plugins.kernels.segment_labels import Labels
target = sys.argv[1]
meta = lambda *size, dtype=torch.int32: torch.empty(*size, dtype=dtype, device="meta")
labels = Labels(meta(1, 16384), meta(1, 16384))
features = {
    "window and softcap": dict(left=4096, softcap=30.0),
    "padding": dict(labels=Labels(None, meta(1, 16384))),
    "segments": dict(labels=labels),
    "dropout": dict(dropout=0.1, row_hashes=meta(2**20), key_hashes=meta(2**15)),
    "tensor offset": dict(offset=meta((), dtype=torch.int64)),
    "float bias": dict(bias=meta(1, 1, 16384, 16384, dtype=torch.bfloat16).expand(1, 32, -1, -1)),
    "plan": dict(pieces=(0, 0, 8192, 0, 8192, 1, 0, 0, 8192, 16384, 0, 16384, 1, 0)),
}
for name, feature in features.items():
    for launch in record(target, torch.bfloat16, 64, True, **feature):
        if launch.kernel.__name__ in ("forward_kernel", "dq_kernel", "dkdv_kernel", "decode_kernel"):
            if "bias" in feature and launch.kernel.__name__ == "decode_kernel":
                continue
            compile_launch(launch, target)
            print(name, launch.kernel.__name__, flush=True)
    if target in ("sm90", "sm100"):
        compile_launch(record(target, torch.bfloat16, 64, True, tma=True, **feature)[0], target)
"""


@pytest.mark.grid
@pytest.mark.parametrize("target", ["sm80", "sm90", "sm100", "sm120", "gfx942", "gfx950"])
def test_every_feature_compiles(target):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", FEATURES, target], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert done.stdout.count("forward_kernel") == 7


@pytest.mark.grid
@pytest.mark.parametrize("target", ["sm80", "sm90", "sm100", "sm120", "gfx942", "gfx950"])
def test_requirements_on_every_target(tmp_path, target):
    rows_of(tmp_path, start(tmp_path, target, "--head-dims", "64", "128", "256"))
