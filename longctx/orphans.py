"""Ties a process to the one that started it, so that no worker outlives its launcher."""

import ctypes
import os
import signal
import sys

LAUNCHER = "LONGCTX_LAUNCHER"
"""Environment variable with the process number of a launcher whose workers die with it."""
PR_SET_PDEATHSIG = 1  # of sys/prctl.h


def die_with_parent() -> None:
    """Asks to be killed when the launcher ends, however it ends; nothing without a launcher.

    A launcher is torchrun, or whoever put its process number into LONGCTX_LAUNCHER. Call this
    first of all: whoever lost its launcher before that ends here.
    """
    launcher = os.environ.pop(LAUNCHER, "")
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if sys.platform != "linux" or not (launcher or under_torchrun):
        return
    signal_when_parent_dies(signal.SIGKILL)
    parent = os.getppid()
    if (launcher and parent != int(launcher)) or (not launcher and _was_adopted(parent)):
        os._exit(128 + signal.SIGKILL)


def signal_when_parent_dies(number: int) -> None:
    """Asks Linux to send this process a signal when the thread that started it ends."""
    if sys.platform == "linux":
        _LIBC.prctl(PR_SET_PDEATHSIG, number)


def _was_adopted(parent: int) -> bool:
    """Whether a worker of torchrun has another parent than torchrun, which is a Python program.

    torchrun gives each process that it starts a session. One that is in another's session was
    started by a wrapper.
    """
    if os.getsid(0) != os.getpid():
        return False
    try:
        program = os.readlink(f"/proc/{parent}/exe")
    except OSError:
        return True
    return "python" not in os.path.basename(program) and program != os.readlink("/proc/self/exe")


_LIBC = ctypes.CDLL(None)
