"""Asks every sample of every attention implementation, with one model load, and records each answer at once."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hf_attn_plugins.core import interrupt
from hf_attn_plugins.hf.inputs.load import check_length, positions
from hf_attn_plugins.hf.models.evaluating import evaluating

from .. import measure
from ..configuration import Attention, Configuration
from ..prompts import Prompter
from ..records import KINDS, Agreement, Generation, Loss, Prediction, RunFolder, Sample, Speed
from ..scoring.metrics import score
from ..tasks import Item, Setting, Task, task
from .attending import Ran, attending, frozen
from .plan import Unit, units

WARM_UP = 32  # tokens of the first, unrecorded call of every implementation


class Runner:
    """One process's part of a run.

    Args:
        settings: what to run; model, tokenizer: loaded and in place.
        process, processes: this process's number, and how many there are.

    Raises:
        ValueError, ImportError: something in the configuration cannot be run. Nothing has been written then.
    """

    def __init__(
        self, settings: Configuration, model: Any, tokenizer: Any, *, process: int = 0, processes: int = 1
    ) -> None:
        self.settings, self.model, self.tokenizer = settings, model, tokenizer
        self.process = process
        together = settings.context_parallel  # then every process asks every sample, and one records it
        part, parts = (0, 1) if together else (process, processes)
        self.writes = part == process
        self.limit = settings.max_positions or positions(model.config)
        longest = max(settings.lengths)
        check_length(f"--lengths {longest}", longest, self.limit)
        setting = Setting(
            Prompter(tokenizer, settings.chat, settings.template_args),
            settings.seed,
            settings.max_new_tokens,
            settings.decode_tokens,
            settings.text,
            settings.haystack,
            settings.data,
            settings.online,
            longest * settings.text_samples,
        )
        self.eos = getattr(tokenizer, "eos_token_id", None)
        self.tasks = [task(name, setting) for name in settings.tasks]
        if settings.context_parallel:
            self._check_context_parallel()
        self.units = units(len(self.tasks), settings.lengths, self._samples, part, parts)
        self._warm: set[tuple[str, int]] = set()
        self._try_first_samples()

    def run(
        self, folder: RunFolder, *, retry_errors: bool = False, progress: Callable[..., None] | None = None
    ) -> None:
        """Ask what has not been asked yet.

        Args:
            retry_errors: ask again what failed before.
            progress: called with (what, done, total), both in tokens of prompts.

        Raises:
            ValueError: a recorded sample is not the one that this run would ask.
        """
        progress = progress or (lambda *_: None)
        known = folder.samples()
        done = {key for key, found in folder.predictions().items() if not (retry_errors and found.error)}
        total, passed = sum(unit.length for unit in self.units), 0
        with contextlib.ExitStack() as stack:
            samples, predictions = (
                stack.enter_context(folder.appender(name, self.process)) if self.writes else None
                for name in ("samples", "predictions")
            )
            stack.enter_context(evaluating(self.model))
            stack.enter_context(frozen())
            for unit in self.units:
                interrupt.check()
                asked = self.tasks[unit.task]
                name = asked.sample_id(unit.length, unit.number)
                progress(f"{asked.title} {unit.length}", passed, total)
                passed += unit.length
                attn = [a for a in self._order(asked, unit) if (name, a.label) not in done]
                if not attn:
                    continue
                sample, answers = self._sample(asked, unit, attn)
                if name in known and known[name].digest:  # none where the sample could not be made
                    _same(known[name], sample)
                elif samples is not None:
                    samples.append(sample)
                for prediction in answers:
                    if predictions is not None:
                        predictions.append(prediction)
        progress("done", total, total)

    def _check_context_parallel(self) -> None:
        texts = [asked.name for asked in self.tasks if asked.kind in ("loss", "agreement")]
        if texts:
            raise ValueError(f"--context-parallel is for tasks that generate: leave out {', '.join(texts)}.")
        for attn in self.settings.attn:  # every process opens it, and what cannot be shared says so
            with self._attention(attn):
                pass

    def _samples(self, number: int, length: int) -> int:
        asked = self.tasks[number]
        wanted = {"generation": self.settings.samples, "speed": self.settings.rounds}.get(
            asked.kind, self.settings.text_samples
        )
        available = asked.available(length)
        return wanted if available is None else min(wanted, available)

    def _try_first_samples(self) -> None:
        """Make the first sample of every task and length, so that what cannot work is reported at the start."""
        for asked in self.tasks:
            for length in self.settings.lengths:
                item = asked.item(length, 0)
                self._check_length(item)
                if item.sample.metric:
                    score(item.sample.metric, "", item.sample.references, **item.arguments)

    def _check_length(self, item: Item) -> None:
        whole, budget = len(item.ids) + item.sample.max_new_tokens, item.sample.max_new_tokens
        check_length(f"{item.sample.sample} with {len(item.ids)} tokens and {budget} to generate", whole, self.limit)

    def _sample(self, asked: Task, unit: Unit, attn: list[Attention]) -> tuple[Sample, Iterable[Prediction]]:
        """The sample and its answers to come; one that cannot be made has an error for every implementation."""
        try:
            item = asked.item(unit.length, unit.number)
            self._check_length(item)
        except Exception as error:
            interrupt.check()
            name, text = asked.sample_id(unit.length, unit.number), _one_line(error)
            failed = [KINDS[asked.kind](name, each.label, error=text) for each in attn]
            return Sample(name, asked.title, asked.suite, unit.length, 0, metric=asked.metric), failed
        return item.sample, self._ask(asked, item, unit, attn)

    def _order(self, asked: Task, unit: Unit) -> list[Attention]:
        """Timed rounds begin with another implementation each, so that none is always first."""
        attn = list(self.settings.attn)
        if asked.kind == "speed":
            turn = unit.number % len(attn)
            return attn[turn:] + attn[:turn]
        if asked.kind == "agreement":
            return [a for a in attn if a.label != self.settings.baseline]
        return attn

    def _ask(self, asked: Task, item: Item, unit: Unit, attn: list[Attention]) -> Iterator[Prediction]:
        base: measure.Hidden | None = None
        for each in attn:
            interrupt.check()
            try:
                if asked.kind == "generation":
                    yield self._generation(item, each)
                elif asked.kind == "loss":
                    yield self._loss(item, each)
                elif asked.kind == "speed":
                    yield self._speed(item, unit, each)
                else:
                    base = base or self._hidden(item, self._baseline())
                    yield self._agreement(item, each, base)
            except Exception as error:  # one failing sample must not end a run of hours
                interrupt.check()  # Ctrl-C is no failing sample, whatever error it came out as
                self._forget()
                yield KINDS[asked.kind](item.sample.sample, each.label, error=_one_line(error))

    def _generation(self, item: Item, attn: Attention) -> Generation:
        nll = None
        with self._attention(attn) as ran:
            self._warm_up(attn, 0, item)
            found = measure.answer(self.model, item.ids, item.sample.max_new_tokens, eos=self.eos)
            if item.answer_ids and not self.settings.context_parallel:  # there the cache is spread over processes
                nll = measure.reference_nll(self.model, item.ids, item.answer_ids)
        text = self.tokenizer.decode(found.token_ids, skip_special_tokens=True)
        counted = text.lstrip(item.stop).split(item.stop)[0] if item.stop else text
        return Generation(
            item.sample.sample,
            attn.label,
            prediction=text,
            token_ids=found.token_ids,
            score=score(item.sample.metric, counted, item.sample.references, **item.arguments),
            seconds=found.seconds,
            new_tokens=len(found.token_ids),
            prompt_tokens=len(item.ids),
            peak_bytes=found.peak_bytes,
            reference_nll=nll,
            reference_tokens=len(item.answer_ids) if nll is not None else 0,
            plan=ran.plan,
        )

    def _loss(self, item: Item, attn: Attention) -> Loss:
        with self._attention(attn) as ran:
            self._warm_up(attn, 0, item)
            states = measure.hidden(self.model, item.ids)
        nll = measure.losses(self.model, item.ids, states)
        return Loss(
            item.sample.sample,
            attn.label,
            nll_sum=float(nll.sum()),
            count=len(nll),
            buckets=measure.loss_buckets(nll),
            seconds={"prefill": states.seconds},
            peak_bytes=states.peak_bytes,
            plan=ran.plan,
        )

    def _agreement(self, item: Item, attn: Attention, base: measure.Hidden) -> Agreement:
        with self._attention(attn) as ran:
            states = measure.hidden(self.model, item.ids)
        figures = measure.agreement(self.model, item.ids, base, states)
        return Agreement(item.sample.sample, attn.label, **figures, plan=ran.plan)

    def _speed(self, item: Item, unit: Unit, attn: Attention) -> Speed:
        tokens = item.sample.max_new_tokens
        with self._attention(attn) as ran:
            self._warm_up(attn, unit.length, item)
            found = measure.answer(self.model, item.ids, tokens, to_the_end=True, eos=self.eos)
        seconds = {name: found.seconds[name] for name in ("prefill", "first_token")}
        seconds["decode_per_token"] = found.seconds["decode"] / (tokens - 1)
        return Speed(
            item.sample.sample,
            attn.label,
            length=unit.length,
            round=unit.number,
            seconds=seconds,
            peak_bytes=found.peak_bytes,
            plan=ran.plan,
        )

    def _hidden(self, item: Item, attn: Attention) -> measure.Hidden:
        with self._attention(attn):
            return measure.hidden(self.model, item.ids)

    def _warm_up(self, attn: Attention, length: int, item: Item) -> None:
        """One unrecorded call of an implementation, at full length where it will be timed: set-up is not measured."""
        if (attn.label, length) not in self._warm:
            measure.answer(self.model, item.ids[: length or WARM_UP], 2, to_the_end=True)
            self._warm.add((attn.label, length))

    def _attention(self, attn: Attention) -> contextlib.AbstractContextManager[Ran]:
        return attending(self.model, attn, sharded=self.settings.context_parallel)

    def _baseline(self) -> Attention:
        return next(a for a in self.settings.attn if a.label == self.settings.baseline)

    def _forget(self) -> None:
        """Free what a failed call has left, so that running out of memory once does not fail the rest."""
        gc.collect()
        if self.model.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()


def _same(known: Sample, sample: Sample) -> None:
    if known.digest != sample.digest:
        raise ValueError(
            f"{known.sample} was recorded with another prompt: tokenizer, text, data or this package have changed. "
            "Choose another --out."
        )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]
