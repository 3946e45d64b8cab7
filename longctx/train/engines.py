"""Builds the model of a run inside the engine that its settings ask for."""

from dataclasses import replace

import torch
from torch import Tensor

from longctx.errors import InputError
from longctx.model.decoder import Decoder, initialise
from longctx.model.first_weights import FirstWeights
from longctx.model.matrices import HiddenMatrix, hidden_matrices
from longctx.model.memory import check_host, host_bytes_needed
from longctx.parallel import Mesh, Split
from longctx.parallel.deepspeed import DeepSpeedEngine
from longctx.parallel.engine import Engine, Replicated
from longctx.parallel.fsdp import Sharded, Sharder
from longctx.parallel.matrices import spread
from longctx.parallel.megatron import check_installed as check_megatron
from longctx.parallel.mesh import processes_here
from longctx.parallel.muon import Wholes
from longctx.parallel.offload import check_state_on_host
from longctx.parallel.shares import refuse_tp
from longctx.parallel.tensor_parallel import TensorSplit, split_decoder
from longctx.parallel.zero import Zero, check_installed
from longctx.sequence.ledger import OUTSIDE_LAYERS
from longctx.train.optim import build_optimizer
from longctx.train.settings import Settings


def settle_engine(settings: Settings, split: Split) -> Split:
    """The split with the engine that it needs; InputError if that, or what it asks for, is not
    there."""
    _check_room(settings, split)
    config = settings.train
    split = fit_engine(settings, split, config.resolve_precision(config.resolve_device()))
    if split.tp > 1:
        check_megatron()
    if split.engine == "deepspeed":
        check_installed()
        _zero(settings, split)
    return split


def fit_engine(settings: Settings, split: Split, precision: str) -> Split:
    """The split with the engine that it needs; InputError if that cannot do what is asked for, on
    whatever machine."""
    if settings.memory.weights == "cpu" and settings.parallel.engine == "fsdp2":
        split = replace(split, engine="fsdp2")
    _check_precision(settings, split, precision)
    if split.tp > 1:
        _check_tp(settings, split)
    if split.engine != "deepspeed":
        _check_places(settings, split)
    elif settings.optim.kind == "muon":
        raise InputError(
            "optim.kind = 'muon': engine 'deepspeed' cuts matrices anywhere; choose "
            "parallel.engine 'fsdp2', or kind 'adamw'"
        )
    return split


