"""A launched conversation in which rank `who` does `what` in an exchange under way; errors end the processes."""

from __future__ import annotations

import os
import sys

from tests.parallel.breaking import act, converse, disturbed, quick
from tests.parallel.models import build


def main(what: str, who: int) -> None:
    quick()
    model = build("llama")
    fail = (lambda: act(what)) if int(os.environ["RANK"]) == who else (lambda: None)
    with disturbed(model, "posted", 20, fail):
        converse(model, "tiled_attention", timeout=5)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
