"""Levels: how far a value is from what `self` holds, and what common calls do to that.

The covenant asks of every statement whether it changes what `self` holds. To answer, each value has a level,
the number of fresh containers around something that belongs to `self`:

    items = self.items              ALIAS: the container itself, so `items.append(x)` is a change
    rows = list(self.rows)          1: a fresh list of aliases, where only `rows[0].append(x)` is a change
    pairs = [[r] for r in rows]     2: fresh lists in a fresh list, and so on up to DEEPEST
    total = 0                       FRESH: reaches nothing of self

A lower level is the more careful guess, so where paths meet the lower one holds.
Imports nothing of BAT OS but the guardian's parts.
"""

from __future__ import annotations

from uvm.guardian.text import words

# MUTATOR is a method that changes its container, taken off it as in `add = self.items.append`.
MUTATOR, SELF, ALIAS, DEEPEST, FRESH = -2, -1, 0, 3, 4

MUTATORS = words(
    """
    append extend insert remove pop clear sort reverse update setdefault popitem add discard difference_update
    intersection_update symmetric_difference_update appendleft popleft extendleft rotate subtract move_to_end
    """
)
# Mutators that may raise only before they change anything.
ATOMIC = MUTATORS - words("extend extendleft sort update subtract difference_update")
# Mutators that take the elements of their argument, and those whose first argument is a key or a place.
BULK = frozenset({"extend", "extendleft", "update"})
KEYED = frozenset({"insert", "setdefault"})
# Methods that hand out an element, and methods that make a fresh container of elements.
GIVERS = frozenset({"get", "setdefault", "pop", "popitem", "popleft"})
VIEWS = words("values items keys copy union intersection difference symmetric_difference most_common")

CONTAINERS = frozenset({"list", "dict", "set", "bytearray", "collections.deque", "array.array"})
# Functions that change their first argument.
CHANGERS = words(
    """
    heapq.heappush heapq.heappop heapq.heapify heapq.heapreplace heapq.heappushpop random.shuffle
    bisect.insort bisect.insort_left bisect.insort_right operator.setitem operator.delitem operator.iadd
    operator.ior operator.iconcat setattr delattr
    """
)
# Functions that hand out an element of an argument, and those that make a fresh container of elements.
PICKERS = words(
    """
    next min max getattr random.choice functools.reduce operator.getitem heapq.heappop heapq.heapreplace
    heapq.heappushpop
    """
)
COPIERS = words(
    """
    list tuple set frozenset dict sorted reversed iter filter enumerate zip copy.copy collections.deque
    collections.OrderedDict collections.Counter collections.defaultdict collections.ChainMap heapq.nlargest
    heapq.nsmallest heapq.merge random.sample random.choices
    """
)


def inside(level: int) -> int:
    """Returns the level of an element of a value."""
    return FRESH if level == FRESH else max(level - 1, ALIAS)


def around(level: int) -> int:
    """Returns the level of a fresh container that holds a value."""
    return FRESH if level == FRESH else min(max(level, ALIAS) + 1, DEEPEST)
