"""The front door of `hf-attn`: versions, help without torch, suggestions, completion, one way to name a model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from hf_attn_plugins._version import __version__
from hf_attn_plugins.cli import main
from hf_attn_plugins.commands import completion, this_cpu
from hf_attn_plugins.commands.table import Entry, commands
from hf_attn_plugins.core import cpu
from hf_attn_plugins.ui.parser import options_of
from hf_attn_plugins.ui.suggest import did_you_mean, nearest

HELP_OF_ALL = """
import contextlib, io, sys
from hf_attn_plugins.cli import main
from hf_attn_plugins.commands.table import Entry, commands
def paths(table, before=()):
    for name, entry in table.items():
        yield from [[*before, name]] if isinstance(entry, Entry) else paths(entry, (*before, name))
for path in [[], *paths(commands()), ["patch", "set-attention"]]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            status = main([*path, "--help"])
        except SystemExit as stop:
            status = stop.code
    assert status == 0 and "usage: hf-attn" in out.getvalue(), path
    heavy = {name.split(".")[0] for name in sys.modules} & {"torch", "transformers", "numpy", "rich", "tqdm", "yaml"}
    assert not heavy, (path, heavy)
assert main(["--version"]) == 0
assert "torch" not in sys.modules
print(len(sys.modules))
"""


def test_no_help_imports_torch():
    """What --help costs, counted in imports: less than 300 modules of Python's own and ours."""
    done = subprocess.run([sys.executable, "-c", HELP_OF_ALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version, count = done.stdout.splitlines()
    assert version.startswith(f"hf-attn-plugins {__version__} (python 3.") and "torch" in version
    assert int(count) < 300


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["lst"], "did you mean 'list'?"),
        (["compair"], "did you mean 'compare'?"),
        (["plan", "tilde"], "did you mean 'tiled'?"),
        (["compare", "--lenght", "5"], "did you mean --length?"),
        (["compare", "--dtype", "bfloat6"], "did you mean bfloat16?"),
        (["patch", "set-atention", "x"], "did you mean set-attention?"),
        (["patch", "set-attention", "x", "--attn", "star_attention", "--blocksize", "4"], "did you mean --block-size?"),
        (["check", "--attn", "star"], "did you mean 'star_attention'?"),
        (["compare", "--attn", "star_atention"], "did you mean 'star_attention'?"),
        (["compare", "--attn", "star_attention:block=4"], "did you mean 'block_size'?"),
        (["compare", "--baseline", "spda"], "did you mean 'sdpa'?"),
        (["compare", "--attn", "star_attention:block_size=64:anchor_size=8"], "write a comma between options"),
        (["compare", "smollm2-135"], "did you mean 'smollm2-135m'?"),
        (["patch", "set-attention", "smollm2-135", "out", "--attn", "star_attention"], "did you mean 'smollm2-135m'?"),
        (["eval", "--tasks", "rulr"], "did you mean 'ruler'?"),
        (["eval", "--tasks", "qasper"], "did you mean 'longbench/qasper'?"),
        (["plan", "star", "--length", "9000", "--model", "smollm-135m"], "did you mean 'smollm2-135m'?"),
    ],
)
def test_a_misspelt_word_is_recognised(capsys, words, meant):
    try:
        status = main(words)
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status == 2 and meant in said.err and said.out == ""


def test_help_names_defaults_once(capsys):
    said = {}
    for words in (["compare"], ["look"], ["bench", "parallel"], ["scan"]):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        said[words[-1]] = " ".join(capsys.readouterr().out.split())
    assert "interleaved (default: 3)" in said["compare"] and "(default: 4096)" in said["compare"]
    assert "exchanges per layer of CQS (default: 1)" in said["parallel"]
    assert "one core each (default 1) --" in said["scan"] and "(default: False)" not in "".join(said.values())


def test_the_cpu_is_told_which_row_of_the_table_it_is():
    known = {"fpu", "avx2"}
    for more, title, dtype in (
        ({"avx512f", "avx512_bf16", "amx_tile"}, "AMX", "bfloat16"),
        ({"avx512f", "avx512_bf16"}, "AVX512-BF16", "bfloat16"),
        ({"avx512f"}, "AVX-512", "float32"),
        (set(), "AVX2", "float32"),
    ):
        said = this_cpu.sentence("x86_64", known | more)
        assert title in said and f"load models in {dtype} and use tiled_attention" in said
    assert "float32; no plugin is faster" in this_cpu.sentence("AMD64", {"fpu"})
    assert "no speed is measured" in this_cpu.sentence("aarch64", set())
    assert this_cpu.sentence("x86_64", set()) == this_cpu.sentence("riscv64", {"avx2"}) == ""


def test_list_ends_with_this_cpu(capsys, tmp_path):
    from hf_attn_plugins.kernels.choose import cpu_multiplies_bf16

    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert said.endswith(f"{this_cpu.here()}\n" if this_cpu.here() else "\n")
    if "load models in" in said:  # PyTorch says the same of the CPU
        assert ("load models in bfloat16" in said) == cpu_multiplies_bf16()
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nflags\t\t: fpu avx2\n\nflags\t\t: other\n")
    assert set(cpu.fields(file)["flags"].split()) == {"fpu", "avx2"} and cpu.fields(tmp_path / "none") == {}


