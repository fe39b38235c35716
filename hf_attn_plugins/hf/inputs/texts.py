"""Texts named on the command line: a file of the user's, or the language reference that Python itself carries."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

import torch

from hf_attn_plugins.hf.inputs.load import check_length


def text_tokens(tokenizer: Any, length: int, path: str | None = None, limit: int | None = None) -> torch.Tensor:
    """(1, length) token ids of real English: a file, or the language reference that Python itself carries.

    Of a file only as many characters are read and tokenised as `length` tokens need.

    Raises:
        ValueError: a length below 2, beyond `limit` (what the model was made for), or beyond the text; no UTF-8.
        OSError: the file cannot be read.
    """
    if length < 2:
        raise ValueError(f"--length {length}: at least 2 tokens are needed to compare predictions.")
    check_length(f"--length {length}", length, limit)
    characters = 40 * length
    while True:
        text = _pydoc()[:characters] if path is None else read_text(path, characters)
        ids = tokenizer(text, return_tensors="pt").input_ids
        if ids.shape[1] >= length:
            return ids[:, :length]
        if len(text) < characters:
            raise ValueError(
                f"the text has {ids.shape[1]} tokens, --length asks for {length}: give a longer --text FILE."
            )
        characters *= 4


def prose_tokens(tokenizer: Any, most: int) -> torch.Tensor:
    """(T,) token ids of the language reference that Python carries, at most `most` of them, fewer where it ends."""
    return tokenizer(_pydoc()[: 40 * most], return_tensors="pt").input_ids[0, :most]


def _pydoc() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def read_text(path: str | Path, characters: int = -1) -> str:
    """A user's text file, or its first characters: UTF-8 with or without a byte order mark, any kind of line end.

    Raises:
        ValueError: another encoding; the message says which where a byte order mark tells it.
        OSError: the file cannot be read; the message names it.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read(characters)
    except UnicodeDecodeError as error:
        with open(path, "rb") as raw:
            start = raw.read(4)
        marks = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16"}
        marks[codecs.BOM_UTF16_BE] = "UTF-16"
        kind = next((name for mark, name in marks.items() if start.startswith(mark)), None)
        reason = f"it is {kind}" if kind else f"{error.reason} at byte {error.start}"
        raise ValueError(f"{path}: not UTF-8 text ({reason}): save it as UTF-8.") from error
