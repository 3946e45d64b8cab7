"""Which packaged cluster is taken for this machine."""

from types import SimpleNamespace

import pytest
import torch

from longctx.errors import InputError
from longctx.plan.command import _cluster_here
from longctx.train.hardware import _listed_peak


@pytest.mark.parametrize(
    ("name", "count", "gib", "cluster"),
    [
        ("NVIDIA H100 80GB HBM3", 8, 79.1, "8xh100"),
        ("NVIDIA H200", 8, 139.7, "8xh200"),
        ("NVIDIA H200", 1, 139.7, "h200"),
        ("NVIDIA A100-SXM4-80GB", 8, 79.2, "dgx-a100"),
        ("NVIDIA A100-SXM4-40GB", 8, 39.5, ""),
        ("NVIDIA GH200 480GB", 1, 94.5, ""),
        ("NVIDIA H200 MIG 1g.18gb", 1, 16.0, ""),
        ("NVIDIA L40S", 4, 44.5, ""),
    ],
)
def test_a_cluster_is_like_this_machine_only_with_such_memory(
    monkeypatch, name, count, gib, cluster
):
    own = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: own)
    if cluster:
        assert _cluster_here() == cluster
    else:
        with pytest.raises(InputError, match="none is known"):
            _cluster_here()


def test_a_part_of_a_device_has_no_listed_peak():
    assert _listed_peak("NVIDIA H200", torch.bfloat16) == 989e12
    assert _listed_peak("NVIDIA H200 MIG 1g.18gb", torch.bfloat16) is None
