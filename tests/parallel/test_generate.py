"""Several ranks against one process: the same tokens, the same logits."""

from __future__ import annotations

import pytest

from tests.parallel import cases
from tests.parallel.processes import ranks as started

pytestmark = pytest.mark.multi_process
SIZES = (1, 2, 3, 4)


@pytest.fixture(scope="module", params=SIZES)
def ranks(request):
    with started(request.param) as group:
        yield group


STAR = dict(block_size=5, anchor_size=3, query_size=4)
CASES = {
    "star": dict(options=STAR),
    "anchor broadcast": dict(options=STAR | {"anchor": "broadcast"}),
    "anchor recomputed": dict(options=STAR | {"anchor": "recompute"}),
    "dense": dict(name="tiled_attention"),
}


@pytest.mark.parametrize("case", CASES)
def test_same_tokens_and_logits(ranks, case):
    found = ranks.run(cases.generate, **CASES[case])
    for rank, result in enumerate(found):
        assert result["tokens"] == found[0]["wanted"], rank
        assert result["implementation"] == "sdpa"
    assert found[0]["error"] <= 1e-10 and found[0]["prefill error"] <= 1e-10
