"""The former address of `running/measure.py`, kept for code that imports it from here."""

from .running.measure import Answer, Hidden, agreement, answer, answer_logits, ends, hidden, loss_buckets, losses

__all__ = ["Answer", "Hidden", "agreement", "answer", "answer_logits", "ends", "hidden", "loss_buckets", "losses"]
