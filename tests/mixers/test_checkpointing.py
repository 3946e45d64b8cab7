"""Layers of every kind compute the same whatever they keep for their backward pass."""

import torch
from torch import Tensor

from longctx.model.decoder import Decoder, ModelConfig
from longctx.model.memory import MemoryConfig
from longctx.sequence.view import SequenceView
from tests.mixers.examples import WIDTH
from tests.mixers.test_every_mixer import packed_view, variants

LENGTH, VOCABULARY = 40, 13
POLICIES = ("none", "full", "keep")


def model(config, **memory) -> Decoder:
    """Two layers, with dropout, of weights that are no longer their first ones."""
    table = ModelConfig(width=WIDTH, depth=2, pattern="M", mixers={"M": config}, dropout=0.2)
    built = Decoder(table, VOCABULARY, MemoryConfig(**memory)).double()
    generator = torch.Generator().manual_seed(7)
    for parameter in built.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (parameter.dim() == 1) + 0.3 * noise
    return built


def found(model: Decoder, view: SequenceView) -> dict[str, Tensor]:
    """Losses, statistics and gradients of a batch, which is taken in two micro-batches."""
    tokens_BT = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    for step in range(2):
        losses = model(tokens_BT, tokens_BT.roll(-1, 1), view.keyed(1, step, (4, 5)))
        (losses.cross_entropy / LENGTH + sum(losses.mixers.values())).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    named = {"loss": losses.cross_entropy, **losses.mixers, **losses.statistics}
    return {name: x.clone() for name, x in (named | gradients).items()}


@variants
def test_gradients_do_not_depend_on_what_is_kept(config):
    view = packed_view(2, LENGTH, (1, 17))
    plain, *others = (found(model(config, checkpointing=p), view) for p in POLICIES)
    for other in others:
        assert plain.keys() == other.keys()
        assert [name for name in plain if not torch.equal(plain[name], other[name])] == []
