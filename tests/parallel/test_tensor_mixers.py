"""Every mixer with its heads shared by two processes, and by two times two."""

import functools

import pytest

from longctx.mixers import MixerConfig
from longctx.parallel.megatron import check_installed
from longctx.parallel.shares import refuse_tp
from longctx.sequence.sharded import Transports
from tests.dist import run_gloo
from tests.mixers.examples import WIDTH
from tests.parallel.tensor_cases import all_cases, found_on
from tests.tolerances import LARGEST_ERROR

pytestmark = pytest.mark.cluster

NEVER = {"bilevel"}
"""Kinds that no setting lets share heads."""


@functools.cache
def errors_of(sp: int) -> list[dict[str, dict[str, float]]]:
    check_installed()  # once, before processes fork
    return run_gloo(2 * sp, found_on, 2, sp, timeout=300)


@pytest.mark.parametrize("sp", [1, 2])
def test_every_rank_has_its_part_of_what_one_process_computes(sp):
    allowed = LARGEST_ERROR["fp64"]
    wrong = [
        f"rank {rank}: {case}: {what}: {error:.1e}"
        for rank, found in enumerate(errors_of(sp))
        for case, errors in found.items()
        for what, error in errors.items()
        if not error <= allowed
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("sp", [1, 2])
def test_every_kind_is_shared_or_refused_by_name(sp):
    shared = {all_cases()[name].kind for name in errors_of(sp)[0]}
    assert shared == MixerConfig.kinds().keys() - NEVER
    for name, config in all_cases().items():
        reason = config.tp_refusal(2)
        assert bool(reason) != (name in errors_of(1)[0])
        assert not reason or "num_heads" in reason or "=" in reason, (name, reason)


@pytest.mark.parametrize("kind", sorted(NEVER))
def test_kinds_whose_heads_depend_on_each_other_are_refused(kind):
    configs = [config for config in all_cases().values() if config.kind == kind]
    assert all(f"kind = '{kind}'" in refuse_tp(c, WIDTH, 2, Transports()) for c in configs)
