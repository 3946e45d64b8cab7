"""Which GPUs of this machine each cell gets."""

from collections.abc import Iterable


class Gpus:
    """GPUs, of which each cell gets those that the fewest others use; there may be none."""

    def __init__(self, names: Iterable[str]):
        self._users = dict.fromkeys(names, 0)

    def take(self, count: int) -> tuple[str, ...]:
        """So many, or as many as there are."""
        taken = tuple(sorted(self._users, key=self._users.__getitem__)[:count])
        for name in taken:
            self._users[name] += 1
        return taken

    def give_back(self, taken: Iterable[str]) -> None:
        """What `take` returned."""
        for name in taken:
            self._users[name] -= 1
