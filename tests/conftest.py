"""Every test runs with one thread and with uninitialised memory filled with NaN."""

import pytest
import torch
from torch.utils._device import _device_constructors

_device_constructors()  # remembers what makes tensors, before that is replaced below


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Makes a read of memory that nobody wrote show up as NaN."""

    def poisoned(make):
        def call(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return call

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
