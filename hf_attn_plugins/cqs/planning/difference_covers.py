"""Interest sets: difference covers of Z_W, from a verified table, Singer's or Wichmann's construction, or the user."""

from __future__ import annotations

import functools
import importlib.resources
import itertools
import json
from collections.abc import Iterable


def interest_set(num_workers: int) -> tuple[int, ...]:
    """The smallest difference cover of Z_W known to this package, ascending.

    Up to 200 workers it comes from a table; above, it is Singer's set where W allows one, else Wichmann's cover.
    Example: 7 workers have (0, 1, 3), whose differences mod 7 are all of 0 .. 6.

    Raises:
        ValueError: fewer than one worker.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers={num_workers}: at least 1 worker is needed.")
    table = _table()
    if num_workers in table:
        return table[num_workers]
    return singer(num_workers) or wichmann(num_workers)


def uncovered(elements: Iterable[int], num_workers: int) -> list[int]:
    """Residues 0 .. W // 2 that are not the difference of two elements (mod W); d and W - d are covered together."""
    members = list(elements)
    differences = {(a - b) % num_workers for a in members for b in members}
    return [residue for residue in range(num_workers // 2 + 1) if residue not in differences]


def check(elements: Iterable[int], num_workers: int) -> tuple[int, ...]:
    """The elements as a tuple, in their order, after checking that they are a difference cover of Z_W.

    Raises:
        ValueError: an element is no whole number of 0 .. W - 1 or is repeated, or a residue is no difference of two.
    """
    members = tuple(elements)
    if any(not isinstance(e, int) or not 0 <= e < num_workers for e in members) or len(set(members)) < len(members):
        raise ValueError(f"interest set {members}: distinct whole numbers 0 .. {num_workers - 1} are needed.")
    missing = uncovered(members, num_workers)
    if missing:
        raise ValueError(
            f"interest set {members} is no difference cover for {num_workers} workers: no two elements differ by "
            f"{missing[0]} (mod {num_workers}); leave it out to get {interest_set(num_workers)}."
        )
    return members


@functools.cache
def _table() -> dict[int, tuple[int, ...]]:
    text = importlib.resources.files(__package__).joinpath("difference_covers_1_200.json").read_text()
    return {int(workers): tuple(elements) for workers, elements in json.loads(text).items()}


def singer_sizes(limit: int) -> list[int]:
    """All W = q^2 + q + 1 <= limit with q a prime power. Z_W then has a cover in which no difference comes up twice."""
    orders = itertools.takewhile(lambda q: q * q + q + 1 <= limit, itertools.count(2))
    return [q * q + q + 1 for q in orders if _prime_power(q)]


def singer(num_workers: int) -> tuple[int, ...] | None:
    """Singer's perfect difference set of q + 1 elements for W = q^2 + q + 1, q a prime power; None for other W.

    With a primitive element alpha of GF(q^3), the set is {0} and log_alpha(alpha + a) mod W for every a in GF(q).
    GF(q) itself is 0 and the powers of alpha^W. Source: J. Singer, Trans. AMS 43 (1938) 377-385.
    """
    order = next(q for q in itertools.count(1) if q * q + q + 1 >= num_workers)
    factors = _prime_power(order)
    if order * order + order + 1 != num_workers or factors is None:
        return None
    prime, exponent = factors
    powers = _powers_of_primitive(prime, 3 * exponent)
    logs = {element: log for log, element in enumerate(powers)}
    subfield = [(0,) * (3 * exponent), *powers[::num_workers]]
    shifted = (tuple((x + y) % prime for x, y in zip(powers[1], a, strict=True)) for a in subfield)
    return tuple(sorted({0} | {logs[element] % num_workers for element in shifted}))


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p^e, or None."""
    prime = next((p for p in range(2, q + 1) if q % p == 0), None)
    if prime is None:
        return None
    exponent = 0
    while q % prime == 0:
        q, exponent = q // prime, exponent + 1
    return (prime, exponent) if q == 1 else None


def _powers_of_primitive(prime: int, degree: int) -> list[tuple[int, ...]]:
    """All powers of x modulo the first primitive polynomial over GF(prime), as coefficient tuples, x^0 first."""
    one = (1,) + (0,) * (degree - 1)
    order = prime**degree - 1
    proper = [order // factor for factor in range(2, order + 1) if order % factor == 0 and _is_prime(factor)]
    for low in itertools.product(range(prime), repeat=degree):  # x^degree = -low
        if low[0] == 0 or _power_of_x(order, low, prime) != one:
            continue
        if any(_power_of_x(exponent, low, prime) == one for exponent in proper):
            continue
        powers = [one]
        for _ in range(order - 1):
            powers.append(_times_x(powers[-1], low, prime))
        return powers
    raise AssertionError("every finite field has a primitive polynomial")


def _is_prime(n: int) -> bool:
    return all(n % d for d in range(2, int(n**0.5) + 1))


def _times_x(element: tuple[int, ...], low: tuple[int, ...], prime: int) -> tuple[int, ...]:
    carry = element[-1]
    return tuple((x - carry * c) % prime for x, c in zip((0, *element[:-1]), low, strict=True))


def _power_of_x(exponent: int, low: tuple[int, ...], prime: int) -> tuple[int, ...]:
    """x^exponent by repeated squaring."""
    result = (1,) + (0,) * (len(low) - 1)
    for bit in bin(exponent)[2:]:
        square, shifted = (0,) * len(low), result
        for coefficient in result:
            square = tuple((a + coefficient * b) % prime for a, b in zip(square, shifted, strict=True))
            shifted = _times_x(shifted, low, prime)
        result = _times_x(square, low, prime) if bit == "1" else square
    return result


def wichmann(num_workers: int) -> tuple[int, ...]:
    """A cover for any W, ascending: the marks of the Wichmann ruler that measures 1 .. W // 2 with the fewest marks.

    The distances between marks are 1^r, r+1, (2r+1)^r, (4r+3)^s, (2r+2)^(r+1), 1^r, where x^n means n times x. That is
    4r + s + 3 marks and a length of 4r(r+s+2) + 3(s+1). Source: B. Wichmann, J. London Math. Soc. 38 (1963) 465-466.
    """
    need = num_workers // 2
    best: tuple[int, int, int] | None = None
    for r in itertools.count():
        if best is not None and 4 * r + 3 >= best[0]:
            break
        s = max(0, -(-(need - 4 * r * (r + 2) - 3) // (4 * r + 3)))
        best = min(best or (4 * r + s + 3, r, s), (4 * r + s + 3, r, s))
    assert best is not None
    _, r, s = best
    steps = [1] * r + [r + 1] + [2 * r + 1] * r + [4 * r + 3] * s + [2 * r + 2] * (r + 1) + [1] * r
    return tuple(sorted({mark % num_workers for mark in itertools.accumulate(steps, initial=0)}))
