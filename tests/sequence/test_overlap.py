"""Exchanges are under way while there is local work, forwards, backwards and in recomputation.

Heavy kernels are made to sleep for a known time besides what they compute, so that two ranks on
threads have work that needs no processor; messages of one layer of two arrive late. Noise can only
add time: of a few runs the fastest counts, with and without the delay alike, and a busy machine
gets a few more.
"""

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from longctx_kernels import decay_torch, delta_torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longctx.sequence import attention_core
from longctx.sequence.placement import place
from longctx.sequence.plan import Plan
from longctx.sequence.sharded import Links, ShardedView, Transports
from longctx.sequence.simulator import Hub, run_ranks
from tests.sequence.delayed import LocalWork, Log, delayed_links

pytestmark = pytest.mark.alone

RANKS, LENGTH, HEADS, SIZE = 2, 24, 4, 2
DELAY = 0.15
LONGER = 1.1 * DELAY
"""Local work beside each exchange."""
EXPOSED = 0.3
"""Share of the delay that a step may take longer."""
SLOW = 1
"""The layer whose messages are late."""
FEWEST, MOST = 2, 8
"""Rounds of runs with and without the delay."""
LOCAL = LocalWork()


class Seconds(NamedTuple):
    """Of the slowest rank."""

    forward: float
    backward: float


class Schedule(NamedTuple):
    """A core, how it exchanges, and where the tokens are."""

    core: str
    transports: Transports
    placement: str = "contiguous"


def softmax(view: ShardedView, x: Tensor) -> Tensor:
    return view.softmax_attention(x, x, x, 0)


def affine(view: ShardedView, x: Tensor) -> Tensor:
    return view.decay_attention(x, x, x, torch.full((HEADS,), -0.1, dtype=x.dtype))


def delta(view: ShardedView, x: Tensor) -> Tensor:
    return view.delta_attention((x, x, x, x[..., 0].sigmoid()), None)


CORES = {"affine": affine, "softmax": softmax, "delta": delta}
OTHER = {"affine": softmax, "softmax": affine, "delta": softmax}
HIDDEN = [
    Schedule("affine", Transports("allgather")),
    Schedule("affine", Transports("scan")),
    Schedule("softmax", Transports(stream="allgather", gather_heads=2), "zigzag"),
    Schedule("softmax", Transports(stream="allgather"), "zigzag"),
    Schedule("softmax", Transports(stream="ring"), "zigzag"),
]
NOT_HIDDEN = Schedule("affine", Transports("serial"))
HALF_HIDDEN = [Schedule("delta", Transports("allgather")), Schedule("delta", Transports("scan"))]


def name_of(schedule: Schedule) -> str:
    core, transports, _ = schedule
    if core != "softmax":
        return f"{core}-{transports.prefix}"
    return f"softmax-{transports.stream}{transports.gather_heads or ''}"


def slowed(kernel: Callable[..., Any], seconds: Callable[..., float]) -> Callable[..., Any]:
    """The kernel, which takes so much longer."""

    def call(*arguments: Any, **options: Any) -> Any:
        LOCAL.log.slept(seconds(*arguments))
        return kernel(*arguments, **options)

    return call


@pytest.fixture
def _slow_kernels(monkeypatch, schedule):
    """Of the delayed core only; softmax tiles of own keys take time by key heads."""

    def change(module: Any, name: str, seconds: Callable[..., float]) -> None:
        monkeypatch.setattr(module, name, slowed(getattr(module, name), seconds))

    def of_own_keys(each: float, operands: tuple, tiles: list) -> float:
        is_own = any(tile.first for tile in tiles)
        return each * operands[1].shape[0] if is_own else 0.0

    if schedule.core == "affine":
        change(decay_torch, "output_pass", lambda *_: LONGER)
        change(decay_torch, "gradient_pass", lambda *_: LONGER)
        return
    if schedule.core == "delta":
        change(delta_torch, "delta_forward", lambda *_: LONGER)
        change(delta_torch, "delta_backward", lambda *_: LONGER)
        return
    chunk = schedule.transports.gather_heads or HEADS
    forward, backward = LONGER / chunk, 2 * LONGER / chunk
    change(attention_core, "attend", lambda x, _, tiles, __: of_own_keys(forward, x, tiles))
    change(
        attention_core,
        "attend_backward",
        lambda _, x, __, ___, tiles, ____: of_own_keys(backward, x, tiles),
    )


