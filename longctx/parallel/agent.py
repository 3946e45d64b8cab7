"""torchrun with its failures in one line: `python -m longctx.parallel.agent ...`."""

import signal
import socket
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import main as torchrun


def main() -> int:
    """Runs torchrun; 0 if all processes ended with it, the code of the first one that failed, or 1
    if the hosts did not meet."""
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.stderr.write(f"longctx: rank {rank} on {socket.gethostname()} {_end(failure)}\n")
        return failure.exitcode if failure.exitcode > 0 else 1
    except RendezvousError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(
            f"longctx: the hosts of this run did not meet ({reason}): start all of them within "
            "the same minutes, with addresses and ports that each can reach\n"
        )
        return 1
    return 0


def _end(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"was ended by {signal.Signals(-failure.exitcode).name}"
    return f"ended with exit code {failure.exitcode}; what it said is above"


if __name__ == "__main__":
    sys.exit(main())
