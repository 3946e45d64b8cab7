"""Makes megatron-core 0.16.1's layers run on a CPU, for tests that compare with them.

They allocate on `torch.cuda.current_device()`, which has no answer without a GPU: a CPU's name is
one that `torch.empty` takes. The library itself needs none of this: it uses of megatron-core only
the groups, which gloo has. Never for a GPU.
"""

from unittest import mock

import torch


def on_cpu() -> mock._patch:
    """A context in which new tensors of megatron-core's layers lie on the CPU."""
    assert not torch.cuda.is_available(), "on a GPU megatron-core needs no help"
    return mock.patch("torch.cuda.current_device", return_value="cpu")
