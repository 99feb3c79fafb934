"""A sentence among the objects that it may talk about: who is mentioned, and what may be meant.

Between `context` and `sentence`, which know nothing of each other, and the verbs, which ask here what to
offer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from uvm.parser.context import Context, Method
from uvm.parser.sentence import Sentence, words_of

MAX_METHODS = 48  # that the model is shown; of more, those most like the sentence
MAX_OBJECTS = 32
_STEM = 3  # letters that two forms of a word share at least
_WORDS = 200  # of a long text, those that are compared with names


@dataclass(frozen=True)
class Scene:
    """One reading's circumstances.

    Attributes:
        refused: verbs, and calls of single methods, that were tried and found wrong.
        only: the one verb that is left, if it has come to that.
    """

    context: Context
    sentence: Sentence
    refused: frozenset[str] = frozenset()
    only: str | None = None

    def without(self, reading: str, only: str | None = None) -> Scene:
        """Returns the scene in which `reading` is refused too."""
        return replace(self, refused=self.refused | {reading}, only=only)

    @cached_property
    def named(self) -> list[str]:
        """The objects whose full names stand in the sentence."""
        return [name for name in self.context.objects if name.casefold() in self.sentence.words]

    @cached_property
    def mentioned(self) -> list[str]:
        """The objects that the sentence names or calls by the plain words of their names."""
        says = self.sentence.says
        return [name for name in self.context.objects if name in self.named or says(plain_words(name))]

    @cached_property
    def objects(self) -> list[str]:
        """The objects that are shown to the model."""
        names = list(self.context.objects)
        if len(names) <= MAX_OBJECTS:
            return names
        kept = {*self.mentioned, *filter(None, [self.context.home])}
        kept.update(method.target for method in self.methods)
        kept.update(names[: max(0, MAX_OBJECTS - len(kept))])
        return [name for name in names if name in kept]

    @cached_property
    def methods(self) -> list[Method]:
        """The methods that are shown to the model."""
        methods = self.context.methods()
        if len(methods) <= MAX_METHODS:
            return methods
        best = sorted(methods, key=self.likeness, reverse=True)[:MAX_METHODS]
        return [method for method in methods if method in best]

    @cached_property
    def own_methods(self) -> list[Method]:
        """Those of the shown methods that their objects hold themselves, or the mentioned of them."""
        own = set(self.context.own_methods())
        methods = [method for method in self.methods if method in own]
        if self.named:
            methods = [method for method in methods if method.target in self.named] or methods
        return [method for method in methods if self.mentions(method)] or methods

    @cached_property
    def callable(self) -> list[Method]:
        """The methods that the sentence may be calling."""
        methods = [method for method in self.methods if f"call {method.name}" not in self.refused]
        if self.named:
            methods = [method for method in methods if method.target in self.named] or methods
        if any(self.mentions(method) for method in methods):
            # Without arguments nothing ties a call to the sentence but its name.
            methods = [method for method in methods if method.parameters or self.mentions(method)]
        return methods

    def mentions(self, method: Method) -> bool:
        """Returns whether the sentence has the method's selector, as a name or in plain words."""
        selector = method.selector.casefold()
        return selector in self.sentence.words or self.sentence.says(plain_words(method.selector))

    def likeness(self, method: Method) -> int:
        """Returns how much of a method's names the sentence has: exact mentions count most."""
        exact = 8 * self.mentions(method) + 4 * (method.target in self.mentioned)
        return exact + 2 * self.resembles(method) + _count_related(method.parameters, self.sentence.words)

    def resembles(self, method: Method) -> bool:
        """Returns whether the sentence has a form of a word of the method's selector."""
        return _count_related(words_of(method.selector.replace("_", " ")), self.sentence.words) > 0


def plain_words(name: str) -> list[str]:
    """Returns the words of a name as people say it: `robin_prototype_obj` is robin, `add_item` add item."""
    words = name.casefold().split("_")
    for suffix in ("obj", "prototype"):
        if len(words) > 1 and words[-1] == suffix:
            words.pop()
    return [word for word in words if word]


def _count_related(names: Iterable[str], words: Sequence[str]) -> int:
    spoken = set(words[:_WORDS])
    return sum(any(_are_related(name.casefold(), word) for word in spoken) for name in names)


def _are_related(one: str, other: str) -> bool:
    """Returns whether two words may be forms of one: square and squared, add and adding."""
    shared = min(len(one), len(other))
    return one == other or (shared >= _STEM and one[:shared] == other[:shared])
