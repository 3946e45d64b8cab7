"""What a config asks of the machine."""

from longctx.doctor.findings import Finding
from longctx.errors import InputError
from longctx.plan.command import vocabulary_of
from longctx.plan.sizes import parameters_of
from longctx.train.prepare import settle_mesh
from longctx.train.settings import Settings

BYTES_A_WEIGHT = 12
"""Of a checkpoint: the weight and two averages in fp32."""
VOCABULARY = 2**16
"""Taken where the tokenizer is not here."""


def checkpoint_bytes(settings: Settings) -> int:
    """About the size of a checkpoint."""
    try:
        vocab_size = vocabulary_of(settings.data)
    except InputError:
        vocab_size = VOCABULARY
    return BYTES_A_WEIGHT * parameters_of(settings.model, vocab_size).total


def config_fits(settings: Settings, name: str, processes: int) -> list[Finding]:
    """Whether devices, kernels and so many processes are those that it asks for."""
    where = f"{name} on {processes} process{'es' * (processes > 1)}"
    try:
        device = settings.train.resolve_device()
        split = settle_mesh(settings, processes)
    except InputError as error:
        return [Finding("problem", where, f"cannot train: {error}")]
    found = [Finding("ok", where, f"{device.type}, {split}")]
    for letter, mixer in settings.model.mixers.items():
        try:
            mixer.on(settings.model.backend).check_device(device)
        except ValueError as error:
            found.append(Finding("problem", f"model.mixers.{letter}", f"cannot train: {error}"))
    return found
