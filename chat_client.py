#!/usr/bin/env python3
"""The terminal client: what the Architect types becomes a command, and the kernel's answer is shown.

This file only finds the project's Python, so that it runs from anywhere; `terminal.cli` does the work.
Nothing beside the standard library is imported here before that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent


def project_python() -> Path | None:
    """Returns the interpreter of the project's virtual environment, unless this is it or there is none."""
    home = Path(os.environ.get("BATOS_VENV") or PROJECT / ".venv")
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    return python if python.exists() and Path(sys.prefix).resolve() != home.resolve() else None


def main(arguments: list[str]) -> int:
    """Runs the client, with the project's interpreter; returns the exit status."""
    python = project_python()
    if python is not None:
        command = [str(python), str(Path(__file__).resolve()), *arguments]
        if os.name == "nt":  # exec would hand the console back while the client still runs
            return subprocess.call(command)
        os.execv(python, command)
    from terminal.cli import main

    return main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
