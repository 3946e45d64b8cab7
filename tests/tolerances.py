"""The one table of tolerances; loosening an entry needs a record in docs/adr."""

import torch
from torch import Tensor

LARGEST_ERROR = {"fp64": 1e-10, "fp32": 1e-5}
"""Largest error over max(1, largest reference value), against a per-token fp64 reference."""

RMS_ERROR = {"bf16": 2e-2, "fp16": 1e-3}
"""Root-mean-square error over that of the reference, of a layer in bf16, of a kernel in fp16."""


def error_of(actual: Tensor, expected: Tensor, precision: str) -> float:
    """The error as the table measures it; infinite for NaN or a wrong shape."""
    if actual.shape != expected.shape or not torch.isfinite(actual).all():
        return float("inf")
    expected = expected.detach().double()
    error = actual.detach().double() - expected
    if precision in RMS_ERROR:
        return float(error.square().mean().sqrt() / expected.square().mean().sqrt())
    return float(error.abs().max() / expected.abs().max().clamp(min=1.0))


def assert_close(actual: Tensor, expected: Tensor, precision: str, what: str = "") -> None:
    """The one comparison of tests."""
    error, allowed = error_of(actual, expected, precision), (LARGEST_ERROR | RMS_ERROR)[precision]
    assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.0e} in {precision}"
