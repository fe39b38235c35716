"""The options of `hf-attn eval` and `hf-attn report`, declared without importing torch."""

from __future__ import annotations

import argparse

from hf_attn_plugins.hf.inputs.arguments import DTYPES, add_loading_arguments

CHATS = ("auto", "yes", "no")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-attn eval`; each overrides the key of the same name in the configuration file."""
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML file, or a configuration of the package: 'default', 'demo'")
    add("--model", metavar="DIR_OR_ID", help="folder or hub id of a causal language model")
    add("--dtype", choices=DTYPES)
    add("--device", help="cpu, cuda, cuda:1, ...; CUDA when there is one, by default")
    add_loading_arguments(parser)
    add("--max-positions", type=int, metavar="N", help="the longest text that the model can take, against its config")
    add("--attn", metavar="LIST", help="implementations: sdpa,tiled_attention,star_attention:block_size=512,...")
    add("--baseline", metavar="LABEL", help="the one to compare with, as written in --attn; the first by default")
    add("--tasks", metavar="LIST", help="tasks or groups: ruler,ppl,agreement,speed,longbench/qasper,...")
    add("--lengths", metavar="LIST", help="tokens of prompt and answer: 1024,2048,...")
    add("--samples", type=int, help="samples of each task at each length")
    add("--text-samples", type=int, help="windows of the text for ppl and agreement")
    add("--rounds", type=int, help="timed rounds of the task speed, all implementations once in each")
    add("--decode-tokens", type=int, help="tokens generated in each timed round")
    add("--seed", type=int)
    add("--max-new-tokens", type=int, help="generation budget in place of each benchmark's own")
    add("--text", metavar="FILE", help="text for ppl, agreement and speed; Python's own documentation by default")
    add("--haystack", metavar="LIST", help="essay, SQuAD or HotpotQA files, datasets names, or pydoc")
    add("--data", metavar="LIST", help="where data sets are: longbench=DIR,babilong=DIR,...; hub ids by default")
    add("--chat", choices=CHATS, help="chat template: auto (where the tokenizer has one), yes, no")
    add(
        "--template-arg",
        action="append",
        dest="template_args",
        metavar="NAME=VALUE",
        help="a variable of the chat template, such as enable_thinking=false; can be given several times",
    )
    add("--context-parallel", action="store_true", default=None, help="one sample over all processes")
    add("--online", action="store_true", default=None, help="download models and data sets that are not cached")
    add("--offline", dest="online", action="store_false", default=None, help="download nothing (the default)")
    add("--out", metavar="DIR", help="run folder; an interrupted run is resumed in it")
    add("--retry-errors", action="store_true", help="when resuming, ask samples again that failed")


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-attn report`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that hf-attn eval wrote")
    parser.add_argument(
        "--out", metavar="DIR", help="where leaderboard.md and .html go; the runs' common folder by default"
    )
    parser.add_argument(
        "--allow-different",
        action="store_true",
        help="join runs of different models, tasks or lengths all the same; the leaderboard then says what differs",
    )
