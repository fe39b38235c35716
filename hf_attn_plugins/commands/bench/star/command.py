"""`hf-attn bench star`: agreement with dense attention, time and memory for several sizes of Star Attention.

Every finished measurement is kept in star.json, so that the command can be stopped at any time (or by --minutes) and
goes on where it was; star.md is written from it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.bench.hardware import describe
from hf_attn_plugins.bench.peak_memory import PeakMemory
from hf_attn_plugins.commands.bench.star.report import SCORED, TEXTS, report
from hf_attn_plugins.eval.measure import answer_logits
from hf_attn_plugins.eval.tasks.needles import Passkey, passkey
from hf_attn_plugins.hf import predictions
from hf_attn_plugins.hf.configure import use
from hf_attn_plugins.hf.inputs.load import load_for
from hf_attn_plugins.hf.inputs.texts import text_tokens
from hf_attn_plugins.star.plan import Plan

Sizes = tuple[int | None, int | None, int | None]
DEFAULT: Sizes = (None, None, None)
GRID: tuple[Sizes, ...] = (
    DEFAULT,
    (1024, 1024, 128),
    (1024, 256, 128),
    (1024, 0, 128),
    (512, 512, 128),
    (512, 128, 128),
    (512, 0, 128),
    (1024, 64, 128),
    (1024, 256, 16),
    (1024, 256, 512),
    (256, 64, 128),
)
SPEED: tuple[Sizes, ...] = (DEFAULT, (1024, 1024, 128), (1024, 256, 128))


def run(arguments: argparse.Namespace) -> None:
    """Measure what is missing, then write both files."""
    if min([*arguments.lengths, arguments.depths, arguments.rounds, arguments.agreement_length]) < 1:
        raise ValueError("lengths, depths and rounds must be at least 1.")
    grid = tuple(_sizes(word) for word in arguments.sizes) if arguments.sizes else GRID
    bench = Bench(arguments, grid)
    steps = [(part, step) for part, step in bench.steps() if arguments.only in (None, part)]
    end = math.inf if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    for index, (_, step) in enumerate(steps):
        if time.monotonic() > end:
            print(f"stopped: {len(steps) - index} of {len(steps)} measurements are left; run the same command to go on")
            break
        step()
        bench.write()
    print("written to", bench.write())


def _sizes(word: str) -> Sizes:
    try:
        block, anchor, query = (int(part) for part in word.split(","))
    except ValueError:
        raise ValueError(f"--sizes {word!r}: give block,anchor,query in tokens, as in 1024,256,128.") from None
    Plan(0, block, anchor, query)
    return block, anchor, query


def named(sizes: Sizes | None) -> str:
    if sizes is None:
        return "dense"
    return "default" if sizes == DEFAULT else ",".join(map(str, sizes))


def score(model: Any, task: Passkey) -> tuple[float, bool]:
    """(mean negative log-likelihood of the number's tokens in nats, whether greedy decoding gives the number)."""
    logits = answer_logits(model, task.prompt, task.answer).float()
    answer = torch.tensor(task.answer, device=logits.device)
    nll = -predictions.of_tokens(logits.log_softmax(-1), answer).mean()
    return nll.item(), bool((logits.argmax(-1) == answer).all())


class Bench:
    """Measurements by name, stored in a JSON file."""

    def __init__(self, arguments: argparse.Namespace, grid: tuple[Sizes, ...]) -> None:
        self.arguments, self.grid = arguments, grid
        self.path = arguments.out / "star.json"
        self.facts = describe()
        self.done: dict[str, Any] = {"model": arguments.model, "dtype": arguments.dtype, "hardware": self.facts}
        if self.path.exists():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if (found["model"], found["dtype"]) != (arguments.model, arguments.dtype):
                raise ValueError(f"{self.path} is about {found['model']} in {found['dtype']}: use another --out.")
            self.done = {**found, "hardware": self.facts}
            if found["hardware"] != self.facts:
                self.done["earlier"] = [*found.get("earlier", []), found["hardware"]]
        length = self.done.setdefault("agreement_length", arguments.agreement_length)
        if length != arguments.agreement_length:
            raise ValueError(
                f"{self.path} has texts of {length} tokens: use --agreement-length {length} or another --out."
            )
        for part in ("agreement", "passkey", "speed", "calls"):
            self.done.setdefault(part, {})
        self._model: tuple[Any, Any] | None = None

    def steps(self) -> list[tuple[str, Callable[[], None]]]:
        """(part, measurement) of everything that is not in the file yet, dense first."""
        a, done = self.arguments, self.done
        steps: list[tuple[str, Callable[[], None]]] = []
        for length in a.lengths:
            for sizes in (None, *self.grid):
                missing = a.depths - len(done["passkey"].get(named(sizes), {}).get(str(length), []))
                steps += [("agreement", partial(self.one_passkey, sizes, length))] * missing
            if length == a.lengths[0]:
                missing_sizes = [sizes for sizes in self.grid if named(sizes) not in done["agreement"]]
                steps += [("agreement", partial(self.one_agreement, sizes)) for sizes in missing_sizes]
        for length in a.speed_lengths:
            missing = a.rounds - len(done["speed"].get(str(length), []))
            steps += [("speed", partial(self.one_speed_round, length))] * missing
        for length in a.call_lengths:
            missing = a.rounds - len(done["calls"].get(str(length), []))
            steps += [("calls", partial(self.one_call_round, length))] * missing
        return steps

    def model(self) -> tuple[Any, Any]:
        if self._model is None:
            self._model = load_for(self.arguments)
        return self._model

    def tokens(self, count: int, skip: int = 0) -> Tensor:
        """`count` token ids of the text, from token `skip` on."""
        return text_tokens(self.model()[1], skip + count, self.arguments.text)[0, skip:]

    def using(self, sizes: Sizes | None) -> Any:
        """The model with dense attention, or with Star Attention of these sizes."""
        if sizes is None:
            return use(self.model()[0], "tiled_attention")
        return use(self.model()[0], "star_attention", **dict(zip(("block_size", "anchor_size", "query_size"), sizes)))

    def one_passkey(self, sizes: Sizes | None, length: int) -> None:
        model, tokenizer = self.model()
        scores = self.done["passkey"].setdefault(named(sizes), {}).setdefault(str(length), [])
        index, depths = len(scores), self.arguments.depths
        depth = (index + 0.5) / depths
        with self.using(sizes):
            prose = self.tokens(length, 1000 * index).tolist()
            nll, exact = score(model, passkey(tokenizer, prose, length, depth, index))
        scores.append({"depth": depth, "nll": nll, "exact": exact})
        print(f"{named(sizes):<14} passkey, {length} tokens, depth {depth:.2f}: NLL {nll:.4f}", flush=True)

    @torch.inference_mode()
    def one_agreement(self, sizes: Sizes) -> None:
        """KL, top-1 and perplexity ratio on the last tokens of several texts, against SDPA."""
        model, length = self.model()[0], self.arguments.agreement_length
        kl, same, dense_nll, star_nll = [], [], [], []
        for index in range(TEXTS):
            ids = self.tokens(length, index * length).to(model.device)[None]
            with self.using(sizes):
                star = predictions.log_probabilities(model(ids, logits_to_keep=SCORED, use_cache=False).logits[0])
            dense = predictions.log_probabilities(self._dense_logits(index, ids))
            kl.append(predictions.divergence(dense, star))
            same.append(predictions.same_first_choice(dense, star))
            targets = ids[0, 1 - len(dense) :]
            dense_nll.append(-predictions.of_tokens(dense[:-1], targets))
            star_nll.append(-predictions.of_tokens(star[:-1], targets))
        row = {
            "kl": torch.cat(kl).mean().item(),
            "top1": torch.cat(same).double().mean().item(),
            "perplexity_ratio": (torch.cat(star_nll).mean() - torch.cat(dense_nll).mean()).exp().item(),
        }
        self.done["agreement"][named(sizes)] = row
        print(f"{named(sizes):<14} KL {row['kl']:.4f}, top-1 {row['top1']:.3f}", flush=True)

    def _dense_logits(self, index: int, ids: Tensor) -> Tensor:
        kept = self.__dict__.setdefault("_dense", {})
        if index not in kept:
            with use(self.model()[0], "sdpa"):
                kept[index] = self.model()[0](ids, logits_to_keep=SCORED, use_cache=False).logits[0]
        return kept[index]

    def one_speed_round(self, length: int) -> None:
        """One prefill of each alternative, one after another: seconds and peak memory above the start."""
        model = self.model()[0]
        ids = self.tokens(length).to(model.device)[None]
        row: dict[str, Any] = {}
        ways = {"sdpa": use(model, "sdpa"), "tiled": self.using(None)}
        for name, way in {**ways, **{named(sizes): self.using(sizes) for sizes in SPEED}}.items():
            with torch.inference_mode(), way:
                model(ids[:, :512], logits_to_keep=1)
                with PeakMemory(model.device) as memory:
                    start = time.perf_counter()
                    model(ids, logits_to_keep=1, use_cache=True)
                    row[name] = {"seconds": time.perf_counter() - start}
            row[name]["peak"] = memory.bytes
        self.done["speed"].setdefault(str(length), []).append(row)
        print(length, "tokens:", ", ".join(f"{name} {one['seconds']:.2f} s" for name, one in row.items()), flush=True)

    def one_call_round(self, length: int) -> None:
        """One attention call of the demo model's shape: star with block 1024 against `tiled_attention`."""
        from hf_attn_plugins.core.mask import Mask
        from hf_attn_plugins.star.entry import attention as star
        from hf_attn_plugins.star.options import StarOptions
        from hf_attn_plugins.tiled.entry import attention as tiled
        from hf_attn_plugins.tiled.options import TiledOptions

        query, key, value = (torch.randn(1, length, heads, 64).transpose(1, 2).bfloat16() for heads in (9, 3, 3))
        common: dict[str, Any] = {"scale": 0.125, "softcap": None, "dropout": 0.0}
        ways: dict[str, Callable[[], Any]] = {
            "tiled": partial(tiled, query, key, value, Mask(causal=True), options=TiledOptions(), **common)
        }
        for anchor in (256, 1024):
            options = StarOptions(1024, anchor, 128)
            ways[str(anchor)] = partial(star, query, key, value, Mask(causal=True), options=options, **common)
        row = {}
        with torch.inference_mode():
            for name, way in ways.items():
                way()
                start = time.perf_counter()
                way()
                row[name] = time.perf_counter() - start
        self.done["calls"].setdefault(str(length), []).append(row)
        print(length, "tokens, one call:", ", ".join(f"{n} {t:.3f} s" for n, t in row.items()), flush=True)

    def write(self) -> Path:
        """Write both files, each in one step."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path, text in (
            (self.path, json.dumps(self.done, indent=1) + "\n"),
            (self.path.with_suffix(".md"), report(self.done)),
        ):
            temporary = path.with_suffix(path.suffix + ".tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        return self.path.with_suffix(".md")