def _check_room(settings: Settings, split: Split) -> None:
    """Whether the host has the memory for what waits there between forward and backward."""
    config = settings.train
    if config.resolve_device().type == "cuda":
        rows = config.micro_batch or config.batch_size // split.dp
        tokens, layers = rows * -(-config.seq_len // split.sp), settings.model.letters
        needed = host_bytes_needed(settings.memory, layers, settings.model.width, tokens)
        check_host(needed * processes_here())


def _check_precision(settings: Settings, split: Split, precision: str) -> None:
    if settings.parallel.weights == "bf16" and precision != "bf16":
        raise InputError(
            f"parallel.weights = 'bf16' with train.precision = {precision!r}: set precision to "
            "'bf16', or weights to 'fp32'"
        )
    if split.engine == "deepspeed" and precision == "fp64":
        raise InputError(
            "train.precision = 'fp64': engine 'deepspeed' adds up in fp32; choose 'fp32' or "
            "'bf16', or another engine"
        )


def _check_places(settings: Settings, split: Split) -> None:
    memory = settings.memory
    for name in ("optimizer", "weights"):
        if getattr(memory, name) == "nvme":
            raise InputError(
                f"memory.{name} = 'nvme': only parallel.engine 'deepspeed' uses NVMe; choose "
                "'cpu', or that engine"
            )
        if getattr(memory, name) != "device" and split.engine == "none":
            raise InputError(
                f"memory.{name} = {getattr(memory, name)!r}: parallel.engine 'none' keeps all on "
                "the device; choose 'fsdp2', with memory.optimizer and memory.weights alike"
            )
    if memory.optimizer != memory.weights:
        raise InputError(
            f"memory.optimizer = {memory.optimizer!r}, memory.weights = {memory.weights!r}: "
            "engine 'fsdp2' keeps both in the same place; set them alike, or take 'deepspeed'"
        )


def _check_tp(settings: Settings, split: Split) -> None:
    for layer, mixer in enumerate(settings.model.layers):
        if reason := refuse_tp(mixer, settings.model.width, split.tp, split.transports):
            raise InputError(f"layer {layer} ({mixer.kind}) cannot share its heads: {reason}")
    if split.engine == "deepspeed":
        raise InputError("parallel.tp: engine 'deepspeed' does not share heads; choose 'fsdp2'")


def build_engine(settings: Settings, vocab_size: int, mesh: Mesh) -> Engine:
    """The model with its first weights, spread as the mesh's split says."""
    if mesh.split.engine == "fsdp2":
        return _sharded(settings, vocab_size, mesh)
    model = Decoder(settings.model, vocab_size, settings.memory)
    initialise(model, settings.run.seed)
    matrices = hidden_matrices(model)
    split = split_decoder(model, mesh.tensor_group, mesh.device) if mesh.tensor_group else None
    model.to(mesh.device, _dtype(settings, mesh))
    optimizer = build_optimizer(model, settings.optim, _wholes(settings, matrices, mesh, split))
    if mesh.split.engine == "deepspeed":
        zero = _zero(settings, mesh.split)
        _check_state(settings, model, mesh)
        return DeepSpeedEngine(model, optimizer, zero, mesh)
    return Replicated(model, optimizer, settings.optim.clip_norm, mesh, split)


def _sharded(settings: Settings, vocab_size: int, mesh: Mesh) -> Engine:
    """No process ever holds more than a layer of a model that is spread."""
    with torch.device("meta"):
        model = Decoder(settings.model, vocab_size, settings.memory)
    matrices = hidden_matrices(model)
    split = split_decoder(model, mesh.tensor_group, mesh.device) if mesh.tensor_group else None
    _check_state(settings, model, mesh)
    model.to(_dtype(settings, mesh))
    on_host = settings.memory.weights == "cpu"
    sharder = Sharder(mesh, settings.parallel.weights, on_host)
    for layer, block in enumerate(model.blocks):
        sharder.shard(block, layer)
    sharder.shard(model, OUTSIDE_LAYERS)
    model.to_empty(device="cpu" if on_host else mesh.device)
    _move_buffers(model, mesh.device)
    if settings.model.tied_head:
        model.head.weight = model.embedding.weight
    optimizer = build_optimizer(model, settings.optim, _wholes(settings, matrices, mesh, split))
    engine = Sharded(model, optimizer, settings.optim.clip_norm, mesh, split)
    first = FirstWeights(settings.model, vocab_size, settings.run.seed)
    engine.load(first.read, (), weights_only=True)
    first.fill_buffers(model, lambda name, whole: _part(split, name, whole))
    return engine


def _wholes(
    settings: Settings,
    matrices: dict[str, HiddenMatrix],
    mesh: Mesh,
    split: TensorSplit | None,
) -> Wholes | None:
    """How Muon has whole matrices computed; None without it. A bf16 run's iterate in bf16."""
    if settings.optim.kind != "muon":
        return None
    is_narrow = settings.train.resolve_precision(mesh.device) == "bf16"
    dtype = torch.bfloat16 if is_narrow else _dtype(settings, mesh)
    cuts = split.cuts if split else None
    return Wholes(mesh, spread(matrices, cuts, mesh.split.engine == "fsdp2"), dtype)


def _move_buffers(model: Decoder, device: torch.device) -> None:
    """To where layers compute; only weights wait on the host."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def _check_state(settings: Settings, model: Decoder, mesh: Mesh) -> None:
    places = settings.memory.optimizer, settings.memory.weights
    holders = mesh.size // mesh.split.replicas
    check_state_on_host(places, model.num_parameters(), holders, processes_here())


def _part(split: TensorSplit | None, name: str, whole: Tensor) -> Tensor:
    return split.cuts[name].take(whole) if split else whole


def _dtype(settings: Settings, mesh: Mesh) -> torch.dtype:
    is_double = settings.train.resolve_precision(mesh.device) == "fp64"
    return torch.float64 if is_double else torch.float32


def _zero(settings: Settings, split: Split) -> Zero:
    memory, config = settings.memory, settings.train
    rows = config.batch_size // split.dp
    return Zero(
        stage=settings.parallel.zero_stage,
        optimizer=memory.optimizer,
        weights=memory.weights,
        nvme_path=memory.nvme_path,
        micro_batches=-(-rows // (config.micro_batch or rows)),
        clip_norm=settings.optim.clip_norm,
        bf16=config.resolve_precision(config.resolve_device()) == "bf16",
    )
