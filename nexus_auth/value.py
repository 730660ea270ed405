"""Values: small objects that do not change, and are compared by what is in them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, ClassVar, NoReturn, TypeVar

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_):
        """Return a decorator that does nothing: only type checkers need the one of Python 3.11."""
        return lambda kind: kind


V = TypeVar("V", bound="Value")


@dataclass_transform(frozen_default=True)
class Value:
    """The base of a frozen value, whose fields are what its class annotates; `hidden` ones do not show in its repr.

    Subclasses are to be read as frozen dataclasses. Those take 0.3 ms each to import, and the first 2 ms more, since
    `dataclass` writes six methods and compiles them: thirty would start a script a tenth later.
    """

    _names: ClassVar[tuple[str, ...]] = ()
    _defaults: ClassVar[Mapping[str, object]] = {}
    _hidden: ClassVar[Collection[str]] = ()

    def __init_subclass__(cls, *, hidden: Collection[str] = ()) -> None:
        cls._names = tuple(cls.__annotations__)
        cls._defaults = {name: getattr(cls, name) for name in cls._names if hasattr(cls, name)}
        cls._hidden = hidden
        setattr(cls, "__match_args__", cls._names)  # noqa: B010  # type checkers know it, and want no assignment

    def __init__(self, *args: object, **kwargs: object) -> None:
        names = self._names
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        fields = {**self._defaults, **given}
        if len(given) != len(args) + len(kwargs) or fields.keys() != set(names):
            raise TypeError(f"{type(self).__name__} takes {', '.join(names)}")
        for name in names:  # not by `vars`: CPython looks up attributes faster while nobody has asked for that dict
            object.__setattr__(self, name, fields[name])

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} does not change")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} does not change")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))

    def __repr__(self) -> str:
        shown = (f"{name}={getattr(self, name)!r}" for name in self._names if name not in self._hidden)
        return f"{type(self).__name__}({', '.join(shown)})"


def replace(value: V, **changes: object) -> V:
    """Return `value` with some fields changed."""
    return type(value)(**{**vars(value), **changes})
