"""Train on texts that are longer than one process's memory allows: every text is cut over the processes of the launch.

accelerate launch --multi_gpu --num_processes 4 examples/train_long.py MODEL TEXTS.txt --length 8192 [--ranks 2]

TEXTS.txt has one text per line. With --ranks 2, processes 0 1 and 2 3 form two groups, and each group trains on its own
batches. Trainer wraps the model in DDP, which averages the gradients of all processes: hence `averaged=True`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_attn_plugins as hap


class LongTrainer(Trainer):
    """`Trainer` whose processes of one group read the same batches; loss, clipping and accumulation are Trainer's."""

    session: Any = None

    def get_train_dataloader(self) -> DataLoader:
        return self.session.same_batches(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return self.session.same_batches(super().get_eval_dataloader(eval_dataset))


def train(
    model: Any, dataset: Any, name: str, arguments: TrainingArguments, ranks: int | None = None, **options: Any
) -> list[float]:
    """Train `model` under the plugin `name` and return the logged losses.

    Args:
        dataset: items with input_ids and labels (L,).
        ranks, options: as in `hap.context_parallel`.
    """
    with hap.context_parallel(model, name, ranks=ranks, averaged=True, **options) as session:
        trainer = LongTrainer(model=model, args=arguments, train_dataset=dataset)
        trainer.session = session
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("texts", type=Path, help="file with one text per line")
    parser.add_argument("--length", type=int, default=8192, help="tokens per text; longer texts are cut")
    parser.add_argument("--ranks", type=int, help="processes that share a text; default: all")
    parser.add_argument("--attention", default="tiled_attention", help="a plugin of hf_attn_plugins")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="trained")
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model)
    dataset = []
    for text in given.texts.read_text(encoding="utf-8").splitlines():
        tokens = tokenizer(text, truncation=True, max_length=given.length)["input_ids"]
        dataset.append({"input_ids": tokens, "labels": tokens})
    arguments = TrainingArguments(
        given.out, max_steps=given.steps, per_device_train_batch_size=1, gradient_checkpointing=True, logging_steps=1
    )
    train(model, dataset, given.attention, arguments, given.ranks)
    model.save_pretrained(given.out)


if __name__ == "__main__":
    main()
