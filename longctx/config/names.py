"""Dotted names of fields: joining them, and suggesting the nearest one."""

import difflib
from collections.abc import Iterable


def join(path: str, name: str) -> str:
    """The dotted name of a field in the table at `path`, which is empty at the root."""
    return f"{path}.{name}" if path else name


def suggest(name: str, known: Iterable[str]) -> str:
    """A message's tail that offers the known name nearest to a wrong one, if one is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; nearest: {matches[0]}" if matches else ""
