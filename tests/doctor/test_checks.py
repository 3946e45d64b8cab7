"""Each check, on machines that are made up, and how checks are run and shown."""

import fcntl
import shutil
import time
from collections import namedtuple
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from longctx.doctor import machine, services, storage, versions
from longctx.doctor.command import local_checks
from longctx.doctor.config_checks import checkpoint_bytes, config_fits
from longctx.doctor.findings import Finding, as_record, as_text, exit_code, run_checks
from longctx.doctor.known_bad import KNOWN_BAD, as_numbers
from longctx.train.settings import load_settings

GIB = 2**30
Usage = namedtuple("Usage", "total used free")


def levels(findings):
    return [finding.level for finding in findings]


def test_a_check_that_fails_or_hangs_is_a_finding_and_the_others_run():
    def broken():
        raise ValueError("no\nsuch thing")

    def endless():
        time.sleep(5)
        return []

    def fine():
        return [Finding("ok", "a", "b")]

    checks = [broken, endless, partial(broken)]
    found = run_checks({"one": checks, "two": [fine]}, seconds=0.05)
    assert found.pop(2) == found[0]
    assert levels(found) == ["warning", "warning", "ok"]
    assert "check broken: failed (ValueError: no such thing)" in str(found[0])
    assert "check endless: no answer within 0.05 s" in str(found[1])
    assert [finding.group for finding in found] == ["one", "one", "two"]


@pytest.mark.parametrize(
    ("worst", "code"), [("ok", 0), ("note", 0), ("warning", 0), ("problem", 1)]
)
def test_only_a_problem_is_a_failure(worst, code):
    found = [Finding("ok", "a", "b", "g"), Finding(worst, "c", "d", "g")]
    assert exit_code(found) == code
    assert as_record(found)["worst"] == worst
    text = as_text(found, "title")
    assert text.count("\ng\n") == 1
    assert f"  {worst:8} c: d" in text


def test_versions_compare_by_their_numbers():
    assert as_numbers("2.13.0+cu126") == (2, 13)
    assert as_numbers("0.5.2rc1") == (0, 5, 2)
    assert as_numbers("2.9") < as_numbers("2.10")


@pytest.mark.parametrize(
    ("package", "version", "hopper", "level"),
    [
        ("torch", "2.7.0+cu126", False, "warning"),
        ("torch", "2.7.1", False, "warning"),
        ("torch", "2.13.0", False, "ok"),
        ("nccl", "2.29.2", False, "warning"),
        ("nccl", "2.29.3", False, "ok"),
        ("triton", "3.6.0", True, "warning"),
        ("triton", "3.6.0", False, "ok"),
        ("triton", "3.7.1", True, "ok"),
        ("fla-core", "0.5.1", False, "note"),
        ("fla-core", "0.5.2", False, "ok"),
    ],
)
def test_versions_in_a_known_bad_range_are_told_with_a_source(package, version, hopper, level):
    found = versions.known_bad_among({package: version}, hopper)
    assert set(levels(found)) == {level}
    if level != "ok":
        assert any(bad.source in str(found) for bad in KNOWN_BAD)


def test_leaks_of_old_torch_are_told_beside_other_faults():
    found = versions.known_bad_among({"torch": "2.6.0"}, False)
    assert "leaks 4 GB" in str(found)
    assert "CVE-2026-24747" in str(found)


def test_a_torch_outside_of_the_range_is_a_warning(monkeypatch):
    have = {"torch": "2.4.0", "triton": ""}
    monkeypatch.setattr(versions, "installed", lambda package: have.get(package, "1"))
    found = versions.required_versions()
    assert levels(found) == ["ok", "warning", "warning"]
    assert "tested with torch" in str(found[1])


def test_a_missing_package_says_what_it_forbids_and_how_to_get_it(monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda package: "" if package == "wandb" else "1")
    (missing,) = [f for f in versions.optional_packages() if f.level != "ok"]
    assert str(missing) == "wandb missing: no log.wandb; pip install wandb"


