"""What is settled, or refused, before processes speak to each other."""

from pathlib import Path
from typing import NamedTuple

import torch

from longctx.checkpoint import Address, read_state, resolve
from longctx.data import Loaders, Tokenizer, build_loaders
from longctx.errors import InputError
from longctx.parallel import Split
from longctx.parallel import resolve as resolve_split
from longctx.parallel.mesh import is_first_here
from longctx.train.determinism import check_deterministic
from longctx.train.engines import fit_engine, settle_engine
from longctx.train.run_directory import open_run
from longctx.train.settings import Settings


class Prepared(NamedTuple):
    """What is known before processes speak to each other."""

    device: torch.device
    split: Split
    loaders: Loaders
    resumed: Address | None
    """The checkpoint that the run goes on from."""
    initial: Address | None
    """The one whose weights a new run starts from."""


def prepare(settings: Settings, processes: int) -> Prepared:
    """Refuses what cannot run on this many processes, before anything is written or sent."""
    config = settings.train
    device = config.resolve_device()
    _check_backends(settings, device)
    if config.deterministic:
        check_deterministic(settings.model.mixers, settings.model.backend)
    split = settle_engine(settings, settle_mesh(settings, processes))
    _check_run_apart(settings)
    loaders = build_loaders(
        settings.data, config.seq_len, config.batch_size, settings.run.seed, is_first_here()
    )
    check_vocabulary(loaders.tokenizer.vocab_size, split)
    resumed, initial = open_run(settings, loaders.fingerprint), None
    if settings.run.init_from and not resumed:
        initial = resolve(settings.run.init_from)
        _check_tokenizer(initial, loaders.tokenizer)
    return Prepared(device, split, loaders, resumed, initial)


def settle_mesh(settings: Settings, processes: int, precision: str = "") -> Split:
    """How this many processes share the work; InputError if they cannot, on whatever machine.

    A precision that is open, there and in the settings, is one that suits.
    """
    config = settings.train
    split = resolve_split(settings.parallel, settings.model.layers, processes, config.seq_len)
    if config.batch_size % split.dp:
        raise InputError(
            f"train.batch_size = {config.batch_size} is not a multiple of the {split.dp} replicas "
            "(processes / parallel.sp / parallel.tp)"
        )
    asked = "bf16" if config.precision == "auto" else config.precision
    return fit_engine(settings, split, precision or asked)


def check_vocabulary(size: int, split: Split) -> None:
    """InputError if processes that share a vocabulary would get nothing of it."""
    if size < split.tp:
        raise InputError(
            f"vocab_size = {size}: fewer than the {split.tp} processes that share it; set "
            f"parallel.tp to at most {size}"
        )


def _check_run_apart(settings: Settings) -> None:
    run = settings.run.path.resolve()
    for source in settings.data.sources().values():
        path = Path(source.path).expanduser()
        if source.path and path.is_dir() and run.is_relative_to(path.resolve()):
            raise InputError(
                f"run.dir = '{settings.run.path}': lies in data.path = {source.path!r}, of which "
                "all files are read; choose a run.dir beside it, or name the files with a glob"
            )


def _check_tokenizer(start: Address, tokenizer: Tokenizer) -> None:
    """InputError if a checkpoint learnt other ids for the same text."""
    learnt = read_state(start).get("tokenizer", tokenizer.fingerprint)
    if learnt != tokenizer.fingerprint:
        raise InputError(
            f"run.init_from = {str(start)!r}: was trained with another tokenizer than that of "
            f"[data], {tokenizer.name}; set data.tokenizer to the one of that run"
        )


def _check_backends(settings: Settings, device: torch.device) -> None:
    for letter, mixer in settings.model.mixers.items():
        try:
            mixer.on(settings.model.backend).check_device(device)
        except ValueError as error:
            raise InputError(f"model.mixers.{letter}: {error}") from None
