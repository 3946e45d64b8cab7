"""Correctness of every op that the GPU bench times: outputs and all gradients against fp64."""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from gpu_problems import Problem, Tensors, problems
from longctx_kernels.launch import is_interpreted
from torch import Tensor

TOLERANCE = {"bf16": 5e-3, "fp16": 1e-3, "fp32": 1e-5}
"""Most root-mean-square error, as a share of that of the reference."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Check:
    """Errors of outputs and gradients by name; `trouble` if there are none."""

    op: str
    name: str
    precision: str
    errors: dict[str, float] = field(default_factory=dict)
    trouble: str = ""

    @property
    def worst(self) -> float:
        """Largest of the errors."""
        return max(self.errors.values(), default=float("inf"))

    @property
    def is_green(self) -> bool:
        """Within the tolerance; NaN is not."""
        return not self.trouble and self.worst <= TOLERANCE[self.precision]

    def __str__(self) -> str:
        name = max(self.errors, key=self.errors.get, default="nothing")
        what = self.trouble or f"{name} off by {self.worst:.1e} (allowed "
        what += "" if self.trouble else f"{TOLERANCE[self.precision]:.0e})"
        return f"{self.op}, {self.name}, {self.precision}: {what}"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """RMS error over RMS of the reference; infinite for NaN or a wrong shape."""
    if actual.shape != expected.shape or not torch.isfinite(actual).all():
        return float("inf")
    expected = expected.double()
    error = (actual.double() - expected).square().mean().sqrt().item()
    size = expected.square().mean().sqrt().item()
    return error / size if size else (float("inf") if error else 0.0)


def evaluate(problem: Problem, inputs: Tensors, backend: str, douts: Tensors) -> Tensors:
    """Outputs and gradients by name; `douts` gets the cotangents that it lacks."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outs = problem.call(leaves, backend)
    for name, out in outs.items():
        if name not in douts:
            douts[name] = torch.randn_like(out)
    cotangents = [douts[name].to(out.dtype) for name, out in outs.items()]
    grads = torch.autograd.grad(list(outs.values()), list(leaves.values()), cotangents)
    named = {f"d{name}": grad for name, grad in zip(leaves, grads)}
    return {name: out.detach() for name, out in outs.items()} | named


def check(problem: Problem, precision: str) -> Check:
    """Runs the problem twice, over memory full of NaN, and compares."""
    about = (problem.op, problem.name, precision)
    try:
        douts: Tensors = {}
        with poisoned():
            actual = evaluate(problem, problem.inputs, "auto", douts)
            again = evaluate(problem, problem.inputs, "auto", douts)
        inputs = {name: x.double() for name, x in problem.inputs.items()}
        expected = evaluate(problem, inputs, problem.reference, douts)
    except Exception as error:  # whatever the compiler or the device raises makes the op red
        return Check(*about, trouble=f"{type(error).__name__}: {str(error)[:300]}")
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    # No kernel adds in an order that varies: a result that moves by more than a last digit here and
    # there (torch's running sums may) is a race.
    still = TOLERANCE[precision] / 100
    moved = [name for name in actual if not relative_error(again[name], actual[name]) <= still]
    trouble = f"{', '.join(moved)} differ between two runs" if moved else ""
    return Check(*about, errors, trouble)


def run_checks(device: torch.device, tiny: bool) -> Iterator[Check]:
    """Every problem in every dtype that this machine computes rightly."""
    started = time.perf_counter()
    for number, make in enumerate(problems(device, tiny), start=1):
        for precision in precisions():
            yield check(make(DTYPES[precision]), precision)
        if number % 10 == 0:
            seconds = time.perf_counter() - started
            print(f"  {number} problems, {seconds:.0f} s", file=sys.stderr, flush=True)


def precisions() -> list[str]:
    """Triton's interpreter computes bf16 wrongly."""
    return [name for name in TOLERANCE if not (name == "bf16" and is_interpreted())]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN, so that a result nobody wrote shows."""

    def poison(make):
        def call(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return call

    kept = torch.empty, torch.empty_like, torch.Tensor.new_empty
    torch.empty, torch.empty_like, torch.Tensor.new_empty = map(poison, kept)
    try:
        yield
    finally:
        torch.empty, torch.empty_like, torch.Tensor.new_empty = kept