def forward(schedule: Schedule, plan: Plan, links: Links, recompute: bool) -> Tensor:
    """Through the layer that is not delayed and the one that is."""
    out = torch.randn(1, plan.length, HEADS, SIZE, dtype=torch.float64, requires_grad=True)
    for number, core in enumerate((OTHER[schedule.core], CORES[schedule.core])):
        view = ShardedView(plan, links, schedule.transports, number)
        layer = partial(checkpoint, core, use_reentrant=False) if recompute else core
        out = layer(view, out)
    return out


def step(schedule: Schedule, delay: float, recompute: bool) -> tuple[Seconds, list[Log]]:
    """Forward and backward on all ranks."""
    together = threading.Barrier(RANKS)
    logs = [Log() for _ in range(RANKS)]

    def work(rank: int, hub: Hub) -> Seconds:
        LOCAL.log = logs[rank]
        plan = Plan(place(schedule.placement, RANKS, LENGTH), rank, ((0,),))
        links = delayed_links(hub, rank, RANKS, slow=SLOW, delay=delay, log=logs[rank])
        together.wait()
        start = time.monotonic()
        out = forward(schedule, plan, links, recompute)
        middle = time.monotonic()
        together.wait()
        turn = time.monotonic()
        out.sum().backward()
        return Seconds(middle - start, time.monotonic() - turn)

    found = run_ranks(RANKS, work)
    return Seconds(*(max(times) for times in zip(*found))), logs


def excess(schedule: Schedule, recompute: bool, most: int) -> tuple[Seconds, list[Log]]:
    """What the delay adds to the fastest forward and backward; and a log of the last run."""
    runs: list[list[Seconds]] = [[], []]
    for number in range(1, most + 1):
        for found, delay in zip(runs, (0.0, DELAY)):
            seconds, logs = step(schedule, delay, recompute)
            found.append(seconds)
        plain, delayed = (Seconds(*map(min, zip(*found))) for found in runs)
        more = Seconds(delayed.forward - plain.forward, delayed.backward - plain.backward)
        if number >= FEWEST and max(more) < EXPOSED * DELAY:
            break
    return more, logs


@pytest.mark.usefixtures("_slow_kernels")
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "checkpointed"])
@pytest.mark.parametrize("schedule", HIDDEN, ids=name_of)
def test_local_work_hides_a_late_exchange(schedule: Schedule, recompute: bool):
    more, logs = excess(schedule, recompute, MOST)
    assert max(more) < EXPOSED * DELAY, more
    late = [
        (log, span)
        for log in logs
        for span in log.exchanges
        if span.label.layer == SLOW and span.stop - span.start > DELAY / 2
    ]
    assert {span.label.backward for _, span in late} == {False, True}
    for log, span in late:
        assert span.shared(log.work) > (1 - EXPOSED) * DELAY, span.label


@pytest.mark.usefixtures("_slow_kernels")
@pytest.mark.parametrize("schedule", [NOT_HIDDEN], ids=name_of)
def test_the_delay_shows_where_nothing_hides_it(schedule: Schedule):
    more, _ = excess(schedule, False, FEWEST + 1)
    assert min(more) > (1 - EXPOSED) * DELAY, more


@pytest.mark.usefixtures("_slow_kernels")
@pytest.mark.parametrize("schedule", HALF_HIDDEN, ids=name_of)
def test_a_delta_rule_hides_an_exchange_forwards_and_waits_for_it_backwards(schedule: Schedule):
    runs = [excess(schedule, False, FEWEST + 1)[0] for _ in range(2)]
    assert min(more.forward for more in runs) < EXPOSED * DELAY, runs
    assert max(more.backward for more in runs) > (1 - EXPOSED) * DELAY, runs
