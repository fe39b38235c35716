"""The former address of `running/prompts.py`, kept for code that imports it from here."""

from .running.prompts import CHATS, Parts, Prompter, digest, opening

__all__ = ["CHATS", "Parts", "Prompter", "digest", "opening"]
