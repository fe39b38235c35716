"""Whether an evaluation may reach the network: unless asked otherwise, hub and data sets are read from their caches."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
TRUE = ("1", "ON", "YES", "TRUE")  # as both libraries read them
# Both libraries read the variables once, when they are imported; from then on these constants decide.
CONSTANTS = (
    ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_DATASETS_OFFLINE"),
)


@contextlib.contextmanager
def network(online: bool) -> Iterator[None]:
    """Keep the network off inside `with`, unless `online`, whether or not the libraries were imported before."""
    if online:
        yield
        return
    variables = {name: os.environ.get(name) for name in VARIABLES}
    before = {each: getattr(sys.modules[each[0]], each[1]) for each in CONSTANTS if each[0] in sys.modules}
    os.environ.update(dict.fromkeys(VARIABLES, "1"))
    for module, name in before:
        setattr(sys.modules[module], name, True)
    try:
        yield
    finally:
        for variable, value in variables.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value
        asked = any(value is not None and value.upper() in TRUE for value in variables.values())
        for module, name in CONSTANTS:
            if module in sys.modules:  # one imported meanwhile read the variables as they were inside
                setattr(sys.modules[module], name, before.get((module, name), asked))
