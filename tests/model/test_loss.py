import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.model import loss as loss_module
from longctx.model.loss import linear_cross_entropy
from tests.tolerances import assert_close


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def example(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(50, 16, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 50, (37,), generator=generator)
    labels[::5] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize("path", ["torch", "own"])
def test_loss_and_gradients_equal_plain_cross_entropy(path, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 50 * 8)
    if path == "own":
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    hidden, weight, labels = example()
    plain = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    expected = (plain, *torch.autograd.grad(plain * 0.3, (hidden, weight)))
    actual = linear_cross_entropy(hidden, weight, labels)
    actual = (actual, *torch.autograd.grad(actual * 0.3, (hidden, weight)))
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, "fp64")


def test_half_precision_operands_give_a_single_precision_loss():
    hidden, weight, labels = example(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, labels)
    exact = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum")
    assert loss.dtype == torch.float32
    assert abs(loss - exact) / exact < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_holds_all_logits(dtype, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 1 << 14)
    hidden = torch.randn(512, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(1000, 8, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 1000, (512,))
    with LargestTensor() as largest:
        linear_cross_entropy(hidden, weight, labels).backward()
    assert largest.elements <= 1 << 14
