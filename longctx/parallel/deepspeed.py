"""DeepSpeed's ZeRO: optimizer state, gradients and weights spread over all processes.

Where its public functions do not reach, attributes of its optimizers are used; docs/deepspeed.md
lists them.
"""

import copy
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.parallel.box import Box
from longctx.parallel.engine import Engine, Part, Read, state_keys
from longctx.parallel.mesh import Mesh
from longctx.parallel.update_norm import UpdateNorm
from longctx.parallel.zero import Zero, check_installed, deepspeed_config

AVERAGES = ("exp_avg", "exp_avg_sq")
TAG = "state"
"""Folder of DeepSpeed's own checkpoint inside the one that is named."""
UNIVERSAL_INFO = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
"""Without this, ds_to_universal refuses the checkpoints of stages 1 and 2."""


class DeepSpeedEngine(Engine):
    """A model and AdamW inside DeepSpeed's engine, which takes over both."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, zero: Zero, mesh: Mesh):
        _refuse(model)
        deepspeed = _start(zero, mesh)
        self.mesh, self.zero, self._done = mesh, zero, 0
        self._weights = dict(model.named_parameters())
        self._shapes = {name: tuple(weight.shape) for name, weight in self._weights.items()}
        if zero.stage == 3:
            _keep_sizes(model)
            # layers come whole: parts of them that compute tile by tile use weights in ways of
            # their own, and one message is better than one for each matrix
            deepspeed.utils.set_z3_leaf_modules(model, [type(block) for block in model.blocks])
        config = deepspeed_config(zero, mesh.size, mesh.device.type == "cuda")
        self.model, self._spread, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        groups = [group for group in self._flat_weights() if group.numel()]
        for group in groups:
            self._spread.optimizer.state[group] = _fresh_state(group)
        self._update_norm = UpdateNorm(groups, [1.0] * len(groups)) if groups else None

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed takes the mean over processes; the gradient is the sum."""
        self._done += 1
        self.model.set_gradient_accumulation_boundary(self._done == self.zero.micro_batches)
        self.model.backward(loss * self.mesh.size, scale_wrt_gas=False)

    def gradient_norm(self) -> Tensor:
        """DeepSpeed's own, by which it clips; NaN, for which it has -1, if it is not finite."""
        assert self._done == self.zero.micro_batches, "a micro-batch is missing"
        if self.zero.stage == 3:
            norms = torch.stack(self._spread._get_norm_groups())
        else:
            norms = self._spread.scaled_global_norm()[None]
        norms = norms.to(self.mesh.device)
        return torch.where((norms < 0).any(), math.nan, norms.square().sum().sqrt())

    def update(self, lr: float) -> Tensor:
        """As the others do, but nothing changes if the norm is not finite; what lies on NVMe is not
        looked at for the change's norm, which is then NaN."""
        for group in self._spread.param_groups:
            group["lr"] = lr * group["lr_share"]
        if self._update_norm is None:
            self._step()
            return torch.tensor(math.nan, device=self.mesh.device)
        self._update_norm.before()
        self._step()
        square = self._update_norm.squared().to(self.mesh.device)
        return self.mesh.sum(square, "update norm").sqrt()

    def discard(self) -> None:
        """Spoils the norm: DeepSpeed forgets the gradients then, and updates nothing."""
        spread = self._spread
        if self.mesh.rank == 0 and self.zero.optimizer == "device":
            spread.averaged_gradients[0][0].fill_(math.nan)
        elif self.mesh.rank == 0:
            some = next(iter(spread.norm_for_param_grads))
            spread.norm_for_param_grads[some] = torch.tensor(math.nan)
        self._step()
        assert not self.model.was_step_applied()

    def _step(self) -> None:
        assert self._done == self.zero.micro_batches, "a micro-batch is missing"
        self._done = 0
        self.model.step()

    def replicas(self) -> list[list[int]]:
        """Stages 1 and 2 have all weights everywhere."""
        ranks = list(range(self.mesh.size))
        return [[rank] for rank in ranks] if self.zero.stage == 3 else [ranks]

    def weights(self) -> dict[str, Part]:
        """Blocks are left out in stage 3, whose parts of weights need not be any."""
        parts = {name: self._everywhere(buffer) for name, buffer in self._buffers()}
        for name, weight in self._weights.items():
            parts[name] = self._everywhere(weight.detach())
            if self.zero.stage == 3:
                parts[name] = Part(self._shapes[name], weight.ds_tensor.detach(), [], 1, 0)
        return parts

    def _everywhere(self, tensor: Tensor) -> Part:
        """A tensor that all processes have and one of them writes."""
        none = (0,) * tensor.dim()
        return Part(tuple(tensor.shape), tensor, [(none, tensor)], self.mesh.size, self.mesh.rank)

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.module.state_dict(keep_vars=True).items():
            if not isinstance(tensor, nn.Parameter):
                yield name, tensor

    def boxes(self) -> list[Box]:
        """Gathers one tensor after another, of which each process keeps some rows; all call it."""
        from deepspeed.utils import safe_get_full_fp32_param

        boxes = self._own_share({f"model/{name}": buffer for name, buffer in self._buffers()})
        steps = [state["step"] for state in self._spread.optimizer.state.values() if state]
        for name, weight in self._weights.items():
            whole = safe_get_full_fp32_param(weight) if self.zero.stage == 3 else weight.detach()
            boxes += self._own_share({f"model/{name}": whole})
            if steps:
                states = {key: self._whole_state(name, key) for key in AVERAGES}
                states["step"] = torch.as_tensor(steps[0])
                boxes += self._own_share(
                    {f"optimizer/{name}/{key}": x for key, x in states.items()}
                )
        return boxes

    def _own_share(self, tensors: dict[str, Tensor]) -> list[Box]:
        """What this process writes of tensors that all have for now."""
        boxes = []
        for name, whole in tensors.items():
            if not whole.dim():
                boxes += self._everywhere(whole).boxes(name)
                continue
            rows = -(-len(whole) // self.mesh.size)
            start = min(rows * self.mesh.rank, len(whole))
            own = whole[start : start + rows].clone()
            if len(own):
                offsets = (start,) + (0,) * (whole.dim() - 1)
                boxes.append(Box(name, tuple(whole.shape), offsets, own))
        return boxes

    @torch.no_grad()
    def load(self, read: Read, names: Iterable[str], weights_only: bool) -> None:
        for name, buffer in self._buffers():
            buffer.copy_(read(f"model/{name}", (0,) * buffer.dim(), tuple(buffer.shape)))
        self._load_weights(read)
        if weights_only:
            return
        keys = state_keys(names)
        if strange := keys.keys() - self._weights.keys():
            raise InputError(
                f"the checkpoint has optimizer state of {min(strange)}, which the model lacks; "
                "use the [model] and [optim] tables it was trained with"
            )
        saved = [f"optimizer/{name}/step" for name in keys if "step" in keys[name]]
        steps = [float(read(name, (), ())) for name in saved]
        for state in self._spread.optimizer.state.values():
            state["step"].fill_(max(steps, default=0.0))
        for name in keys:
            for key in AVERAGES:
                self._set_state(name, key, read)

    def _load_weights(self, read: Read) -> None:
        import deepspeed

        for name, weight in self._weights.items():
            shape = self._shapes[name]
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                if self.mesh.rank == 0 or self.zero.stage < 3:
                    weight.copy_(read(f"model/{name}", (0,) * len(shape), shape))
        if self.zero.stage < 3:
            self._spread.refresh_fp32_params()
            return
        for name, weight in self._weights.items():
            part = self._partition(name, f"model/{name}", read)
            deepspeed.utils.safe_set_local_fp32_param(weight, part)

    def _flat_weights(self) -> list[Tensor]:
        if self.zero.stage == 3:
            return self._spread.fp32_partitioned_groups_flat
        return self._spread.single_partition_of_fp32_groups

    def _whole_state(self, name: str, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        weight = self._weights[name]
        if self.zero.stage == 3:
            return safe_get_full_optimizer_state(weight, key)
        whole = torch.zeros_like(weight).flatten()
        start, part = self._state_here(weight, key)
        whole[start : start + len(part)] = part
        return self.mesh.sum(whole, "checkpoint").view_as(weight)

    def _set_state(self, name: str, key: str, read: Read) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        weight, saved = self._weights[name], f"optimizer/{name}/{key}"
        if self.zero.stage == 3:
            value = self._partition(name, saved, read)
            safe_set_local_optimizer_state(weight, value, key)
            return
        start, part = self._state_here(weight, key)
        part.copy_(_flat_range(read, saved, self._shapes[name], start, start + len(part)))

    def _state_here(self, weight: Any, key: str) -> tuple[int, Tensor]:
        """Where in a weight this process's part of its state starts, and the part itself.

        Of stages 1 and 2, for which DeepSpeed has functions only from the first update on.
        """
        mapping = weight._hp_mapping
        if mapping is None:
            return 0, torch.zeros(0)
        group = self._flat_weights()[mapping.param_group_index]
        there = mapping.hp_fragment_address
        state = self._spread.optimizer.state[group][key]
        return mapping.lp_fragment_address.start, state.narrow(0, there.start, there.numel)

    def _partition(self, name: str, saved: str, read: Read) -> Tensor:
        """This process's part of a weight, or what belongs to it, as stage 3 cuts it: with zeros to
        make all parts equally long."""
        shape, length = self._shapes[name], self._weights[name].ds_tensor.numel()
        total = math.prod(shape)
        start = min(total, length * self.mesh.rank)
        part = _flat_range(read, saved, shape, start, min(total, start + length))
        return nn.functional.pad(part, (0, length - part.numel()))

    def write_native(self, folder: Path) -> None:
        """Writes DeepSpeed's own checkpoint, pickles, from which ds_to_universal makes others."""
        self.model.save_checkpoint(str(folder), tag=TAG, client_state=UNIVERSAL_INFO)

    def load_native(self, folder: Path) -> None:
        """Unpickles DeepSpeed's own checkpoint, or one that ds_to_universal made of it.

        Whoever wrote such files decides what is executed here.
        """
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._spread.param_groups
        ]
        loaded, _ = self.model.load_checkpoint(str(folder))
        if loaded is None:
            raise InputError(f"{folder}: no checkpoint of DeepSpeed's here")
        # of a universal one, all groups get the weight decay of the first, and one count of updates
        for group, configured in zip(self._spread.param_groups, groups):
            group.update(configured)
        for state in self._spread.optimizer.state.values():
            state["step"] = state["step"].clone()


def _refuse(model: nn.Module) -> None:
    check_installed()
    if any(weight.dtype != torch.float32 for weight in model.parameters()):
        raise InputError(
            "train.precision = 'fp64' with parallel.engine = 'deepspeed': DeepSpeed adds up in "
            "fp32; choose precision 'fp32' or 'bf16', or another engine"
        )


def _start(zero: Zero, mesh: Mesh) -> Any:
    """DeepSpeed, told which processes and devices there are."""
    os.environ.setdefault("LOCAL_RANK", str(mesh.device.index or 0))
    if mesh.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed calls exchanges by names that torch 2.13 would rather not hear
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    import deepspeed

    # a compiler would run for 90 s to build an exchange that training does not use
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if zero.on_nvme and not deepspeed.ops.__compatible_ops__["async_io"]:
        raise InputError(
            "memory.optimizer or memory.weights = 'nvme': DeepSpeed reads and writes NVMe with "
            "libaio, which is not here; install it (libaio-dev), or choose 'cpu'"
        )
    return deepspeed


def _fresh_state(group: Tensor) -> dict[str, Tensor]:
    """AdamW's state before its first update.

    Made here because DeepSpeed looks for it after the update of the first group, when the other
    groups would not have any.
    """
    state = {key: torch.zeros_like(group, requires_grad=False) for key in AVERAGES}
    return state | {"step": torch.zeros((), dtype=torch.float32, device=group.device)}


def _keep_sizes(model: Any) -> None:
    """Lets a copy without contents count weights and FLOPs: those of stage 3 look empty."""
    memo = {id(w): nn.Parameter(w.to("meta")) for w in model.parameters()}
    hollow = copy.deepcopy(model, memo)
    model.flops, model.num_parameters = hollow.flops, hollow.num_parameters


def _flat_range(read: Read, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    """Elements `start` to `stop` of a saved tensor, flattened; reads only the rows of these."""
    if start == stop:
        return torch.zeros(0)
    if not shape:
        return read(name, (), ()).flatten()
    row = math.prod(shape[1:])
    first, rows = start // row, -(-stop // row) - start // row
    offsets = (first,) + (0,) * (len(shape) - 1)
    return read(name, offsets, (rows, *shape[1:])).flatten()[start - first * row :][: stop - start]
