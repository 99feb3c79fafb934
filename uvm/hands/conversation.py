"""One call's talk with its hand, from the kernel's side: the job, and answers to the hand's questions.

Whatever runs in a hand may forge any frame, so nothing is believed, and each question is answered once.
Kernel's side; no I/O here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from uvm.capabilities import KINDS
from uvm.codec import encode, is_oid, references
from uvm.errors import MalformedMessage, ObjectNotFound
from uvm.hands.bytecode import Bytecode, Method
from uvm.hands.calls import Call, Host, ObjectView
from uvm.hands.frames import pack
from uvm.hands.natives import filename
from uvm.hands.shown import Shown

MAX_QUESTIONS = 10_000  # of one call
MAX_VIEW = 256 << 10  # bytes of slots that travel with a view; the larger ones are asked for


class Conversation:
    """What the kernel tells one hand.

    Attributes:
        shown: what the hand has been sent, and so what it may refer to and change.
    """

    def __init__(
        self, call: Call, host: Host, bytecode: Bytecode, overlay: Mapping[str, str] | None = None
    ) -> None:
        self.shown = Shown(call.target)
        self.shown.hold([call.args, call.kwargs])
        self._call = call
        self._host = host
        self._bytecode = bytecode
        self._overlay = overlay or {}
        self._large: dict[tuple[str, str], tuple[bytes, Any]] = {}
        self._grants: dict[tuple[str, str], str] = {}  # holder and slot of those shown -> kind
        self._questions = 0
        self._answers: dict[str, Callable[[Any], Any]] = {
            "view": self._view,
            "slot": self._slot,
            "taken": self._taken,
        }

    def job(self) -> bytes:
        """Returns the frame of the job: the call, with the target and its whole delegation chain.

        Raises:
            ObjectNotFound: the target is not there, or an argument refers to what can be no object.
            ValueNotStorable: an argument is no plain value.
        """
        views = {view.oid: self._show(view) for view in self._chain()}
        if self._call.target not in views:
            raise ObjectNotFound(f"there is no object {self._call.target}", target=self._call.target)
        job = {
            "target": self._call.target,
            "selector": self._call.selector,
            "args": self._call.args,
            "kwargs": self._call.kwargs,
            "overlay": dict(self._overlay),
            "views": views,
        }
        frame = pack("call", job)
        if b"new:" in frame:  # in a hand that names an object made by this very call
            for oid in references([self._call.args, self._call.kwargs]):
                if not is_oid(oid):
                    raise ObjectNotFound(f"there is no object {oid}", target=oid)
        return frame

    def answer(self, kind: str, payload: Any) -> bytes | Awaitable[bytes] | None:
        """Returns the frame that answers a question, or None if this kind of frame is no question.

        The answer to the use of a grant is to be awaited.

        Raises:
            MalformedMessage: a question that an honest hand does not ask.
        """
        answer = self._answers.get(kind)
        if answer is None and kind != "use":
            return None
        self._questions += 1
        if self._questions > MAX_QUESTIONS:
            raise MalformedMessage(f"more than {MAX_QUESTIONS} questions in one call")
        return self._use(payload) if answer is None else pack(kind, answer(payload))

    def _chain(self) -> Iterator[ObjectView]:
        """Yields the target and its parents depth first, each once."""
        seen: set[str] = set()
        stack = [self._call.target]
        while stack:
            oid = stack.pop()
            if oid not in seen:
                seen.add(oid)
                view = self._host.view(oid)
                if view is not None:
                    yield view
                    stack.extend(reversed(view.parents))

    def _show(self, view: ObjectView) -> dict[str, Any]:
        slots = {slot: encode(value) for slot, value in view.slots.items()}
        large = _large(slots)
        self._large |= {(view.oid, slot): (slots.pop(slot), view.slots[slot]) for slot in large}
        self.shown.add(view.oid, view.parents, [view.slots[slot] for slot in slots])
        self._grants |= {(view.oid, slot): kind for slot, kind in view.grants.items()}
        granted = {"grants": dict(view.grants)} if view.grants else {}
        return {
            **granted,
            "name": view.name,
            "parents": list(view.parents),
            "slots": slots,
            "methods": dict(view.methods),
            "code": self._code(view),
            "large": large,
        }

    def _code(self, view: ObjectView) -> dict[str, bytes]:
        """Returns the methods that are compiled already: selector -> bytecode."""
        owner = view.name or view.oid
        found = {
            selector: self._bytecode.of(Method(source, filename(owner, selector)))
            for selector, source in view.methods.items()
        }
        return {selector: code for selector, code in found.items() if code is not None}

    def _view(self, oid: Any) -> dict[str, Any] | None:
        if type(oid) is not str or not is_oid(oid) or oid in self.shown.objects:
            raise MalformedMessage("a question for an object that it has, or for no object")
        if not self.shown.may_view(oid):
            raise MalformedMessage("a question for an object that it can't reach")
        view = self._host.view(oid)
        return None if view is None else self._show(view)

    def _slot(self, place: Any) -> bytes:
        if type(place) is not list or [type(part) for part in place] != [str, str]:
            raise MalformedMessage("a question for no slot")
        found = self._large.pop((place[0], place[1]), None)
        if found is None:
            raise MalformedMessage("a question for a slot that it has")
        data, value = found
        self.shown.hold(value)
        return data

    def _taken(self, name: Any) -> bool:
        if type(name) is not str:
            raise MalformedMessage("a question for no name")
        return self._host.taken(name)

    def _use(self, payload: Any) -> Awaitable[bytes]:
        form = [str, str, str, list, dict]
        if type(payload) is not list or [type(part) for part in payload] != form:
            raise MalformedMessage("a use of no grant")
        holder, slot, verb, args, kwargs = payload
        kind = self._grants.get((holder, slot))
        if kind is None or verb not in KINDS[kind].verbs or not all(type(name) is str for name in kwargs):
            raise MalformedMessage("a use of a grant that it was not shown")
        return self._carry_out(holder, slot, verb, args, kwargs)

    async def _carry_out(
        self, holder: str, slot: str, verb: str, args: list[Any], kwargs: dict[str, Any]
    ) -> bytes:
        return pack("use", await self._host.use(holder, slot, verb, args, kwargs))


def _large(slots: dict[str, bytes]) -> list[str]:
    """Returns the slots that do not fit into a view, when the smallest go first."""
    room = MAX_VIEW
    large = []
    for slot, data in sorted(slots.items(), key=lambda item: len(item[1])):
        room -= len(data)
        if room < 0:
            large.append(slot)
    return large
