"""Counts of exchanges and of the bytes that a rank sent and received in them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Tally:
    """What this rank exchanged so far under one name.

    Attributes:
        calls: number of collectives.
        sent: bytes sent to other ranks; the same bytes sent to two ranks count twice.
        received: bytes received from other ranks.
    """

    calls: int = 0
    sent: int = 0
    received: int = 0


@dataclass
class Traffic:
    """The tallies of one rank by the name of the exchange: "merge", "anchor", "keys and values", ...

    The bytes are those that the exchange needs. A backend may move more, for example in a ring.

    Example: with 3 ranks, an all-gather of 100 bytes per rank adds 1 call, 200 bytes sent and 200 received.
    """

    tallies: dict[str, Tally] = field(default_factory=dict)

    def add(self, what: str, sent: int, received: int) -> None:
        """Count one exchange called `what`, with the bytes that this rank sent and received."""
        tally = self.tallies.setdefault(what, Tally())
        tally.calls += 1
        tally.sent += sent
        tally.received += received

    def __getitem__(self, what: str) -> Tally:
        """The tally of one exchange; zeros if there was none of this name."""
        return self.tallies.get(what, Tally())

    @property
    def sent(self) -> int:
        """Bytes sent in all exchanges."""
        return sum(tally.sent for tally in self.tallies.values())

    @property
    def received(self) -> int:
        """Bytes received in all exchanges."""
        return sum(tally.received for tally in self.tallies.values())

    def reset(self) -> None:
        """Forget everything counted so far."""
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
