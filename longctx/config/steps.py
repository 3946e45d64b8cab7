"""Steps as people write them: one, or a range of them."""

import re

from longctx.errors import InputError


def range_of_steps(text: str, field: str) -> range:
    """The steps of `120-140` or `200`; they count from 1. `field` is whose value this is."""
    found = re.fullmatch(r"([1-9][0-9]*)(?:-([1-9][0-9]*))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if first > last:
        raise InputError(
            f"{field}: {text!r} is neither a step nor a range such as 120-140 (on the "
            f"command line: --{field} 120-140 200)"
        )
    return range(first, last + 1)
