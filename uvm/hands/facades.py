"""What `self.files` is inside a hand: a facade whose verbs ask the kernel's broker, each use on its own.

It holds no power of its own: a name of the grant, and the way to ask. Runs in the child; imports the table of
kinds and the errors alone.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

from uvm.capabilities import KINDS
from uvm.errors import ValueNotStorable

Use = Callable[[str, list[Any], dict[str, Any]], dict[str, Any]]  # verb, args, kwargs -> the broker's answer


class Facade:
    """A grant, as a method sees it.

    Args:
        kind: one of `KINDS`.
        name: how the method calls it: `self.files`.
        use: carries a use out and returns `{ok: value}` or `{error: {type, message}}`.
    """

    __slots__ = ("_kind", "_name", "_use")

    def __init__(self, kind: str, name: str, use: Use) -> None:
        self._kind = kind
        self._name = name
        self._use = use

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        kind = KINDS[self._kind]
        if kind.called or verb not in kind.verbs:
            offered = ", ".join(kind.offered(self._name.removeprefix("self.")))
            raise AttributeError(f"{self._name} has no {verb!r:.60}; it offers {offered}")
        return lambda *args, **kwargs: self._carry_out(verb, args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not KINDS[self._kind].called:
            offered = ", ".join(KINDS[self._kind].offered(self._name.removeprefix("self.")))
            raise TypeError(f"{self._name} can't be called itself; it offers {offered}")
        return self._carry_out(self._kind, args, kwargs)

    def __repr__(self) -> str:
        return f"<grant {self._name}>"

    def _carry_out(self, verb: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            answer = self._use(verb, list(args), kwargs)
        except ValueNotStorable as error:
            raise TypeError(f"{self._name}: {error.message}") from None
        if "ok" in answer:
            return answer["ok"]
        told = answer["error"]
        raise getattr(builtins, told["type"])(told["message"])
