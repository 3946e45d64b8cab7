"""Versions of the program and of what it builds on."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version

import torch

from longctx.doctor.findings import Finding
from longctx.doctor.known_bad import KNOWN_BAD

OPTIONAL = {
    "deepspeed": ("engine 'deepspeed'", "pip install 'longctx[deepspeed]'"),
    "megatron-core": ("parallel.tp", "pip install 'longctx[megatron]'"),
    "wandb": ("log.wandb", "pip install wandb"),
    "datasets": ("datasets of the hub and Arrow folders", "pip install datasets"),
    "transformers": ("the tests and kernels/bench only", "pip install 'longctx[bench]'"),
    "fla-core": ("backend 'fla'", "pip install 'longctx[fla]'"),
    "pyarrow": ("Parquet files", "pip install pyarrow"),
    "matplotlib": ("pictures of losses and plans", "pip install matplotlib"),
    "sentencepiece": ("SentencePiece tokenizers", "pip install 'longctx[sentencepiece]'"),
    "tensorboard": ("log.tensorboard", "pip install 'longctx[tensorboard]'"),
}
"""What packages are for, and how to get them."""


def installed(package: str) -> str:
    """Its version, empty if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def versions_here() -> dict[str, str]:
    """Those that every process of a run must share, by name."""
    found = {
        "python": platform.python_version(),
        "longctx": installed("longctx"),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "cuda": torch.version.cuda or "",
        "nccl": "",
    }
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    found |= {name: installed(name) for name in ("deepspeed", "megatron-core", "fla-core")}
    return {name: found_version for name, found_version in found.items() if found_version}


def required_versions() -> list[Finding]:
    """Whether Python, torch and Triton are those that longctx was made for."""
    found = [Finding("ok", f"Python {platform.python_version()}", "longctx runs")]
    wanted = _wanted()
    for package in ("torch", "triton"):
        have, needed = installed(package), wanted.get(package, "")
        if not have:
            level, meaning = "warning", "kernels on a GPU need it"
        elif needed and not _is_in(have, needed):
            level, meaning = "warning", f"longctx is tested with {package} {needed}"
        else:
            level, meaning = "ok", "in the range that longctx is tested with"
        found.append(Finding(level, f"{package} {have or 'missing'}", meaning))
    return found


def _wanted() -> dict[str, str]:
    """Ranges of versions by package, as the installed longctx asks for them."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in requires("longctx") or []]
    except PackageNotFoundError:
        return {}
    return {each.name: str(each.specifier) for each in wanted if "extra" not in str(each.marker)}


def _is_in(have: str, needed: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(needed).contains(have.split("+")[0], prereleases=True)


def cuda_versions() -> list[Finding]:
    """CUDA and NCCL that torch was built with."""
    if torch.version.cuda is None:
        return [Finding("note", "torch without CUDA", "processes speak through gloo; no GPU")]
    nccl = versions_here().get("nccl", "")
    if not nccl:
        return [Finding("note", f"CUDA {torch.version.cuda}", "torch finds no device to use it on")]
    return [
        Finding("ok", f"CUDA {torch.version.cuda}, NCCL {nccl}", "processes speak through NCCL")
    ]


def optional_packages() -> list[Finding]:
    """What can be had besides."""
    found = []
    for package, (purpose, command) in OPTIONAL.items():
        if have := installed(package):
            found.append(Finding("ok", f"{package} {have}", f"allows {purpose}"))
        else:
            found.append(Finding("note", f"{package} missing", f"no {purpose}; {command}"))
    return found


def known_bad_versions() -> list[Finding]:
    """Versions here that are known to be bad."""
    return known_bad_among(versions_here(), is_hopper())


def known_bad_among(here: Mapping[str, str], hopper: bool) -> list[Finding]:
    """Those of some versions by package; some are bad on Hopper GPUs only."""
    found = []
    for bad in KNOWN_BAD:
        have = here.get(bad.package, "")
        if have and bad.holds(have) and (hopper or not bad.hopper_only):
            ending = "; longctx does not use it" * bad.is_avoided
            ending += f"; take {bad.fixed}" if bad.fixed else ""
            level = "note" if bad.is_avoided else "warning"
            told = f"{bad.what} ({bad.source}){ending}"
            found.append(Finding(level, f"{bad.package} {have}", told))
    return found or [Finding("ok", "no version here is known to be bad", "nothing to avoid")]


def is_hopper() -> bool:
    """Whether this machine's GPUs are of that generation."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
