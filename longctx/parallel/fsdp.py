"""PyTorch's fully sharded data parallelism: weights, gradients and optimizer state spread over the
processes of a shard group, whatever they share of sequences."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from longctx.parallel.engine import TorchEngine
from longctx.parallel.mesh import Mesh
from longctx.sequence.c10d import all_gather_flat, named, reduce_scatter_flat
from longctx.sequence.communicator import all_reduce_bytes
from longctx.sequence.ledger import Label, Ledger


class Sharder:
    """Shards modules as they are built, innermost first."""

    def __init__(self, mesh: Mesh, weights: str, on_host: bool):
        self._mesh, self._ledger, self._replicas = mesh.shards(), mesh.ledger, mesh.split.replicas
        if weights == "bf16":
            self._rounded = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        else:
            self._rounded = MixedPrecisionPolicy()
        pinned = mesh.device.type == "cuda"
        self._offload = CPUOffloadPolicy(pin_memory=pinned) if on_host else OffloadPolicy()

    def shard(self, module: nn.Module, layer: int) -> None:
        """Spreads what `module` has and its parts have not yet spread; in place. Layers count from
        0; what is outside of them stays in fp32 on the way."""
        sharded: Any = fully_shard(
            module,
            mesh=self._mesh,
            mp_policy=self._rounded if layer >= 0 else MixedPrecisionPolicy(),
            offload_policy=self._offload,
        )
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_custom_all_gather(_CountedGather(self._ledger, layer))
        sharded.set_custom_reduce_scatter(_CountedScatter(self._ledger, layer))
        if self._replicas > 1:
            # A scatter over one process is left out by PyTorch, the sum over replicas is not.
            sharded.set_all_reduce_hook(partial(self._count_sum, Label(layer, "gradients")))

    def _count_sum(self, label: Label, summed: Tensor) -> None:
        self._ledger.record(label, all_reduce_bytes(summed, self._replicas))


class Sharded(TorchEngine):
    """A model that a Sharder has spread."""

    def _sum_gradients(self) -> None:
        """Backward has done it."""

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def _offset(self, tensor: Tensor) -> int:
        if not isinstance(tensor, DTensor):
            return 0
        size, (_, shard) = len(tensor), self._place
        return min(size, shard * -(-size // self._shards))

    @property
    def _shards(self) -> int:
        return self.mesh.data_size // self.mesh.split.replicas

    @property
    def _place(self) -> tuple[int, int]:
        """Which replica this process belongs to, and which shard of it it has."""
        return divmod(self.mesh.data_rank, self._shards)

    def _copies(self, tensor: Tensor) -> tuple[int, int]:
        if not isinstance(tensor, DTensor):
            return self.mesh.data_size, self.mesh.data_rank
        return self.mesh.split.replicas, self._place[0]

    def replicas(self) -> list[list[int]]:
        mesh, apart = self.mesh, self._shards * self.mesh.split.tp
        return [list(range(first, mesh.size, apart)) for first in range(apart)]


class _Buffers:
    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _CountedGather(_Buffers):
    """Brings the weights of a layer together."""

    def __init__(self, ledger: Ledger, layer: int):
        self._ledger, self._label = ledger, Label(layer, "weights")

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        self._ledger.record(self._label, output_tensor.nbytes - input_tensor.nbytes)
        return named(
            self._ledger,
            self._label,
            lambda: all_gather_flat(output_tensor, input_tensor, group=group, async_op=async_op),
        )


class _CountedScatter(_Buffers):
    """Sums the gradients of a layer."""

    def __init__(self, ledger: Ledger, layer: int):
        self._ledger, self._label = ledger, Label(layer, "gradients")

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        shards = dist.get_world_size(group)
        self._ledger.record(self._label, (shards - 1) * output_tensor.nbytes)
        return named(
            self._ledger,
            self._label,
            lambda: reduce_scatter_flat(
                output_tensor, input_tensor, op=op, group=group, async_op=async_op
            ),
        )
