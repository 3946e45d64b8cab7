"""Peak memory of the loss beyond its inputs, in one fresh process each."""

import resource
import subprocess
import sys

import torch
import torch.nn.functional as F

from longctx.model import loss

TOKENS, WIDTH, VOCABULARY = 8192, 512, 32000
WAYS = ("all logits", "longctx, torch's function", "longctx, own loop (bf16)")


def measure(way: str) -> float:
    """MiB by which forward and backward raise the peak."""
    dtype = torch.bfloat16 if "bf16" in way else torch.float32
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if way == "all logits":
        F.cross_entropy(hidden @ weight.mT, labels, reduction="sum").backward()
    else:
        loss.linear_cross_entropy(hidden, weight, labels).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if len(sys.argv) > 1:
    print(f"{measure(sys.argv[1]):.0f}")
else:
    print("| way | MiB beyond inputs |\n|---|---:|")
    for name in WAYS:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True)
        print(f"| {name} | {done.stdout.strip()} |")
