"""Hides secrets in whatever a run tells: config, command line, messages of errors.

A secret is the value of a name that ends in `_key` or `_token`, or has `secret`, `password` or
`credential` in it, and what stands before the @ of a URL.
"""

import re
from typing import Any

HIDDEN = "[redacted]"
_NAME = r"[\w.-]*(?:[_-](?:key|token)|apikey|secret[\w-]*|passw(?:or)?d[\w-]*|credentials?[\w-]*)"
_IN_QUERY = r"[?&;](?:[\w.-]*(?:key|key_?id|token|signature|sig))"
_VALUE = r"(?:\"[^\"]*\"|'[^']*'|[^\s&;,\"')]+)"
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
_ASSIGNED = re.compile(rf"({_IN_QUERY}=|\b{_NAME}['\"]?\s*[=:]\s*){_VALUE}", re.IGNORECASE)
_OPTION = re.compile(rf"(--{_NAME}\s+){_VALUE}", re.IGNORECASE)
_USER_OF_URL = re.compile(r"://(?:[^\s/@]+@|[^\s/@:]+:[^\s@]+@)")
_BEARER = re.compile(r"\b(bearer\s+)[\w.~+/-]{8,}=*", re.IGNORECASE)


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
    return text
