"""Weights of replicas are compared bit for bit."""

import pytest
import torch

from longctx.errors import OutsideError
from longctx.train import replicas
from longctx.train.replicas import check_replicas, weights_digest
from tests.dist import run_gloo

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool)


def example(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-99, 99, (50, 30), generator=generator).to(dtype)


def digests(*tensors: torch.Tensor) -> list[int]:
    return weights_digest(tensors).tolist()


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
def test_every_changed_bit_changes_the_digest(dtype):
    weight = example(dtype)
    (before,) = digests(weight)
    raw = weight.view(torch.uint8).view(-1)
    for position in range(0, len(raw), 97):
        raw[position] ^= 1 << position % 8
        assert digests(weight) != [before]
        raw[position] ^= 1 << position % 8
    assert digests(weight) == [before]


def test_the_digest_sees_order_signs_of_zero_and_nans():
    assert digests(torch.tensor([1.0, 2.0])) != digests(torch.tensor([2.0, 1.0]))
    assert digests(torch.tensor([0.0])) != digests(torch.tensor([-0.0]))
    nans = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert digests(nans[:1]) != digests(nans[1:])


def test_the_digest_does_not_depend_on_strides_but_on_places_beyond_a_chunk(monkeypatch):
    weight = example(torch.float32)
    assert digests(weight.T.contiguous().T, weight) == digests(weight, weight)
    assert digests(torch.zeros(0), torch.tensor(True)) == digests(
        torch.zeros(0), torch.tensor(True)
    )
    monkeypatch.setattr(replicas, "CHUNK", 4)
    replicas._factors.cache_clear()
    one, other = torch.zeros(12), torch.zeros(12)
    one[1], other[5] = 1.0, 1.0
    assert digests(one) != digests(other)
    replicas._factors.cache_clear()


def gathered(*ranks: dict[str, torch.Tensor]):
    return lambda _own: [weights_digest(list(weights.values())) for weights in ranks]


def test_equal_replicas_pass_and_shards_may_differ():
    one, other = {"a": torch.ones(3)}, {"a": torch.zeros(3)}
    check_replicas(one, gathered(one, one, one), [range(3)])
    check_replicas(one, gathered(one, other, one, other), [[0, 2], [1, 3]])


def test_a_mismatch_names_the_minority_and_the_first_parameter():
    good = {"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(3)}
    bad = good | {"b": torch.tensor([1.0, 1.0, 1.0000001]), "c": torch.zeros(3)}
    found = r"rank 1 differs from the other replicas in 2 of the weights, first in b: "
    with pytest.raises(OutsideError, match=found):
        check_replicas(good, gathered(good, bad, good), [range(3)])
    with pytest.raises(OutsideError, match=r"ranks 1, 3 differ from one another .* first in b: "):
        check_replicas(good, gathered(good, bad, good, good), [[0, 2], [1, 3]])


def _check(rank: int) -> str:
    import torch.distributed as dist

    def gather(x):
        parts = [torch.empty_like(x) for _ in range(3)]
        dist.all_gather(parts, x)
        return parts

    weights = {"layer.weight": example(torch.float32), "norm": torch.ones(4)}
    check_replicas(weights, gather, [range(3)])
    if rank == 2:
        weights["norm"].view(torch.int32)[3] ^= 1
    try:
        check_replicas(weights, gather, [range(3)])
    except OutsideError as error:
        return str(error)
    return ""


@pytest.mark.alone
def test_one_flipped_bit_on_a_rank_is_told_on_all_of_them():
    messages = run_gloo(3, _check)
    assert all(m.startswith("rank 2 differs from the other replicas") for m in messages)
    assert all("first in norm" in m for m in messages)
