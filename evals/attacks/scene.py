"""What there is to be won by an attack: files, listeners and a victim, made for one run and gone after it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECRET = "open sesame"


@contextlib.contextmanager
def scenery(folder: Path) -> Iterator[Scene]:
    """Gives the scene of a run; `folder` must exist."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        name = f"batos-attacks-{os.getpid()}"
        abstract.bind(f"\0{name}")
        abstract.listen()
        scene = Scene(folder, listener.getsockname()[1], name)
        stack.callback(scene.close)
        yield scene


class Scene:
    """The scene; `told` sets up what the last attack may have destroyed, and describes it."""

    def __init__(self, folder: Path, port: int, abstract: str) -> None:
        self._folder = folder
        self._fixed = {"port": port, "abstract": abstract, "kernel": os.getpid()}
        self._victim: subprocess.Popen[bytes] | None = None
        folder.chmod(0o777)  # whoever a hand is, nothing but a wall may keep it out
        secret = folder / "secret"
        secret.write_text(SECRET)
        secret.chmod(0o600)

    def told(self) -> dict[str, Any]:
        """Returns the scene as an attack is told of it, everything in its place again."""
        for path in self._folder.iterdir():
            if path.name != "secret":
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        paths = {name: self._folder / name for name in ("open", "doomed")}
        for path in paths.values():
            path.write_text("as it was")
            path.chmod(0o666)
        return {
            **self._fixed,
            **{name: str(path) for name, path in paths.items()},
            "folder": str(self._folder),
            "secret": str(self._folder / "secret"),
            "victim": self._living_victim(),
        }

    def harmed(self) -> str:
        """Returns what an attack has changed, empty where everything is as it was."""
        if self._victim is not None and self._victim.poll() is not None:
            return "the victim is dead"
        names = sorted(path.name for path in self._folder.iterdir())
        if names != ["doomed", "open", "secret"]:
            return f"the folder holds {', '.join(names)}"
        held = {path.read_text() for path in self._folder.iterdir()}
        return "" if held == {"as it was", SECRET} else "a file has changed"

    def close(self) -> None:
        """Ends the victim."""
        if self._victim is not None:
            self._victim.kill()
            self._victim.communicate()
            self._victim = None

    def _living_victim(self) -> int:
        if self._victim is not None and self._victim.poll() is not None:
            self.close()
        if self._victim is None:
            idle = "import sys; sys.stdin.read()"  # it ends with us, at the latest
            self._victim = subprocess.Popen(
                [sys.executable, "-I", "-c", idle], stdin=subprocess.PIPE, start_new_session=True
            )
        return self._victim.pid
