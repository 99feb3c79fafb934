"""Every error that BAT OS raises on purpose: one tree, whose types say whose fault it is.

    BatosError
    ├── CallerError              the request is at fault; sending it again changes nothing
    │   ├── MalformedMessage     not a message of this protocol
    │   ├── UnsupportedVersion   a protocol version that this kernel does not speak
    │   ├── UnknownCommand
    │   ├── InvalidField         a field is missing, of the wrong type, or over its limit
    │   ├── ValueNotStorable     a value that is no plain data (names the type and the path)
    │   ├── ObjectNotFound
    │   ├── ObjectExists
    │   ├── SlotNotFound
    │   ├── SlotProtected        a method, a native, a grant or an underscore name: not for set_slot
    │   ├── MethodNotFound
    │   ├── MissionNotFound
    │   ├── TransactionNotFound
    │   ├── NotUndoable          later transactions build on the one to undo, or the image rests on it
    │   ├── KernelRefused        kernel and client do not accept each other's keys; `reason` says which way
    │   ├── GrantMissing         (also an AttributeError) a method needs what the Architect has not granted
    │   └── DoesNotUnderstand    (also an AttributeError) nobody in the delegation chain answers
    ├── RetryLater               nothing is wrong with the request; the same one may succeed later
    │   ├── QueueFull
    │   ├── ShuttingDown
    │   ├── Conflict             other transactions kept winning
    │   ├── ResourceExhausted    no disk, descriptors or memory left; `resource` says which
    │   ├── UpkeepBusy           another backup, restore, verification or pack is under way
    │   ├── ImageUnreachable     the server of the image can't be reached
    │   └── KernelUnreachable    raised by the client library
    ├── MethodError              generated code failed; the image is untouched
    │   ├── MethodRaised         it raised an exception
    │   ├── HandTimeout          it ran longer than HAND_TIMEOUT_S
    │   ├── HandOutOfMemory      it needed more than HAND_MEMORY_MIB
    │   ├── HandOutputTooLarge   its answer was larger than allowed
    │   ├── HandDied             its process ended without an answer
    │   ├── WriteSetRefused      it tried to change what a method may not change
    │   ├── FilesNotWritten      its files are not on disk; with `committed`, the image has changed
    │   └── SandboxTooWeak       it was not run at all: this system offers no sandbox
    ├── MissionError
    │   ├── MissionFailed        the cycle ended in FAILED; the details hold the findings
    │   ├── MissionCancelled
    │   └── MissionExpired       its deadline has passed
    ├── MindError
    │   ├── ModelUnavailable     missing, damaged, or refused by its engine
    │   ├── PromptTooLong        the prompt does not fit the model's context
    │   └── GenerationCancelled
    ├── UpkeepError              a backup, a restore or a pack did not succeed; what was there is whole
    │   ├── NoBackup
    │   └── NotVerified          what was read is not sound; `problems` says what
    └── HomeError                the kernel can't start with what it found
        ├── ConfigError          a setting with a wrong value
        ├── AssetError           a model file that is missing or whose SHA-256 differs
        ├── ImageLocked          another process has the image open
        ├── ImageDamaged         the database file can't be read
        └── ForbiddenClass       a record names a class outside the allow-list

On the wire an error is `{type, message, details}`: `to_wire` writes it, `from_wire` reads it.
Imports nothing of BAT OS.
"""

from __future__ import annotations

from typing import Any


class BatosError(Exception):
    """Base of all deliberate errors; `details` carries the data that the text talks about."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __str__(self) -> str:
        return self.message


class CallerError(BatosError):
    pass


class MalformedMessage(CallerError):
    pass


class UnsupportedVersion(CallerError):
    pass


class UnknownCommand(CallerError):
    pass


class InvalidField(CallerError):
    pass


class ValueNotStorable(CallerError):
    pass


class ObjectNotFound(CallerError):
    pass


class ObjectExists(CallerError):
    pass


class SlotNotFound(CallerError):
    pass


class SlotProtected(CallerError):
    pass


class MethodNotFound(CallerError):
    pass


class MissionNotFound(CallerError):
    pass


class TransactionNotFound(CallerError):
    pass


class NotUndoable(CallerError):
    pass


class KernelRefused(CallerError):
    pass


class GrantMissing(CallerError, AttributeError):
    pass


class DoesNotUnderstand(CallerError, AttributeError):
    """A message that nobody in the target's delegation chain understands."""

    def __init__(self, message: str, *, target: str, selector: str, **details: Any) -> None:
        super().__init__(message, target=target, selector=selector, **details)
        self.target = target
        self.selector = selector


class RetryLater(BatosError):
    pass


class QueueFull(RetryLater):
    pass


class ShuttingDown(RetryLater):
    pass


class Conflict(RetryLater):
    pass


class ResourceExhausted(RetryLater):
    pass


class UpkeepBusy(RetryLater):
    pass


class ImageUnreachable(RetryLater):
    pass


class KernelUnreachable(RetryLater):
    pass


class MethodError(BatosError):
    pass


class MethodRaised(MethodError):
    pass


class HandTimeout(MethodError):
    pass


class HandOutOfMemory(MethodError):
    pass


class HandOutputTooLarge(MethodError):
    pass


class HandDied(MethodError):
    pass


class WriteSetRefused(MethodError):
    pass


class FilesNotWritten(MethodError):
    pass


class SandboxTooWeak(MethodError):
    pass


class MissionError(BatosError):
    pass


class MissionFailed(MissionError):
    pass


class MissionCancelled(MissionError):
    pass


class MissionExpired(MissionError):
    pass


class MindError(BatosError):
    pass


class ModelUnavailable(MindError):
    pass


class PromptTooLong(MindError):
    pass


class GenerationCancelled(MindError):
    pass


class UpkeepError(BatosError):
    pass


class NoBackup(UpkeepError):
    pass


class NotVerified(UpkeepError):
    pass


class HomeError(BatosError):
    pass


class ConfigError(HomeError):
    pass


class AssetError(HomeError):
    pass


class ImageLocked(HomeError):
    pass


class ImageDamaged(HomeError):
    pass


class ForbiddenClass(HomeError):
    pass


def _tree(root: type[BatosError]) -> dict[str, type[BatosError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def to_wire(error: BaseException) -> dict[str, Any]:
    """Returns `{type, message, details}`; an error outside the tree becomes an `InternalError`."""
    if isinstance(error, BatosError):
        return {"type": type(error).__name__, "message": error.message, "details": error.details}
    return {"type": "InternalError", "message": f"{type(error).__name__}: {error}", "details": {}}


def from_wire(error: dict[str, Any]) -> BatosError:
    """Returns the exception that `to_wire` described; an unknown type becomes a `BatosError`."""
    kind, message = str(error.get("type", "")), str(error.get("message", ""))
    details = {str(key): value for key, value in dict(error.get("details") or {}).items()}
    cls = _tree(BatosError).get(kind)
    if cls is None:
        return BatosError(message, type=kind, **details)
    if issubclass(cls, DoesNotUnderstand):
        target, selector = details.pop("target", ""), details.pop("selector", "")
        return cls(message, target=str(target), selector=str(selector), **details)
    return cls(message, **details)
