"""A broker on a real image and a real folder, for tests to use grants as a hand's conversation does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from uvm.awakening import CATALOG, awaken
from uvm.broker.broker import Broker, Uses
from uvm.grant_options import FilesOptions, HttpOptions, NoOptions
from uvm.granting import Granting
from uvm.image.image import LivingImage
from uvm.image.txn import Txn
from uvm.memory.embedder import Hashing
from uvm.memory.fractal import FractalMemory
from uvm.metacognition import MetacognitionLog
from uvm.mind.backends import Message
from uvm.mind.backends.scripted import Scripted
from uvm.mind.mind import Mind
from uvm.mind.personas import Persona

HOLDER = "genesis_obj"


class World:
    """An image with a broker.

    Attributes:
        folder: what `files` is granted on, as soon as it is.
        events: what the log was told.
        commits: id, note and user of each.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folder = home / "granted"
        self.folder.mkdir(exist_ok=True)
        self.events: list[dict[str, Any]] = []
        self.commits: list[tuple[str, str, str]] = []
        self.image = LivingImage(str(home / "bat" / "image.fs"), home / "bat" / "blobs", self._committed)
        self.writer = Scripted([("weather", "Sunny."), (None, "I can't say.")])
        self.log = MetacognitionLog(
            home / "bat" / "log", (lambda event, fields: self.events.append({"event": event, **fields}),)
        )
        self.mind = Mind({"ROBIN": Persona("ROBIN", "You are ROBIN.", "writer")}, {"writer": self.writer})
        self.memory = FractalMemory(Hashing())
        self.broker = Broker(
            image=self.image,
            mind=self.mind,
            memory=self.memory,
            catalog=CATALOG,
            log=self.log,
            default_persona="ROBIN",
            moves_dir=home / "bat" / "moves",
            protected=(home / "bat",),
        )
        self.granting = Granting(self.image, self.broker.settled)
        self.oid = ""

    async def start(self) -> None:
        """Opens the image."""
        (self.home / "bat").mkdir(exist_ok=True)
        self.image.open()
        await awaken(self.image)
        async with self.image.reading() as txn:
            self.oid = txn.find(HOLDER).oid

    async def _committed(self, tid: str, note: str, user: str) -> None:
        self.commits.append((tid, note, user))

    async def close(self) -> None:
        """Closes everything."""
        await self.mind.close()
        self.image.close()
        await self.log.close()

    async def grant_files(self, *, write: bool = True, path: Path | None = None, **options: Any) -> None:
        """Grants the folder to the holder."""
        chosen = FilesOptions(kind="files", path=str(path or self.folder), write=write, **options)
        await self.granting.grant(HOLDER, "files", chosen)

    async def grant(self, options: HttpOptions | NoOptions) -> None:
        """Grants in the slot that is named as the kind."""
        await self.granting.grant(HOLDER, options.kind, options)

    def call(self, txn: Txn) -> Call:
        """Returns a call that uses grants in `txn`."""
        return Call(self.broker.open(txn, "test"), self.oid)

    async def once(self, slot: str, verb: str, *args: Any, **kwargs: Any) -> Any:
        """Uses a grant in a transaction of its own, which commits."""

        async def unit(txn: Txn) -> Any:
            call = self.call(txn)
            result = await call.use(slot, verb, *args, **kwargs)
            call.uses.keep()
            return result

        return await self.image.attempt("once", unit)

    def names(self) -> list[str]:
        """Returns what is really in the folder."""
        return sorted(path.name for path in self.folder.iterdir())

    def text(self, name: str) -> str:
        """Returns what is really in a file."""
        return (self.folder / name).read_text()


class Refused(Exception):
    """What a method would have to catch; `kind` is the name of its exception."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Call:
    """One call's uses."""

    def __init__(self, uses: Uses, oid: str) -> None:
        self.uses = uses
        self._oid = oid

    async def use(self, slot: str, verb: str, *args: Any, **kwargs: Any) -> Any:
        """Returns the result of a use.

        Raises:
            Refused: the method would get an exception.
        """
        answer = await self.uses.use(self._oid, slot, verb, list(args), kwargs)
        if "error" in answer:
            raise Refused(answer["error"]["type"], answer["error"]["message"])
        return answer["ok"]

    async def files(self, verb: str, *args: Any) -> Any:
        """Returns the result of a use of `files`."""
        return await self.use("files", verb, *args)


def asked(world: World) -> list[Message]:
    """Returns the last conversation that the writing model was given."""
    return list(world.writer.prompts[-1])
