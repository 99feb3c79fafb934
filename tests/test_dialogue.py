"""The first conversation, in a real terminal, with the real models, through kills and restarts."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from evals.kernels import PROJECT, KernelProcess

pytestmark = [pytest.mark.slow, pytest.mark.model]

PROMPT = "BAT OS>"
STATES = ["IDLE", "DECOMPOSING", "DELEGATING", "SYNTHESIZING", "VALIDATING", "COMPLETE"]
THINKING_S = 180  # the longest that a sentence or a cycle may take on a busy machine


@pytest.fixture
def home(tmp_path: Path) -> KernelProcess:
    return KernelProcess(tmp_path / "home")


@pytest.fixture
def watchdog(home: KernelProcess) -> Iterator[subprocess.Popen[bytes]]:
    """A watchdog that keeps a kernel with the real models at `home`."""
    home.home.mkdir()
    with (home.home / "watchdog.out").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, str(PROJECT / "min_watchdog_service.py"), "--backoff", "0.2"],
            env=home.environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    wait_until_live(home, 1)
    yield process
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def wait_until_live(home: KernelProcess, starts: int) -> None:
    """Waits until the watchdog's kernel has said `starts` times that it is live."""
    out = home.home / "watchdog.out"
    child = pexpect.spawn("tail", ["-n", "+1", "-F", str(out)], encoding="utf-8", timeout=120)
    for _ in range(starts):
        child.expect_exact("[UVM] System is live. Awaiting Architect's command...")
    child.close()


def client(home: KernelProcess, *arguments: str) -> "pexpect.spawn[str]":
    environment = {**home.environment, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "120"}
    return pexpect.spawn(
        sys.executable,
        [str(PROJECT / "chat_client.py"), *arguments],
        env=environment,
        encoding="utf-8",
        timeout=THINKING_S,
        dimensions=(50, 120),
    )


def once(home: KernelProcess, text: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(PROJECT / "chat_client.py"), "-c", text],
        env=home.environment,
        capture_output=True,
        text=True,
        timeout=THINKING_S,
        check=False,
    )


def greeting_of(name: str) -> str:
    """A pattern for a line that greets `name`; not for the echoed line, which has it in quotation marks."""
    return f'[A-Z][a-z]+[^\r\n"]*{name}[^\r\n"]*\r\n'


def test_the_first_conversation(home: KernelProcess, watchdog: "subprocess.Popen[bytes]") -> None:
    terminal = client(home)
    terminal.expect_exact(PROMPT)
    terminal.sendline("Create a function to greet me by name.")
    for state in STATES:
        terminal.expect_exact(state)
    terminal.expect_exact("learned")
    terminal.expect_exact(PROMPT)

    prompts = log(home).count('"event": "prompt"')
    terminal.sendline('Greet me as "Architect".')
    terminal.expect(greeting_of("Architect"))
    terminal.expect_exact(PROMPT)
    assert log(home).count('"event": "prompt"') == prompts  # understood: no cycle ran

    pid = int(once(home, "/ping").stdout.split("pid")[1].split()[0])
    os.kill(pid, signal.SIGKILL)
    wait_until_live(home, 2)
    terminal.sendline('Greet me as "Ada".')
    terminal.expect(greeting_of("Ada"))
    terminal.expect_exact(PROMPT)
    terminal.sendeof()
    terminal.expect(pexpect.EOF)

    dump = subprocess.run(
        [sys.executable, "-m", "ZODB.FileStorage.fsdump", str(home.home / "live_image.fs")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "uvm.image.prototypes.UvmMethod" in dump
    assert re.search(r"unhandled_message \w+ \w*greet\w* \(mission ", dump)


def test_a_pipe_prints_the_answer_alone(home: KernelProcess, watchdog: "subprocess.Popen[bytes]") -> None:
    learned = once(home, "Create a method named double_it that returns two times x.")
    assert learned.returncode == 0, learned.stderr
    piped = subprocess.run(
        [sys.executable, str(PROJECT / "chat_client.py")],
        input="genesis_obj.double_it(21)\n",
        env=home.environment,
        capture_output=True,
        text=True,
        timeout=THINKING_S,
        check=False,
    )
    assert (piped.returncode, piped.stdout, piped.stderr) == (0, "42\n", "")
    wrong = once(home, "nobody_obj.double_it(21)")
    assert wrong.returncode == 1
    assert (wrong.stdout, wrong.stderr.count("\n")) == ("", 1)


def log(home: KernelProcess) -> str:
    return (home.home / "metacognition.jsonl").read_text(encoding="utf-8")
