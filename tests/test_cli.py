"""hf-attn: every command does its job, and bad input ends with one line and exit status 2."""

from __future__ import annotations

import json

import pytest
import torch

from hf_attn_plugins import PLUGINS
from hf_attn_plugins.cli import commands, main
from hf_attn_plugins.kernels.cpu_fused import build as fused
from tests.families import build


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny Llama with a byte-level tokenizer, on disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    build("llama").save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:90]
    tokenizer = Tokenizer(
        models.WordLevel({"<unk>": 0, **{c: i + 5 for i, c in enumerate(alphabet)}}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(), pre_tokenizers.Split("", "isolated")]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def run(capsys, *words):
    try:
        status = main([str(word) for word in words])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_list(capsys):
    status, out, _ = run(capsys, "list", "--json")
    assert status == 0 and [row["name"] for row in json.loads(out)] == list(PLUGINS)
    assert all(name in run(capsys, "list")[1] for name in PLUGINS)
    assert all(f"`{name}`" in run(capsys, "list", "--markdown")[1] for name in PLUGINS)


def test_overview_names_every_command(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0 and all(word in out for word in commands())
    assert run(capsys)[0] == 2


def test_check(capsys, model_folder):
    status, out, _ = run(capsys, "check", model_folder, "--attn", "tiled_attention")
    assert status == 0 and "LlamaAttention x 2" in out
    status, out, _ = run(capsys, "check", model_folder, "--json")
    assert status == 0 and [report["plugin"] for report in json.loads(out)] == list(PLUGINS)


def test_check_refuses(capsys, tmp_path):
    import transformers as hf

    hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4).save_pretrained(tmp_path)
    status, out, _ = run(capsys, "check", tmp_path)
    assert status == 1 and "refused" in out


def test_compare(capsys, model_folder, tmp_path):
    words = ("compare", model_folder, "--dtype", "float32", "--length", 300, "--repeats", 1)
    status, out, _ = run(capsys, *words, "--option", "kernel=cpu_tiled", "--json", tmp_path / "report.json")
    assert status == 0 and "same first choice" in out and "kernel=cpu_tiled" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tokens"] == 300 and report["top1"] > 0.99 and report["kl_max"] < 1e-4
    assert {"processor", "torch", "transformers", "speedup", "kl_p999"} <= set(report)
    status, out, _ = run(capsys, *words, "--json", "-")
    assert status == 0 and json.loads(out)["model"] == str(model_folder)


def test_compare_reads_a_users_text(capsys, model_folder, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox " * 40, encoding="utf-8")
    status, out, _ = run(
        capsys,
        "compare",
        model_folder,
        "--dtype",
        "float32",
        "--length",
        200,
        "--repeats",
        1,
        "--text",
        tmp_path / "text.txt",
    )
    assert status == 0 and "text.txt" in out


def test_run_registers_the_plugins_first(capsys, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom transformers import AttentionInterface\n"
        "assert 'tiled_attention' in AttentionInterface._global_mapping\nprint('args', sys.argv[1:])\nsys.exit(7)\n"
    )
    for prefix in ((), ("python",)):
        status, out, _ = run(capsys, "run", "--", *prefix, script, "--flag", "x")
        assert status == 7 and "args ['--flag', 'x']" in out
    status, out, _ = run(capsys, "run", "--", "-m", "json.tool", "--help")
    assert status == 0 and "json" in out


def test_bench_writes_its_table(capsys, tmp_path):
    status, out, _ = run(
        capsys,
        "bench",
        "tiled",
        "--dtypes",
        "float32",
        "--lengths",
        640,
        "--short",
        64,
        "--head-dims",
        16,
        "--decode-keys",
        128,
        "--repeats",
        1,
        "--out",
        tmp_path,
    )
    assert status == 0 and "written to" in out
    table = json.loads((tmp_path / "tiled.json").read_text())
    assert table["hardware"]["torch"] and {row["kernel"] for row in table["rows"]} <= {"aten", "cpu_tiled", "cpu_fused"}
    assert all(row["forward ratio"] > 0 for row in table["rows"])
    assert "| dtype |" in (tmp_path / "tiled.md").read_text()


def test_bench_memory_writes_its_table(capsys, tmp_path):
    status, out, _ = run(capsys, "bench", "memory", "--lengths", 256, 512, "--rows", 64, "--out", tmp_path)
    assert status == 0 and "written to" in out
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    for name in ("bfloat16", "float32"):
        kernels = (
            ["cpu_tiled", "aten"] if fused.unavailable(getattr(torch, name)) else ["cpu_fused", "cpu_tiled", "aten"]
        )
        measured = [(row["keys"], row["kernel"]) for row in rows if row["dtype"] == name]
        assert measured == [(n, kernel) for n in (256, 512) for kernel in kernels]


def test_bench_decode_writes_its_table(capsys, tmp_path):
    given = ("--keys", 64, 300, "--repeats", 1, "--dtypes", "float32", "--out", tmp_path)
    status, out, _ = run(capsys, "bench", "decode", *given)
    assert status == 0 and "written to" in out
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert len(rows) == 4 * 3 * 2 and all(row["ratio"] > 0 for row in rows)
    assert {row["prompts"] for row in rows} == {1, "4, padded"}


BAD = {
    "unknown command": (("lisst",), "choose one of list"),
    "unknown method": (("plan", "ring"), "choose one of cqs, star, tiled"),
    "unknown option": (("list", "--jsn"), "unrecognized"),
    "no such model": (("compare", "nowhere"), "no model folder 'nowhere'"),
    "no such model to check": (("check", "./nowhere"), "no model folder './nowhere'"),
    "unknown plugin": (("compare", "MODEL", "--attn", "tilled"), "choose one of tiled_attention"),
    "unknown plugin to check": (("check", "MODEL", "--attn", "tilled"), "choose one of tiled_attention"),
    "unknown plugin option": (("compare", "MODEL", "--option", "blocks=3", "--length", "50"), "no option blocks"),
    "malformed option": (("compare", "MODEL", "--option", "blocks"), "name=value"),
    "too few keys": (("bench", "decode", "--keys", "8"), "at least 64"),
    "missing text": (("compare", "MODEL", "--text", "nowhere.txt", "--length", "50"), "nowhere.txt"),
    "too long for the model": (("compare", "MODEL", "--length", "5000"), "beyond the model's 4096 positions"),
    "too short": (("compare", "MODEL", "--length", "1"), "at least 2"),
    "no repeats": (("compare", "MODEL", "--repeats", "0", "--length", "50"), "at least 1"),
    "unknown baseline": (("compare", "MODEL", "--baseline", "sdpaa", "--length", "50"), "sdpaa"),
    "json into nowhere": (("compare", "MODEL", "--json", "nowhere/x.json"), "does not exist"),
    "nothing to run": (("run", "--"), "nothing to run"),
    "no such program": (("run", "--", "no-such-program-here"), "no file or installed command"),
    "no Python program": (("run", "--", "ls"), "no Python program"),
    "bench of nothing": (("bench", "tiled", "--lengths", "0"), "at least 1"),
    "memory of nothing": (("bench", "memory", "--lengths", "0"), "at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(capsys, model_folder, case):
    words, message = BAD[case]
    status, _, err = run(capsys, *(model_folder if word == "MODEL" else word for word in words))
    assert status == 2 and message in err
    assert (
        "Traceback" not in err
        and len([line for line in err.splitlines() if "hf-attn" in line and "usage" not in line]) == 1
    )


def test_a_short_text_is_named(capsys, model_folder, tmp_path):
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    status, _, err = run(capsys, "compare", model_folder, "--text", tmp_path / "short.txt", "--length", 500)
    assert status == 2 and "longer --text" in err
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    status, _, err = run(capsys, "compare", model_folder, "--text", tmp_path / "binary.txt", "--length", 50)
    assert status == 2 and "not UTF-8" in err


def test_compare_several_and_a_gate(capsys, model_folder, tmp_path):
    words = ("compare", model_folder, "--dtype", "float32", "--repeats", 2, "--length", "40,200")
    words += ("--attn", "tiled_attention:kernel=aten,star_attention:block_size=32,anchor_size=4")
    status, out, err = run(capsys, *words, "--max-kl", "1e-5", "--min-top1", "0.5", "--json", tmp_path / "all.json")
    assert status == 1 and "what ran:" in out and out.index("what ran:") < out.index("same first choice")
    faults = [line for line in err.splitlines() if line]
    assert faults and all("star_attention" in line and "mean KL" in line for line in faults)
    found = json.loads((tmp_path / "all.json").read_text())["comparisons"]
    assert [(each["tokens"], each["plugin"]["name"]) for each in found] == [
        (40, "tiled_attention"), (40, "star_attention"), (200, "tiled_attention"), (200, "star_attention"),
    ]  # fmt: skip
    status, _, err = run(capsys, *words[:8], "--length", 40, "--max-kl", "1e-3")
    assert status == 0 and err == ""


def test_version(capsys):
    for flag in ("--version", "-V"):
        status, out, _ = run(capsys, flag)
        assert status == 0 and out.startswith("hf-attn-plugins ")
