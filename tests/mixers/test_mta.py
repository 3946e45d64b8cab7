"""What attention to several tokens at once promises beyond what every mixer does."""

import pytest
import torch

from longctx.errors import InputError
from longctx.mixers import mta
from longctx.mixers.mta import MTAConfig
from longctx.mixers.softmax import SoftmaxConfig
from tests.mixers.examples import PLACE, WIDTH
from tests.mixers.test_every_mixer import build, example_input, packed_view
from tests.tolerances import assert_close

CONFIG = MTAConfig(num_heads=4, num_kv_heads=2, window=9, mixed_heads=2)


def test_an_untrained_filter_leaves_windowed_softmax():
    mixer = CONFIG.build(PLACE).double()
    softmax = SoftmaxConfig(num_heads=4, num_kv_heads=2, window=9).build(PLACE).double()
    softmax.load_state_dict(mixer.state_dict(), strict=False)
    x_BTD, view = example_input(2, 60), packed_view(2, 60, (1, 17))
    assert_close(mixer(x_BTD, view).out, softmax(x_BTD, view).out, "fp64")


def test_a_model_starts_with_the_identity():
    mixer, generator = CONFIG.build(PLACE), torch.Generator()
    for name, parameter in mixer.named_parameters():
        drawn = mixer.initial(name, generator)
        is_own = name in ("filter_HQN", "mix_GMM")
        assert (drawn is not None) == is_own
        assert not is_own or torch.equal(drawn, parameter)


def test_blocks_of_queries_change_nothing(monkeypatch):
    mixer = build(CONFIG)
    x_BTD, view = example_input(2, 60), packed_view(2, 60, (1, 17))
    expected = mixer(x_BTD, view).out
    monkeypatch.setattr(mta, "BLOCK", 7)
    assert_close(mixer(x_BTD, view).out, expected, "fp64")


WRONG = {
    "window": ({"window": 0}, "set at least 1"),
    "past_queries": ({"past_queries": 0}, "must be at least 1"),
    "near_keys": ({"near_keys": 4}, "must be odd"),
    "mixed_heads": ({"mixed_heads": 3}, "does not divide num_heads = 4"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_built_is_refused(name):
    fields, mend = WRONG[name]
    with pytest.raises(InputError, match=rf"^x\.{name} = .*{mend}"):
        MTAConfig(**({"num_heads": 4} | fields)).check(WIDTH, "x")


def test_a_window_longer_than_the_sequence_is_refused():
    with pytest.raises(InputError, match=r"^x\.window = 512 is longer"):
        MTAConfig().check_length(511, "x")
