"""Simulated ranks whose messages take a known time at one layer, and a log of what happens when."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from longctx.sequence.communicator import Pending
from longctx.sequence.ledger import Label, Ledger
from longctx.sequence.sharded import Links
from longctx.sequence.simulator import SECONDS_TO_WAIT, Hub, SimulatedCommunicator
from tests.sequence.links import member_lists


class Span(NamedTuple):
    """Something that lasted; `label` is None for local work."""

    label: Label | None
    start: float
    stop: float

    def shared(self, others: Sequence["Span"]) -> float:
        """Seconds in which one of the others lasted too."""
        overlaps = (min(self.stop, o.stop) - max(self.start, o.start) for o in others)
        return sum(max(0.0, overlap) for overlap in overlaps)


class Log:
    """One rank's spans: exchanges from post to arrival, and local work."""

    def __init__(self) -> None:
        self.exchanges: list[Span] = []
        self.work: list[Span] = []

    def slept(self, seconds: float) -> None:
        """Local work that takes no processor."""
        start = time.monotonic()
        time.sleep(seconds)
        self.work.append(Span(None, start, time.monotonic()))


class LocalWork(threading.local):
    """The log of the rank that runs on this thread."""

    log: Log | None = None


class DelayedCommunicator(SimulatedCommunicator):
    """What is sent at layer `slow` arrives no earlier than `delay` seconds after it was sent."""

    def __init__(self, *simulated: Any, slow: int, delay: float, log: Log):
        super().__init__(*simulated)
        self._slow, self._delay, self._log = slow, delay, log

    def _post(self, rank: int, x: Tensor) -> None:
        wire: Any = self._wire("sent", self.rank, rank)
        wire.put((time.monotonic(), x.detach().clone()))

    def _expect(self, rank: int, label: Label) -> Callable[[], Tensor]:
        wire: Any = self._wire("received", rank, self.rank)

        def take() -> Tensor:
            sent, x = wire.get(timeout=SECONDS_TO_WAIT)
            if label.layer == self._slow:
                time.sleep(max(0.0, sent + self._delay - time.monotonic()))
            return x

        return take

    def _logged(self, label: Label, post: Callable[[], Pending]) -> Pending:
        start = time.monotonic()
        pending = post()

        def finish() -> list[Tensor]:
            arrived = pending.wait()
            self._log.exchanges.append(Span(label, start, time.monotonic()))
            return arrived

        return Pending(finish)

    def _all_gather(self, flat: Tensor, label: Label) -> Pending:
        parent = super()._all_gather
        return self._logged(label, lambda: parent(flat, label))

    def _reduce_scatter(self, flat_PN: Tensor, label: Label) -> Pending:
        parent = super()._reduce_scatter
        return self._logged(label, lambda: parent(flat_PN, label))

    def _exchange(self, sends: Any, receives: Any, like: Tensor, label: Label) -> Pending:
        parent = super()._exchange
        return self._logged(label, lambda: parent(sends, receives, like, label))


def delayed_links(hub: Hub, rank: int, ranks: int, **delay: Any) -> Links:
    """As simulated_links, without groups of heads."""
    return Links(
        *(
            DelayedCommunicator(hub, channel, members, rank, Ledger(), **delay)
            for channel, members in zip(Links.__dataclass_fields__, member_lists(rank, ranks, 1))
        )
    )
