"""What the user sees: answers by the command that was asked, a cycle as it goes, errors in one line.

Colours go away in a pipe and with NO_COLOR. In a pipe only answers are printed: no progress, no ornament.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text

from terminal.values import as_text, printable
from uvm.parser import SLASHES
from uvm.states import State

SAY = """\
Say in your own words what you want, in any language:
  Create a function to greet me by name.      a new method is written, verified and installed
  Greet me as "Ada".                          a method is called
  What can shop_obj do?                       objects, methods and their source are shown
Or exactly, without a model: shop_obj.add_item("apples", 4)"""

_MOMENTS = ("created", "deadline", "finished")  # what a mission's record has in Unix seconds


class Display:
    """Prints to standard output, errors to standard error.

    Attributes:
        out: standard output.
        live: somebody watches: standard output is a terminal.
    """

    def __init__(self) -> None:
        self.out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.live = self.out.is_terminal
        self._answers: dict[str, Callable[[Any], None]] = {
            "initiate_cognitive_cycle": self._mission_outcome,
            "inspect": self._object,
            "list_objects": self._objects,
            "method_history": self._versions,
            "revert_method": self._versions,
            "recall": self._memories,
            "grant": lambda result: self._grants([result]),
            "grants": self._grants,
            "revoke": self._done,
            "missions": self._missions,
            "mission": self._mission,
            "cancel_mission": self._mission,
            "set_slot": self._done,
            "delete_slot": self._done,
            "shutdown": self._map,
            "undo": self._map,
            "status": self._map,
            "ping": self._map,
        }

    def answer(self, command: str, result: Any) -> None:
        """Shows the result of a command."""
        self._answers.get(command, self._value)(result)

    def error(self, message: str) -> None:
        """Shows what went wrong, in one line."""
        self._err.print(Text(f"error: {' '.join(printable(message).split())}", style="red"))

    def note(self, text: str) -> None:
        """Says something about the session itself, if somebody watches."""
        if self.live:
            self.out.print(Text(printable(text), style="dim"))

    def help(self) -> None:
        """Shows what can be said."""
        self.out.print(SAY)
        self._rows([(f"  /{name} {slash.usage}".rstrip(), slash.meaning) for name, slash in SLASHES.items()])

    # Answers

    def _value(self, value: Any) -> None:
        self.out.print(as_text(value))

    def _mission_outcome(self, result: dict[str, Any]) -> None:
        method = result.get("method")
        if method:
            signature = f"{method['selector']}({', '.join(method['parameters'])})"
            figures = []
            if "attempts" in result:
                figures.append(f"{result['attempts']} attempt{'s' * (result['attempts'] != 1)}")
            if "seconds" in result:
                figures.append(f"{result['seconds']:.1f} s")
            told = (f"  {', '.join(figures)}".rstrip(), "dim")
            self.out.print(Text.assemble(("learned ", "green"), (signature, "bold"), told))
            self._source(method.get("source", ""))  # a mission's record names the method, and no more
        else:
            self.out.print(f"mission {result['mission_id']}: {result['state']}")
        if "result" in result:
            self._value(result["result"])

    def _object(self, result: dict[str, Any]) -> None:
        parents = f"  delegates to {', '.join(result['parents'])}" if result["parents"] else ""
        name = result["name"] or result["oid"]
        self.out.print(Text.assemble((printable(name), "bold"), (f"  {result['oid']}{parents}", "dim")))
        for slot, value in result["slots"].items():
            self.out.print(f"{slot} = {printable(repr(value))}")
        for slot, grant in result["grants"].items():
            self.out.print(f"{slot}: may use {grant['kind']}  {printable(_flat(grant['options']))}".rstrip())
        for method in result["methods"].values():
            self._source(method["source"])

    def _objects(self, rows: list[dict[str, Any]]) -> None:
        def methods(row: dict[str, Any]) -> str:
            return ", ".join(f"{name}({', '.join(names)})" for name, names in row["selectors"].items())

        self._rows([(row["name"] or row["oid"], methods(row)) for row in rows])

    def _versions(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            when = row.get("created")
            told = [_moment(when) if when else "", row.get("user") or "", _one_line(row.get("reason") or "")]
            first = Text(f"version {row['version']}", style="bold")
            self.out.print(first.append("".join(f"  {printable(one)}" for one in told if one), style="dim"))
            marks = [row.get("model") or "", row["sha256"][:12], row.get("transaction_id") or ""]
            self.out.print(Text("  ".join(filter(None, map(printable, marks))), style="dim"))
            if row.get("diff"):
                self._diff(row["diff"])
            elif row["version"] == 1:
                self._source(row["source"])
            for broken in row.get("broken", ()):
                self.out.print(Text(f"breaks: {_one_line(printable(broken))}", style="yellow"))

    def _diff(self, text: str) -> None:
        """Prints what differs from the version before, without the two lines that only name them."""
        styles = {"+": "green", "-": "red", "@": "cyan"}
        for line in printable(text).splitlines()[2 if text.startswith("---") else 0 :]:
            self.out.print(Text(line, style=styles.get(line[:1], "")))

    def _memories(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            self.note("the memory has nothing like it")
        for row in rows:
            about = " ".join(str(row[key]) for key in ("kind", "subject") if row.get(key))
            self.out.print(Text(f"{row['score']:.2f}  {about}".rstrip(), style="dim"))
            self.out.print(printable(row["text"]))

    def _grants(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            self.note("nothing is granted")
        self._rows([(f"{row['object']}.{row['slot']}", row["kind"], _flat(row["options"])) for row in rows])

    def _missions(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            self.note("no missions yet")
        shown = []
        for row in rows:
            made, selector = _moment(row["created"]), row["brief"]["selector"]
            shown.append((row["mission_id"], made, f"{row['state']:<11}", selector))
        self._rows(shown)

    def _mission(self, result: dict[str, Any]) -> None:
        times = {name: _moment(result[name]) for name in _MOMENTS if result.get(name) is not None}
        told = {**result, **times}
        if "error" in told:
            told["error"] = f"{told['error']['type']}: {told['error']['message']}"
        self._map({name: value for name, value in told.items() if value is not None})

    def _map(self, result: dict[str, Any]) -> None:
        self._rows([(name, _flat(value)) for name, value in result.items()])

    def _done(self, result: None) -> None:
        self.note("done")

    def _rows(self, rows: Sequence[tuple[str, ...]]) -> None:
        """Prints rows with a bold first column; the others follow with two spaces between."""
        width = max((cell_len(row[0]) for row in rows), default=0)
        for first, *others in rows:
            gap = " " * (width - cell_len(first))
            line = Text.assemble(
                (printable(first), "bold"), gap, *(f"  {printable(cell)}" for cell in others)
            )
            line.rstrip()
            self.out.print(line)

    def _source(self, source: str) -> None:
        source = printable(source).strip("\n")
        if not source:
            return
        if self.live:
            self.out.print(Syntax(source, "python", background_color="default", word_wrap=True))
        else:
            self.out.print(source)


class CycleView:
    """A cycle as it goes, if somebody watches: each state with its time, the model's words, findings."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._writing = False

    def show(self, event: dict[str, Any]) -> None:
        """Shows one event of the cycle."""
        if not self._display.live:
            return
        shows = {"transition": self._transition, "token": self._token, "finding": self._finding}
        shows[event["event"]](event)

    def _transition(self, event: dict[str, Any]) -> None:
        self.rest()
        again = f"  attempt {event['attempt']}" if _is_repetition(event) else ""
        selector = f"  {event['selector']}" if event["state"] == State.IDLE else ""
        style = {State.COMPLETE: "green", State.FAILED: "red"}.get(event["state"], "cyan")
        time_s = (f"{event.get('seconds', 0.0):7.1f} s  ", "dim")
        self._display.out.print(Text.assemble(time_s, (event["state"], style), (f"{selector}{again}", "dim")))

    def _token(self, event: dict[str, Any]) -> None:
        self._writing = True
        self._display.out.print(Text(printable(event["text"]), style="dim"), end="")
        sys.stdout.flush()

    def _finding(self, event: dict[str, Any]) -> None:
        self.rest()
        mended = " (mended)" if event.get("mended") else ""
        found = f"           {event['rule']}, line {event['line']}: {event['message']}{mended}"
        self._display.out.print(Text(printable(found), style="yellow"))

    def rest(self) -> None:
        """Ends the line that the model's words are on."""
        if self._writing:
            self._writing = False
            self._display.out.print()


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _flat(value: Any) -> str:
    """Returns nested data on one line: a map's values with their names, a list's one after another."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(_flat, value))
    return as_text(value)


def _is_repetition(event: dict[str, Any]) -> bool:
    return bool(event["state"] == State.SYNTHESIZING and event.get("attempt", 0) > 0)
