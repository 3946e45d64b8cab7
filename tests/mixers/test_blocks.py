"""What attention by blocks is when it sees everything, and what its parts do."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longctx.errors import InputError
from longctx.mixers import Mixer, MixerConfig
from longctx.mixers.bilevel import BilevelConfig
from longctx.mixers.combiner import CombinerConfig
from longctx.mixers.landmark import LandmarkConfig
from longctx.mixers.moba import MoBAConfig
from longctx.mixers.nsa import NSAConfig
from longctx.mixers.scatterbrain import ScatterbrainConfig
from longctx.mixers.sla import SLAConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.decoder import Decoder, ModelConfig, initialise
from longctx.sequence.local import LocalView
from tests.mixers.examples import PLACE, WIDTH
from tests.mixers.test_every_mixer import LENGTH, build, example_input
from tests.tolerances import assert_close

FULL = SoftmaxConfig(num_heads=4, num_kv_heads=2)
HEADS = {"num_heads": 4, "num_kv_heads": 2}
NSA = NSAConfig(
    **HEADS,
    block=8,
    num_blocks=4,
    compress_block=8,
    compress_stride=4,
    window=9,
    compression="mean",
)
VIEW = LocalView(((0, 10), (0,)), LENGTH)


def with_weights_of(other: Mixer, config: MixerConfig) -> Mixer:
    """A mixer that has the weights of another wherever both have them."""
    mixer = build(config)
    mixer.load_state_dict(other.state_dict(), strict=False)
    return mixer


@pytest.mark.parametrize(
    "config",
    [
        MoBAConfig(**HEADS, block=8, num_blocks=11),
        MoBAConfig(**HEADS, block=100),
        BilevelConfig(**HEADS, block=8, num_blocks=11),
        CombinerConfig(**HEADS, block=100),
        CombinerConfig(**HEADS, block=1),
        ScatterbrainConfig(**HEADS, window=LENGTH),
        LandmarkConfig(**HEADS, block=100),
    ],
    ids=lambda config: config.kind,
)
def test_what_leaves_nothing_out_is_softmax_attention(config):
    full = build(FULL)
    x_BTD = example_input(2, LENGTH)
    assert_close(with_weights_of(full, config)(x_BTD, VIEW).out, full(x_BTD, VIEW).out, "fp64")


def test_a_block_of_blocks_sees_less_than_everything():
    full, x_BTD = build(FULL), example_input(2, LENGTH)
    for config in (MoBAConfig(**HEADS, block=8), BilevelConfig(**HEADS, block=8), NSA):
        out = with_weights_of(full, config)(x_BTD, VIEW).out
        assert (out - full(x_BTD, VIEW).out).abs().max() > 1e-2


def test_linear_attention_beside_selected_blocks_starts_as_nothing():
    config = SLAConfig(**HEADS, block=8)
    model = ModelConfig(width=WIDTH, depth=1, pattern="A", mixers={"A": config})
    decoder = Decoder(model, 11)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(1.0)
    initialise(decoder, 0)
    mixer = decoder.blocks[0].mixer.double()
    selecting = with_weights_of(mixer, MoBAConfig(**HEADS, block=8))
    x_BTD = example_input(2, LENGTH)
    assert torch.equal(mixer(x_BTD, VIEW).out, selecting(x_BTD, VIEW).out)


def test_random_features_beyond_the_window_come_close_to_softmax_attention():
    full, x_BTD = build(FULL), example_input(2, LENGTH)
    expected = full(x_BTD, VIEW).out

    def error(num_features: int, window: int) -> float:
        config = ScatterbrainConfig(**HEADS, window=window, num_features=num_features)
        out = with_weights_of(full, config)(x_BTD, VIEW).out
        return float((out - expected).detach().norm() / expected.detach().norm())

    assert error(3000, 1) < error(30, 1) / 2
    assert error(3000, 40) < error(30, 40) / 2
    assert error(30, 40) < error(30, 1) / 2


def branches(mixer: Mixer, x_BTD: Tensor) -> tuple[Tensor, ...]:
    return mixer._branches(mixer.project(x_BTD, VIEW), VIEW)


def test_a_compressed_block_is_seen_from_its_last_token_on():
    mixer, x_BTD = build(NSA), example_input(2, LENGTH)
    far, *_ = branches(mixer, x_BTD)
    assert (far[0, :7] == 0).all()
    assert (far[0, 7] != 0).all()
    # The document that starts at 10 has its first block at 17.
    assert (far[0, 10:17] == 0).all()
    assert (far[0, 17] != 0).all()


def test_queries_learn_from_compressed_blocks_and_selected_ones_alike():
    mixer, x_BTD = build(NSA), example_input(2, LENGTH)
    for branch in branches(mixer, x_BTD):
        (gradient,) = torch.autograd.grad(branch.sum(), mixer.query.weight, retain_graph=True)
        assert gradient.abs().max() > 1e-3


def test_the_compressed_branch_ranks_blocks():
    """Keys of the compressed branch alone decide which blocks the selected branch sees."""
    mixer, x_BTD = build(replace(NSA, num_heads=2, num_kv_heads=1)), example_input(2, LENGTH)
    _, chosen, near = branches(mixer, x_BTD)
    mixer.key.weight.data.neg_()
    _, other, same = branches(mixer, x_BTD)
    assert torch.equal(near, same)
    assert torch.equal(chosen[0, 10:42], other[0, 10:42])
    assert not torch.equal(chosen[0, 42:], other[0, 42:])


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (MoBAConfig(block=0), "m.block = 0"),
        (MoBAConfig(num_blocks=1), "m.num_blocks = 1"),
        (BilevelConfig(block=-1), "m.block = -1"),
        (CombinerConfig(block=0), "m.block = 0"),
        (LandmarkConfig(block=1), "m.block = 1"),
        (LandmarkConfig(backend="triton"), "m.backend = 'triton'"),
        (NSAConfig(num_blocks=2), "m.num_blocks = 2"),
        (NSAConfig(compress_stride=24), "m.compress_stride = 24"),
        (NSAConfig(compress_block=64, block=32), "m.compress_block = 64"),
        (NSAConfig(window=0), "m.window = 0"),
        (ScatterbrainConfig(window=0), "m.window = 0"),
        (ScatterbrainConfig(num_features=-1), "m.num_features = -1"),
        (ScatterbrainConfig(qk_norm=False), "m.qk_norm = false"),
        (ScatterbrainConfig(num_features=1 << 20), "m.num_features = 1048576"),
        (SLAConfig(num_blocks=1), "m.num_blocks = 1"),
        (SLAConfig(head_dim=1024, num_heads=16), "m.head_dim = 1024"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_what_cannot_be_built_is_named(config, named):
    with pytest.raises(InputError, match=named):
        config.check(WIDTH, "m")


@pytest.mark.parametrize("config", [NSAConfig(window=65), ScatterbrainConfig(window=65)])
def test_a_window_longer_than_sequences_is_named(config):
    with pytest.raises(InputError, match=r"m\.window = 65"):
        config.check_length(64, "m")
    config.check_length(65, "m")


def test_selecting_layers_take_any_place_of_a_model():
    for config in (NSA, SLAConfig(**HEADS)):
        config.check(WIDTH, "m")
        assert config.build(PLACE).num_heads == 4
