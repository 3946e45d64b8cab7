"""What is timed: shapes and repeats of the full run and of the quick one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Shapes and repeats."""

    width: int = 512
    num_heads: int = 8
    lengths: tuple[int, ...] = (4096, 8192, 32768)
    quadratic_limit: int = 8192
    """Longest sequence for mixers whose cost per token grows with length."""
    tokens_per_sample: int = 8192
    """Short sequences are repeated up to so many tokens a sample."""
    repeats: int = 5
    train_steps: int = 15
    train_options: tuple[str, ...] = ()
    """Options of `longctx train` that shrink the preset."""
    peer_length: int = 8192
    is_judged: bool = True
    """Whether speed targets apply."""

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.width // self.num_heads


FULL = Sizes()
QUICK = Sizes(
    width=64,
    lengths=(128, 256),
    quadratic_limit=128,
    tokens_per_sample=256,
    repeats=1,
    train_steps=2,
    train_options=("--train.seq_len", "64", "--train.batch_size", "2"),
    peer_length=384,
    is_judged=False,
)
