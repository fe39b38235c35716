"""What an evaluation asks and reads: ends of sequence, likelihoods, lengths, marks in files, commas in paths."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from hf_attn_plugins.eval import measure
from hf_attn_plugins.eval.records import RunFolder
from hf_attn_plugins.eval.report.wording import figures, findings
from hf_attn_plugins.eval.tasks import haystacks, rows
from hf_attn_plugins.eval.tasks.paths import split_paths

import hf_attn_plugins as hap
from hf_attn_plugins import cli
from hf_attn_plugins.hf.compare import overlap
from hf_attn_plugins.hf.inputs.load import load, positions
from hf_attn_plugins.hf.inputs.texts import read_text, text_tokens
from hf_attn_plugins.hf.models.families import own_backend
from tests.eval.tiny import model_folder, tokenizer
from tests.families import build, llama

TINY = ["--dtype", "float32", "--lengths", "256", "--samples", "1", "--text-samples", "1", "--max-new-tokens", "16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


def always(token: int, folder=None):
    """A model that predicts one token whatever it reads."""
    made = llama(vocab_size=2000, max_position_embeddings=2048, tie_word_embeddings=False)
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.o_proj.weight.zero_(), layer.mlp.down_proj.weight.zero_()
        made.model.embed_tokens.weight.fill_(1.0), made.lm_head.weight.zero_()
        made.lm_head.weight[token] = 1.0
    return made.float().eval()


@pytest.mark.parametrize("eos", [None, 9, [9, 4]])
def test_answers_end_at_the_tokenizers_and_at_the_configs_end_of_sequence(eos, tmp_path):
    made = always(1)  # the tokenizer's eos
    made.generation_config.eos_token_id = eos
    assert len(measure.answer(made, [5, 6, 7], 16, eos=1).token_ids) == 1
    made.generation_config.eos_token_id = 1
    assert len(measure.answer(made, [5, 6, 7], 16, eos=4).token_ids) == 1
    made.generation_config.eos_token_id = made.config.eos_token_id = eos
    made.save_pretrained(tmp_path / "m"), tokenizer().save_pretrained(tmp_path / "m")
    pytest.importorskip("wonderwords")
    words = ["--tasks", "niah_single_1", "--attn", "sdpa", "--out", str(tmp_path / "run"), *TINY]
    assert cli.main(["eval", "--model", str(tmp_path / "m"), *words]) == 0
    (found,) = RunFolder(tmp_path / "run").predictions().values()
    assert found.new_tokens == 1 and found.reference_tokens > 0 and found.reference_nll > 0


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("count", [1, 5])
def test_the_likelihood_of_an_answer_is_that_of_whole_logits(name, count):
    made = build(name)
    ids = torch.randint(5, 97, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    prompt, answer = ids[:-count], ids[-count:]
    with torch.inference_mode():
        logp = made(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    expected = -sum(float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
    assert measure.reference_nll(made, prompt, answer) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="without tokens"):
        measure.reference_nll(made, prompt, [])


def test_the_likelihood_sees_what_an_approximation_loses():
    made, ids = build("llama"), torch.randint(5, 97, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    exact = measure.reference_nll(made, ids, ids[:4])
    with hap.use(made, "tiled_attention"):
        assert measure.reference_nll(made, ids, ids[:4]) == pytest.approx(exact, rel=1e-5)
    with hap.use(made, "star_attention", block_size=32, anchor_size=0, query_size=4):
        assert abs(measure.reference_nll(made, ids, ids[:4]) - exact) > 1e-4


def row(**values):
    base = dict.fromkeys(("difference", "difference_low", "difference_high", "kl", "top1", "perplexity_ratio"))
    return {"attn": "x", "n": 0, "pairs": 0, "errors": 0, **base, **values}


def test_few_answers_are_counts_and_the_verdict_comes_from_predictions():
    few = row(kl=0.002, top1=0.98, n=8, pairs=8, score=0.75, total=6.0, changed=1)
    few |= {"difference": -0.125, "difference_low": -0.25, "difference_high": 0.0}
    ((_, said),) = findings.sentences({"baseline": "sdpa", "overall": [few]})
    assert said.startswith("predicts what the baseline predicts (KL 2.0e−3") and "1 of 8 answers scores" in said
    assert "below" not in said and "12.5" not in said
    assert figures.score(few, "score") == "6 of 8" and figures.difference(few) == "1 of 8 answers differs"
    assert figures.interval({"n": 9, "low": 0.1, "high": 0.2}) == (None, None)
    many = {**few, "n": 20, "pairs": 20}
    ((_, said),) = findings.sentences({"baseline": "sdpa", "overall": [many]})
    assert "below" not in said and "as far as chance allows" in said  # the interval holds 0
    slow = row(speed_up=0.5, speed_length=1024)
    assert "2.00× slower" in findings.sentences({"baseline": "sdpa", "overall": [slow]})[0][1]


@pytest.mark.parametrize(
    ("rope", "most", "expected"),
    [
        (None, 256, 256),
        ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 256}, 256, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 256}, 1024, 1024),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, 256, 512),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 256, 512),
    ],
)
def test_rope_scaling_gives_the_positions(rope, most, expected):
    config = hf.LlamaConfig(max_position_embeddings=most, **({"rope_parameters": rope} if rope else {}))
    assert positions(config) == expected


def test_lengths_beyond_the_config_run_where_the_user_says_so(model, capsys):
    words = ["compare", str(model), "--length", "2100", "--dtype", "float32", "--repeats", "1"]
    assert cli.main(words) == 2
    assert "--max-positions 2100" in capsys.readouterr().err.splitlines()[-1]
    assert cli.main([*words, "--max-positions", "2100"]) == 0
    assert "spread" in capsys.readouterr().out


def test_timings_that_overlap_are_noise():
    assert overlap([1.0, 2.0], [1.9, 3.0]) and overlap([1.0], [5.0]) and not overlap([1.0, 2.0], [2.1, 3.0])


def test_models_without_sdpa_load_and_compare_with_their_own_default(tmp_path):
    made = build("gemma2")
    assert own_backend(made) == ("sdpa" if made._supports_sdpa else "eager")
    made.save_pretrained(tmp_path), tokenizer().save_pretrained(tmp_path)
    loaded, _ = load(str(tmp_path), "float32")
    report = hap.compare(loaded, torch.arange(5, 69)[None], "tiled_attention")
    assert report.baseline.name == own_backend(made) and report.kl_mean < 1e-6
    assert len(report.plugin.repeats) == 2


def test_code_of_a_models_own_is_one_line_and_never_a_question(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}})
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    for words in (["check"], ["compare"], ["eval", "--out", str(tmp_path / "run"), *TINY, "--model"]):
        assert cli.main([*words, str(tmp_path)]) == 2
        assert "--trust-remote-code" in capsys.readouterr().err.strip().splitlines()[-1]


def test_an_adapter_without_peft_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}', encoding="utf-8")
    with pytest.raises(ImportError, match="pip install peft"):
        load(str(tmp_path))


def test_marks_and_line_ends_of_files_are_no_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbfOne two.\r\nThree four. " * 40)
    assert read_text(file).startswith("One two.\nThree")
    assert tokenizer().decode(text_tokens(tokenizer(), 4, str(file))[0]).startswith("One")
    file.write_bytes("One".encode("utf-16"))
    with pytest.raises(ValueError, match="it is UTF-16"):
        read_text(file)
    for name, text in (("e.json", '{"text": "One two. Three."}'), ("e.jsonl", '{"text": "One two. Three."}\r\n')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert haystacks.read(str(tmp_path / name), False).sentences(2) == ["One two.", "Three."]


def test_one_long_line_is_read_as_far_as_it_is_needed(tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("word. " * 500_000, encoding="utf-8")
    calls = []
    made = tokenizer()
    found = text_tokens(lambda text, **kind: calls.append(len(text)) or made(text, **kind), 50, str(file))
    assert found.shape == (1, 50) and calls == [2000]
    essay = haystacks.read(str(file), False)
    assert essay.sentences(3) == ["word."] * 3 and len(essay._cut[0]) == 3
    assert haystacks.Essay("x", "a b. c").sentences(5) == ["a b.", "c", "a b.", "c", "a b."]
    assert max(len(s.split()) for s in haystacks.Essay("x", "word " * 200).sentences(3)) == haystacks.LONGEST


def test_scripts_without_spaces_have_sentences():
    text = "今天很冷。你去哪里？回家！Fine\nday."
    assert haystacks.Essay("x", text).sentences(4) == ["今天很冷。", "你去哪里？", "回家！", "Fine day."]
    endless = haystacks.Essay("x", "字" * 1_000_000)
    assert [len(s) for s in endless.sentences(3)] == [haystacks.LONGEST_WORD] * 3


def test_existing_paths_win_over_commas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    (tmp_path / "a,b" / "e.json").write_text("{}")
    assert split_paths("a,b/e.json") == ["a,b/e.json"]
    assert split_paths("pydoc,a,b/e.json,c") == ["pydoc", "a,b/e.json", "c"]
    assert split_paths("x,,y") == ["x", "y"] and split_paths("") == []
    assert split_paths("longbench=a,b,babilong=c") == ["longbench=a,b", "babilong=c"]


def test_longbench_is_read_from_the_archive_on_the_hub(tmp_path, monkeypatch):
    import zipfile

    with zipfile.ZipFile(tmp_path / "data.zip", "w") as packed:
        packed.writestr("data/qasper.jsonl", '{"context": "c", "input": "i", "answers": ["a"]}\n')
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)  # for `zip://`, which needs no network
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "data.zip"))
    archive = ("org/name", "data.zip", "data/qasper.jsonl")
    found = rows.load("longbench", "org/name", "qasper", fields=("context",), archive=archive, online=True)
    assert found[0]["answers"] == ["a"]
