"""How many units of haystack fit: integers only, and a search that always ends."""

from __future__ import annotations

from collections.abc import Callable


def largest(count: Callable[[int], int], limit: int, low: int, high: int) -> int | None:
    """The largest n in low .. high with count(n) <= limit, for a count that grows with n; None where `low` is too much.

    Steps alternate: one guesses by linear interpolation, the next halves the interval. So at most
    2 log2(high - low + 1) + 2 values are counted, whatever `count` does.

    Args:
        count: tokens of a prompt with n units; where it does not grow with n, some fitting n is returned.
    """
    at_low = count(low)
    if at_low > limit:
        return None
    fits, fits_count = low, at_low
    too_many = high + 1  # never counted: it stands for "not allowed"
    slope = max(1.0, at_low / max(1, low))
    halve = False
    while too_many - fits > 1:
        if halve:
            guess = (fits + too_many) // 2
        else:
            guess = fits + int((limit - fits_count) / slope)
        guess = min(max(guess, fits + 1), too_many - 1)
        halve = not halve
        counted = count(guess)
        if counted > fits_count:
            slope = max(1e-3, (counted - fits_count) / (guess - fits))
        if counted <= limit:
            fits, fits_count = guess, counted
        else:
            too_many = guess
    return fits
