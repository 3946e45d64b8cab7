"""A few splits over more ranks than the matrix has."""

import pytest

from longctx.sequence.sharded import Transports
from tests.sequence.conform import run
from tests.sequence.matrix import Case, Setting
from tests.tolerances import LARGEST_ERROR

SETTINGS = {
    "8 ranks, mirror of 4 heads, ring": Setting(8, "mirror", Transports("scan", "ring", 4)),
    "8 ranks, mirror of 2 heads": Setting(8, "mirror", Transports("ulysses", "allgather", 2, 1)),
    "6 ranks, mirror of 2 heads": Setting(6, "mirror", Transports("allgather", "ring", 2)),
    "7 ranks, zigzag": Setting(7, "zigzag", Transports("scan", "ring")),
    "8 ranks, zigzag of 4 heads": Setting(8, "zigzag", Transports("serial", "allgather", 4)),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("subject", ["linear-retention", "softmax-grouped", "moh-softmax"])
def test_more_ranks_are_as_exact(subject, setting):
    result = run(Case(subject, setting, 131, "packed"))
    assert result.error <= LARGEST_ERROR["fp64"], result.worst
    assert not result.mismatch
