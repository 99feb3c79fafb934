"""Uses of grants: each one is checked, carried out by what its kind stands for, and told to the log.

A hand asks through its conversation; whatever it says is taken for hostile. A grant counts only if the object
holds it in the call's own transaction and still holds it now, so that revoking takes effect at once and an
earlier view of the image brings no power back. Layer 3: used by the messenger.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from uvm.broker import folder, staging, web
from uvm.broker.files import MOVES, Attempt, Files, Granted
from uvm.broker.moves import Entry, MovesLog
from uvm.broker.threads import Threads
from uvm.capabilities import KINDS, Verb
from uvm.errors import (
    BatosError,
    CallerError,
    GenerationCancelled,
    HandDied,
    InvalidField,
    MalformedMessage,
    MindError,
)
from uvm.image.grants import Grant
from uvm.image.image import LivingImage
from uvm.image.prototypes import UvmObject
from uvm.image.txn import Txn
from uvm.memory.fractal import FractalMemory
from uvm.metacognition import MetacognitionLog
from uvm.mind.backends import Message
from uvm.mind.mind import Mind
from uvm.pressure import exhausted

MAX_USES = {"files": 1000, "http": 100, "clock": 1000, "recall": 100, "ask": 20}  # of one call
MAX_REFUSED = 100  # further uses that are answered, before the call is ended
MAX_WAIT_S = 600.0  # that all uses of one call may take together
MAX_QUESTION = 16_384  # characters
MAX_ANSWER_TOKENS = 1024
MAX_HITS = 20
MAX_THREADS = 32  # that folders, and as many that name servers, may keep waiting

_TOLD = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, TimeoutError)
# What a method gets to see: the first of these that an error is.
_ERRORS: tuple[type[Exception], ...] = (*_TOLD, ConnectionError, OSError, ValueError, TypeError, RuntimeError)


_OURS = ("descriptors", "memory")  # the kernel's own want; a full disk is that of the folder granted


class Broker:
    """Carries out the uses of grants.

    Args:
        catalog: name of the object that holds the memory.
        default_persona: who answers where a method names nobody.
        protected: files and folders of BAT OS itself, which no grant may open.
    """

    def __init__(
        self,
        *,
        image: LivingImage,
        mind: Mind,
        memory: FractalMemory,
        catalog: str,
        log: MetacognitionLog,
        default_persona: str,
        moves_dir: Path,
        protected: tuple[Path, ...] = (),
    ) -> None:
        self.image = image
        self.log = log
        self._mind = mind
        self._memory = memory
        self._catalog = catalog
        self._default_persona = default_persona
        self._protected = protected
        self.moves = MovesLog(moves_dir)
        self._swept: set[str] = set()
        self._disk = Threads("folders", MAX_THREADS)
        self._resolve = web.resolver(Threads("names", MAX_THREADS))
        self.kinds: dict[str, Callable[[Use], Awaitable[Any]]] = {
            "files": self._files,
            "http": self._http,
            "clock": self._clock,
            "recall": self._recall,
            "ask": self._ask,
        }

    def open(self, txn: Txn, selector: str) -> Uses:
        """Returns what carries out the uses of one call in `txn`."""
        return Uses(self, txn, selector)

    async def finish_moves(self) -> list[str]:
        """Does what was committed but not yet done in granted folders; returns lines that tell of it."""

        def committed(entry: Entry) -> bool:
            return self.image.carries(MOVES, entry.token, since=entry.since)

        return await self._disk.run(lambda: self.moves.finish(committed))

    async def settled(self, options: dict[str, Any]) -> dict[str, Any]:
        """Returns the options of a new grant as they are kept: a folder without links in its path.

        Raises:
            InvalidField: the folder is not there, or belongs to BAT OS itself.
        """
        if "path" not in options:
            return options
        try:
            path = await self._disk.run(lambda: folder.settled(options["path"], self._protected))
        except (ValueError, OSError) as error:
            raise InvalidField(f"options.path: {error}", field="options.path") from None
        return {**options, "path": path}

    # The kinds

    async def _files(self, use: Use) -> Any:
        attempt = use.files.attempt()
        result = await self._disk.run(lambda: self._in_folder(use, attempt))
        use.files.adopt(attempt)  # one that was given up is never adopted, even if it ends later
        return result

    def _in_folder(self, use: Use, attempt: Attempt) -> Any:
        options = use.grant.options
        root = folder.settled(options["path"], self._protected)
        if root != options["path"]:
            raise FileNotFoundError("the folder granted is no longer where it was")
        if options["write"] and root not in self._swept:
            with folder.opened(root) as descriptor:
                staging.sweep(descriptor, self.moves.waiting())
            self._swept.add(root)
        granted = Granted(root, options["max_bytes"], options["write"], use.holds)
        return attempt.carry_out(granted, use.verb.name, dict(use.values))

    async def _http(self, use: Use) -> Any:
        options = use.grant.options
        return await web.fetch(
            use.verb.name.upper(),
            use.values["url"],
            use.values["headers"],
            hosts=options["hosts"],
            max_bytes=options["max_bytes"],
            timeout_s=options["timeout_s"],
            resolve=self._resolve,
        )

    async def _clock(self, use: Use) -> Any:
        now = dt.datetime.now(dt.UTC)
        return now if use.verb.name == "now" else now.date()

    async def _recall(self, use: Use) -> Any:
        query, k = use.values["query"], use.values["k"]
        if not 1 <= k <= MAX_HITS or not 1 <= len(query) <= MAX_QUESTION:
            raise ValueError(f"k is 1 to {MAX_HITS}, and a query has 1 to {MAX_QUESTION} characters")
        catalog = use.txn.find(self._catalog)
        return [hit.record() for hit in await self._memory.search(catalog, [query], k=k, minimum=0.0)]

    async def _ask(self, use: Use) -> Any:
        question, tokens = use.values["question"], use.values["max_tokens"]
        if not 1 <= tokens <= MAX_ANSWER_TOKENS or not 1 <= len(question) <= MAX_QUESTION:
            raise ValueError(
                f"max_tokens is 1 to {MAX_ANSWER_TOKENS}, and a question has 1 to {MAX_QUESTION} characters"
            )
        persona = use.values["persona"] or self._default_persona
        try:
            reply = await self._mind.ask(
                persona, [Message("user", question)], max_tokens=tokens, temperature=0.0
            )
        except GenerationCancelled:
            raise
        except CallerError as error:
            raise ValueError(error.message) from None
        except MindError as error:
            raise RuntimeError(error.message) from None
        return reply.text


class Use:
    """One use of a grant.

    Attributes:
        values: of the verb's parameters.
    """

    def __init__(
        self, uses: Uses, holder: UvmObject, slot: str, grant: Grant, verb: Verb, values: dict[str, Any]
    ) -> None:
        self.txn = uses.txn
        self.files = uses.files
        self.grant = grant
        self.verb = verb
        self.values = values
        self._image = uses.broker.image
        self._holder = holder.oid
        self._slot = slot
        self._what = (grant.kind, grant.options)

    def holds(self) -> bool:
        """Returns whether the grant is there now, whatever the call's own view of the image says."""
        with self._image.view() as now:
            try:
                grant = now.find(self._holder)._slots.get(self._slot)
            except BatosError:
                return False
            return isinstance(grant, Grant) and (grant.kind, grant.options) == self._what

    def told(self) -> str:
        """Returns what the log says that was used; never what was read, written, asked or answered."""
        if self.grant.kind == "http":
            return web.parse(self.values["url"]).told
        what = str(self.values.get("path") or self.values.get("persona") or "")[:200]
        return what.encode("utf-8", "backslashreplace").decode()


