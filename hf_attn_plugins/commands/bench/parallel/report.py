"""parallel.md, written from parallel.json: three tables and what their columns mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_attn_plugins.bench.timing import hardware_line, markdown_table
from hf_attn_plugins.commands.bench.parallel import prompt, training

TITLE = "Several ranks: what each method sends, holds and computes"


def report(done: dict[str, Any], notes: str, folder: Path) -> Path:
    """Write parallel.md; its path.

    Raises:
        ValueError: nothing was measured.
    """
    parts = []
    if done["rows"]:
        parts += ["## Counted and measured", "", *markdown_table(done["rows"]), "", notes, ""]
    if done["prompt"]:
        parts += [*_prompt(done["about"]["prompt"], done["prompt"]), ""]
    if done["training"]:
        parts += [*_training(done["about"]["training"], done["training"]), ""]
    if not parts:
        raise ValueError("nothing was measured for parallel: choose at least one part.")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "parallel.md"
    lead = [f"# {TITLE}", "", f"{hardware_line(done['hardware'])} Code {done['code']}.", ""]
    path.write_text("\n".join([*lead, *parts]), encoding="utf-8")
    return path


def _prompt(about: dict[str, Any], rounds: dict[str, list[dict[str, Any]]]) -> list[str]:
    count = min(len(each) for each in rounds.values())
    notes = f"""\
{about["model"]} in {about["prompt_dtype"]}, a prompt of {about["prompt_length"]} tokens, {about["new_tokens"]} tokens
generated; default options of each method; one thread in every process. {about["prompt_ranks"]} ranks on gloo on this
machine. `link`: their connection, which is the machine's memory, or a loopback in a network namespace whose rate all
messages share. Times are the smallest of {count} or more rounds. In a round, one process and the ranks are measured one
after the other, in an order that alternates. Other programs ran on the machine, so compare times of one method and link
only. `prefill s`: from the prompt to the first token. `of one process`: the same, over that of one process. `CPU s`:
this process's own time in it. `waits s`: the part of `prefill s` in which the rank waits for exchanges. `in turn s`:
prefill of the same computation where every exchange ends before the rank goes on; `gain`: that over `prefill s`. Star
computes nothing while it sends. `peak MiB`: the largest peak above the loaded model during prefill and generation, of
each process's first run: freed memory that malloc keeps in pieces makes the peak of a second run larger.
`cache MiB`: keys and values at the end. `received MiB`: from other ranks, prefill and generation. `tokens`: whether all
generated tokens, in every round and both ways, are those of one process with the same method."""
    return ["## A prompt on ranks and in one process", "", *markdown_table(prompt.rows(rounds)), "", notes]


def _training(about: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[str]:
    notes = f"""\
{about["model"]} in {about["training_dtype"]}, one text of random tokens, forward and backward, one thread in every
process. `peak MiB`: the largest peak of a rank above its start; weights and gradients exist before. With
`checkpointing` every layer is computed again in the backward pass (Transformers' gradient checkpointing), in one
process as on the ranks."""
    return ["## Memory of a training step", "", *markdown_table(training.rows(done)), "", notes]