def test_what_is_unlike_everything_is_not_guessed():
    assert nearest("quorum", ["list", "check"]) is None and did_you_mean("x", []) == ""
    assert nearest("Star", ["tiled_attention", "star_attention"]) == "star_attention"


@pytest.fixture
def loads_nothing(monkeypatch):
    from hf_attn_plugins.hf.inputs import load

    def loaded(*_, **__):
        raise AssertionError("a model is loaded before the options are checked")

    monkeypatch.setattr(load, "load", loaded)
    monkeypatch.setattr(load, "load_for", loaded)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--option", "blocks=3"], "no option blocks"),
        (["--option", "kernel=magic"], "magic"),
        (
            ["--attn", "tiled_attention,star_attention", "--option", "kernel=aten"],
            "--option belongs to a single --attn",
        ),
        (["--baseline", "sdpaa"], "no attention 'sdpaa'"),
        (["--length", "1"], "at least 2"),
        (["--length", "12,many"], "whole numbers"),
        (["--repeats", "0"], "at least 1"),
        (["--text", "nowhere.txt"], "--text nowhere.txt: no such file"),
        (["--max-kl", "-1"], "at least 0"),
        (["--min-top1", "95"], "a share of 0 to 1"),
        (["--max-perplexity", "0.9"], "a ratio of at least 1"),
    ],
)
def test_options_of_compare_are_checked_before_anything_is_loaded(capsys, loads_nothing, words, message):
    assert main(["compare", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--baseline", "sdpaa"], ["--length", "3"], ["--texts", "1"], ["--text", "nowhere"]])
def test_options_of_tune_are_checked_before_anything_is_loaded(capsys, loads_nothing, words):
    assert main(["tune", "--max-kl", "0.1", *words]) == 2
    assert capsys.readouterr().err.startswith("hf-attn tune: ")


def test_the_alias_names_the_model_in_every_command(capsys, tmp_path, monkeypatch):
    from hf_attn_plugins.hf.inputs import load
    from tests.eval.tiny import model_folder

    folder = model_folder(tmp_path / "model")
    monkeypatch.setattr(load, "demo_folder", lambda: folder)
    assert main(["check", "smollm2-135m", "--attn", "tiled_attention"]) == 0
    assert main(["plan", "star", "--length", "9000", "--model", "smollm2-135m"]) == 0
    assert "expected gain" in capsys.readouterr().out
    patch, attn = ["patch", "set-attention", "smollm2-135m"], ["--attn", "tiled_attention"]
    assert main([*patch, str(tmp_path / "patched"), *attn]) == 0
    assert json.loads((tmp_path / "patched" / "config.json").read_text())["attn_implementation"] == "tiled_attention"
    assert main([*patch, *attn, "--in-place"]) == 2
    assert "the copy that all commands share" in capsys.readouterr().err
    for words in (["check", "./no/such"], ["plan", "star", "--length", "9", "--model", "./no/such"]):
        assert main(words) == 2
        assert "no model folder './no/such'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def places():
    return {place.path: place for place in completion.places(commands())}


def test_completion_knows_every_command_and_option(places):
    def entries(table, before=""):
        for name, entry in table.items():
            if isinstance(entry, Entry):
                yield f"{before} {name}", entry
            else:
                yield from entries(entry, f"{before} {name}")

    for path, entry in entries(commands()):
        below = [place for name, place in places.items() if name == path or name.startswith(path + " ")]
        known = {flag for place in below for flag in place.options}
        assert {flag for flag in options_of(entry.parser("x")) if flag.startswith("--")} == known, path
    assert "star_attention" in places[" compare"].choices["--attn"]
    assert places[" check"].words == ["smollm2-135m"] and "set-attention" in places[" patch"].commands


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["pl"], ["plan"]),
        (["plan", "st"], ["star"]),
        (["plan", "star", "--blo"], ["--block-size"]),
        (["compare", "--attn", "ti"], ["tiled_attention"]),
        (["compare", "--dtype", "f"], ["float16", "float32"]),
        (["compare", "smo"], ["smollm2-135m"]),
        (["patch", "set-attention", "--pa"], ["--part"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
    ],
)
def test_bash_completes(tmp_path, capsys, words, found):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    typed = " ".join(repr(word) for word in ["hf-attn", *words])
    code = f"source {tmp_path / 'script'}; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _hf_attn"
    done = subprocess.run(
        ["bash", "--norc", "-c", code + '; printf "%s\\n" "${COMPREPLY[@]}"'], capture_output=True, text=True
    )
    assert done.stderr == "" and done.stdout.split() == found


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_scripts_of_other_shells_can_be_read(tmp_path, capsys, shell):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "smollm2-135m" in script and "block-size" in script and "set-attention" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: its script was not run")
    (tmp_path / "script").write_text(script)
    assert subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True).returncode == 0
