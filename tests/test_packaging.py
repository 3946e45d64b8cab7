"""What pyproject.toml says about packages, and what is on the disk; presets."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import pytest

from longctx.cli import main
from longctx.config import decode
from longctx.train.settings import Settings, load_settings

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PRESETS = sorted((ROOT / "configs").glob("*.toml"))
NOT_NEEDED = (
    *("datasets", "tokenizers", "wandb", "matplotlib", "triton"),
    *("transformers", "deepspeed", "megatron", "fla"),
)
IMPORT_ALL = """
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))
import longctx
for module in pkgutil.walk_packages(longctx.__path__, "longctx."):
    if module.name != "longctx.__main__":
        importlib.import_module(module.name)
"""


def folder_of(package: str) -> Path:
    mapped = SETUPTOOLS["package-dir"].get(package)
    return ROOT / (mapped or package.replace(".", "/"))


def packages_below(folder: Path) -> set[str]:
    files = [path.parent for path in folder.rglob("*.py")]
    return {".".join(parent.relative_to(folder.parent).parts) for parent in files}


def test_the_list_of_packages_equals_the_folders_on_disk():
    kernels = packages_below(ROOT / "kernels" / "longctx_kernels")
    mapped = {"longctx.configs", "longctx.launch.scripts"}
    mapped |= {"longctx.configs.clusters", "longctx.configs.studies"}
    on_disk = packages_below(ROOT / "longctx") | kernels | mapped
    assert set(SETUPTOOLS["packages"]) == on_disk
    assert len(SETUPTOOLS["packages"]) == len(on_disk)


def test_every_file_of_a_package_that_is_not_python_is_package_data():
    for package in SETUPTOOLS["packages"]:
        patterns = SETUPTOOLS["package-data"].get(package, [])
        for path in folder_of(package).iterdir():
            if path.is_file() and path.suffix != ".py":
                assert any(fnmatch(path.name, pattern) for pattern in patterns), path


def test_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow a package of that name"


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}
    return {name.split(".")[0] for name in names}


def test_kernels_import_only_torch_and_triton_and_fla_inside_functions():
    allowed = {"torch", "triton", "longctx_kernels"} | sys.stdlib_module_names
    for path in (ROOT / "kernels" / "longctx_kernels").rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert imported(tree.body) <= allowed, path
        assert imported(list(ast.walk(tree))) <= allowed | {"fla"}, path


def test_every_module_imports_without_optional_packages():
    command = [sys.executable, "-c", IMPORT_ALL, *NOT_NEEDED]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_found_by_name_and_round_trips_through_print_config(preset, capsys):
    settings = load_settings(str(preset))
    assert load_settings(preset.stem) == settings
    assert main(["train", preset.stem, "--print-config"]) == 0
    printed = tomllib.loads(capsys.readouterr().out)
    assert decode(Settings, printed) == settings


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_says_what_it_is_and_is_named_after_its_file(preset):
    assert preset.read_text().startswith("# ")
    assert load_settings(str(preset)).run.name == preset.stem
