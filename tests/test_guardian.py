"""The guardian: what it lets pass, what it refuses and why, and what it mends without changing the meaning.

The tables in `guardian_cases` hold one method after each `# title` line at the left margin. Methods of the
covenant's tables are also run, on an object whose marker remembers the state that it was set in.
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
import string
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import uvm.guardian
from uvm.guardian import ALLOWED_MODULES, MAX_SOURCE_BYTES, Audit, Finding, PersistenceGuardian

GUARDIAN = PersistenceGuardian()
# A busy machine is no failure.
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
CASES = Path(__file__).with_name("guardian_cases")


def table(name: str) -> list[Any]:
    """Returns the cases of a table as pytest parameters `(title, source)`."""
    cases: list[tuple[str, list[str]]] = []
    for line in (CASES / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            cases.append((line[2:], []))
        else:
            cases[-1][1].append(line)
    return [pytest.param(title, "\n".join(lines).strip() + "\n", id=title) for title, lines in cases]


def audit(source: str, selector: str = "f") -> Audit:
    return GUARDIAN.audit_code(source, selector, None)


def plain(value: object) -> str:
    """Returns a value as text without addresses, which differ from run to run."""
    return re.sub("0x[0-9a-f]+", "", repr(value))


class Image:
    """A plain object with slots to change and messages to send; `kept` is the state that its marker saw."""

    def __init__(self) -> None:
        self.n: Any = 1
        self.name = "Ada"
        self.items: Any = [3, 1, 2]
        self.rows: Any = [[1], [2, 3]]
        self.data: Any = {"a": 1, "b": 2}
        self.nested: Any = {"a": [1], "b": [2]}
        self.seen: Any = {1, 2}
        self.kept: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(
            "kept" if name == "_p_changed" else name, self.state() if name == "_p_changed" else value
        )

    def state(self) -> str:
        return plain({name: value for name, value in vars(self).items() if name != "kept"})

    def double(self, x: int) -> int:
        return 2 * x

    def append(self, x: int) -> str:
        return f"a message with {x}"


VARIANTS: list[dict[str, Any]] = [
    {"x": 5, "k": "a", "xs": [4, 6], "flag": True},
    {"x": "7", "k": "missing", "xs": [], "flag": False},
    {"x": None, "k": "b", "xs": [1], "flag": True},
    {"x": 0, "k": "a", "xs": ["b", 2, 2], "flag": False},
]


def run(source: str, variant: dict[str, Any], selector: str = "f") -> tuple[object, str, str | None]:
    """Returns how a method ended, the state that it left, and the state that its marker saw last."""
    namespace: dict[str, Any] = {}
    exec(compile(source, "<method>", "exec"), namespace)
    image, method = Image(), namespace[selector]
    names = list(inspect.signature(method).parameters)[1:]
    try:
        ended: object = (
            "returned",
            repr(method(image, **copy.deepcopy({name: variant[name] for name in names}))),
        )
    except Exception as error:
        ended = ("raised", type(error))
    return ended, image.state(), image.kept


def assert_keeps_changes(source: str, variant: dict[str, Any]) -> None:
    ended, state, kept = run(source, variant)
    if isinstance(ended, tuple) and ended[0] == "returned" and state != Image().state():
        assert kept == state


# The covenant, kept: these stay as they are.

KEPT = table("kept")


@pytest.mark.parametrize(("title", "source"), KEPT)
def test_a_kept_covenant_stays_as_it_is(title: str, source: str) -> None:
    result = audit(source)
    assert result.findings == ()
    assert result.source == source
    for variant in VARIANTS:
        assert_keeps_changes(source, variant)


# The covenant, broken. The numbers are the lines of the exits that lack the marker.

BROKEN = table("broken")


@pytest.mark.parametrize(("title", "source"), BROKEN)
def test_a_broken_covenant_is_mended(title: str, source: str) -> None:
    result = audit(source)
    lines = [int(line) for line in title.partition(":")[0].split(",")]
    assert [(finding.rule, finding.line) for finding in result.findings] == [
        ("covenant", line) for line in lines
    ]
    assert result.ok
    assert result.source != source
    again = audit(result.source)
    assert (again.findings, again.source) == ((), result.source)
    for variant in VARIANTS:
        assert run(source, variant)[:2] == run(result.source, variant)[:2]
        assert_keeps_changes(result.source, variant)


def test_a_mend_keeps_what_it_does_not_touch() -> None:
    source = 'def f(self, x):\r\n    # why\r\n    self.n = x  # so\r\n\r\n    return """a\r\nb"""'
    start, end = "def f(self, x):\n    # why\n    self.n = x  # so\n\n", '    return """a\nb"""\n'
    assert audit(source).source == start + "    self._p_changed = True\n" + end


# The policy. The titles say rule and line of each finding.

REFUSED = table("refused")


@pytest.mark.parametrize(("title", "source"), REFUSED)
def test_the_policy_refuses(title: str, source: str) -> None:
    expected = [word.split(":") for word in title.split() if ":" in word]
    result = audit(source)
    assert [(finding.rule, finding.line) for finding in result.findings] == [
        (rule, int(line)) for rule, line in expected
    ]
    assert not result.ok
    assert result.source == source
    assert not any(finding.mended for finding in result.findings)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import sys\ndef f(self):\n    return sys.maxsize\n", ["`sys`", "float('inf')"]),
        ("def f(self):\n    import os\n", ["`os`", "operating system"]),
        ("def g(self, x):\n    return x\n", ["`f`", "`g`"]),
        ("def f(self, other):\n    other.x = 1\n", ["sending it a message"]),
        ("def f(self, x):\n    return type(x).__name__\n", ["`__name__`", "isinstance"]),
        ("from __future__ import annotations\ndef f(self, x):\n    return x\n", ["need no import"]),
        ("def f(self, x):\n    return helper(x)\ndef helper(x):\n    return x\n", ["`helper`", "inside `f`"]),
    ],
)
def test_a_refusal_says_what_to_do(source: str, words: list[str]) -> None:
    (finding,) = audit(source).findings
    assert all(word in finding.message for word in words)
    assert finding.message.endswith(".")
    assert "\n" not in finding.message


@pytest.mark.parametrize(
    ("source", "parameters", "rules"),
    [
        ("def f(self, a, b):\n    return a\n", ["a", "b"], []),
        ("def f(self):\n    return 1\n", [], []),
        ("def f(self, a=1, *, b=None):\n    return a\n", ["a", "b"], []),
        ("def f(self, a, b):\n    return a\n", None, []),
        ("def f(self, *a, **b):\n    return a\n", ["*a", "**b"], []),
        ("def f(self, b, a):\n    return a\n", ["a", "b"], ["parameters"]),
        ("def f(self, a):\n    return a\n", ["a", "b"], ["parameters"]),
        ("def f(self, a, b, c=1):\n    return a\n", ["a", "b"], ["parameters"]),
        ("def f(self, *a):\n    return a\n", ["a"], ["parameters"]),
        ("def f(b):\n    return b\n", ["a"], ["self"]),
        ("def f(*, self):\n    return 1\n", [], ["self"]),
    ],
)
def test_parameters(source: str, parameters: list[str] | None, rules: list[str]) -> None:
    result = GUARDIAN.audit_code(source, "f", parameters)
    assert [finding.rule for finding in result.findings] == rules


def test_names_are_compared_as_python_reads_them() -> None:
    full_width_n = chr(0xFF4E)
    result = GUARDIAN.audit_code(f"def \ufb01nd(self, {full_width_n}):\n    return n\n", "find", ["n"])
    assert (result.findings, result.parameters) == ((), ("n",))


def test_an_audit_tells_parameters_and_doc() -> None:
    result = audit(
        "def f(self, a, /, b, *rest, c=1, **more):\n    '''Adds.\n\n    More.\n    '''\n    return a\n"
    )
    assert result.parameters == ("a", "b", "*rest", "c", "**more")
    assert result.doc == "Adds.\n\nMore."
    assert result.ok


def test_only_so_many_findings_at_once() -> None:
    result = audit("def f(self):\n" + "    self._x = 1\n" * 500)
    assert 5 < len(result.findings) < 50


# The other mends.


@pytest.mark.parametrize(
    ("source", "parameters", "mended", "rules"),
    [
        ("def f():\n    return 1\n", [], "def f(self):\n    return 1\n", ["self"]),
        ("def f(n):\n    return n\n", ["n"], "def f(self, n):\n    return n\n", ["self"]),
        ("def f(n):\n    return n\n", None, "def f(self, n):\n    return n\n", ["self"]),
        ("def f (*ns): return ns\n", None, "def f (self, *ns): return ns\n", ["self"]),
        ("def f(n, /, *, k=1): return n\n", ["n", "k"], "def f(self, n, /, *, k=1): return n\n", ["self"]),
        (
            "def f(self, n):\n    return 1 if n < 2 else n * f(n - 1)\n",
            ["n"],
            "def f(self, n):\n    return 1 if n < 2 else n * self.f(n - 1)\n",
            ["recursion"],
        ),
        (
            "def f(n):\n    # é\n    return n if n < 2 else f(n - 1) + f(n=n - 2)\n",
            ["n"],
            "def f(self, n):\n    # é\n    return n if n < 2 else self.f(n - 1) + self.f(n=n - 2)\n",
            ["self", "recursion"],
        ),
        (
            "def f(self, n):\n    return n and f(self, n - 1) and f(self) and f(self, **{'n': 1})\n",
            ["n"],
            "def f(self, n):\n    return n and self.f(n - 1) and self.f() and self.f(**{'n': 1})\n",
            ["recursion"],
        ),
        (
            "def f(self, xs):\n    return [x if x == 1 else f(x) for x in xs] + list(map(f, xs))\n",
            ["xs"],
            "def f(self, xs):\n    return [x if x == 1 else self.f(x) for x in xs] + list(map(self.f, xs))\n",
            ["recursion"],
        ),
        (
            "def f(n):\n    self.n = n\n    return n and f(n - 1)\n",
            ["n"],
            "def f(self, n):\n    self.n = n\n    self._p_changed = True\n    return n and self.f(n - 1)\n",
            ["self", "recursion", "covenant"],
        ),
    ],
)
def test_slips_are_mended(source: str, parameters: list[str] | None, mended: str, rules: list[str]) -> None:
    result = GUARDIAN.audit_code(source, "f", parameters)
    assert result.source == mended
    assert list(dict.fromkeys(finding.rule for finding in result.findings)) == rules
    assert all(finding.mended for finding in result.findings)


@pytest.mark.parametrize(
    ("source", "selector"),
    [
        ("def f(self, n):\n    def f(k):\n        return k and f(k - 1)\n    return f(n)\n", "f"),
        ("def f(self, f):\n    return f(1)\n", "f"),
        ("def f(self, xs):\n    return [f(1) for f in xs]\n", "f"),
        ("from math import factorial\ndef factorial(self, n):\n    return factorial(n)\n", "factorial"),
        ("def sum(self, xs):\n    return sum(xs)\n", "sum"),
        ("def f(self, n):\n    return self.f(n - 1) if n else 0\n", "f"),
    ],
)
def test_a_name_that_means_something_else_is_no_recursion(source: str, selector: str) -> None:
    assert (audit(source, selector).source, audit(source, selector).findings) == (source, ())


def test_refusals_come_without_mends() -> None:
    result = GUARDIAN.audit_code("import os\ndef f(n):\n    self.n = n\n    return f(n - 1)\n", "f", ["n"])
    assert [(finding.rule, finding.line, finding.mended) for finding in result.findings] == [
        ("import", 1, False)
    ]
    assert result.source.startswith("import os\ndef f(n):")
    assert not result.ok


# Ordinary methods. The titles are what they must do, with their name bound to an object.

ORDINARY = table("ordinary")


@pytest.mark.parametrize(("title", "source"), ORDINARY)
def test_ordinary_methods_pass_untouched(title: str, source: str) -> None:
    selector = title.partition("(")[0].removeprefix("not ")
    result = audit(source, selector)
    assert (result.findings, result.source) == ((), source)
    namespace: dict[str, Any] = {}
    exec(compile(source, "<method>", "exec"), namespace)
    image = type("Bound", (Image,), {selector: namespace.pop(selector)})()
    assert eval(title, {selector: getattr(image, selector)})


# Hostile text.

HOSTILE = {
    "nothing": "",
    "a null byte": "def f(self):\n    return '\0'\n",
    "a surrogate": "def f(self):\n    return '\ud800'\n",
    "a byte order mark": "\ufeffdef f(self):\n    return 1\n",
    "70 KB": "def f(self):\n    return '" + "x" * 70_000 + "'\n",
    "70 KB in 35,000 letters": "def f(self):\n    return '" + "é" * 35_000 + "'\n",
    "minus signs": "-" * 50_000,
    "brackets": "(" * 50_000,
    "closed brackets": "def f(self):\n    return " + "[" * 190 + "]" * 190 + "\n",
    "a long sum": "def f(self):\n    return " + "1+" * 20_000 + "1\n",
    "a long chain": "def f(self):\n    return self" + ".a" * 20_000 + "\n",
    "elif": "def f(self, x):\n    if x: pass\n" + "    elif x: pass\n" * 2_000,
    "deep blocks": "def f(self):\n"
    + "".join(" " * i + "if 1:\n" for i in range(1, 99))
    + " " * 99
    + "pass\n",
    "nested loops": "def f(self):\n"
    + "".join(" " * i + f"for a{i} in a{i - 1}:\n" for i in range(1, 20))
    + " " * 20
    + "a0 = a19\n",
    "nested tries": "def f(self):\n"
    + "".join(" " * i + "try:\n" for i in range(1, 19))
    + " " * 19
    + "return self.x.pop()\n"
    + "".join(" " * i + "finally: log()\n" for i in range(18, 0, -1)),
    "functions that call each other": "def f(self):\n"
    + "".join(f"  def g{i}(x): return g{i + 1}(g{i + 2}(x))\n" for i in range(300))
    + "  return g0(self.items)\n",
    "names handed round": "def f(self):\n  for x in y:\n"
    + "".join(f"   a{i} = a{i + 1}\n" for i in range(2_500))
    + "   a2500 = self.x\n",
    "a huge number": "def f(self):\n    return " + "9" * 5_000 + "\n",
    "an invalid escape": "def f(self):\n    return '\\d' is 1\n",
    "an encoding": "# -*- coding: rot13 -*-\ndef f(self):\n    return 1\n",
    "form feeds": "\x0cdef f(self):\n\x0c    self.n = 1\n",
    "lines that continue": "\\\n" * 30_000,
    "recursion in an f-string": "def f(self, n):\n    return f'''\n{n and f(n - 1)}'''\n",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_no_text_raises(source: str) -> None:
    result = audit(source)
    assert result == audit(source)
    assert all(finding.line >= 1 and finding.message for finding in result.findings)
    if result.ok:
        assert audit(result.source) == Audit(result.source, (), result.parameters, result.doc)
    else:
        assert result.source == source


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("nothing", "shape"),
        ("a null byte", "syntax"),
        ("a surrogate", "syntax"),
        ("70 KB", "size"),
        ("70 KB in 35,000 letters", "size"),
        ("minus signs", "complexity"),
        ("a long sum", "complexity"),
        ("elif", "complexity"),
        ("names handed round", "complexity"),
    ],
)
def test_hostile_text_is_refused_for_its_reason(name: str, rule: str) -> None:
    assert [finding.rule for finding in audit(HOSTILE[name]).findings] == [rule]


def test_the_largest_source() -> None:
    head, tail = "def f(self):\n    return '", "'\n"
    source = head + "x" * (MAX_SOURCE_BYTES - len(head + tail)) + tail
    assert audit(source).ok
    assert [finding.rule for finding in audit(source + " ").findings] == ["size"]


@RELAXED
@given(st.text())
def test_random_text_never_raises(source: str) -> None:
    assert isinstance(audit(source), Audit)


LETTERS = st.text(alphabet=string.ascii_letters + "_(){}[]:.,'\"\\= \n\t#@*é\0", max_size=200)


@RELAXED
@given(LETTERS, st.text(max_size=5))
def test_random_bodies_never_raise(body: str, selector: str) -> None:
    assert isinstance(audit("def f(self):\n" + textwrap.indent(body, "    ")), Audit)
    assert isinstance(GUARDIAN.audit_code(body, selector, [selector]), Audit)


# Random small programs. `flip()` decides their paths, so that two runs can take the same one.

VALUES = """
a|b|x|[]|1|[a]|[a, b]|a or b|a[0]|b[-1]|self.items|self.rows|self.rows[0]|self.data|self.data.values()
list(self.rows)|self.rows[:]|sorted(self.rows)|dict(self.data)|next(iter(self.rows))|[*self.rows]
[r for r in self.rows]|[list(r) for r in self.rows]|[flip() or v.append(1) for v in a]|list(zip(a, self.rows))
helper(a)|helper(b)|helper(self.rows)|list(map(helper, self.rows))|(lambda: a)()|a if flip() else self.rows
self.items.pop()|self.data.get('a')|self.double(1)|(a := self.rows)|self.nested.setdefault('z', [])
getattr(self, 'rows')
"""
SIMPLE = """
{name} = {value}
{name}, b = {value}, {other}
{name}, *b = {value}
self.n = {value}
self.items = {name} = {value}
self.data['k'] = {value}
{name}.append({value})
{value}.append({other})
{name}[0] = {value}
{name}[0][0] = {value}
del {name}[0]
{name} += {value}
self.n += {value}
push({value}, {other})
{name} = self.items.append
{name}(1)
{value}
assert flip()
raise ValueError
return {value}
return {name}
self._p_changed = True
"""
COMPOUND = """
if flip():
{block}

