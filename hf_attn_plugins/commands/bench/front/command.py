"""`hf-attn bench front`: what accuracy costs in speed, for star's plans and for what a user might take instead.

Every finished measurement is kept in front.json, so that the command can be stopped at any time and goes on where it
was. front.md and front.svg are written from it. All rows of a text, a prompt or a round of timing are measured one
after another, so that a table never mixes what cannot be compared.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.bench.hardware import describe
from hf_attn_plugins.bench.timing import synchronize
from hf_attn_plugins.commands.bench.arguments import FRONT_PARTS as PARTS
from hf_attn_plugins.commands.bench.front.report import described, report
from hf_attn_plugins.commands.bench.front.rows import Row, rows_for
from hf_attn_plugins.core.staging import put
from hf_attn_plugins.eval.baselines import registered
from hf_attn_plugins.eval.measure import answers_logits
from hf_attn_plugins.eval.prompts import Prompter
from hf_attn_plugins.eval.tasks import task
from hf_attn_plugins.eval.tasks.needles import passkeys
from hf_attn_plugins.eval.tasks.task import Setting
from hf_attn_plugins.hf.configure import use
from hf_attn_plugins.hf.inputs.load import load_for
from hf_attn_plugins.hf.inputs.texts import prose_tokens
from hf_attn_plugins.hf.predictions import backbone, divergence, log_probabilities, log_probabilities_at, of_tokens
from hf_attn_plugins.hf.trace import trace
from hf_attn_plugins.hf.tune import tune
from hf_attn_plugins.hf.tuning import heads as key_heads
from hf_attn_plugins.star.options import StarOptions

POSITIONS, CHUNK, TAIL = 2048, 256, 128
DEPTHS = 5
TUNED_TEXTS = 5  # pieces that `hap.tune` is given, behind the texts that rows are measured on
NEEDLES = ("niah_multikey_2", "vt")
BASELINE = "sdpa"


def run(arguments: argparse.Namespace) -> None:
    """Measure what is missing, then write the table and the chart."""
    least = [*arguments.lengths, arguments.texts, arguments.passkeys, arguments.needles, arguments.rounds]
    if min(least) < 1:
        raise ValueError("lengths, texts, passkeys, needles and rounds must be at least 1.")
    bench = Front(arguments)
    end = math.inf if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    with registered():
        for what, step in bench.steps():
            if time.monotonic() > end:
                print("stopped: run the same command to go on")
                break
            print(what, flush=True)
            step()
            bench.save()
    print("written to", report(bench.done, arguments.out))


class Front:
    """Measurements by part, length and index, in a JSON file."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.path = arguments, arguments.out / "front.json"
        self.here = describe()
        self.done: dict[str, Any] = {"model": arguments.model, "dtype": arguments.dtype, "hardware": self.here}
        if self.path.exists():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if (found["model"], found["dtype"]) != (arguments.model, arguments.dtype):
                raise ValueError(f"{self.path} is about {found['model']} in {found['dtype']}: use another --out.")
            if found.get("hardware") != self.here and "speed" in arguments.only and found.get("speed"):
                raise ValueError(
                    f"{self.path} was timed on {described(found['hardware'])}, this is {described(self.here)}: no "
                    "table mixes the speeds of two. Leave speed out of --only, or use another --out."
                )
            self.done = found
        for part in (*PARTS, "heads", "tuned", "rows"):
            self.done.setdefault(part, {})
        self._model: tuple[Any, Any] | None = None
        self._prose: Tensor | None = None

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.done, indent=1) + "\n"
        put(self.path, lambda path: path.write_text(text, encoding="utf-8"))

    def model(self) -> tuple[Any, Any]:
        if self._model is None:
            self._model = load_for(self.arguments)
        return self._model

    def prose(self, first: int, count: int) -> Tensor:
        """`count` token ids of Python's language reference."""
        if self._prose is None:
            most = (self.arguments.texts + TUNED_TEXTS) * max(self.arguments.lengths)
            self._prose = prose_tokens(self.model()[1], most)
        if first + count > len(self._prose):
            raise ValueError(f"the prose has {len(self._prose)} tokens, {first + count} are needed: take fewer texts.")
        return self._prose[first : first + count]

    def steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """(what, measurement) of everything that is not in the file yet."""
        a = self.arguments
        names = {row.name for length in a.lengths for row in rows_for(length, self.done)}
        names |= {f"tuned for {target:g}x" for target in a.targets}
        if a.rows and not names.issuperset(a.rows):
            raise ValueError(f"--rows {sorted(set(a.rows) - names)}: the rows are {sorted(names)}.")
        for length in a.lengths:
            key = str(length)
            if key not in self.done["heads"]:
                yield f"{length}: order of heads", partial(self.heads, length)
            for target in a.targets if "speed" in a.only else ():
                if f"{target:g}" not in self.done["tuned"].get(key, {}):
                    yield f"{length}: tune for {target:g}x", partial(self.tuned, length, target)
        documents = -(-a.passkeys // DEPTHS)
        counts = {"agreement": a.texts, "speed": a.rounds, "passkeys": documents, "needles": a.needles}
        for part in PARTS:
            if part not in a.only:
                continue
            for length in a.lengths:
                rows = rows_for(length, self.done)
                self.done["rows"][str(length)] = [row.as_dict() for row in rows]
                rows = [row for row in rows if not a.rows or row.name in a.rows]
                held = self.done[part].setdefault(str(length), {})
                for index in range(counts[part]):
                    missing = [row for row in rows if index >= len(held.get(row.name, []))]
                    if part == "speed" and missing:
                        missing = rows  # a round is whole or not there
                    if missing:
                        measure = getattr(self, part)
                        yield (
                            f"{length}: {part} {index + 1} of {counts[part]}, {len(missing)} rows",
                            partial(measure, length, index, missing),
                        )

    def heads(self, length: int) -> None:
        """The order of key heads, on a text that no row is measured on."""
        model, _ = self.model()
        ids = self.prose(self.arguments.texts * length, length)[None].to(model.device)
        with torch.inference_mode():
            found = key_heads.losses(
                model,
                lambda: backbone(model)(ids, use_cache=False),
                "star_attention",
                StarOptions(128, 64, None, length // 16),
            )
        self.done["heads"][str(length)] = key_heads.order_of(found)

    def tuned(self, length: int, target: float) -> None:
        """What `hap.tune` chooses for a speed, on texts that no row is measured on."""
        model, _ = self.model()
        first = self.arguments.texts * length
        text = self.prose(first, TUNED_TEXTS * length)
        try:
            found = tune(model, length=length, min_speedup=target, text=text, baseline=BASELINE).as_dict()
        except ValueError as out_of_reach:
            found = {"refused": str(out_of_reach)}
        self.done["tuned"].setdefault(str(length), {})[f"{target:g}"] = found

    def agreement(self, length: int, index: int, rows: list[Row]) -> None:
        """KL over all positions and over the last ones, and both losses, against the dense run of the same text.

        At most `POSITIONS` are looked at, evenly spread; the last `TAIL` ones by themselves.
        """
        model, _ = self.model()
        ids = self.prose(index * length, length)[None].to(model.device)
        base = backbone(model)
        runs, shares = [], []
        with torch.inference_mode():
            for row in (Row(BASELINE, BASELINE), *rows):
                with use(model, row.attn, **row.options), trace(model) as seen:
                    runs.append(base(ids, use_cache=False))
                shares.append(seen.share if seen.share is not None else 1.0)
            kl: list[list[Tensor]] = [[] for _ in runs]
            nll: list[list[Tensor]] = [[] for _ in runs]
            for places in (*key_heads.sampled(length, POSITIONS).split(CHUNK), torch.arange(length)[-TAIL:]):
                wanted, targets = None, ids[0, places[places < length - 1] + 1]
                for got, kls, nlls in zip(runs, kl, nll, strict=True):
                    found = log_probabilities_at(model, ids, got, places)
                    wanted = found if wanted is None else wanted
                    kls.append(divergence(wanted, found))
                    nlls.append(-of_tokens(found[: len(targets)], targets))
        losses = [float(torch.cat(each[:-1]).mean()) for each in nll]
        for row, share, kls, loss in zip(rows, shares[1:], kl[1:], losses[1:], strict=True):
            whole, window = torch.cat(kls[:-1]), row.options.get("window")
            if window is not None:  # the baselines' windows are no plan that a trace could count
                share = (2 * length - window + 1) * window / (length * (length + 1))
            self.add("agreement", length, row, index, {
                "kl": float(whole.mean()),
                "kl_median": float(whole.median()),
                "kl_tail": float(kls[-1].mean()),
                "ppl_ratio": math.exp(loss - losses[0]),
                "share": share,
            })  # fmt: skip

    def speed(self, length: int, index: int, rows: list[Row]) -> None:
        """One prefill of every row and of the baseline, in an order drawn anew for every round; seconds."""
        model, _ = self.model()
        ids, base = self.prose(0, length)[None].to(model.device), backbone(model)
        order = [Row(BASELINE, BASELINE), *rows]
        random.Random(index).shuffle(order)
        with torch.inference_mode():
            base(ids[:, :256], use_cache=False)
            for row in order:
                with use(model, row.attn, **row.options):
                    gc.collect()
                    start = time.perf_counter()
                    base(ids, use_cache=False)
                    synchronize(ids.device)
                    self.add("speed", length, row, index, time.perf_counter() - start)

    def passkeys(self, length: int, index: int, rows: list[Row]) -> None:
        """Numbers in prose, one at each depth, each asked for by itself over one prefill of the document."""
        tokenizer = self.model()[1]
        depths = [depth / (DEPTHS - 1) for depth in range(DEPTHS)]
        found = passkeys(tokenizer, self.prose(0, length).tolist(), length, depths, index)
        self.ask("passkeys", length, index, rows, found.document, [(one.prompt, one.answer) for one in found.asked])

    def needles(self, length: int, index: int, rows: list[Row]) -> None:
        """One prompt of RULER's tasks with several needles, in turns."""
        setting = Setting(Prompter(self.model()[1]), haystack="pydoc")
        item = task(NEEDLES[index % len(NEEDLES)], setting).item(length, index // len(NEEDLES))
        self.ask("needles", length, index, rows, item.ids, [([], item.answer_ids)])

    def ask(
        self,
        part: str,
        length: int,
        index: int,
        rows: list[Row],
        document: list[int],
        asked: list[tuple[list[int], list[int]]],
    ) -> None:
        """For every (question, answer): the answer's mean negative log-likelihood, whether each token comes first."""
        model, _ = self.model()
        for row in (Row(BASELINE, BASELINE), *rows):
            if index < len(self.done[part][str(length)].get(row.name, [])):
                continue
            with use(model, row.attn, **row.options):
                logits = answers_logits(model, document, asked)
            found = []
            for (_, answer), each in zip(asked, logits, strict=True):
                wanted, logp = torch.tensor(answer, device=each.device), log_probabilities(each)
                nll, exact = -of_tokens(logp, wanted).mean(), (logp.argmax(-1) == wanted).all()
                found.append({"nll": float(nll), "exact": bool(exact)})
            self.add(part, length, row, index, found)

    def add(self, part: str, length: int, row: Row, index: int, value: Any) -> None:
        if self.here != self.done["hardware"]:  # accuracy, which no speed hangs on; the page names the machine
            parts = self.done.setdefault("elsewhere", {}).setdefault(described(self.here), [])
            name = f"{part} at {length} tokens"
            parts += [name] if name not in parts else []
        held = self.done[part][str(length)].setdefault(row.name, [])
        del held[index:]
        held.append(value)
