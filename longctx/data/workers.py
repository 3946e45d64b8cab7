"""The same work for many items, on several processes of this machine."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from longctx.errors import InputError, OutsideError
from longctx.orphans import signal_when_parent_dies

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def in_order(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """What `work` gives for each item, in order, each from the first process that is free.

    An error of `work` is raised here. The processes are forked, so `work` may be anything; they end
    when the iterator is closed, and when this process ends, however it ends.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        yield from ((item, work(item)) for item in items)
        return
    processes = [_Worker(work) for _ in range(workers)]
    try:
        yield from _serve(processes, items)
    finally:
        for process in processes:
            process.end()


def _serve(processes: "list[_Worker]", items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
    free, busy = list(processes), {}
    results: dict[int, Result] = {}
    given = taken = 0
    while taken < len(items):
        while free and given < len(items):
            worker = free.pop()
            worker.connection.send((given, items[given]))
            busy[worker.connection] = worker
            given += 1
        for connection in wait(list(busy)):
            worker = busy.pop(connection)
            number, result = worker.receive()
            results[number] = result
            free.append(worker)
        while taken in results:
            yield items[taken], results.pop(taken)
            taken += 1


class _Worker:
    """A process and the pipe to it."""

    def __init__(self, work: Callable[[Item], Result]) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, work, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()  # now the pipe ends when the process does

    def receive(self) -> tuple[int, Result]:
        """The next result; raises what the work raised."""
        try:
            number, result, error = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise OutsideError(
                f"a worker process was killed (exit code {self._process.exitcode}); is memory "
                "short? run the same command again, with fewer --workers"
            ) from None
        if error is not None:
            raise error
        return number, result

    def end(self) -> None:
        """Ends the process at once."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _run(connection: Connection, work: Callable[[Item], Result], parent: int) -> None:
    signal_when_parent_dies(signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Each process tokenizes on one thread: there are as many processes as cores.
    os.putenv("TOKENIZERS_PARALLELISM", "false")
    while True:
        try:
            number, item = connection.recv()
        except EOFError:
            return
        try:
            answer = (number, work(item), None)
        except Exception as error:
            if not isinstance(error, InputError | OutsideError | OSError):
                error.add_note(traceback.format_exc())
            answer = (number, None, error)
        connection.send(answer)
