"""Running a command as an ordinary user, from a root that wants to know how the walls look from there."""

from __future__ import annotations

import os
import pwd
import site
import subprocess
import sys
from pathlib import Path


def run_as(user: str, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs this project's Python with `arguments` as `user` and returns how it ended.

    Args:
        folder: a new folder that may hold an interpreter which the user can start.

    Raises:
        ValueError: there is no such user, or no interpreter that he can start.
    """
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise ValueError(f"no user {user!r} on this machine") from None
    folder.chmod(0o755)
    return subprocess.run(
        [_interpreter(entry, folder), *arguments],
        cwd=Path(__file__).resolve().parents[2],
        env={"PATH": os.environ.get("PATH", ""), "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"},
        user=entry.pw_uid,
        group=entry.pw_gid,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
    )


def _interpreter(entry: pwd.struct_passwd, folder: Path) -> str:
    """Returns an interpreter of our version, with our packages, that the user may start."""
    if _starts(sys.executable, entry):
        return sys.executable
    for place in ("/usr/bin", "/usr/local/bin"):
        other = f"{place}/python{sys.version_info.major}.{sys.version_info.minor}"
        if Path(other).exists() and _starts(other, entry):
            subprocess.run([other, "-m", "venv", "--without-pip", folder / "venv"], check=True)
            [packages] = (folder / "venv" / "lib").glob("python*/site-packages")
            (packages / "ours.pth").write_text("\n".join(site.getsitepackages()))
            return str(folder / "venv" / "bin" / "python")
    raise ValueError(
        f"{entry.pw_name} can start no Python {sys.version_info.major}.{sys.version_info.minor} here"
    )


def _starts(interpreter: str, entry: pwd.struct_passwd) -> bool:
    try:
        ended = subprocess.run(
            [interpreter, "-c", ""], user=entry.pw_uid, group=entry.pw_gid, capture_output=True, check=False
        )
    except PermissionError:
        return False
    return ended.returncode == 0