class Uses:
    """The uses that one call makes of grants, with their limits.

    Args:
        selector: the message that the call answers, for the log.
    """

    def __init__(self, broker: Broker, txn: Txn, selector: str) -> None:
        self.broker = broker
        self.txn = txn
        self.files = Files(txn, broker.moves)
        self._selector = selector
        self._left_s = MAX_WAIT_S
        self._made: Counter[str] = Counter()

    def keep(self) -> None:
        """Lets the call's file writes become a part of its transaction."""
        self.files.keep()

    async def use(
        self, holder: str, slot: str, verb: str, args: list[Any], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Carries one use out and returns `{ok: value}` or `{error: {type, message}}`, for the method.

        Raises:
            MalformedMessage: there is no such grant, or it has no such verb.
            HandDied: it was used far too often.
        """
        owner = self.txn.find(holder)
        grant = owner._slots.get(slot)
        known = KINDS[grant.kind].verbs.get(verb) if isinstance(grant, Grant) else None
        if known is None:
            raise MalformedMessage("a use of a grant that is not there")
        self._made[grant.kind] += 1
        if self._made[grant.kind] > MAX_USES[grant.kind] + MAX_REFUSED:
            raise HandDied(f"{self._selector} goes on using {grant.kind}, though it was told that it can't")
        began = time.monotonic()
        what, outcome = "", "ok"
        try:
            use = Use(self, owner, slot, grant, known, known.bind(args, kwargs))
            what = use.told()
            return {"ok": await self._carry_out(use)}
        except _ERRORS as error:
            if (pressed := exhausted(error)) is not None and pressed.details["resource"] in _OURS:
                outcome = "ResourceExhausted"
                raise pressed from error
            seen = next(kind for kind in _ERRORS if isinstance(error, kind))
            outcome = seen.__name__
            return {"error": {"type": outcome, "message": _message(error)}}
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            seconds = time.monotonic() - began
            self._left_s -= seconds
            await self.broker.log.record(
                "capability",
                target=owner.label,
                slot=slot,
                kind=grant.kind,
                verb=verb,
                what=what,
                outcome=outcome,
                seconds=round(seconds, 3),
                selector=self._selector,
            )

    async def _carry_out(self, use: Use) -> Any:
        kind = use.grant.kind
        if self._made[kind] > MAX_USES[kind]:
            raise RuntimeError(f"one call may use {kind} {MAX_USES[kind]} times")
        if use.verb.writes and not self.txn.writable:
            raise PermissionError("a look at an earlier image can't write files")
        if not use.holds():
            raise PermissionError("the grant was revoked")
        if self._left_s <= 0:
            raise _spent()
        try:
            async with asyncio.timeout(self._left_s) as budget:
                return await self.broker.kinds[kind](use)
        except TimeoutError:
            if not budget.expired():
                raise
            raise _spent() from None


def _spent() -> TimeoutError:
    return TimeoutError(f"the grants of this call took {MAX_WAIT_S:g} s, which is the limit")


def _message(error: Exception) -> str:
    """Returns an error's text without what the system adds to it."""
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return told[:1000]
