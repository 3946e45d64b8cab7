"""What each process of a run has to do in a step: what every prediction starts from."""

from dataclasses import dataclass, replace

from longctx.errors import InputError
from longctx.model.saved_bytes import Batch
from longctx.parallel import Split
from longctx.sequence.expected import WIDTHS, Share
from longctx.sequence.placement import Placement
from longctx.sequence.plan import Documents
from longctx.train.prepare import check_vocabulary, settle_mesh
from longctx.train.settings import Settings


@dataclass(frozen=True)
class Workload:
    """A run on a definite number of processes; nothing of it is allocated."""

    settings: Settings
    split: Split
    vocab_size: int
    precision: str
    """fp64, fp32 or bf16."""
    documents: Documents = ()
    """Where documents start in each row; () if each row is one."""

    @property
    def processes(self) -> int:
        """Of the whole run."""
        return self.split.dp * self.split.sp * self.split.tp

    @property
    def micro_rows(self) -> tuple[int, ...]:
        """Sequences of each forward and backward pass of a step, on one process."""
        config = self.settings.train
        rows = config.batch_size // self.split.dp
        size = config.micro_batch or rows
        return tuple(min(size, rows - i) for i in range(0, rows, size))

    @property
    def placement(self) -> Placement:
        """Where the parts of a sequence lie."""
        return self.split.place(self.settings.train.seq_len)

    @property
    def tokens_per_step(self) -> int:
        """Of all processes."""
        return self.settings.train.batch_size * self.settings.train.seq_len

    def share(self, rank: int, rows: int) -> Share:
        """What one of the `sp` ranks of a sequence has of a pass over so many rows."""
        widths, transports = WIDTHS[self.precision], self.split.transports
        return Share(rank, self.placement, rows, transports, widths, self.documents[:rows])

    def batch(self, rank: int) -> Batch:
        """The largest pass of that rank."""
        return Batch(max(self.micro_rows), self.placement.lengths[rank], self.precision)

    def with_length(self, seq_len: int) -> "Workload":
        """The same with sequences of another length."""
        train = replace(self.settings.train, seq_len=seq_len)
        settings = replace(self.settings, train=train)
        return workload(settings, self.processes, self.vocab_size, self.precision)


def workload(settings: Settings, processes: int, vocab_size: int, precision: str) -> Workload:
    """The work of so many processes; InputError if they cannot share it like that."""
    if vocab_size < 1:
        raise InputError(f"vocab_size = {vocab_size}: must be at least 1")
    split = settle_mesh(settings, processes, precision)
    check_vocabulary(vocab_size, split)
    return Workload(settings, split, vocab_size, precision)
