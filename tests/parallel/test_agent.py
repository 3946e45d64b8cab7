import socket

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousTimeoutError

from longctx.parallel import agent


def failed(exitcode: int) -> ChildFailedError:
    return ChildFailedError("train", {3: ProcessFailure(1, 77, exitcode, "<N/A>")})


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (failed(2), 2, f"rank 3 on {socket.gethostname()} ended with exit code 2; what it said"),
        (failed(-9), 1, "was ended by SIGKILL"),
        (RendezvousTimeoutError(), 1, "did not meet (RendezvousTimeoutError)"),
        (None, 0, ""),
    ],
    ids=["mistake", "killed", "alone", "fine"],
)
def test_a_failure_is_one_line_and_an_exit_code(monkeypatch, capsys, error, code, said):
    def torchrun(argv):
        assert argv == ["--nnodes=2"]
        if error:
            raise error

    monkeypatch.setattr(agent, "torchrun", torchrun)
    monkeypatch.setattr("sys.argv", ["agent", "--nnodes=2"])
    assert agent.main() == code
    output = capsys.readouterr().err
    assert said in output
    assert output.count("\n") == bool(error)
