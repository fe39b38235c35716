"""Interest sets: the table, both constructions, and what is refused."""

import itertools

import pytest

from hf_attn_plugins.cqs.planning import difference_covers as covers

# Smallest possible sizes for 1 .. 150 workers (Luk and Wong 1997; OEIS A283297; exhaustive search beyond), as run ends.
OPTIMAL = [
    (1, 1), (3, 2), (7, 3), (13, 4), (19, 5), (20, 6), (21, 5), (28, 6), (30, 7), (31, 6), (37, 7), (38, 8), (39, 7),
    (51, 8), (56, 9), (57, 8), (65, 9), (72, 10), (73, 9), (79, 10), (90, 11), (91, 10), (93, 11), (94, 12), (95, 11),
    (113, 12), (116, 13), (117, 12), (131, 13), (132, 14), (133, 12), (150, 14),
]  # fmt: skip


def covers_all(elements: tuple[int, ...], workers: int) -> bool:
    return {(a - b) % workers for a, b in itertools.product(elements, repeat=2)} == set(range(workers))


def test_table_holds_covers_of_the_smallest_size() -> None:
    sizes = iter(OPTIMAL)
    end, size = next(sizes)
    for workers in range(1, 201):
        chosen = covers.interest_set(workers)
        assert covers_all(chosen, workers)
        assert chosen[:2] == (0, 1)[:workers]
        if workers > end and workers <= 150:
            end, size = next(sizes)
        if workers <= 150:
            assert len(chosen) == size, workers


@pytest.mark.parametrize(
    ("order", "workers"), [(2, 7), (3, 13), (4, 21), (5, 31), (7, 57), (8, 73), (9, 91), (16, 273)]
)
def test_singer_sets_are_perfect(order: int, workers: int) -> None:
    chosen = covers.singer(workers)
    assert chosen is not None and len(chosen) == order + 1 and chosen[:2] == (0, 1)
    differences = [(a - b) % workers for a, b in itertools.permutations(chosen, 2)]
    assert sorted(differences) == list(range(1, workers))


def test_singer_exists_for_prime_powers_only() -> None:
    assert covers.singer_sizes(200) == [7, 13, 21, 31, 57, 73, 91, 133, 183]
    assert all(covers.singer(q * q + q + 1) is None for q in (6, 10, 12, 14, 15))
    assert all(covers.singer(w) is None for w in (8, 12, 100))


def test_wichmann_covers_every_number_of_workers() -> None:
    for workers in range(1, 700):
        chosen = covers.wichmann(workers)
        assert covers_all(chosen, workers)
        assert len(chosen) <= 1.75 * workers**0.5 + 2


@pytest.mark.parametrize("workers", [201, 250, 307, 512, 1000])
def test_beyond_the_table(workers: int) -> None:
    assert covers_all(covers.interest_set(workers), workers)


@pytest.mark.parametrize(
    ("elements", "workers", "words"),
    [
        ((0, 1, 2), 7, "no two elements differ by 3"),
        ((0, 1, 7), 7, "0 .. 6"),
        ((0, 1, 1), 3, "distinct"),
        ((), 1, "no two elements differ by 0"),
    ],
)
def test_what_is_no_cover_is_refused(elements: tuple[int, ...], workers: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        covers.check(elements, workers)


def test_a_users_cover_is_taken_in_its_order() -> None:
    assert covers.check([5, 0, 1], 7) == (5, 0, 1)
