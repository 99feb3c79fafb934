#!/usr/bin/env python3
"""The command line of upkeep: `./puter.sh backup`, `restore`, `verify` and `pack` run this.

Works beside a running kernel, and without one. An image that a kernel has open is packed by that kernel: then
this asks it to, over the wire. The kernel itself runs this for backups and verifications (`--json --nice`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from config import Settings
from uvm.client import Kernel
from uvm.errors import BatosError, ImageLocked, KernelUnreachable, UpkeepError, to_wire
from uvm.upkeep import files
from uvm.upkeep.backups import Backups
from uvm.upkeep.ledger import Ledger
from uvm.upkeep.packs import Packed, pack_closed
from uvm.upkeep.restore import Restored, parse_time, restore
from uvm.upkeep.verify import verify

INTERRUPTED = 130
SIGN_OF_LIFE_S = 10.0
NICENESS = 10


class Upkeep:
    """One run of one command."""

    def __init__(self, options: argparse.Namespace, settings: Settings) -> None:
        self._options = options
        self._settings = settings
        self._blob_dir: Path = settings.BLOB_DIR
        self._counting = False

    def run(self) -> tuple[str, dict[str, Any]]:
        """Does what is asked; returns a line to print, and the result as plain data.

        Raises:
            BatosError: it failed.
        """
        verbs = {
            "backup": self._backup,
            "restore": self._restore,
            "verify": self._verify_backup if getattr(self._options, "backups", False) else self._verify,
            "pack": self._pack,
        }
        return verbs[self._options.verb]()

    def tell(self, phase: str) -> None:
        """Shows which phase begins; on a terminal, each replaces the one before."""
        if self._options.json:
            return
        if sys.stderr.isatty():
            print(f"\r\x1b[K{phase} ...", end="", file=sys.stderr, flush=True)
            self._counting = True
        elif not phase.startswith("loading object") or phase.startswith("loading object 0 "):
            print(f"{phase} ...", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        self.rest()
        print(line, file=sys.stderr, flush=True)

    def rest(self) -> None:
        """Clears the line of the last phase."""
        if self._counting:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _image(self) -> Path:
        location = self._settings.DB_FILE
        if "://" in location:
            raise UpkeepError(f"{location} is no image file; use the tools of its server")
        return Path(location)

    def _folder(self, given: Path | None) -> Path:
        return (given or self._settings.BACKUP_DIR).expanduser().absolute()

    def _backup(self) -> tuple[str, dict[str, Any]]:
        folder = self._folder(self._options.to)
        settings = self._settings
        backup = Backups(folder, self.tell).make(
            self._image(),
            self._blob_dir,
            keep=settings.BACKUP_KEEP,
            full_every=settings.BACKUP_FULL_EVERY,
            full=self._options.full,
        )
        kept = Backups(folder).kept()
        chains = len({one.chain for one in kept})
        line = f"Backup {backup.told()}; in {folder}: {len(kept)} backups in {chains} chains."
        return line, asdict(backup)

    def _restore(self) -> tuple[str, dict[str, Any]]:
        image, blob_dir = self._image_and_blobs(self._options.to)
        until = None if self._options.at is None else parse_time(self._options.at)
        backups = Backups(self._folder(self._options.source), self.tell)
        done = restore(backups, image, blob_dir, until=until, tell=self.tell)
        result = {"stamp": done.backup.stamp, "image": str(done.image), "aside": str(done.aside or "")}
        return _told(done, blob_dir), result

    def _verify(self) -> tuple[str, dict[str, Any]]:
        image, blob_dir = self._image_and_blobs(self._options.file)
        if not image.is_file():
            raise UpkeepError(f"there is no image file {image}")
        with files.typed_errors(f"verifying {image}"):
            report = verify(image, blob_dir, self.tell).check()
        return report.told(), asdict(report) | {"path": str(report.path)}

    def _verify_backup(self) -> tuple[str, dict[str, Any]]:
        backups = Backups(self._folder(self._options.source), self.tell)
        with files.typed_errors(f"verifying {backups.folder}"):
            report = backups.check(newest := backups.newest())
        line = f"Backup {newest.told()} again just now, in {report.seconds:.1f} s."
        return line, asdict(report) | {"path": str(report.path), "stamp": newest.stamp}

    def _image_and_blobs(self, given: Path | None) -> tuple[Path, Path]:
        """Returns an image file and the folder of its blobs; those of another file lie beside it."""
        if given is None or given.absolute() == Path(self._settings.DB_FILE):
            return self._image(), self._blob_dir
        return given.absolute(), Path(f"{given.absolute()}.blob")

    def _pack(self) -> tuple[str, dict[str, Any]]:
        image = self._image()
        days = self._settings.PACK_KEEP_DAYS if self._options.days is None else self._options.days
        try:
            with files.typed_errors(f"packing {image}"):
                packed = pack_closed(image, self._blob_dir, days, self.tell, self.say)
        except ImageLocked:
            self.tell("the running kernel packs its image")
            result = asyncio.run(self._ask_kernel(days))
            packed = Packed(*(result[name] for name in ("before", "bytes", "until")))
        else:
            result = asdict(packed)
            with files.typed_errors("the ledger"):
                Ledger(self._settings.HOME / "run" / "upkeep.json").done("pack", result)
        return f"Packed {image}: {packed.told()}.", result

    async def _ask_kernel(self, days: float) -> dict[str, Any]:
        """Lets the kernel pack, and waits as long as it lives."""
        settings = self._settings
        async with Kernel(settings.ZMQ_ENDPOINT, settings.ZMQ_EVENTS_ENDPOINT, settings.KEYS_DIR) as kernel:
            request = asyncio.ensure_future(kernel.request("upkeep", what="pack", days=days))
            pid = (await kernel.request("ping", timeout_s=SIGN_OF_LIFE_S))["pid"]
            try:
                while not (await asyncio.wait({request}, timeout=SIGN_OF_LIFE_S))[0]:
                    if (await kernel.request("ping", timeout_s=SIGN_OF_LIFE_S))["pid"] != pid:
                        raise KernelUnreachable("the kernel ended while it packed; pack again")
                result: dict[str, Any] = await request
                return result
            finally:
                request.cancel()


def _told(done: Restored, blob_dir: Path) -> str:
    """Returns what a restore did, and how to go back."""
    line = f"Restored backup {done.backup.told()}, as {done.image}."
    if done.aside is None:
        return line
    line += f"\nThe image before is kept. To go back: stop the kernel, then mv {done.aside} {done.image}"
    if done.aside_blobs is not None:
        line += f"; rm -r {blob_dir}; mv {done.aside_blobs} {blob_dir}"
    return line + f"; rm -f {done.image}.index"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the options on the command line."""
    parser = argparse.ArgumentParser(
        prog="puter", description="Backups, verification and packing of the living image.", allow_abbrev=False
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result, or the error, as JSON")
    common.add_argument("--nice", action="store_true", help="give way to everybody else")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="backup|restore|verify|pack")

    def verb(name: str, help: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=help, description=help, parents=[common], allow_abbrev=False)

    folder: dict[str, Any] = {"type": Path, "metavar": "FOLDER"}
    folder["help"] = "folder of the backups (default: BACKUP_DIR)"
    backup = verb("backup", "back the image up, what is new of it, and verify that it can be restored")
    backup.add_argument("--to", **folder)
    backup.add_argument("--full", action="store_true", help="begin a new chain")
    back = verb("restore", "put a backup in the place of the image, which is kept beside it")
    back.add_argument("--from", dest="source", **folder)
    back.add_argument("--at", metavar="TIME", help="the newest backup until then: 2026-01-31T18:30, in UTC")
    back.add_argument("--to", type=Path, metavar="FILE", help="restore to another file (blobs: FILE.blob)")
    check = verb("verify", "read the whole image, or the newest backup, and say whether it is sound")
    check.add_argument("file", nargs="?", type=Path, metavar="FILE", help="another image file")
    check.add_argument("--backups", action="store_true", help="the newest backup in place of an image")
    check.add_argument("--from", dest="source", **folder)
    pack = verb("pack", "forget versions of objects that were replaced long ago")
    pack.add_argument(
        "--days", type=_days, metavar="N", help="keep those of N days (default: PACK_KEEP_DAYS)"
    )
    return parser.parse_args(arguments)


def _days(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) <= 36_500:
            return float(text)
    raise argparse.ArgumentTypeError("a number of days from 0 to 36500")


def _stop(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)  # unwinds, and so sweeps


def main(arguments: list[str]) -> int:
    """Runs one command and returns the exit status: 0, or 1 where it failed."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, _stop)
    if options.nice and hasattr(os, "nice"):
        os.nice(NICENESS)
    upkeep: Upkeep | None = None
    try:
        upkeep = Upkeep(options, Settings())
        line, result = upkeep.run()
        upkeep.rest()
        print(json.dumps({"ok": True, "result": result}) if options.json else line, flush=True)
    except BatosError as error:
        if upkeep is not None:
            upkeep.rest()
        if options.json:
            print(json.dumps({"ok": False, "error": to_wire(error)}, default=str), flush=True)
        else:
            _complain(error)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; what was there before is whole", file=sys.stderr)
        return INTERRUPTED
    return 0


def _complain(error: BatosError) -> None:
    print(f"error: {error}", file=sys.stderr)
    for problem in error.details.get("problems", [])[1:]:
        print(f"  {problem}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
