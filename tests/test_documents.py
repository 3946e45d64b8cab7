"""What the documents say is so: links, commands, fields, the worked example, every message."""

import ast
import contextlib
import functools
import itertools
import re
import shlex
import shutil
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from longctx.cli import main
from longctx.config import decode, load_table
from longctx.config import overrides as command_line
from longctx.config.files import merge
from longctx.mixers import MixerConfig
from longctx.sequence.sharded import Transports
from longctx.train.settings import Settings
from tests.mixers import test_every_mixer as every_mixer
from tests.sequence.conform import run
from tests.sequence.matrix import Case, Setting
from tests.tolerances import LARGEST_ERROR

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
TABLES = set(Settings.__dataclass_fields__)
NO_FIELD = ("py", "md", "txt", "json", "jsonl", "toml", "sh", "png", "csv", "html", "safetensors")


def page(name: str) -> str:
    return (DOCS / name).read_text()


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """What headings can be linked by, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```|`[^`]*`", "", path.read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)]*)?\)", text):
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), target
        assert not anchor or anchor[1:] in anchors(found.read_text()), target + anchor


def test_the_index_names_every_document():
    index = page("README.md")
    for path in {*DOCS.rglob("*.md")} - {DOCS / "README.md"}:
        assert f"]({path.relative_to(DOCS)})" in index, path


# Commands


class ParsedError(BaseException):
    """The command line is understood; what follows would do the work."""


def commands_of(path: Path) -> list[list[str]]:
    """Commands in blocks for a shell and in indented lines, as words; a backslash goes on."""
    text = path.read_text()
    program = r"(?:[A-Z_]+=\S+ )*(?:longctx|launch/|torchrun|make )"
    indented = re.findall(rf"^    ({program}.*)$", text, re.MULTILINE)
    text = "\n".join([*blocks(text, "sh"), *indented]).replace("\\\n", " ")
    found = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words for words in found if words]


OF_NOW = [path for path in PAGES if path.parent in (ROOT, DOCS) and path.stem != "log"]
"""Pages that say how things are, not how they once were."""
ALL_COMMANDS = [(path, words) for path in OF_NOW for words in commands_of(path)]
STAND_IN = """
extends = "{base}"
[run]
name = "{name}"
[train]
batch_size = 64
"""


def given_files(path: Path, words: list[str], folder: Path) -> None:
    """Writes the configs that a page shows under the names in their first lines, and something in
    place of those that a command names as the reader's own."""
    for text in blocks(path.read_text(), "toml"):
        if named := re.match(r"# ([\w./-]+\.toml)\n", text):
            (folder / named[1]).write_text(text)
    for name in words:
        file = folder / name
        if name.endswith(".toml") and not file.exists() and not name.startswith("configs/"):
            file.parent.mkdir(exist_ok=True)
            base = ROOT / "configs" / "tiny.toml"
            file.write_text(STAND_IN.format(base=base, name=file.stem))


def as_longctx(words: list[str]) -> list[str] | None:
    """Arguments of the `longctx` that a command comes to, None if it is another program's."""
    words = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))
    if words[0] in ("launch/local.sh", "launch/ladder.sh"):
        rest = words[1:]
        count, rest = (rest[1], rest[2:]) if rest[0] == "-n" else ("1", rest)
        return ["check", rest[0], count, *rest[1:]]
    if words[0] == "launch/torchrun.sh":
        return ["train", *words[1:]]
    if "longctx" not in words:
        return None
    return words[words.index("longctx") + 1 :]


def understand(argv: list[str], monkeypatch) -> None:
    """Fails unless a command line is understood; does not do what it says."""
    if argv[0] == "launch":
        cut = argv.index("--") if "--" in argv else len(argv)
        assert main([*argv[:cut], "--dry-run", *argv[cut:]]) == 0
        return
    whole = command_line.decode

    def decode_and_stop(kind, table, file=""):
        decoded = whole(kind, table, file=file)
        if file == "command line":
            raise ParsedError
        return decoded

    monkeypatch.setattr(command_line, "decode", decode_and_stop)
    with contextlib.suppress(ParsedError, SystemExit):
        assert main(argv) == 0


