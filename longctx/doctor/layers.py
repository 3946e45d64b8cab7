"""Layers that stand for the classes of kernels in a cluster's file."""

from collections.abc import Sequence

from longctx.errors import InputError
from longctx.mixers import MixerConfig
from longctx.mixers.attention import AttentionConfig
from longctx.mixers.delta import GDNConfig
from longctx.mixers.linear import LinearConfig
from longctx.mixers.moba import MoBAConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.decoder import ModelConfig
from longctx.plan.kernel_time import kernels_of

WIDTH, HEAD = 512, 64
LETTERS = {"softmax": "S", "linear": "L", "delta": "D", "sparse": "B"}


def layers_to_time(
    model: ModelConfig | None, longest: int
) -> tuple[int, dict[str, tuple[str, MixerConfig]]]:
    """A width, and by class of kernels a letter and a mixer: the model's first of that class that
    allows so many tokens, else an ordinary one with heads of 64."""
    width = model.width if model else WIDTH
    heads = next(n for n in range(max(1, width // HEAD), 0, -1) if width % n == 0)
    ordinary: dict[str, MixerConfig] = {
        "softmax": SoftmaxConfig(num_heads=heads),
        "linear": LinearConfig(num_heads=heads, feature_map="silu", decay="alibi"),
        "delta": GDNConfig(num_heads=heads),
        "sparse": MoBAConfig(num_heads=heads),
    }
    own: dict[str, MixerConfig] = {}
    for mixer in model.layers if model else ():
        if not _reuses(mixer) and allow([mixer], longest):
            own.setdefault(kernels_of(mixer), mixer)
    mixers = ordinary | own
    return width, {name: (LETTERS[name], mixer) for name, mixer in mixers.items()}


def _reuses(mixer: MixerConfig) -> bool:
    inner = getattr(mixer, "inner", mixer)
    return isinstance(inner, AttentionConfig) and inner.reuses != "nothing"


def allow(mixers: Sequence[MixerConfig], tokens: int) -> bool:
    """Whether layers take sequences of that length."""
    try:
        for mixer in mixers:
            mixer.check_length(tokens, "")
    except InputError:
        return False
    return True
