"""Tensor parallelism: processes with the same tokens share heads, hidden columns and vocabulary.

A layer's input enters a region in which each process computes its part, and the sum of the parts
leaves it; on the way back the gradient of the input is summed where it entered. Parameters that
follow heads, hidden columns or tokens of the vocabulary are cut. Those of a mixer that do not, such
as norms within a head or a router, are whole everywhere, but each process finds the part of their
gradient that came through its own heads: `TensorSplit.sum_partial` adds these up.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longctx.mixers import Mixer, MixerConfig, Place
from longctx.mixers.base import Mixed, RMSNorm
from longctx.parallel.megatron import TensorGroup
from longctx.parallel.shares import Cut, cut_to, share
from longctx.parallel.vocabulary import SharedEmbedding, SharedHead
from longctx.sequence.ledger import OUTSIDE_LAYERS, Label

PARTIAL = Label(OUTSIDE_LAYERS, "partial gradients")


@dataclass(frozen=True)
class TensorSplit:
    """What this process has of a decoder's weights."""

    group: TensorGroup
    cuts: dict[str, Cut]
    """Of every parameter and buffer, by name."""
    partial: frozenset[str]
    """Parameters that are whole, with gradients of which each process finds a part."""
    device: torch.device
    """Where the group exchanges."""

    def is_sharded(self, name: str) -> bool:
        """Whether processes of the group have different parts of it."""
        return self.cuts[name].dim is not None

    def copies(self, name: str) -> int:
        """How many processes of the group have the same of it."""
        return 1 if self.is_sharded(name) else self.group.size

    def sum_partial(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Adds up the partial gradients among these parameters, in one message and in place."""
        found = [p.grad for name, p in named if name in self.partial and p.grad is not None]
        gradients = [g.to_local() if isinstance(g, DTensor) else g for g in found]
        if not gradients:
            return
        flat = torch.cat([g.flatten() for g in gradients]).to(self.device)
        total = self.group.sum(flat, PARTIAL)
        for gradient, summed in zip(gradients, total.split([g.numel() for g in gradients])):
            gradient.copy_(summed.view_as(gradient))


def split_decoder(model: Any, group: TensorGroup, device: torch.device) -> TensorSplit:
    """Leaves of a whole Decoder the part of one process of a group that exchanges on `device`, in
    place; names stay as they are.

    Its FLOPs and number of parameters stay those of the whole.
    """
    cuts = {name: Cut(tuple(x.shape)) for name, x in model.state_dict().items()}
    vocab_size, is_partial = model.embedding.num_embeddings, set[str]()
    with torch.device("meta"):
        whole = type(model)(model.config, vocab_size)
    for layer, (block, letter) in enumerate(zip(model.blocks, model.config.letters)):
        prefix = f"blocks.{layer}."
        if block.mixer is not None:
            config = model.config.mixers[letter].on(model.config.backend)
            place = Place(model.config.width, layer, model.config.depth)
            block.mixer, own = share_mixer(block.mixer, config, place, group)
            cuts |= {f"{prefix}mixer.{name}": cut for name, cut in own.items()}
            names = (name for name, _ in block.mixer.named_parameters() if own[name].dim is None)
            is_partial |= {f"{prefix}mixer.{name}" for name in names}
        if block.mlp is not None:
            own = _share_mlp(block.mlp, group, layer)
            cuts |= {f"{prefix}mlp.{name}": cut for name, cut in own.items()}
    cuts |= _share_vocabulary(model, group)
    model.flops, model.num_parameters, model.step = whole.flops, whole.num_parameters, _no_step
    return TensorSplit(group, cuts, frozenset(is_partial), device)


def share_mixer(
    whole: Mixer, config: MixerConfig, place: Place, group: TensorGroup
) -> tuple[Mixer, dict[str, Cut]]:
    """A mixer with one share of the heads of `whole`, which stands at `place` and has this config;
    it enters and leaves by itself. And the cuts of its parameters and buffers."""
    with torch.device("meta"):
        here = replace(place, part=group.rank, parts=group.size)
        part = config.over_tp(place.width, group.size).build(here).train(whole.training)
    sizes: dict[str, tuple[int, ...]] = {}
    for prefix, module in whole.named_modules():
        stretches = getattr(module, "stretches", dict)()
        sizes |= {f"{prefix}.{name}".lstrip("."): each for name, each in stretches.items()}
    tensors = dict(whole.named_parameters()) | dict(whole.named_buffers())
    shapes = {n: tuple(x.shape) for n, x in (*part.named_parameters(), *part.named_buffers())}
    where, cuts = (group.rank, group.size), dict[str, Cut]()
    for name, shape in shapes.items():
        tensor = tensors[name].detach()
        cuts[name] = cut_to(tuple(tensor.shape), shape, where, sizes.get(name, ()))
        _replace(part, name, cuts[name].take(tensor))
    label = Label(place.layer, "shared heads")
    for name, module in part.named_modules():
        if isinstance(module, RMSNorm) and cuts[f"{name}.weight"].dim is not None:
            module.mean_over_parts = partial(group.mean, label=label)

    def leave(_module: nn.Module, _inputs: Any, mixed: Mixed) -> Mixed:
        losses = {n: group.leave(x / group.size, label) for n, x in mixed.losses.items()}
        return mixed._replace(out=group.leave(mixed.out, label), losses=losses)

    _between(part, group, label, leave)
    return part, cuts


def _share_mlp(mlp: nn.Module, group: TensorGroup, layer: int) -> dict[str, Cut]:
    """Leaves a share of the hidden columns, and makes the layer enter and leave."""
    label, cuts = Label(layer, "shared columns"), dict[str, Cut]()
    for name, parameter in list(mlp.named_parameters()):
        dim = 1 if name == "project_out.weight" else 0
        stretch = share(parameter.shape[dim], group.rank, group.size)
        cuts[name] = Cut(tuple(parameter.shape), dim, (stretch,))
        _replace(mlp, name, cuts[name].take(parameter.detach()))

    def leave(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        return group.leave(out, label)

    _between(mlp, group, label, leave)
    return cuts


def _share_vocabulary(model: Any, group: TensorGroup) -> dict[str, Cut]:
    """Leaves a share of the rows of embedding and head, and takes the functions of the loss."""
    is_tied, whole = model.head.weight is model.embedding.weight, model.embedding.weight
    stretch = share(len(whole), group.rank, group.size)
    cut = Cut(tuple(whole.shape), 0, (stretch,))
    weight = nn.Parameter(cut.take(whole.detach()))
    model.embedding = SharedEmbedding(weight, stretch[0], group)
    model.head.weight = weight if is_tied else nn.Parameter(cut.take(model.head.weight.detach()))
    model.head.out_features = stretch[1]
    head = SharedHead(group, len(whole), stretch[0], model.memory.loss_tokens)
    model.cross_entropy, model.score_labels = head.cross_entropy, head.score_labels
    return {"embedding.weight": cut, "head.weight": cut}


def _between(module: nn.Module, group: TensorGroup, label: Label, leave: Any) -> None:
    """Has the module's first input enter, and what it returns leave."""

    def enter(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return group.enter(inputs[0], label), *inputs[1:]

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a tensor in the place of a parameter or buffer of that name."""
    path, _, own_name = name.rpartition(".")
    owner = module.get_submodule(path)
    if own_name in owner._parameters:
        setattr(owner, own_name, nn.Parameter(tensor))
    else:
        owner._buffers[own_name] = tensor


def _no_step(*_arguments: Any) -> Any:
    raise TypeError("a decoder that is shared by processes does not generate; load its checkpoint")
