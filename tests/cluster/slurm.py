"""A SLURM cluster of four nodes on one machine: real daemons, two fake GPUs a node."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from longctx.launch.ports import free_port
from longctx.orphans import signal_when_parent_dies

NODES = 4
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIG = """\
ClusterName=fake
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
MpiDefault=none
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
GresTypes=gpu
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=15
ReturnToService=2
TreeWidth=65533
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports}] CPUs=4 Boards=1 \
SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=2000 Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes=n[1-{nodes}] Default=YES MaxTime=30 State=UP PriorityTier=1 \
PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=n[1-{nodes}] MaxTime=30 State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """What this machine lacks for a SLURM cluster; empty if nothing."""
    if os.geteuid():
        return "a SLURM cluster of one machine needs root"
    tools = [name for name in TOOLS if not shutil.which(name)]
    packages = "slurm-wlm slurm-client munge libpmix2"
    return f"a SLURM cluster needs {', '.join(tools)} (Debian: {packages})" if tools else ""


class Slurm:
    """A context in which commands of SLURM speak to a cluster of nodes n1 to n4.

    The partition `high` preempts `debug`, whose jobs then have a minute. Whatever was started in it
    ends with it.
    """

    def __init__(self, root: Path):
        self._root, self._daemons = root, dict[str, subprocess.Popen[bytes]]()
        self.environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf")}

    def __enter__(self) -> "Slurm":
        try:
            self._write_files()
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D")
            for node in range(1, NODES + 1):
                self._start(f"n{node}", "slurmd", "-D", "-N", f"n{node}")
            wait_for(lambda: self("sinfo", "-h", "-t", "idle", "-o", "%D") == str(NODES), 30)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)

    def __call__(self, *words: str, folder: Path | None = None, text: str = "") -> str:
        """What a command prints; it must succeed."""
        done = subprocess.run(
            words,
            cwd=folder or self._root,
            env=self.environment,
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """The fields of a job, as scontrol shows them."""
        shown = self("scontrol", "show", "job", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def state(self, number: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.job(number)["JobState"]

    def processes(self, *marks: str) -> list[int]:
        """Processes with this cluster, and these marks, in the environment that they began with."""
        wanted, found = (f"SLURM_CONF={self._root}/", *marks), []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environment = (folder / "environ").read_bytes()
                if all(mark.encode() in environment for mark in wanted):
                    found.append(int(folder.name))
        return found

    def lose(self, node: str) -> None:
        """Ends everything on a node, as if its power failed, and lets the controller notice."""
        self._daemons[node].kill()
        for pid in self.processes(f"SLURMD_NODENAME={node}\0"):
            os.kill(pid, signal.SIGKILL)
        self("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def start_again(self, number: str, *changes: str) -> int:
        """Starts a job as soon as it is in the queue again; how often that was.

        Spares it the two minutes that a requeued job waits.
        """
        wait_for(lambda: self.state(number) == "PENDING", 90)
        time.sleep(2)  # in the same second, a node would still refuse it
        self("scontrol", "update", f"jobid={number}", "starttime=now", *changes)
        wait_for(lambda: self.state(number) == "RUNNING", 90)
        return int(self.job(number)["Restarts"])

    def _write_files(self) -> None:
        for name in ("state", "spool", "dev"):
            (self._root / name).mkdir()
        for gpu in range(2):
            os.mknod(self._root / "dev" / f"gpu{gpu}", 0o666 | 0o020000, os.makedev(1, 3))
        first = _free_ports(NODES)
        config = CONFIG.format(
            host=socket.gethostname().split(".")[0],
            port=free_port(),
            root=self._root,
            nodes=NODES,
            ports=f"{first}-{first + NODES - 1}",
        )
        (self._root / "slurm.conf").write_text(config)
        gres = f"NodeName=n[1-{NODES}] Name=gpu File={self._root}/dev/gpu[0-1]\n"
        (self._root / "gres.conf").write_text(gres)

    def _start_munge(self) -> None:
        key = self._root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid"}
        files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        options = [f"--{name}={self._root / file}" for name, file in files.items()]
        self._start("munged", "munged", "--foreground", "--force", *options)
        wait_for((self._root / "munge.socket").exists, 10)

    def _start(self, name: str, *words: str) -> None:
        with (self._root / f"{name}.out").open("wb") as output:
            self._daemons[name] = subprocess.Popen(
                words,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: signal_when_parent_dies(signal.SIGKILL),
            )


def wait_for(holds: Callable[[], bool], seconds: float) -> None:
    """Waits until this holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def _free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    while True:
        first = free_port()
        try:
            listeners = [socket.create_server(("127.0.0.1", first + i)) for i in range(count)]
        except (OSError, OverflowError):
            continue
        for listener in listeners:
            listener.close()
        return first
