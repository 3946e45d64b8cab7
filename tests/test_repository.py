"""Promises about the repository as a whole: its README, its size, its configuration."""

import ast
import functools
import inspect
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from longctx.cli import main
from longctx.config import Registered
from longctx.data.inspect import InspectConfig
from longctx.data.statistics import StatsConfig
from longctx.data.tokenize import TokenizeConfig
from longctx.data.vocabulary import TrainTokenizerConfig
from longctx.doctor.command import DoctorConfig
from longctx.eval.generate import GenerateConfig
from longctx.launch.slurm import SlurmConfig
from longctx.plan.command import PlanConfig
from longctx.report.page import ReportConfig
from longctx.study.design import StudyConfig
from longctx.train.settings import Settings, load_settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SOURCES = sorted((ROOT / "longctx").rglob("*.py"))
MOST_LINES = 350
CHECKS = {"__post_init__", "check"}


def block_after(heading: str, fence: str) -> str:
    """The first fenced block below a heading of the README."""
    section = README.split(f"\n## {heading}\n")[1]
    return section.split(f"\n```{fence}\n")[1].split("\n```")[0]


def readme_map() -> list[str]:
    """Paths of the README's map, resolved through its indentation."""
    paths: list[str] = []
    parents: dict[int, str] = {}
    for line in block_after("Map", "").splitlines():
        indent = len(line) - len(line.lstrip())
        above = [path for depth, path in parents.items() if depth < indent]
        path = (above[-1] if above else "") + line.split()[0]
        parents = {depth: p for depth, p in parents.items() if depth < indent} | {indent: path}
        paths.append(path)
    return paths


def tracked_top_level() -> set[str]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {line.split("/")[0] for line in listed.splitlines()}


def config_classes(annotation: Any, found: set[type]) -> set[type]:
    """Adds to `found` every config dataclass that a field of this type can hold."""
    is_family = isinstance(annotation, type) and issubclass(annotation, Registered)
    for cls in annotation.kinds().values() if is_family else [annotation]:
        if is_dataclass(cls) and cls not in found:
            found.add(cls)
            for hint in get_type_hints(cls).values():
                config_classes(hint, found)
    for argument in get_args(annotation):
        config_classes(argument, found)
    return found


COMMANDS = (
    Settings,
    DoctorConfig,
    GenerateConfig,
    PlanConfig,
    ReportConfig,
    SlurmConfig,
    StudyConfig,
    TokenizeConfig,
    InspectConfig,
    StatsConfig,
    TrainTokenizerConfig,
)
ALL_CONFIGS = sorted(
    {cls for command in COMMANDS for cls in config_classes(command, set())},
    key=lambda cls: cls.__name__,
)


def field_docstrings(cls: type) -> dict[str, str]:
    """Docstrings of a dataclass's fields, inherited ones too, with white space normalised."""
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if is_dataclass(base)]):
        (definition,) = ast.parse(inspect.cleandoc(inspect.getsource(base))).body
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if isinstance(statement, ast.AnnAssign) and is_text:
                found[statement.target.id] = " ".join(following.value.value.split())
    return found


@functools.cache
def attributes_read() -> frozenset[str]:
    """Names of attributes that longctx reads, other than where a config checks itself."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef) and node.name in CHECKS:
            return
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    return frozenset(name for path in SOURCES for name in visit(ast.parse(path.read_text())))


def without_layout(text: str) -> str:
    """Letters, digits and signs only: help is wrapped and framed to fit a terminal."""
    return re.sub(r"[\s│╭╮╰╯─]", "", text)


def test_the_example_in_the_readme_runs():
    names: dict[str, Any] = {}
    exec(block_after("One mixer in your own model", "python"), names)
    assert names["y"].shape == (2, 100, 512)
    names["y"].sum().backward()


def test_the_map_in_the_readme_names_what_exists():
    for path in readme_map():
        assert (ROOT / path).exists(), path
        assert path.endswith("/") == (ROOT / path).is_dir(), path


def test_the_map_in_the_readme_names_everything_at_the_top_and_every_folder_of_the_library():
    named = {path.rstrip("/") for path in readme_map()}
    assert tracked_top_level() - {".gitignore"} <= named
    folders = {path.parent for path in SOURCES} - {ROOT / "longctx"}
    assert {str(folder.relative_to(ROOT)) for folder in folders} <= named


def test_the_readme_describes_every_table():
    for field in fields(Settings):
        assert f"| `[{field.name}]` |" in README


def test_the_readme_names_every_preset():
    for path in (ROOT / "configs").glob("*.toml"):
        assert f"`{path.stem}`" in README


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_of_the_library_is_short(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_only_processes_and_their_groups_read_environment_variables():
    allowed = {*(ROOT / "longctx" / "parallel").glob("*.py"), ROOT / "longctx" / "orphans.py"}
    for path in set(SOURCES) - allowed:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            assert not {"environ", "environb", "getenv", "getenvb"} & set(names), path


def test_a_mixer_imports_no_process_group_no_trainer_and_no_other_mixer():
    sources = {path: path.read_text() for path in (ROOT / "longctx" / "mixers").glob("*.py")}
    mixers = [path.stem for path, text in sources.items() if ", kind=" in text]
    assert {"linear", "softmax"} <= set(mixers)
    forbidden = re.compile(
        rf"torch\.distributed|longctx\.(train|parallel|mixers\.({'|'.join(mixers)})\b)"
    )
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            assert not [name for name in names if forbidden.match(name)], path


@pytest.mark.parametrize("cls", ALL_CONFIGS, ids=lambda cls: cls.__name__)
def test_every_field_of_a_config_is_read(cls):
    assert {field.name for field in fields(cls)} <= attributes_read()


@pytest.mark.parametrize(
    "cls", [cls for cls in ALL_CONFIGS if cls is not Settings], ids=lambda cls: cls.__name__
)
def test_every_field_of_a_config_has_a_docstring(cls):
    assert {field.name for field in fields(cls)} <= set(field_docstrings(cls))


@pytest.mark.parametrize("preset", ["tiny"])
def test_help_shows_every_field_with_its_docstring(preset, capsys):
    with pytest.raises(SystemExit):
        main(["train", preset, "--help"])
    shown = without_layout(capsys.readouterr().out)

    def check(config: Any, path: str) -> None:
        for field in fields(config):
            value, name = getattr(config, field.name), f"{path}{field.name}"
            if is_dataclass(value):
                check(value, f"{name}.")
            elif isinstance(value, dict):
                for key, item in value.items():
                    check(item, f"{name}.{key}.")
            else:
                assert without_layout(f"--{name}") in shown
                assert without_layout(field_docstrings(type(config))[field.name]) in shown, name

    check(load_settings(preset), "")


def test_unfinished_work_names_its_issue():
    marks = re.compile(r"\b(TO" r"DO|FIX" r"ME)\b(?!\(#\d+\))")
    folders = ("longctx", "kernels", "tests", "configs", "launch", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in [*files, ROOT / "Makefile", ROOT / "pyproject.toml"]:
        if "__pycache__" not in path.parts:
            assert not marks.search(path.read_text()), path
