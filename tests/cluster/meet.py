"""A worker for torchrun: `python -m tests.cluster.meet MARK RESULT`.

In the first attempt rank 1 dies while rank 0 computes, so that only one of two hosts' agents counts
a restart. Whoever gets through all steps writes its count of restarts.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from longctx.parallel.rendezvous import join

SECONDS_OF_COMPUTING = 8.0


def main() -> None:
    """Joins, dies or adds up ranks, and leaves a file."""
    torch.set_num_threads(1)
    mark, result = map(Path, sys.argv[1:])
    first = not mark.exists()
    join("gloo", timedelta(seconds=20))
    rank, x = dist.get_rank(), torch.ones(1)
    dist.all_reduce(x)
    if first and rank == 1:
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if first:
        time.sleep(SECONDS_OF_COMPUTING)
    group = dist.new_group([0, 1])
    dist.all_reduce(x, group=group)
    assert x.item() == 4
    result.with_suffix(f".{rank}").write_text(os.environ["TORCHELASTIC_RESTART_COUNT"])
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
