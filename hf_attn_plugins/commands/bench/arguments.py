"""The options of every `hf-attn bench` command, apart from its module: those import torch, and --help must not."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_attn_plugins.hf.inputs.arguments import DEMO, DTYPES, add_model_arguments

RESULTS = Path("benchmarks/results")
FRONT_PARTS = ("agreement", "speed", "passkeys", "needles")
PARALLEL_PARTS = ("volumes", "prompt", "training")
INDEXED_PARTS = ("stages", "scaling", "text")
PUBLISHED = {"words": 500, "length": 32, "characters": 64, "width": 512}  # of ISDPA's published notebook


def cqs(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-attn bench cqs`."""
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768], help="tokens")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 7, 8, 13, 31], help="numbers of workers")
    parser.add_argument("--masks", nargs="+", choices=["full", "causal"], default=["full", "causal"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the median counts (default: 3)")
    parser.add_argument(
        "--scores-up-to",
        type=int,
        default=32768,
        help="tokens of the longest case with textbook scores (default: 32768)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        help="folder for cqs.md and cqs.json; rows of other cases there stay",
    )


def front(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-attn bench front`."""
    add_model_arguments(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--texts", type=int, default=4, help="texts for KL and perplexity")
    parser.add_argument("--passkeys", type=int, default=40, help="passkeys: five in a document, one at each depth")
    parser.add_argument(
        "--needles", type=int, default=16, help="prompts with several needles: RULER's niah_multikey_2 and vt in turns"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing")
    parser.add_argument(
        "--targets", type=float, nargs="*", default=[2.0, 2.5], help="speeds that hap.tune is asked for"
    )
    parser.add_argument(
        "--only", choices=FRONT_PARTS, nargs="+", default=list(FRONT_PARTS), help="measure just these parts"
    )
    parser.add_argument("--rows", nargs="+", help="measure just the rows of these names")
    parser.add_argument("--minutes", type=float, help="stop after this time; the same command continues")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for front.json, .md, .svg")


def gpu(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-attn bench gpu`."""
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(10, 18)], help="tokens")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128], help="elements per head")
    parser.add_argument("--minutes", type=float, default=7.5, help="no step starts after this time (default: 7.5)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds; the median counts (default: 15)")
    parser.add_argument("--tune", type=Path, help="first time candidate tile sizes, and write the best to this file")
    parser.add_argument("--save", action="store_true", help="let the timings decide which kernels run on this machine")
    parser.add_argument("--anew", action="store_true", help="start again where an interrupted run would be continued")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for gpu.md and gpu.json")


def indexed(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-attn bench indexed`."""
    parser.add_argument(
        "--only", choices=INDEXED_PARTS, help="measure this part alone; the others are kept in --output"
    )
    parser.add_argument("--words", type=int, default=PUBLISHED["words"], help="number of words (default: %(default)s)")
    parser.add_argument(
        "--length", type=int, default=PUBLISHED["length"], help="characters per word (default: %(default)s)"
    )
    parser.add_argument(
        "--characters",
        type=int,
        default=PUBLISHED["characters"],
        help="size of the character set (default: %(default)s)",
    )
    parser.add_argument(
        "--width", type=int, default=PUBLISHED["width"], help="embedding dimension (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=7, help="turns per form; the median counts (default: %(default)s)"
    )
    parser.add_argument(
        "--text", type=Path, help="a UTF-8 text file for the part `text` (default: the Python language reference)"
    )
    parser.add_argument("--steps", type=int, default=150, help="training steps on the text (default: %(default)s)")
    parser.add_argument(
        "--query",
        nargs="+",
        default=["attenton", "dictionnary", "implementation"],
        metavar="WORD",
        help="words whose nearest words of the text are shown (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, help="folder for indexed.md and indexed.json (default: print only)")


def _dtypes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["bfloat16", "float32"], help="(default: both)"
    )


def memory(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-attn bench memory`."""
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="numbers of keys")
    parser.add_argument("--rows", type=int, default=512, help="query rows (default: 512)")
    _dtypes(parser)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for memory.md and memory.json")


def decode(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-attn bench decode`."""
    parser.add_argument("--keys", type=int, nargs="+", default=[512, 2048, 8192], help="keys in the cache")
    _dtypes(parser)
    parser.add_argument("--repeats", type=int, default=100, help="rounds; the median counts (default: 100)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for decode.md and decode.json")


def parallel(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-attn bench parallel`."""
    parser.add_argument("--length", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(range(1, 9)), help="numbers of ranks to count for")
    parser.add_argument(
        "--measure-up-to", type=int, default=4, help="measure with up to this many processes; 0 only counts"
    )
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument(
        "--kv-heads", type=int, nargs="+", default=[8, 2], help="numbers of key heads; one table row for each"
    )
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2, help="layers of the random Llama that is measured")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--block-size", type=int, help="tokens of Star's blocks; default: an eighth of the prompt")
    parser.add_argument("--halo-size", type=int, help="tokens just before a block in the row with near tokens; a block")
    parser.add_argument("--workers", type=int, help="workers of CQS; default: chosen for each number of ranks")
    parser.add_argument("--rounds", type=int, default=1, help="exchanges per layer of CQS")
    add_model = parser.add_argument_group("a prompt, and a training step, of a real model").add_argument
    add_model("--model", default=DEMO, help="folder or hub id (default: %(default)s)")
    add_model("--prompt-length", type=int, default=8192, help="tokens of the prompt (default: %(default)s)")
    add_model("--prompt-ranks", type=int, default=2, help="processes beside the one (default: %(default)s)")
    add_model("--prompt-dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    add_model("--prompt-rounds", type=int, default=3, help="rounds of timing (default: %(default)s)")
    help = "also with all messages over a connection of this rate, as 1gbit (Linux, root, tc); default: none"
    add_model("--links", nargs="*", default=[], metavar="RATE", help=help)
    add_model("--new-tokens", type=int, default=32, help="tokens to generate (default: %(default)s)")
    help = "lengths of a training step, as TOKENS or TOKENS:checkpointing"
    add_model("--training", nargs="*", default=["8192", "8192:checkpointing"], metavar="TOKENS", help=help)
    add_model("--training-ranks", type=int, nargs="+", default=[1, 4], help="processes (default: 1 4)")
    add_model("--training-dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    parser.add_argument(
        "--only", choices=PARALLEL_PARTS, nargs="+", default=list(PARALLEL_PARTS), help="measure just these parts"
    )
    parser.add_argument("--minutes", type=float, help="no step starts after this time; the same command continues")
    parser.add_argument("--anew", action="store_true", help="start again where parallel.json would be continued")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds that one measured launch may take")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for parallel.md and parallel.json")


def star(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-attn bench star`."""
    add_model_arguments(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 6144], help="tokens of passkey prompts")
    parser.add_argument("--depths", type=int, default=5, help="number of passkey positions, from the start to the end")
    parser.add_argument("--agreement-length", type=int, default=4096, help="tokens of the texts compared with dense")
    parser.add_argument("--speed-lengths", type=int, nargs="*", default=[2048, 4096, 8192], help="timed prefills")
    parser.add_argument("--call-lengths", type=int, nargs="*", default=[8192, 16384], help="timed attention calls")
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds of timing; medians of ratios within a round count"
    )
    parser.add_argument(
        "--sizes", nargs="+", metavar="B,A,Q", help="block,anchor,query sizes instead of the usual grid"
    )
    parser.add_argument("--only", choices=["agreement", "speed", "calls"], help="measure just this part")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 prose; Python's own language reference by default")
    parser.add_argument("--minutes", type=float, help="stop after this time; the same command continues")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for star.md and star.json")


def tiled(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-attn bench tiled`."""
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384], help="tokens of the long cases")
    parser.add_argument(
        "--short", type=int, nargs="*", default=[128, 512, 1024, 2048], help="tokens of the short cases"
    )
    _dtypes(parser)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128], help="elements per head")
    parser.add_argument(
        "--backward-up-to", type=int, default=8192, help="tokens of the longest case that is timed with backward, too"
    )
    parser.add_argument("--decode-keys", type=int, default=8192, help="cached keys of the decoding step")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the median counts (default: 5)")
    parser.add_argument(
        "--against", nargs="*", choices=["zentorch"], default=[], help="libraries to time beside PyTorch's attention"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for tiled.md and tiled.json")


def triton(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-attn bench triton`."""
    parser.add_argument("--static", action="store_true", help="compile ahead of time and read the binaries (no GPU)")
    targets = ["sm80", "sm90", "sm100", "sm120", "gfx942", "gfx950"]
    parser.add_argument("--targets", nargs="+", default=targets, help="architectures")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp16", "fp32"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128, 256], help="elements per head, 1 to 256")
    parser.add_argument("--masks", nargs="+", choices=["causal", "full"], default=["causal", "full"])
    parser.add_argument("--kernels", nargs="+", help="some of: forward delta dq dkdv decode merge (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for triton_static.md and .json")
