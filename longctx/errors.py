"""The two ways a command can fail; each message is one line that says how to mend it."""


class InputError(Exception):
    """The user's config, path or checkpoint is wrong: exit code 2."""


class OutsideError(Exception):
    """Something outside the program failed (disk, network, device): exit code 1."""