@pytest.mark.parametrize(
    ("path", "words"), ALL_COMMANDS, ids=[f"{p.stem}: {' '.join(w)}" for p, w in ALL_COMMANDS]
)
def test_a_command_is_understood(path, words, tmp_path, monkeypatch, request):
    presets = {file.stem for file in (ROOT / "configs").glob("*.toml")}
    if words[0].startswith("launch/ladder.sh"):
        assert set(words[1 + 2 * (words[1] == "-n") :]) <= presets
        return
    argv = as_longctx(words)
    if argv is None:
        check_other(words)
        return
    if path.name == "mixers.md":
        request.getfixturevalue("example")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    given_files(path, words, tmp_path)
    monkeypatch.chdir(tmp_path)
    understand(argv, monkeypatch)


def check_other(words: list[str]) -> None:
    """What other programs are asked for exists: targets of make, extras, files, modules."""
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^(\w+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif program == "pip":
        extras = re.findall(r"longctx\[(\w+)\]", " ".join(rest))
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert set(extras) <= set(project["optional-dependencies"])
    elif program.startswith(("launch/", "docs/", "kernels/", "tests/")):
        assert (ROOT / program).is_file(), program
    for word in rest:
        if re.fullmatch(r"(launch|docs|kernels|tests)/[\w./]+", word):
            assert (ROOT / word).exists(), word
        if re.fullmatch(r"tests(\.\w+)+", word):
            file = ROOT / word.replace(".", "/")
            assert file.is_dir() or file.with_suffix(".py").exists(), word


def test_a_command_that_is_not_understood_is_noticed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for argv in (["train", "tinny"], ["train", "tiny", "--train.stepz", "1"], ["trian", "tiny"]):
        with pytest.raises(AssertionError):
            understand(argv, monkeypatch)


# Fields


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_fields_exist(path):
    text = path.read_text()
    named = re.findall(r"--((?:[a-z_]+\.)+\w+)", text)
    named += re.findall(rf"`((?:{'|'.join(TABLES)})\.[\w.]+)(?:`| =)", text)
    for name in named:
        if name.rpartition(".")[2] in NO_FIELD or name.split(".")[0] not in TABLES:
            continue
        assert field_exists(name), name


def field_exists(name: str) -> bool:
    table, *rest = name.split(".")
    if table == "model" and rest[0] == "mixers":
        kinds = MixerConfig.kinds().values()
        return len(rest) == 2 or any(rest[-1] in kind.__dataclass_fields__ for kind in kinds)
    return rest[0] in Settings.__dataclass_fields__[table].type.__dataclass_fields__


# The worked example


@pytest.fixture
def example():
    """The mixer that the page builds, registered for one test."""
    (code,) = blocks(page("mixers.md"), "python")
    module = types.ModuleType("longctx.mixers.forgetful")
    before = MixerConfig.kinds()
    sys.modules[module.__name__] = module
    try:
        exec(compile(code, "docs/mixers.md", "exec"), vars(module))
        yield module.ForgetfulConfig()
    finally:
        del sys.modules[module.__name__]
        MixerConfig._members.clear()
        MixerConfig._members.update(before)


def test_the_worked_mixer_passes_the_tests_that_it_would_be_given(example):
    for cuts in every_mixer.CUTS.values():
        every_mixer.test_fast_path_equals_per_token_reference(example, cuts)
    every_mixer.test_packed_documents_equal_separate_documents(example)
    every_mixer.test_no_output_sees_a_later_token(example, 40)
    every_mixer.test_last_output_reaches_every_token_it_claims_to_see(example)
    every_mixer.test_generation_equals_the_whole_sequence(example)
    every_mixer.test_flops_formula_counts_the_definition(example)
    every_mixer.test_autocast_keeps_the_answer(example)


@pytest.mark.parametrize(
    ("ranks", "placement", "transports", "length"),
    [
        (2, "zigzag", Transports(), 63),
        (3, "contiguous", Transports("scan"), 96),
        (4, "mirror", Transports("serial", heads=2), 63),
        (2, "contiguous", Transports("ulysses", heads=2), 63),
    ],
)
def test_the_worked_mixer_is_exact_under_any_split(example, ranks, placement, transports, length):
    setting = Setting(ranks, placement, transports)
    result = run(Case(f"{example.kind}-default", setting, length, "packed"))
    assert result.error <= LARGEST_ERROR["fp64"], result.worst
    assert not result.mismatch


def test_the_config_of_the_worked_mixer_is_one(example):
    (text,) = blocks(page("mixers.md"), "toml")
    table = tomllib.loads(text)
    base = load_table(ROOT / "configs" / table.pop("extends"))
    settings = decode(Settings, merge(base, table), file="docs/mixers.md")
    assert settings.model.mixers["L"].kind == example.kind


# Messages

ERRORS = {"InputError", "OutsideError", "DamageError"}
MAKERS = {"refusal", "tp_refusal", "refuse", "refuse_tp", "indivisible", "_first", "_mend"}
MAKERS |= {"_explain", "_message", "_contradictions", "_mismatch"}
"""Functions that make messages which others raise."""
MADE_ELSEWHERE = re.compile(
    r"error|reason|found\[|failed\[|_explain\(|_message\(|complaint|DamageError"
)
FIELD_NAME = re.compile(r"[\w.]+ = |\w+\.[\w.]*")
LEAST = 5
"""Letters of a fragment, and of a text that says something."""


def pieces(node: ast.AST, constants: dict[str, str]) -> list[str]:
    """Texts in an expression, each as long as nothing is put in."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.Name):
        return [constants[node.id]] if node.id in constants else []
    if isinstance(node, ast.JoinedStr):
        return [piece for value in node.values for piece in pieces(value, constants)]
    if isinstance(node, ast.FormattedValue):
        inner = node.value
        return pieces(inner, constants) if isinstance(inner, ast.Name | ast.IfExp) else []
    if isinstance(node, ast.BinOp | ast.IfExp | ast.Tuple | ast.List | ast.Dict | ast.BoolOp):
        return [p for child in ast.iter_child_nodes(node) for p in pieces(child, constants)]
    return []


def constants_of(tree: ast.Module) -> dict[str, str]:
    """Texts of a module in names of capital letters."""
    return {
        target.id: statement.value.value
        for statement in tree.body
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
        for target in statement.targets
        if isinstance(target, ast.Name) and isinstance(statement.value.value, str)
    }


@functools.cache
def parsed() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in sorted((ROOT / "longctx").rglob("*.py"))}


def kinds_of_errors() -> set[str]:
    """Names of the errors that become messages, and of those derived from them."""
    return ERRORS | {
        node.name
        for tree in parsed().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(isinstance(base, ast.Name) and base.id in ERRORS for base in node.bases)
    }


def called(node: ast.Call) -> str:
    """The name of what a call calls."""
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


@functools.cache
def messages() -> dict[str, list[str]]:
    """Where a message is made, and its texts."""
    found, kinds = {}, kinds_of_errors()
    for path, tree in parsed().items():
        constants = constants_of(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and called(node) in {*kinds, "warn"}:
                told = [p for argument in node.args for p in pieces(argument, constants)]
            elif isinstance(node, ast.FunctionDef) and node.name in MAKERS:
                returned = (child for child in ast.walk(node) if isinstance(child, ast.Return))
                told = [p for r in returned if r.value for p in pieces(r.value, constants)]
                if not says_something(told):
                    continue
            else:
                continue
            found[f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:400]}"] = told
    return found


def says_something(told: list[str]) -> bool:
    """Whether there are words other than names of fields."""
    return any(len(re.findall(r"[a-z]", FIELD_NAME.sub("", piece))) >= LEAST for piece in told)


def entries() -> list[str]:
    """Fragments of messages that the page explains: code in the first cells of its tables."""
    rows = re.findall(r"^\| (`.*?) \| ", page("troubleshooting.md"), re.MULTILINE)
    return [fragment for row in rows for fragment in re.findall(r"`([^`]+)`", row)]


def test_every_message_is_explained():
    fragments = entries()
    missing = [
        where
        for where, told in messages().items()
        if says_something(told) and not any(f in piece for f in fragments for piece in told)
    ]
    assert not missing, "docs/troubleshooting.md lacks:\n" + "\n".join(missing)


def test_a_message_without_a_text_of_its_own_hands_on_another():
    for where, told in messages().items():
        assert says_something(told) or MADE_ELSEWHERE.search(where), where


def texts_of_the_program() -> Iterator[str]:
    for tree in parsed().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
    for path in [
        *(ROOT / "kernels" / "longctx_kernels").rglob("*.py"),
        *(ROOT / "launch").iterdir(),
    ]:
        yield path.read_text()


def test_every_explained_message_exists():
    texts = "\0".join(set(texts_of_the_program()))
    for fragment in entries():
        assert len(fragment) >= LEAST, fragment
        assert fragment in texts, fragment


def test_no_message_is_explained_twice():
    fragments = entries()
    assert len(fragments) == len(set(fragments))
