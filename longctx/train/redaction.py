"""Hides secrets in whatever a run tells: config, command line, messages of errors.

A secret is the value of a name that ends in `_key` or `_token`, or has `secret`, `password` or
`credential` in it, what stands before the @ of a URL, and a token whose kind its beginning tells.
"""

import re
from typing import Any

HIDDEN = "[redacted]"
_TAIL = r"[\w-]{0,64}"
_ENDING = rf"(?:(?<=\w)[_-](?:key|token)|apikey|(?:secret|passw(?:or)?d|credential){_TAIL})"
"""What a name of a secret ends with; bounds keep the time of a search in proportion to the text."""
_IN_QUERY = r"[?&;][\w.-]{0,64}(?:key|key_?id|token|signature|sig)"
_VALUE = r"(?:\"[^\"]*\"|'[^']*'|[^\s&;,\"')]+)"
_IS = rf"{_ENDING}['\"]?\s{{0,9}}[=:]\s{{0,9}}"
_SECRET_NAME = re.compile(rf"[\w.-]*{_ENDING}", re.IGNORECASE)
_ASSIGNED = re.compile(rf"({_IN_QUERY}=|{_IS}){_VALUE}", re.IGNORECASE)
_WRITTEN_OUT = re.compile(rf"({_IS})(?:\"[^\"\n]+\"|'[^'\n]+')", re.IGNORECASE)
_OPTION = re.compile(rf"(--[\w.-]{{0,80}}{_ENDING}\s{{1,9}}){_VALUE}", re.IGNORECASE)
_USER_OF_URL = re.compile(r"://(?:[^\s/@]{1,999}@|[^\s/@:]{1,99}:[^\s@]{1,999}@)")
_BEARER = re.compile(
    r"\b((?:bearer|authorization:\s{0,9}basic)\s{1,9})[\w.~+/-]{8,}=*", re.IGNORECASE
)
_KNOWN = re.compile(r"\b(?:hf_|gh[pousr]_|glpat-|sk-|AKIA)[\w-]{16,}")
"""Tokens that tell by their beginning what they are."""


def redact(value: Any) -> Any:
    """The same, a text or tables and lists of anything, with every secret in it hidden.

    Numbers are only hidden as a secret or password: `bytes_per_token` is none.
    """
    if isinstance(value, str):
        return _redact_text(value)
    if isinstance(value, dict):
        return {key: _redact_value(key, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        words = _redact_words(value)
        return words if isinstance(value, list) else tuple(words)
    return value


def redact_source(text: str) -> str:
    """Source code with secrets that are written out hidden; `api_key = read()` stays."""
    text = _USER_OF_URL.sub(f"://{HIDDEN}@", text)
    text = _WRITTEN_OUT.sub(rf'\g<1>"{HIDDEN}"', text)
    return _KNOWN.sub(HIDDEN, _BEARER.sub(rf"\g<1>{HIDDEN}", text))


def _redact_value(key: Any, value: Any) -> Any:
    name = str(key)
    if value is None or value == "" or isinstance(value, bool) or not _is_secret(name):
        return redact(value)
    is_number = isinstance(value, int | float)
    return value if is_number and name.lower().endswith(("key", "token")) else HIDDEN


def _is_secret(name: str) -> bool:
    return _SECRET_NAME.fullmatch(name) is not None


def _redact_words(words: Any) -> list[Any]:
    """Words of a command line too, where a secret follows the option that names it."""
    redacted, follows_secret = [], False
    for word in words:
        is_option = isinstance(word, str) and word.startswith("--")
        if is_option:
            follows_secret = _is_secret(word[2:])
        redacted.append(HIDDEN if follows_secret and not is_option else redact(word))
    return redacted


def _redact_text(text: str) -> str:
    text = _USER_OF_URL.sub(f"://{HIDDEN}@", text)
    for pattern in (_ASSIGNED, _OPTION, _BEARER):
        text = pattern.sub(rf"\g<1>{HIDDEN}", text)
    return _KNOWN.sub(HIDDEN, text)
