"""The groups of tensor parallelism, made by megatron-core.

Only its bookkeeping of groups is used. Its layers exchange by calls that this repository can
neither count nor name when one of them hangs, and megatron-core 0.16.1's sum returns its operand as
it was if that is not contiguous; so exchanges over its groups are ours.
"""

import math
import warnings
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from longctx.errors import InputError
from longctx.sequence.c10d import ProcessGroup
from longctx.sequence.communicator import Communicator
from longctx.sequence.ledger import Label, Ledger


class TensorGroup:
    """The processes that share the heads, hidden columns and vocabulary of the same tokens."""

    def __init__(self, communicator: Communicator):
        self.rank, self.size = communicator.rank, communicator.size
        self._communicator = communicator

    def sum(self, x: Tensor, label: Label) -> Tensor:
        """Sum over the group, without gradients."""
        return self._communicator.all_reduce(x, label)

    def gather(self, x: Tensor, label: Label) -> Tensor:
        """Everybody's `x`, in order of ranks, without gradients."""
        return torch.stack(self._communicator.all_gather(x, label).wait())

    @torch.compiler.disable
    def enter(self, x: Tensor, label: Label) -> Tensor:
        """`x`, the same in all, for each to compute its part of; gradients are summed."""
        return _Enter.apply(x, self, label)

    @torch.compiler.disable
    def leave(self, x: Tensor, label: Label) -> Tensor:
        """The sum of parts, of which each has the whole gradient."""
        return _Leave.apply(x, self, label)

    def mean(self, x: Tensor, label: Label) -> Tensor:
        """Mean of parts, for each to go on with its part; gradients are summed."""
        return self.enter(self.leave(x / self.size, label), label)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup, label: Label) -> Tensor:
        ctx.group, ctx.label = group, label
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Any:
        return ctx.group.sum(dx, ctx.label.reversed()), None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor, group: TensorGroup, label: Label) -> Tensor:
        return group.sum(x, label)

    @staticmethod
    def backward(_ctx: Any, dx: Tensor) -> Any:
        return dx, None, None


def make_tensor_group(tp: int, sp: int, timeout: timedelta, ledger: Ledger) -> TensorGroup:
    """The group of `tp` neighbouring ranks that this process is in; every process calls this once,
    after the default group is made."""
    state = _parallel_state()
    state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        context_parallel_size=sp,
        distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
        create_gloo_process_groups=False,
    )
    return TensorGroup(ProcessGroup(state.get_tensor_model_parallel_group(), ledger))


def drop_tensor_groups() -> None:
    """Forgets what make_tensor_group made, before the default group goes."""
    _parallel_state().destroy_model_parallel()


def check_installed() -> None:
    """Raises InputError if megatron-core is not there."""
    _parallel_state()


def _parallel_state() -> Any:
    with warnings.catch_warnings():
        # It warns of accelerated optimizers that it lacks; ours does not come from there.
        warnings.simplefilter("ignore")
        try:
            from megatron.core import parallel_state
        except ImportError as error:
            raise InputError(
                f"parallel.tp needs megatron-core ({error}): pip install 'longctx[megatron]', or "
                "set parallel.tp to 1"
            ) from error
    return parallel_state
