"""Correctness of everything that is timed, against its reference, in fp64 at small sizes."""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from layers import examples
from longctx_kernels.decay_attention import decay_attention, decay_attention_reference
from longctx_kernels.softmax_attention import softmax_attention, softmax_attention_reference
from torch import Tensor

from longctx.mixers import Mixer, Place
from longctx.model.decoder import Decoder, ModelConfig, initialise
from longctx.sequence.local import LocalView

TOLERANCE = 1e-10
TOKENS = 150
TOKENS_OF_WINDOWS = 560
FIRST_DOCUMENT = 30


@dataclass(frozen=True)
class Check:
    """Largest difference of output and gradients, relative to the reference where that is big."""

    name: str
    error: float

    @property
    def is_green(self) -> bool:
        """Within the tolerance; NaN is not."""
        return self.error <= TOLERANCE


def run_checks(model: ModelConfig) -> Iterator[Check]:
    """Operators, mixers, and the model of the training step; small, hence on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _checks(model)
    finally:
        torch.set_num_threads(threads)


def _checks(model: ModelConfig) -> Iterator[Check]:
    torch.manual_seed(0)
    yield from _check_decay_attention()
    yield from _check_softmax_attention()
    for example in examples():
        mixer = example.build(8, Place(32, 0, 2)).double()
        tokens = TOKENS_OF_WINDOWS if "window" in example.name else TOKENS
        yield Check(example.name, _mixer_error(mixer, 32, tokens))
    yield Check("the model of preset tiny", _model_error(model))


def difference(results: list[Tensor], references: list[Tensor]) -> float:
    """Largest difference, as a share of the largest value of that tensor if it is above 1."""
    return max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()
        for a, b in zip(results, references, strict=True)
    )


def value_and_gradients(
    function: Callable[[], Tensor], leaves: list[Tensor], dout: Tensor | None = None
) -> list[Tensor]:
    """Output and gradients of the leaves."""
    out = function()
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def _check_decay_attention() -> Iterator[Check]:
    H, K, V = 3, 8, 9
    g_H = -torch.rand(H, dtype=torch.float64)
    for g, cuts in itertools.product((None, g_H), (None, torch.tensor([0, 1, 65, 200]))):
        q, k = (_leaf(1, 200, H, K) for _ in range(2))
        v = _leaf(1, 200, H, V)
        dout = torch.randn_like(v)
        results, references = (
            value_and_gradients(lambda: op(q, k, v, g_gamma=g, cu_seqlens=cuts)[0], [q, k, v], dout)  # noqa: B023
            for op in (decay_attention, decay_attention_reference)
        )
        yield Check("decay_attention", difference(results, references))


def _check_softmax_attention() -> Iterator[Check]:
    H, J, K = 4, 2, 8
    for window, cuts in itertools.product((0, 50), (None, torch.tensor([0, 1, 33, 300]))):
        q = _leaf(1, 300, H, K)
        k, v = (_leaf(1, 300, J, K) for _ in range(2))
        dout = torch.randn_like(q)
        results, references = (
            value_and_gradients(lambda: op(q, k, v, window, cu_seqlens=cuts), [q, k, v], dout)  # noqa: B023
            for op in (softmax_attention, softmax_attention_reference)
        )
        yield Check("softmax_attention", difference(results, references))


def _mixer_error(mixer: Mixer, width: int, tokens: int) -> float:
    """Over two documents, the second longer than the windows of the examples."""
    x_BTD = _leaf(1, tokens, width)
    view = LocalView.of_ids((torch.arange(tokens) >= FIRST_DOCUMENT)[None])
    dout = torch.randn_like(x_BTD)
    leaves = [x_BTD, *mixer.parameters()]

    results, references = [], []
    for forward, values in ((mixer, results), (mixer.reference, references)):
        mixed = forward(x_BTD, view)
        total = (mixed.out * dout).sum() + sum(mixed.losses.values())
        values += [mixed.out.detach(), *torch.autograd.grad(total, leaves)]
    return difference(results, references)


def _model_error(config: ModelConfig) -> float:
    """Loss and its gradients against the same model with reference cores and a plain loss."""
    model = Decoder(config, vocab_size=50)
    initialise(model, seed=0)
    model.double()
    reference = copy.deepcopy(model)
    for block in reference.blocks:
        block.mixer.core = block.mixer.core_reference
    tokens_BT = torch.randint(50, (2, 81))
    view = LocalView.of_ids((torch.arange(80) >= 33).expand(2, -1))

    def total(decoder: Decoder) -> Tensor:
        losses = decoder(tokens_BT[:, :-1], tokens_BT[:, 1:], view)
        return losses.cross_entropy + sum(losses.mixers.values())

    results, references = (
        value_and_gradients(lambda: total(decoder), list(decoder.parameters()))  # noqa: B023
        for decoder in (model, reference)
    )
    return difference(results, references)


def _leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)
