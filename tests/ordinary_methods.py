"""Methods as people and small models write them: each must pass the guardian and do what it says in a hand.

The first half answers missions of the kind that the project is measured with, the second half shows the
constructs of the language and the allowed modules.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from textwrap import dedent
from typing import Any


@dataclass(frozen=True)
class Ordinary:
    """A method, the call that tries it, and what must come of it: the result and the slots afterwards."""

    source: str
    args: tuple[Any, ...]
    returns: Any
    slots: dict[str, Any]
    kept: dict[str, Any]

    @property
    def selector(self) -> str:
        return self.source.split("def ", 1)[1].split("(")[0]


ORDINARY: list[Ordinary] = []


def method(source: str, *args: Any, returns: Any, kept: dict[str, Any] | None = None, **slots: Any) -> None:
    """Adds a method to the collection; `slots` are the object's, `kept` what the call leaves changed."""
    ORDINARY.append(Ordinary(dedent(source).strip() + "\n", args, returns, slots, kept or {}))


# Missions

method(
    '''
    def is_not_prime(self, n):
        """Tells whether n has a divisor between 1 and itself."""
        if n < 2:
            return True
        for d in range(2, int(n ** 0.5) + 1):
            if n % d == 0:
                return True
        return False
    ''',
    91,
    returns=True,
)
method(
    """
    import heapq

    def largest(self, nums, n):
        return heapq.nlargest(n, nums)
    """,
    [25, 35, 22, 85, 14, 65, 75, 22, 58],
    3,
    returns=[85, 75, 65],
)
method(
    """
    def differ_at_one_bit(self, a: int, b: int) -> bool:
        x = a ^ b
        return x != 0 and (x & (x - 1)) == 0
    """,
    13,
    9,
    returns=True,
)
method(
    """
    def square_nums(self, nums):
        return list(map(lambda x: x ** 2, nums))
    """,
    [1, 2, 3],
    returns=[1, 4, 9],
)
method(
    """
    def rotations(self, s):
        tmp = s + s
        n = len(s)
        for i in range(1, n + 1):
            if s == tmp[i:i + n]:
                return i
        return n
    """,
    "abab",
    returns=2,
)
method(
    """
    def remove_first_and_last(self, s, ch):
        i = s.find(ch)
        if i == -1:
            return s
        s = s[:i] + s[i + 1:]
        j = s.rfind(ch)
        return s if j == -1 else s[:j] + s[j + 1:]
    """,
    "hello",
    "l",
    returns="heo",
)
method(
    """
    def sort_matrix(self, M):
        result = sorted(M, key=sum)
        return result
    """,
    [[1, 2, 3], [2, 4, 5], [1, 1, 1]],
    returns=[[1, 1, 1], [1, 2, 3], [2, 4, 5]],
)
method(
    """
    import re

    def lowercase_underscore(self, text):
        pattern = r'^[a-z]+(_[a-z]+)+$'
        return bool(re.match(pattern, text))
    """,
    "aab_cbbbc",
    returns=True,
)
method(
    """
    def drop_chars(self, string, second_string):
        unwanted = set(second_string)
        return ''.join(c for c in string if c not in unwanted)
    """,
    "probasscurve",
    "pros",
    returns="bacuve",
)
method(
    """
    def has_duplicate(self, array_nums):
        seen = set()
        for num in array_nums:
            if num in seen:
                return True
            seen.add(num)
        else:
            return False
    """,
    [1, 2, 3, 1],
    returns=True,
)
method(
    """
    def is_woodall(self, x):
        if not isinstance(x, int) or x <= 0 or x % 2 == 0:
            return False
        x, k = x + 1, 0
        while x % 2 == 0:
            x //= 2
            k += 1
            if x == k:
                return True
        return False
    """,
    383,
    returns=True,
)
method(
    """
    def biggest_number(self, digits):
        digits = sorted(digits, reverse=True)
        return int("".join(str(d) for d in digits))
    """,
    [1, 2, 3],
    returns=321,
)
method(
    """
    def count_substrings(self, s):
        from collections import defaultdict
        count, total = 0, 0
        seen = defaultdict(int)
        seen[0] += 1
        for ch in s:
            total += ord(ch) - ord('0') - 1
            count += seen[total]
            seen[total] += 1
        return count
    """,
    "112112",
    returns=6,
)
method(
    """
    def nested_sum(self, data_list):
        total = 0
        for element in data_list:
            if type(element) == list:
                total = total + self.nested_sum(element)
            else:
                total = total + element
        return total
    """,
    [1, 2, [3, 4], [5, [6]]],
    returns=21,
)
method(
    """
    def bell_number(self, n):
        bell = [[0] * (n + 1) for _ in range(n + 1)]
        bell[0][0] = 1
        for i in range(1, n + 1):
            bell[i][0] = bell[i - 1][i - 1]
            for j in range(1, i + 1):
                bell[i][j] = bell[i - 1][j - 1] + bell[i][j - 1]
        return bell[n][0]
    """,
    56,
    returns=6775685320645824322581483068371419745979053216268760300,
)
method(
    """
    def is_monotonic(self, A):
        return all(A[i] <= A[i + 1] for i in range(len(A) - 1)) or all(
            A[i] >= A[i + 1] for i in range(len(A) - 1)
        )
    """,
    [6, 5, 4, 4],
    returns=True,
)
method(
    """
    def is_sublist(self, l, s):
        n = len(s)
        return any(l[i:i + n] == s for i in range(len(l) - n + 1))
    """,
    [2, 4, 3, 5, 7],
    [4, 3],
    returns=True,
)
method(
    """
    def comb_sort(self, nums):
        def next_gap(gap):
            gap = (gap * 10) // 13
            return max(gap, 1)

        gap, swapped = len(nums), True
        while gap != 1 or swapped:
            gap = next_gap(gap)
            swapped = False
            for i in range(len(nums) - gap):
                if nums[i] > nums[i + gap]:
                    nums[i], nums[i + gap] = nums[i + gap], nums[i]
                    swapped = True
        return nums
    """,
    [5, 15, 37, 25, 79],
    returns=[5, 15, 25, 37, 79],
)
method(
    """
    def same_patterns(self, colors, patterns):
        if len(colors) != len(patterns):
            return False
        mapping = {}
        for c, p in zip(colors, patterns):
            if mapping.setdefault(p, c) != c:
                return False
        return len(set(mapping.values())) == len(mapping)
    """,
    ["red", "green", "green"],
    ["a", "b", "b"],
    returns=True,
)
method(
    """
    def letter_of_sum(self, text):
        total = sum(ord(c) - ord('a') + 1 for c in text)
        if total % 26 == 0:
            return 'z'
        return chr(ord('a') + total % 26 - 1)
    """,
    "abc",
    returns="f",
)
method(
    """
    def newman_conway(self, n):
        memo = {1: 1, 2: 1}

        def p(k):
            if k not in memo:
                memo[k] = p(p(k - 1)) + p(k - p(k - 1))
            return memo[k]

        return p(n)
    """,
    10,
    returns=6,
)
method(
    """
    def merge_three(self, dict1, dict2, dict3):
        return {**dict3, **dict2, **dict1}
    """,
    {"R": "Red"},
    {"G": "Green"},
    {"R": "Rose", "O": "Orange"},
    returns={"R": "Red", "O": "Orange", "G": "Green"},
)
method(
    """
    def next_palindrome(self, num):
        while True:
            num += 1
            if str(num) == str(num)[::-1]:
                return num
    """,
    1221,
    returns=1331,
)
method(
    """
    def snake_to_camel(self, word):
        return "".join(x.capitalize() or "_" for x in word.split("_"))
    """,
    "python_program",
    returns="PythonProgram",
)
method(
    """
    def merge_sorted(self, num1, num2, num3):
        from heapq import merge
        result = merge(sorted(num1), sorted(num2), sorted(num3))
        return [*result]
    """,
    [25, 24],
    [19, 20],
    [24, 26],
    returns=[19, 20, 24, 24, 25, 26],
)
method(
    """
    def amicable_sum(self, limit):
        def divisors_sum(n):
            return sum(d for d in range(1, n // 2 + 1) if n % d == 0)

        sums = {n: divisors_sum(n) for n in range(1, limit + 1)}
        return sum(n for n, m in sums.items() if m != n and sums.get(m) == n)
    """,
    300,
    returns=504,
)
method(
    """
    def long_words(self, n, text):
        return [w for w in text.split() if len(w) > n]
    """,
    3,
    "python is a programming language",
    returns=["python", "programming", "language"],
)
method(
    """
    def magic_square(self, matrix):
        size = len(matrix[0])
        sums = [sum(row) for row in matrix]
        sums += [sum(row[i] for row in matrix) for i in range(size)]
        sums.append(sum(matrix[i][i] for i in range(size)))
        sums.append(sum(matrix[i][size - i - 1] for i in range(size)))
        return len(set(sums)) <= 1
    """,
    [[2, 7, 6], [9, 5, 1], [4, 3, 8]],
    returns=True,
)
method(
    """
    from collections import Counter

    def most_frequent(self, nums):
        counter = Counter(nums)
        value, _ = counter.most_common(1)[0]
        return value
    """,
    [2, 3, 8, 4, 7, 9, 8, 2, 6, 5, 1, 6, 1, 2, 3, 2],
    returns=2,
)
method(
    """
    def reverse_vowels(self, text):
        vowels = [c for c in text if c.lower() in "aeiou"]
        result = ""
        for c in text:
            result += vowels.pop() if c.lower() in "aeiou" else c
        return result
    """,
    "USA",
    returns="ASU",
)

