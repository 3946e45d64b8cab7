"""Needs TRITON_INTERPRET=1 before Python starts."""

import pytest
import torch
from longctx_kernels import launch as launching

from tests.kernels.test_routed_attention import assert_routed_equals_definition

assert launching.is_interpreted(), "run with TRITON_INTERPRET=1"


@pytest.mark.parametrize("window", [0, 9])
def test_kernels_equal_the_definition(window):
    assert_routed_equals_definition(2, window, 0.4, torch.float32, "fp32")


def test_lanes_without_queries_leave_zeros():
    assert_routed_equals_definition(1, 0, 0.0, torch.float32, "fp32")
