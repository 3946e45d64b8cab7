"""Open registries of config classes, keyed by `kind`."""

from typing import Any, ClassVar, Self


class Registered:
    """Base of open registries: each direct subclass is one, and its subclasses join it by `kind`.

    A family is declared with `class MixerConfig(Registered)` and a member with
    `class LinearConfig(MixerConfig, kind="linear")`; a member without `kind` is abstract.
    """

    kind: ClassVar[str]
    _members: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, kind: str = "", **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if Registered in cls.__bases__:
            cls._members = {}
        if not kind and "kind" in vars(cls):
            raise TypeError(f"{cls.__name__}: give kind as a class argument, and no slots=True")
        if kind in cls._members:
            raise TypeError(f"kind {kind!r} is taken by {cls._members[kind].__name__}")
        if kind:
            cls.kind = kind
            cls._members[kind] = cls

    @classmethod
    def kinds(cls) -> dict[str, type[Self]]:
        """The registered members of this family."""
        return dict(cls._members)