# The language and its library

method(
    '''
    def invoice(self, customer: str, items: list[tuple[str, float]], *, rate=0.19) -> str:
        """Returns the invoice as text.

        Args:
            customer: who pays.
            items: names and prices.
        """
        WIDTH = 20
        lines = [f"Invoice for {customer!r}", "=" * WIDTH]
        lines += [f"{name:<12}{price:>8.2f}" for name, price in items]
        net = sum(price for _, price in items)
        lines.append(f"{'total':<12}{net * (1 + rate):>8,.2f}")
        return "\\n".join(lines)
    ''',
    "Ada",
    [("tea", 3.5), ("cake", 1200.0)],
    returns="Invoice for 'Ada'\n" + "=" * 20 + "\ntea             3.50\ncake         1200.00\n"
    "total       1,432.16",
)
method(
    """
    def parse_number(self, text):
        try:
            value = int(text)
        except ValueError as error:
            return f"no number: {error.args[0][:7]}"
        except (TypeError, OverflowError):
            return None
        else:
            return value * 2
        finally:
            self.tries = getattr(self, "tries", 0) + 1
            self._p_changed = True
    """,
    "21",
    returns=42,
    kept={"tries": 3},
    tries=2,
)
method(
    """
    def describe(self, shape):
        match shape:
            case {"kind": "circle", "r": r}:
                return f"circle of {r}"
            case [x, y]:
                return f"point {x}, {y}"
            case [first, *rest] if rest:
                return f"{first} and {len(rest)} more"
            case int() | float() as number:
                return f"number {number}"
            case "origin" | None:
                return "origin"
            case _:
                return "unknown"
    """,
    [1, 2, 3],
    returns="1 and 2 more",
)
method(
    """
    def first_long(self, words, limit=4):
        if any((found := w) and len(w) > limit for w in words):
            return found
        while (size := len(words)) > 2:
            words = words[:-1]
        return size
    """,
    ["a", "bb", "ccccc"],
    returns="ccccc",
)
method(
    """
    from typing import Dict, List, Optional, Tuple, Union

    def group(self, words: List[str], by: Optional[int] = None) -> Dict[str, List[str]]:
        groups: Dict[str, List[str]] = {}
        key: Union[str, None]
        for word in words:
            key = word[: by or 1]
            groups.setdefault(key, []).append(word)
        return groups
    """,
    ["ant", "ape", "bee"],
    returns={"a": ["ant", "ape"], "b": ["bee"]},
)
method(
    """
    def ranking(self, people):
        ordered = sorted(people, key=lambda p: (-p["score"], p["name"]))
        return ["{0}. {name} ({score:.1f})".format(i, **p) for i, p in enumerate(ordered, start=1)]
    """,
    [{"name": "bob", "score": 2}, {"name": "amy", "score": 2}, {"name": "cy", "score": 3.25}],
    returns=["1. cy (3.2)", "2. amy (2.0)", "3. bob (2.0)"],
)
method(
    """
    def fibonacci(self, n):
        def numbers():
            a, b = 0, 1
            while True:
                yield a
                a, b = b, a + b

        from itertools import islice
        return list(islice(numbers(), n))
    """,
    8,
    returns=[0, 1, 1, 2, 3, 5, 8, 13],
)
method(
    """
    import datetime

    def days_between(self, start, end):
        fmt = "%Y-%m-%d"
        a = datetime.datetime.strptime(start, fmt)
        b = datetime.datetime.strptime(end, fmt)
        return abs((b - a).days)
    """,
    "2024-02-28",
    "2024-03-01",
    returns=2,
)
method(
    """
    from datetime import date, timedelta, timezone, datetime

    def deadline(self, day, weeks):
        due = day + timedelta(weeks=weeks)
        stamp = datetime(due.year, due.month, due.day, tzinfo=timezone.utc)
        return {"due": due, "weekday": due.strftime("%A"), "iso": stamp.isoformat()}
    """,
    dt.date(2024, 1, 1),
    2,
    returns={"due": dt.date(2024, 1, 15), "weekday": "Monday", "iso": "2024-01-15T00:00:00+00:00"},
)
method(
    """
    import json

    def tidy_json(self, text):
        data = json.loads(text)
        data.pop("secret", None)
        return json.dumps(data, sort_keys=True, indent=2)
    """,
    '{"b": 1, "a": [1, 2], "secret": 0}',
    returns='{\n  "a": [\n    1,\n    2\n  ],\n  "b": 1\n}',
)
method(
    """
    import math, statistics

    def summary(self, values):
        mean = statistics.mean(values)
        return {
            "mean": mean,
            "median": statistics.median(values),
            "stdev": round(statistics.pstdev(values), 3),
            "norm": math.hypot(*values),
            "log": math.floor(math.log2(max(values))),
        }
    """,
    [3, 4],
    returns={"mean": 3.5, "median": 3.5, "stdev": 0.5, "norm": 5.0, "log": 2},
)
method(
    """
    import re
    from collections import OrderedDict, deque

    def word_index(self, text):
        index = OrderedDict()
        for m in re.finditer(r"(?P<word>\\w+)", text.lower()):
            index.setdefault(m.group("word"), deque()).append(m.start())
        return {word: list(places) for word, places in index.items()}
    """,
    "To be or not to be",
    returns={"to": [0, 13], "be": [3, 16], "or": [6], "not": [9]},
)
method(
    """
    import itertools

    def pairs(self, xs, ys):
        product = [x * y for x, y in itertools.product(xs, ys)]
        runs = {k: len(list(g)) for k, g in itertools.groupby(sorted(product))}
        return list(itertools.accumulate(product)), runs
    """,
    [1, 2],
    [2, 1],
    returns=([2, 3, 7, 9], {1: 1, 2: 2, 4: 1}),
)
method(
    """
    from decimal import Decimal, ROUND_HALF_UP
    from fractions import Fraction

    def split_bill(self, total, people):
        share = (Decimal(total) / people).quantize(Decimal("0.01"), rounding=ROUND_HALF_UP)
        return share, Fraction(1, people) + Fraction(1, 6)
    """,
    "100.00",
    3,
    returns=(Decimal("33.33"), Fraction(1, 2)),
)
method(
    """
    import textwrap
    import string

    def poster(self, message, width=16):
        wrapped = textwrap.fill(message, width=width)
        table = str.maketrans("", "", string.punctuation)
        return textwrap.indent(wrapped.translate(table).title(), "> ")
    """,
    "the quick, brown fox jumps!",
    returns="> The Quick Brown\n> Fox Jumps",
)
method(
    """
    def total_of(self, *numbers, start=0, **named):
        total = start
        for n in numbers + tuple(named.values()):
            total += n
        return total
    """,
    1,
    2,
    3,
    returns=6,
)
method(
    """
    def visit(self, page):
        if not hasattr(self, "visits"):
            self.visits = {}
        day = self.visits.setdefault("today", {})
        day[page] = day.get(page, 0) + 1
        self._p_changed = True
        return day[page]
    """,
    "home",
    returns=3,
    kept={"visits": {"today": {"home": 3}}},
    visits={"today": {"home": 2}},
)
method(
    """
    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount
        self.history.append(("deposit", amount))
        self._p_changed = True
        return self.balance
    """,
    50,
    returns=150,
    kept={"balance": 150, "history": [("deposit", 50)]},
    balance=100,
    history=[],
)
method(
    """
    def move(self, name, to):
        for room, people in self.rooms.items():
            if name in people:
                people.remove(name)
                break
        else:
            return False
        self.rooms.setdefault(to, []).append(name)
        self._p_changed = True
        return True
    """,
    "ann",
    "hall",
    returns=True,
    kept={"rooms": {"den": ["bob"], "hall": ["ann"]}},
    rooms={"den": ["ann", "bob"]},
)
method(
    """
    def reset(self):
        del self.cache
        self.config["theme"]["colour"] = "blue"
        self.tags |= {"new"}
        self.queue[1:3] = []
        self._p_changed = True
    """,
    returns=None,
    kept={
        "config": {"theme": {"colour": "blue"}},
        "tags": {"old", "new"},
        "queue": [1, 4],
    },
    cache=[1],
    config={"theme": {"colour": "red"}},
    tags={"old"},
    queue=[1, 2, 3, 4],
)
method(
    """
    from functools import lru_cache, partial, reduce
    import operator

    def change(self, amount, coins):
        @lru_cache(maxsize=None)
        def ways(left, index):
            if left == 0:
                return 1
            if left < 0 or index == len(coins):
                return 0
            return ways(left - coins[index], index) + ways(left, index + 1)

        product = reduce(operator.mul, coins, 1)
        double = partial(operator.mul, 2)
        return ways(amount, 0), double(product)
    """,
    10,
    [1, 5],
    returns=(3, 10),
)
method(
    """
    def flatten(self, data, prefix=""):
        flat = {}
        for key, value in data.items():
            name = f"{prefix}.{key}" if prefix else key
            if isinstance(value, dict):
                flat.update(self.flatten(value, prefix=name))
            else:
                flat[name] = value
        return flat
    """,
    {"a": {"b": 1, "c": {"d": 2}}, "e": 3},
    returns={"a.b": 1, "a.c.d": 2, "e": 3},
)
method(
    """
    def matrix(self, rows):
        transposed = [list(column) for column in zip(*rows)]
        flat = [cell for row in rows for cell in row if cell % 2]
        unique = {cell // 2 for cell in flat}
        lookup = {(i, j): cell for i, row in enumerate(rows) for j, cell in enumerate(row)}
        first, *_, last = flat
        return transposed, sorted(unique), lookup[1, 0], first - last
    """,
    [[1, 2], [3, 5]],
    returns=([[1, 3], [2, 5]], [0, 1, 2], 3, -4),
)
method(
    """
    def tree_depth(self, root):
        class Node:
            def __init__(self, value, children=()):
                self.value = value
                self.children = list(children)

            def depth(self):
                return 1 + max((child.depth() for child in self.children), default=0)

        def build(data):
            value, *children = data
            return Node(value, map(build, children))

        return build(root).depth()
    """,
    ["a", ["b", ["c"]], ["d"]],
    returns=3,
)
method(
    """
    def slug(self, title):
        import unicodedata
        text = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
        text = "".join(c if c.isalnum() else "-" for c in text.lower()).strip("-")
        while "--" in text:
            text = text.replace("--", "-")
        return text or "untitled"
    """,
    "  Grüße, Welt!  ",
    returns="grue-welt",
)
method(
    """
    import random

    def draw(self, items, k=2, seed=7):
        rng = random.Random(seed)
        chosen = rng.sample(items, k)
        rng.shuffle(chosen)
        return sorted(chosen) == sorted(set(chosen)) and len(chosen) == k
    """,
    [1, 2, 3, 4],
    returns=True,
)
method(
    """
    from enum import Enum

    def order(self, name, quantity):
        class Size(Enum):
            SMALL = 1
            LARGE = 10

        class Line:
            def __init__(self, name, quantity=1):
                self.name = name
                self.quantity = quantity

            @property
            def size(self):
                return Size.LARGE if self.quantity >= Size.LARGE.value else Size.SMALL

        line = Line(name, quantity)
        line.quantity += 1
        return [line.name, line.size.name, line.quantity]
    """,
    "nuts",
    12,
    returns=["nuts", "LARGE", 13],
)
method(
    """
    def grade(self, scores):
        import bisect
        LIMITS, GRADES = (60, 70, 80, 90), "FDCBA"
        count = 0

        def letter(score):
            nonlocal count
            count += 1
            return GRADES[bisect.bisect(LIMITS, score)]

        letters = [letter(score) for score in scores]
        best: int = max(scores)
        assert count == len(scores), "each is graded once"
        return letters, best if best > 60 else None
    """,
    [33, 99, 77, 70],
    returns=(["F", "A", "C", "C"], 99),
)
method(
    """
    def checksum(self, text):
        import hashlib, base64, zlib
        data = text.encode("utf-8")
        digest = hashlib.sha256(data).hexdigest()[:8]
        with_b64 = base64.b64encode(data).decode("ascii")
        return digest, with_b64, zlib.crc32(data) & 0xFFFFFFFF
    """,
    "abc",
    returns=("ba7816bf", "YWJj", 891568578),
)
method(
    """
    import csv, io
    from contextlib import suppress

    def read_table(self, text):
        rows = []
        for row in csv.DictReader(io.StringIO(text)):
            with suppress(ValueError):
                row["age"] = int(row["age"])
            rows.append(dict(row))
        return rows
    """,
    "name,age\nann,7\nbob,x\n",
    returns=[{"name": "ann", "age": 7}, {"name": "bob", "age": "x"}],
)
method(
    '''
    def breed(self, name):
        """Makes a calf; `{self._brand}` is no format string here."""
        calf = self.clone(name)
        calf.age = 0
        calf.toys = ["ball"]
        calf.toys.append("bell")
        self.young.append(calf.age)
        self._p_changed = True
        return [calf.age, calf.toys, calf.legs]
    ''',
    "daisy",
    returns=[0, ["ball", "bell"], 4],
    kept={"young": [0]},
    young=[],
    legs=4,
)
