"""Windows of one long text: for perplexity, for agreement with the baseline, and for timing."""

from __future__ import annotations

import functools

from ..prompts import Prompter
from .haystacks import PYDOC, Essay, read
from .task import Item, Setting, Task


class TextTask(Task):
    """Windows that do not overlap, one after another; each begins with what the tokenizer puts before a text.

    For speed, prompt and generated tokens together have the length asked for, and every round has the same prompt.
    """

    suite = "text"

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        self.kind = KINDS[name]
        self.max_new_tokens = setting.decode_tokens if self.kind == "speed" else 0

    @property
    def ids(self) -> tuple[int, ...]:
        """The whole text's token ids."""
        setting = self.setting
        return _ids(setting.prompter, setting.text or PYDOC, setting.online, setting.text_tokens)

    def available(self, length: int) -> int | None:
        if self.kind == "speed":
            return None
        count = len(self.ids) // self._room(length)
        if not count:
            raise ValueError(f"the text has {len(self.ids)} tokens, --lengths asks for {length}: give a longer --text.")
        return count

    def item(self, length: int, index: int) -> Item:
        room = self._room(length)
        start = index * room if self.kind != "speed" else 0
        window = self.ids[start : start + room]
        if len(window) < room:
            raise ValueError(f"the text has {len(self.ids)} tokens, --lengths asks for {length}: give a longer --text.")
        return self.make(self.setting.prompter.opening + list(window), length, index)

    def _room(self, length: int) -> int:
        room = length - self.max_new_tokens - len(self.setting.prompter.opening)
        if room < 2:
            raise ValueError(f"--lengths {length} leaves no text to {self.name}.")
        return room


EDGE = 64  # tokens beside the place where a text was cut, which may not be those of the whole text
KINDS = {"ppl": "loss", "agreement": "agreement", "speed": "speed"}


@functools.lru_cache(maxsize=1)  # three tasks read the same text
def _ids(prompter: Prompter, source: str, online: bool, tokens: int | None) -> tuple[int, ...]:
    found = read(source, online)
    if not isinstance(found, Essay):
        raise ValueError(f"--text {source}: a text is needed, not questions over documents.")
    text = found.text
    characters = len(text) if tokens is None else 8 * tokens + 4096
    while True:
        ids = prompter.ids(text[:characters])
        if characters >= len(text):
            return tuple(ids)
        if len(ids) >= tokens + EDGE:  # type: ignore[operator]
            return tuple(ids[:-EDGE])
        characters *= 2
