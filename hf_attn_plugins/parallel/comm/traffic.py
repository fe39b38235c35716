"""Bytes on the wire, counted where they are sent."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Tally:
    """What one kind of exchange has cost this rank so far.

    Attributes:
        calls: number of collectives.
        sent: bytes that other ranks had to be given from here, once for every rank that gets them.
        received: bytes of other ranks that arrived here.
    """

    calls: int = 0
    sent: int = 0
    received: int = 0


@dataclass
class Traffic:
    """Tallies by the name of the exchange ("merge", "anchor", "keys", ...), for one rank.

    The figures are those of the exchange itself, whatever way a backend takes to carry it out.
    """

    tallies: dict[str, Tally] = field(default_factory=dict)

    def add(self, what: str, sent: int, received: int) -> None:
        tally = self.tallies.setdefault(what, Tally())
        tally.calls += 1
        tally.sent += sent
        tally.received += received

    def __getitem__(self, what: str) -> Tally:
        return self.tallies.get(what, Tally())

    @property
    def sent(self) -> int:
        return sum(tally.sent for tally in self.tallies.values())

    @property
    def received(self) -> int:
        return sum(tally.received for tally in self.tallies.values())

    def reset(self) -> None:
        self.tallies.clear()

    def as_dict(self) -> dict[str, dict[str, int]]:
        """{exchange: {"calls": n, "sent": bytes, "received": bytes}}, JSON-ready."""
        return {what: vars(tally).copy() for what, tally in self.tallies.items()}

    def __str__(self) -> str:
        if not self.tallies:
            return "no exchange: nothing was sent."
        width = max(len(what) for what in self.tallies)
        lines = [f"{'':{width}}  {'calls':>8}  {'sent bytes':>14}  {'received bytes':>14}"]
        for what, tally in self.tallies.items():
            lines.append(f"{what:{width}}  {tally.calls:>8}  {tally.sent:>14}  {tally.received:>14}")
        return "\n".join(lines)
