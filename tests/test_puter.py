"""The launcher in a copy of the project whose kernel, client and models are stand-ins of a few lines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import ZODB

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
LIVE_KERNEL = """
    import os, pathlib, signal, time
    alive = pathlib.Path(os.environ["BATOS_HOME"]) / "alive"
    def end(*_):
        alive.unlink()
        raise SystemExit(0)
    signal.signal(signal.SIGTERM, end)
    alive.touch()
    time.sleep(600)
"""
BROKEN_KERNEL = "print('[UVM] the image is locked'); raise SystemExit(2)"
CLIENT = """
    import os, pathlib, sys
    if not (pathlib.Path(os.environ["BATOS_HOME"]) / "alive").exists():
        raise SystemExit("no kernel")
    print("status: live" if sys.argv[1:] == ["-c", "/status"] else f"client {sys.argv[1:]}")
"""
CONFIG = """
    import os, sys
    names = {"DB_FILE": "live_image.fs", "KEYS_DIR": "keys"}
    print(os.path.join(os.environ["BATOS_HOME"], names[sys.argv[1]]))
"""
MODELS = "import sys; print('looking for models', *sys.argv[1:])"
TERMINAL = """\
#!/bin/sh
echo "$@" >>"$BATOS_HOME/windows"
while [ "$1" != -e ]; do shift; done
shift
exec "$@" </dev/null >/dev/null 2>&1
"""


class Project:
    """A folder with the launcher, the watchdog and stand-ins; its environment is this very interpreter's."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.bin = folder, folder / "home", folder / "bin"
        for name in ("puter.sh", "min_watchdog_service.py"):
            shutil.copy(ROOT / name, folder / name)
        self.write("batos.py", LIVE_KERNEL)
        self.write("chat_client.py", CLIENT)
        self.write("config.py", CONFIG)
        self.write("uvm/mind/assets.py", MODELS)
        for name in ("errors.py", "keyfiles.py", "keys.py", "image/dump.py"):
            self.write(f"uvm/{name}", (ROOT / "uvm" / name).read_text(encoding="utf-8"))
        self.write("requirements.txt", "")
        self.write("requirements-dev.txt", "")
        self.write_program("venv/bin/python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def write_program(self, name: str, text: str) -> None:
        self.write(name, text)
        (self.folder / name).chmod(0o755)

    def puter(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        hidden = {"DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"}
        outside = {name: value for name, value in os.environ.items() if name not in hidden}
        places = {"BATOS_HOME": str(self.home), "BATOS_VENV": str(self.folder / "venv"), "PIP_NO_INDEX": "1"}
        path = {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}
        command = [str(self.folder / "puter.sh"), *arguments]
        settings = outside | places | path | environment
        # A background watchdog must not hold these: files, not pipes whose end it would keep open.
        with (self.folder / "out").open("w+") as out, (self.folder / "err").open("w+") as err:
            status = subprocess.run(
                command, env=settings, stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=120
            ).returncode
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(command, status, out.read(), err.read())


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    project = Project(tmp_path)
    yield project
    project.puter("stop")


def test_help_and_unknown_commands(project: Project) -> None:
    result = project.puter("help")
    assert result.returncode == 0
    assert "Usage: ./puter.sh [COMMAND]" in result.stdout
    result = project.puter("dance")
    assert result.returncode == 2
    assert "Usage: ./puter.sh [COMMAND]" in result.stderr
    assert not project.home.exists()


def test_setup_does_only_what_is_missing(project: Project) -> None:
    first = project.puter("setup")
    assert first.returncode == 0
    assert "Installing requirements.txt" in first.stderr
    assert "looking for models --quiet" in first.stderr
    assert "Installing" not in project.puter("setup").stderr
    project.write("requirements.txt", "# changed")
    assert "Installing requirements.txt" in project.puter("setup").stderr


def test_a_failed_installation_shows_the_end_of_its_log(project: Project) -> None:
    project.write("requirements.txt", "no-such-package-anywhere==1.0")
    result = project.puter("setup", PIP_FIND_LINKS=str(project.folder))
    assert result.returncode == 1
    assert "No matching distribution found for no-such-package-anywhere==1.0" in result.stderr
    assert f"the whole log: {project.home}/run/setup.log" in result.stderr
    assert "Installing requirements.txt" in project.puter("setup").stderr


def test_without_windows_the_watchdog_goes_to_the_background(project: Project) -> None:
    result = project.puter()
    assert (result.returncode, result.stdout) == (0, "client []\n")
    assert "The kernel goes on in the background" in result.stderr
    assert "Starting batos.py..." in (project.home / "run" / "watchdog.log").read_text()
    watchdog = int((project.home / "run" / "watchdog.pid").read_text())
    assert os.getsid(watchdog) == watchdog  # no terminal can end it

    status = project.puter("status")
    assert (status.returncode, status.stdout) == (0, "status: live\n")
    second = project.puter()
    assert (second.returncode, second.stdout) == (0, "client []\n")

    stopped = project.puter("stop")
    assert (stopped.returncode, stopped.stderr) == (0, "Stopped.\n")
    assert not (project.home / "alive").exists()
    status = project.puter("status")
    assert (status.returncode, status.stderr) == (1, f"Nothing runs in {project.home}.\n")
    assert project.puter("stop").stderr == f"Nothing runs in {project.home}.\n"


def test_with_windows_watchdog_and_client_get_one_each(project: Project) -> None:
    project.write_program("bin/x-terminal-emulator", TERMINAL)
    result = project.puter(DISPLAY=":99")
    assert (result.returncode, result.stdout) == (0, "")
    assert project.puter("status").returncode == 0
    titles = [
        line.split(" -e ")[0]
        for line in (project.home / "windows").read_text().splitlines()
        if " -e " in line
    ]
    assert titles == ["-T BAT OS Watchdog Service", "-T BAT OS Client"]


def test_over_ssh_no_window_is_opened(project: Project) -> None:
    project.write_program("bin/x-terminal-emulator", TERMINAL)
    assert project.puter(DISPLAY=":99", SSH_CONNECTION="1 2 3 4").stdout == "client []\n"


def test_a_kernel_that_cannot_start_is_told(project: Project) -> None:
    project.write("batos.py", BROKEN_KERNEL)
    result = project.puter()
    assert result.returncode == 1
    assert "STARTING -> FATAL: the kernel can't start: [UVM] the image is locked" in result.stderr
    assert f"the whole log: {project.home}/run/watchdog.log" in result.stderr


def test_the_client_gets_its_arguments_and_keeps_its_output_clean(project: Project) -> None:
    project.puter()
    result = project.puter("client", "-c", 'Greet me as "Ada".')
    assert (result.returncode, result.stdout) == (0, "client ['-c', 'Greet me as \"Ada\".']\n")


def test_inspect_reads_an_image_that_is_open(project: Project) -> None:
    project.puter("setup")
    result = project.puter("inspect")
    assert result.returncode == 1
    assert "there is no living image" in result.stderr
    database = ZODB.DB(str(project.home / "live_image.fs"))
    with database.transaction("the first note") as connection:
        connection.root()["key"] = "value"
    result = project.puter("inspect")
    assert result.returncode == 0
    assert "description=b'the first note'" in result.stdout
    assert project.puter("inspect", "--object", "nobody").returncode == 1
    assert "the first note" in project.puter("inspect", "--oid", "0").stdout
    database.close()


def test_keys_come_and_go(project: Project) -> None:
    project.puter("setup")
    added = project.puter("key", "add", "ada")
    assert (added.returncode, added.stderr) == (0, "")
    carried = project.home / "keys" / "carry" / "ada"
    assert str(carried) in added.stdout
    assert {path.name for path in carried.iterdir()} == {"client.key_secret", "kernel.key"}
    listed = project.puter("key", "list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["ada", "client"]
    refused = project.puter("key", "add", "../ada")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "revoked" in project.puter("key", "revoke", "ada").stdout
    assert not carried.exists()
    assert project.puter("key", "revoke", "client").returncode == 1
    assert project.puter("key").returncode == 2


def test_commands_that_need_a_set_up_say_so(project: Project) -> None:
    shutil.rmtree(project.folder / "venv")
    for command in ("status", "stop", "inspect", "key"):
        result = project.puter(command)
        assert (result.returncode, result.stdout) == (1, "")
        assert "run: ./puter.sh setup" in result.stderr


def test_the_test_command_runs_every_check_and_adds_up(project: Project) -> None:
    project.write("test_one.py", "def test_one() -> None:\n    assert 1 == 2\n")
    result = project.puter("test", "-q", "-p", "no:cacheprovider")
    assert result.returncode == 1
    verdicts = [line.split() for line in result.stdout.splitlines()[-4:]]
    assert [name for _, *name in verdicts] == [["ruff", "check"], ["ruff", "format"], ["mypy"], ["pytest"]]
    assert verdicts[-1][0] == "FAILED"
    assert "1 failed" in result.stdout
