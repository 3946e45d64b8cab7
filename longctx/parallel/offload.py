"""Weights and optimizer state on the host: whether it has the room."""

from longctx.errors import InputError
from longctx.host import free_memory

OPTIMIZER_BYTES = 16
"""A weight's fp32 value, gradient and two averages, which lie where the optimizer does."""
WEIGHT_BYTES = 4


def check_state_on_host(places: tuple[str, str], weights: int, processes: int, here: int) -> None:
    """InputError if the `here` processes of this host would hold more than its free memory.

    `places` are those of optimizer state and of weights; all processes share `weights` evenly.
    """
    optimizer, own = places
    each = OPTIMIZER_BYTES * (optimizer == "cpu") + WEIGHT_BYTES * (own == "cpu")
    needed, free = weights * each * here // processes, free_memory()
    if needed > free:
        raise InputError(
            f"memory.optimizer = {optimizer!r}, memory.weights = {own!r}: "
            f"{needed / 2**30:.1f} GiB on this host ({each} bytes for each of {weights:,} weights, "
            f"{here} of {processes} processes), of which {free / 2**30:.1f} GiB are free; use more "
            "hosts or 'device'"
        )
