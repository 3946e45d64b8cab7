"""Two runs of the same settings, on the same machines, that are equal bit for bit."""

import contextlib
import re
from collections.abc import Iterator, Mapping

import torch

from longctx.errors import InputError
from longctx.mixers import MixerConfig
from longctx.parallel.variables import fix_cublas_workspace


def make_deterministic() -> None:
    """Lets torch use only operations that repeat their results; call before the first of them."""
    fix_cublas_workspace()
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def check_deterministic(mixers: Mapping[str, MixerConfig], backend: str) -> None:
    """Refuses the layers, by letter, that would not repeat their results with this backend."""
    for letter, mixer in mixers.items():
        for path, name in _backends(mixer.on(backend), f"model.mixers.{letter}"):
            if name == "fla":
                raise InputError(
                    f"train.deterministic: {path} computes with fla, which picks tiles, and so the "
                    f"order of sums, by timing them at each start; set {path}.backend to 'triton'"
                )


@contextlib.contextmanager
def naming_nondeterminism() -> Iterator[None]:
    """Turns torch's refusal of an operation that does not repeat its results into an InputError."""
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"(\S+) does not have a deterministic implementation", str(error))
        if not found:
            raise
        raise InputError(
            f"train.deterministic: {found[1]} gives other bits each time on this device; leave out "
            "the layer that uses it, or train.deterministic"
        ) from error


def _backends(config: object, path: str) -> Iterator[tuple[str, str]]:
    """Who computes in a mixer and in those inside it, by path."""
    if isinstance(config, MixerConfig):
        yield path, getattr(config, "computes_with", "auto")
        for name, value in vars(config).items():
            yield from _backends(value, f"{path}.{name}")
    elif isinstance(config, Mapping):
        for name, value in config.items():
            yield from _backends(value, f"{path}.{name}")