if flip():
{block}
else:
{more}

for {name} in {value}:
    if flip():
        break
{block}
{more}

while flip():
{block}
    if flip():
        continue
{more}

try:
{block}
except Exception:
{more}

try:
{block}
finally:
{more}

try:
{block}
except TypeError:
{more}
else:
{block}
finally:
{more}

with suppress(Exception):
{block}

match {value}:
  case [{name}, *_]:
{block}
  case _:
{more}
"""
PROGRAM = """
from contextlib import suppress
def f(self, x):
    a = b = []
    def helper(v=None):
        flip()
        {helper}
    def push(p, q):
        {push}
{block}
"""
HELPERS = "return v|return [v]|v.append(1)|return a|b.append(v)|self.n = v|return self.rows"
PUSHES = "p.append(q)|q.append(p)|return helper(p)|a.append(q)|p[0] = q"


def choice(text: str) -> st.SearchStrategy[str]:
    return st.sampled_from(text.strip().replace("\n", "|").split("|"))


def filled(templates: list[str], block: st.SearchStrategy[str] | None = None) -> st.SearchStrategy[str]:
    """Returns a strategy for templates whose fields are filled by chance."""
    parts = {
        "name": choice("a|b"),
        "value": choice(VALUES),
        "other": choice(VALUES),
        "helper": choice(HELPERS),
        "push": choice(PUSHES),
    }
    blocks = {} if block is None else {"block": block, "more": block}
    return st.builds(str.format_map, st.sampled_from(templates), st.fixed_dictionaries(parts | blocks))


def block_of(statements: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    lines = st.lists(statements, min_size=1, max_size=4)
    return lines.map(lambda lines: textwrap.indent("\n".join(lines), "    "))


STATEMENTS = st.recursive(
    filled(SIMPLE.strip().splitlines()),
    lambda inner: filled(COMPOUND.strip("\n").split("\n\n"), block_of(inner)),
    max_leaves=8,
)


class Stop(BaseException):
    """Ends a run that asks for more decisions than were made."""


def run_on_path(source: str, path: list[bool]) -> tuple[object, str, str | None]:
    decisions = iter(path)

    def flip() -> bool:
        for decision in decisions:
            return decision
        raise Stop

    namespace: dict[str, Any] = {"flip": flip}
    exec(compile(source, "<method>", "exec"), namespace)
    image = Image()
    try:
        ended: object = ("returned", plain(namespace["f"](image, [7])))
    except Exception as error:
        ended = ("raised", type(error))
    except Stop:
        ended = "stopped"
    return ended, image.state(), image.kept


PROGRAMS = filled([PROGRAM], block_of(STATEMENTS))
PATHS = st.lists(st.lists(st.booleans(), min_size=4, max_size=16), min_size=2, max_size=4)


@settings(RELAXED, max_examples=150)
@given(PROGRAMS, PATHS)
def test_random_programs_keep_their_changes_and_their_meaning(source: str, paths: list[list[bool]]) -> None:
    result = audit(source)
    if not result.ok:
        assert {finding.rule for finding in result.findings} <= {"syntax"}
        return
    assert all(finding.rule == "covenant" for finding in result.findings)
    assert audit(result.source) == Audit(result.source, (), result.parameters, result.doc)
    for path in paths:
        ended, state, kept = run_on_path(result.source, path)
        assert (ended, state) == run_on_path(source, path)[:2]
        if isinstance(ended, tuple) and ended[0] == "returned" and state != Image().state():
            assert kept == state


# What the guardian itself needs.


def test_the_guardian_imports_only_the_standard_library() -> None:
    for path in Path(uvm.guardian.__file__).parent.glob("*.py"):
        for module in imported(ast.parse(path.read_text(encoding="utf-8"))):
            assert module.startswith("uvm.guardian") or module.partition(".")[0] in sys.stdlib_module_names


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_the_allowed_modules_exist_and_reach_no_further() -> None:
    assert {module.partition(".")[0] for module in ALLOWED_MODULES} <= sys.stdlib_module_names
    assert not ALLOWED_MODULES & {
        "os",
        "sys",
        "subprocess",
        "socket",
        "importlib",
        "ctypes",
        "pickle",
        "types",
    }


def test_a_mended_finding_leaves_the_audit_ok() -> None:
    mended = Finding("covenant", 1, "Mended.", mended=True)
    refused = Finding("import", 1, "Refused.")
    assert Audit("", (mended,), (), "").ok
    assert not Audit("", (mended, refused), (), "").ok