def test_a_gpu_that_torch_cannot_use_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_query", lambda fields: [])
    assert levels(machine.devices(1)) == ["note"]
    monkeypatch.setattr(machine, "_query", lambda fields: ["NVIDIA H200"] * 2)
    monkeypatch.setattr(torch.version, "cuda", None)
    (found,) = machine.devices(1)
    assert found.level == "problem"
    assert "2 x NVIDIA H200" in found.found
    assert "no CUDA" in found.meaning


def pretend_gpus(monkeypatch, count, capability=(9, 0), query=(), built=("sm_75", "sm_90a")):
    properties = namedtuple("Properties", "name total_memory major minor")
    own = properties("NVIDIA H200", 141 * GIB, *capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: own)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built))
    monkeypatch.setattr(machine, "_query", lambda fields: list(query))


def test_gpus_are_told_with_memory_errors_parts_and_processes_without_one(monkeypatch):
    pretend_gpus(monkeypatch, 2, query=["0, Disabled", "3, Enabled"])
    found = machine.devices(2)
    assert levels(found) == ["ok", "ok", "problem", "warning"]
    assert "GPU 0: NVIDIA H200, 141 GiB, 9.0" in found[0].found
    assert levels(machine.devices(4))[-1] == "problem"
    pretend_gpus(monkeypatch, 1, query=["Unable to determine the device handle"])
    assert levels(machine.devices(1)) == ["ok"]


@pytest.mark.parametrize(("capability", "level"), [((7, 5), "warning"), ((6, 1), "problem")])
def test_an_old_gpu_forbids_bf16_or_all(monkeypatch, capability, level):
    pretend_gpus(monkeypatch, 1, capability)
    assert levels(machine.devices(1)) == [level]


@pytest.mark.parametrize(
    ("capability", "built", "level"),
    [
        ((10, 0), ("sm_80", "sm_90"), "problem"),
        ((10, 0), ("sm_80", "sm_90a"), "problem"),
        ((10, 0), ("sm_80", "compute_90"), "ok"),
        ((12, 1), ("sm_90", "sm_120"), "ok"),
        ((8, 9), ("sm_80", "sm_90"), "ok"),
        ((8, 0), ("sm_86", "sm_90"), "problem"),
    ],
)
def test_a_gpu_that_torch_was_not_built_for_is_a_problem(monkeypatch, capability, built, level):
    pretend_gpus(monkeypatch, 1, capability, built=built)
    assert levels(machine.devices(1)) == [level]


