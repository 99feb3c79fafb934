"""What there is to talk about: the objects of a kernel, their methods and the parameters of these.

The parser offers the model nothing that is not in here. Imports the errors only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from uvm.errors import InvalidField

HOME = "genesis_obj"  # the object that learns what is asked of nobody in particular
Parameters = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Method:
    """A method, and an object that understands it."""

    target: str
    selector: str
    parameters: Parameters

    @property
    def name(self) -> str:
        """The method as people write it: `shop_obj.total`."""
        return f"{self.target}.{self.selector}"

    def __str__(self) -> str:
        return f"{self.name}({', '.join(self.parameters)})"


class Context:
    """The objects that exist, with the methods of each.

    Args:
        objects: name -> selector -> names of the parameters; the object's own methods.
        parents: name -> names of the objects that it delegates to, as far as known.
    """

    def __init__(
        self,
        objects: Mapping[str, Mapping[str, Sequence[str]]],
        parents: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.objects: dict[str, dict[str, Parameters]] = {
            name: {selector: tuple(parameters) for selector, parameters in methods.items()}
            for name, methods in objects.items()
        }
        self._parents = {name: tuple(above) for name, above in (parents or {}).items()}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Returns the context in `{"objects": {name: {"methods": {selector: [name]}, "parents"?: [name]}}}`.

        Raises:
            InvalidField: it has another form.
        """
        try:
            rows = data["objects"].items()
            return cls(
                {name: row["methods"] for name, row in rows},
                {name: row.get("parents", ()) for name, row in rows},
            )
        except (AttributeError, KeyError, TypeError, ValueError):
            form = '{"objects": {NAME: {"methods": {SELECTOR: [PARAMETER, …]}}}}'
            raise InvalidField(f"a context has the form {form}", field="context") from None

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> Self:
        """Returns the context in the answer of `list_objects`."""
        rows = list(rows)
        return cls(
            {row["name"]: row["selectors"] for row in rows},
            {row["name"]: row.get("parents", ()) for row in rows},
        )

    @property
    def home(self) -> str | None:
        """The object that learns by default, or None where there is no object at all."""
        return HOME if HOME in self.objects else next(iter(self.objects), None)

    def understood(self, name: str) -> dict[str, Parameters]:
        """Returns the methods that an object answers with, its own and those of its parents."""
        found: dict[str, Parameters] = {}
        for holder in self._chain(name, set()):
            found = {**self.objects.get(holder, {}), **found}
        return found

    def methods(self) -> list[Method]:
        """Returns every method that any object understands."""
        return [
            Method(name, selector, parameters)
            for name in self.objects
            for selector, parameters in self.understood(name).items()
        ]

    def own_methods(self) -> list[Method]:
        """Returns the methods that objects hold themselves, which can be changed and reverted."""
        return [
            Method(name, selector, parameters)
            for name, methods in self.objects.items()
            for selector, parameters in methods.items()
        ]

    def narrowed(self, names: Iterable[str]) -> Context:
        """Returns the context of these objects only."""
        kept = [name for name in self.objects if name in set(names)]
        return Context({name: self.understood(name) for name in kept})

    def _chain(self, name: str, seen: set[str]) -> Iterator[str]:
        if name not in seen:
            seen.add(name)
            yield name
            for parent in self._parents.get(name, ()):
                yield from self._chain(parent, seen)
