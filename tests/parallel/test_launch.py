"""`accelerate launch`, the way users start it: on one node, on two, and with no launcher at all."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_attn_plugins.parallel.comm.launch import place
from tests.parallel.processes import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.multi_process


def start(folder: Path, name: str, *arguments: str) -> subprocess.Popen:
    # `--multi_gpu` is how Accelerate is told to start several processes, on CPUs as well.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, *launcher, *arguments, "--module", "tests.parallel.script", str(folder), name]
    known = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    environment = {**known, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def check(folder: Path, processes: list[subprocess.Popen], size: int) -> None:
    outputs = [process.communicate(timeout=150)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    found = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(size)]
    assert [result["size"] for result in found] == [size] * size
    assert all(result["tokens"] == found[0]["wanted"] for result in found)
    assert all(0 < result["prefill"] < 23 for result in found), "nobody reads the whole prompt"


@pytest.mark.grid
def test_one_node(tmp_path):
    port = str(free_port())
    process = start(tmp_path, "star_attention", "--num_processes", "2", "--main_process_port", port)
    check(tmp_path, [process], 2)


def test_two_nodes(tmp_path):
    port = str(free_port())
    nodes = [
        start(
            tmp_path, "tiled_attention", "--num_machines", "2", "--machine_rank", str(rank), "--num_processes", "2",
            "--main_process_ip", "127.0.0.1", "--main_process_port", port, "--rdzv_backend", "static",
        )
        for rank in range(2)
    ]  # fmt: skip
    check(tmp_path, nodes, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "who"), (("kill", 0), ("kill", 2), ("hang", 1), ("stop", 0), ("limit", 1)))
def test_a_launch_with_a_failing_rank_ends_whole(what, who):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command = [sys.executable, *launcher, "-m", "tests.parallel.failing_script", what, str(who)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    written = process.communicate(timeout=200)[1]
    assert process.returncode
    if what in ("hang", "stop"):
        named = [line for line in written.splitlines() if "RankError: rank" in line]
        assert named and all(f"rank {who} " in line.partition("): ")[2] for line in named), written
    else:  # the launcher sees which process ended first, and ends the others before they see it
        cause = written.partition("Root Cause")[2]
        assert f"local_rank: {who}" in cause, written
    assert not [each for each in Path("/proc").glob("[0-9]*") if _session(each) == process.pid], "no process is left"


def _session(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[3])
    except OSError:
        return None


def test_a_launcher_that_started_one_process_only_is_told(monkeypatch, caplog):
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    # What `accelerate launch --num_processes 2` leaves behind where it finds no GPUs.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with caplog.at_level(logging.WARNING, logger="hf_attn_plugins"):
        assert place().size == 1
    assert "--multi_gpu" in caplog.text


@pytest.mark.parametrize("name", ("star_attention", "tiled_attention"))
def test_the_same_lines_without_a_launcher(tmp_path, name, monkeypatch):
    from tests.parallel.script import main

    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    main(str(tmp_path), name)
    found = json.loads((tmp_path / "0.json").read_text(encoding="utf-8"))
    assert found["size"] == 1 and found["tokens"] == found["wanted"]
