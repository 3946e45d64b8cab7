"""Delta rules in the GPU bench: ours, which are batched torch operations, beside fla's kernels."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from gpu_items import OURS, Item, Items, random_values
from gpu_peers import delta_peers
from gpu_problems import Tensors
from longctx_kernels.delta_attention import delta_attention
from torch import Tensor

SHAPE, TINY_SHAPE = (1, 16384, 16, 128), (1, 80, 2, 16)
GATES = ("none", "scalar", "diagonal")


def delta_groups(device: torch.device, tiny: bool) -> Iterator[Items]:
    """An item for each kind of decay. They have no targets: fla is the fast path here."""
    shape = TINY_SHAPE if tiny else SHAPE
    for gate in GATES:
        B, T, H, D = shape
        name = f"delta {gate} B{B} T{T} H{H} D{D}"
        make = partial(_item, gate, shape, name, device)
        yield Items(f"Delta rule, {gate} decay", f"delta {gate}", ((name, make),))


def _item(gate: str, shape: tuple[int, ...], name: str, device: torch.device) -> Item:
    random = partial(random_values, device=device)
    inputs = {"q": random(*shape), "k": F.normalize(random(*shape), dim=-1), "v": random(*shape)}
    inputs["beta"] = random(*shape[:3]).sigmoid()
    if gate != "none":
        gates = shape[:3] if gate == "scalar" else shape
        inputs["g"] = F.logsigmoid(torch.randn(gates, device=device) + 3)
    argument = "gk" if gate == "diagonal" else "g"

    def ours(x: Tensors) -> Tensor:
        operands = (x["q"], x["k"], x["v"], x["beta"])
        return delta_attention(*operands, **{argument: x.get("g")})[0]

    def reference(x: Tensors, heads: list[int]) -> Tensor:  # noqa: ARG001
        return ours(x)

    return Item(f"delta {gate}", name, inputs, {OURS: ours} | delta_peers(gate, device), reference)