def test_without_a_compiler_nothing_is_built(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert levels(machine.compiler()) == ["note"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert levels(machine.compiler()) == ["problem"]


def test_limits_of_a_control_group_are_told(monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "free_memory", lambda: GIB)
    found = machine.cores_and_memory()
    assert levels(found) == ["ok", "warning", "warning"]
    assert "0.5 cores" in found[1].found
    assert "1.0 by its control group" in found[2].found


def test_small_limits_are_told(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 * 2**20, 0, 0))
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (1024, 8192))
    monkeypatch.setattr(machine, "INFINIBAND", Path("/"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory, files, locked = machine.limits()
    assert (memory.level, files.level, locked.level) == ("warning", "note", "warning")
    assert "ulimit -n 8192" in files.meaning


def test_an_interface_that_is_not_here_is_a_problem(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert "problem" not in levels(machine.network())
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,nothere7")
    assert levels(machine.network())[0] == "problem"


@pytest.mark.parametrize(
    ("told", "is_there"),
    [("l", True), ("en,l", True), ("=lo", True), ("=l", False), ("en", False), ("^en", True)],
)
def test_nccl_is_told_beginnings_of_names(monkeypatch, told, is_there):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(machine.socket, "if_nameindex", lambda: [(1, "lo"), (2, "ib0")])
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", told)
    assert levels(machine.network())[0] == ("ok" if is_there else "problem")


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    assert levels(storage.what_files_can(tmp_path / "runs" / "new")) == ["ok"]
    found = storage.space_and_speed(tmp_path / "runs", "tiny", 1000)
    assert found[0].level == "ok"
    assert storage.write_speed(tmp_path, 2**20) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_slow_keeps_no_file(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(storage.os, "fsync", lambda _: seen.extend(tmp_path.iterdir()))
    monkeypatch.setattr(
        storage, "sync_path", lambda _: seen.extend(tmp_path.iterdir()), raising=False
    )
    storage.write_speed(tmp_path, 2**20)
    assert seen == []


def test_a_folder_that_cannot_be_made_is_a_problem(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (found,) = storage.what_files_can(tmp_path / "file" / "run")
    assert found.level == "problem"
    assert "Not a directory" in found.meaning
    monkeypatch.setattr(storage, "nearest_folder", mock.Mock(side_effect=PermissionError(13, "no")))
    assert levels(storage.what_files_can(tmp_path / "run")) == ["problem"]


def test_a_tilde_is_no_home_as_it_is_none_to_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.nearest_folder(Path("~/run")) == tmp_path


def test_room_is_that_of_the_checkpoints(tmp_path):
    settings = load_settings("tiny")
    elsewhere = replace(settings.checkpoint, dir=str(tmp_path / "kept"))
    checks = local_checks(replace(settings, checkpoint=elsewhere), "")["storage"]
    assert checks[-1].args[0] == tmp_path / "kept"
    (found,) = storage.space_and_speed("s3://user:topsecret@bucket/x", "tiny", 1)
    assert found.level == "note"
    assert "topsecret" not in str(found)


def test_a_folder_that_takes_no_files_is_a_problem(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (found,) = storage.what_files_can(tmp_path)
    assert found.level == "problem"
    assert "Function not implemented" in found.meaning


def test_a_full_or_slow_disk_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(GIB, 0, 10**6))
    (full,) = storage.space_and_speed(tmp_path, "7b", 10**9)
    assert full.level == "problem"
    monkeypatch.setattr(storage, "write_speed", lambda folder, size: 1e3)
    room, slow = storage.space_and_speed(tmp_path, "7b", 900_000)
    assert (room.level, slow.level) == ("warning", "warning")
    assert "900.0 s" in slow.meaning


def test_file_systems_that_lose_or_share_files_are_told(tmp_path, monkeypatch):
    mounts = tmp_path / "mounts"
    monkeypatch.setattr(storage, "MOUNTS", mounts)
    for kind, level in (("tmpfs", "note"), ("nfs4", "ok"), ("ext4", "ok")):
        mounts.write_text(f"x / ext4 rw 0 0\nx {tmp_path} {kind} rw 0 0\n")
        (found,) = storage.kind_of_storage(tmp_path / "runs")
        assert found.level == level
        assert f"on {kind} at {tmp_path}" in found.found


def test_slurm_is_told_by_its_commands_and_the_job(monkeypatch):
    have = set()
    monkeypatch.setattr(services.shutil, "which", lambda name: name if name in have else None)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert levels(services.slurm()) == ["note"]
    have |= {"sbatch", "srun"}
    assert levels(services.slurm()) == ["warning"]
    have |= set(services.SLURM_COMMANDS)
    monkeypatch.setattr(services, "_partitions", lambda: ["debug", "long"])
    assert "partitions debug, long" in services.slurm()[0].found
    monkeypatch.setattr(services, "_partitions", list)
    assert levels(services.slurm()) == ["note"]
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_PARTITION", "debug")
    assert "SLURM job 17 in partition debug" in services.slurm()[0].found
    have.clear()
    assert levels(services.slurm()) == ["warning"]


def test_wandb_is_told_without_its_key(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(services, "installed", lambda package: "0.31")
    assert levels(services.wandb("disabled")) == ["ok"]
    assert levels(services.wandb("offline")) == ["ok"]
    assert levels(services.wandb("online")) == ["warning"]
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password topsecret\n")
    assert levels(services.wandb("online")) == ["ok"]
    monkeypatch.setenv("WANDB_API_KEY", "topsecret")
    assert "topsecret" not in str(services.wandb("online"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "WANDB_MODE = 'offline'" in services.wandb("online")[0].found
    monkeypatch.setattr(services, "installed", lambda package: "")
    assert levels(services.wandb("online")) == ["problem"]


def test_a_config_that_cannot_be_split_so_is_a_problem():
    settings = load_settings("tiny")
    assert levels(config_fits(settings, "tiny", 2)) == ["ok"]
    (found,) = config_fits(settings, "tiny", 3)
    assert found.level == "problem"
    assert "batch_size" in found.meaning
    assert checkpoint_bytes(settings) == 12 * 871168
