"""Config files that come with longctx, which users may call by their names."""

from pathlib import Path
from typing import Literal

from longctx.errors import InputError

FOLDERS = {"preset": "", "cluster": "clusters", "study": "studies"}
"""Below configs, by what files in them are called."""


def find_config(name: str | Path, kind: Literal["preset", "cluster", "study"]) -> Path:
    """The file of that name, or the one of that kind that comes with longctx."""
    path, known = Path(name), _packaged(FOLDERS[kind])
    if path.is_file():
        return path
    if not path.exists() and path.parent == Path() and path.stem in known:
        return known[path.stem]
    raise InputError(f"{name}: no such file or {kind} (there are: {', '.join(known)})")


def packaged(name: str) -> Path | None:
    """The file of whatever kind that comes with longctx under that name."""
    found = (_packaged(folder).get(Path(name).stem) for folder in FOLDERS.values())
    return next(filter(None, found), None) if Path(name).parent == Path() else None


def _packaged(folder: str) -> dict[str, Path]:
    """Inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).parents[1]
    configs = package / "configs"
    if not configs.is_dir():
        configs = package.parent / "configs"
    return {path.stem: path for path in sorted((configs / folder).glob("*.toml"))}
