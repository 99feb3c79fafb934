"""The terminal client as users start it: alone, in a pipe, and in a real terminal with a real kernel.

The kernel's personas and the client's own model recite scripts; `test_parser_model.py` has the real model.
"""

import asyncio
import contextlib
import json
import os
import re
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pexpect
import pytest

from evals.kernels import PROJECT, KernelProcess, free_endpoints
from terminal.display import Display
from terminal.session import Session, spell
from terminal.values import as_json, as_text
from tests.conftest import Start, scripted, writes
from uvm import errors
from uvm.client import Kernel
from uvm.codec import Ref
from uvm.image import journal
from uvm.outcomes import settled
from uvm.parser import Context, Reading

CLIENT = str(PROJECT / "chat_client.py")
CONTEXT = {"objects": {"genesis_obj": {"methods": {"square": ["x"]}}, "shop_obj": {"methods": {"total": []}}}}
GREET = 'def greet_by_name(self, name):\n    """Greets."""\n    return f"Good day, {name}."'
READINGS = [
    {
        "pattern": "Create a function to greet",
        "reply": '{"learn":"genesis_obj.greet_by_name","with":["name"]}',
    },
    {"pattern": "Greet me as", "reply": '{"call":"genesis_obj.greet_by_name","with":{"name":"Ada"}}'},
    {"pattern": "Greet somebody", "reply": '{"call":"genesis_obj.greet_by_name","with":{"name":"Bob"}}'},
    {"pattern": "something slow", "reply": '{"learn":"genesis_obj.slow","with":[]}'},
    {"pattern": "stop the system", "reply": '{"stop":"kernel"}'},
]
STALLS = {"pattern": "Write `def slow", "stall": True}
ESCAPE = re.compile(r"\x1b[\[\]()][0-9;?]*[A-Za-z]?")


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """The environment of a client whose kernel is not there; its model recites `READINGS`."""
    script = tmp_path / "readings.json"
    script.write_text(json.dumps(READINGS), encoding="utf-8")
    commands, events = free_endpoints(2)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("BATOS_")},
        "BATOS_HOME": str(tmp_path),
        "BATOS_VENV": sys.prefix,
        "BATOS_ZMQ_ENDPOINT": commands,
        "BATOS_ZMQ_EVENTS_ENDPOINT": events,
        "BATOS_LLAMA_MODEL_PATH": f"scripted:{script}",
    }


def run(home: dict[str, str], *options: str, say: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, CLIENT, *options],
        input=say,
        env={**home, **more},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    assert text.startswith("error: ")
    return text.strip()


@pytest.fixture
def context(tmp_path: Path) -> str:
    path = tmp_path / "context.json"
    path.write_text(json.dumps(CONTEXT), encoding="utf-8")
    return str(path)


# Without a kernel


def test_help_explains_itself(home: dict[str, str]) -> None:
    done = run(home, "--help")
    assert done.returncode == 0
    assert all(
        word in done.stdout for word in ("-c TEXT", "--parse", "--context", "--json", "$type", "Exit status")
    )


@pytest.mark.parametrize("options", [["--nonsense"], ["--context", "x"], ["-c", "/ping", "--parse"]])
def test_wrong_options_are_refused(home: dict[str, str], options: list[str]) -> None:
    assert run(home, *options).returncode == 2


def test_a_wrong_setting_is_refused(home: dict[str, str]) -> None:
    done = run(home, "-c", "/ping", BATOS_HAND_COUNT="many")
    assert done.returncode == 2
    assert "BATOS_HAND_COUNT" in one_line(done.stderr)


def test_parse_needs_no_kernel_with_a_context(home: dict[str, str], context: str) -> None:
    say = "square(12)\n\n/status\nshop_obj.total(\nshop_obj.total((1,))\nstop the system\n"
    done = run(home, "--parse", "--context", context, say=say)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    square = {"command": "send_message", "target_oid": "genesis_obj", "selector": "square", "args": [12]}
    assert told[:2] == [square, {"command": "status"}]
    assert told[2]["error"]["type"] == "InvalidField"
    assert told[3]["args"] == [{"$type": "tuple", "value": [1]}]
    assert told[4] == {"command": "shutdown"}
    assert done.returncode == 1  # one line could not be read


def test_no_engine_is_imported_for_exact_syntax(home: dict[str, str], context: str) -> None:
    options = ["--parse", "--context", context]
    code = (
        "import sys; sys.argv[1:] = sys.argv[1:]; from terminal.cli import main; status = main(sys.argv[1:]);"
        "print(status, [m for m in ('llama_cpp', 'torch', 'prompt_toolkit') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *options],
        input="/status\nsquare(2)\n",
        env=home,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "0 []"


def test_a_context_that_is_none(home: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("[]", encoding="utf-8")
    for name in ("bad.json", "missing.json"):
        done = run(home, "--parse", "--context", str(tmp_path / name), say="/ping\n")
        assert done.returncode == 1
        one_line(done.stderr)


def test_without_a_kernel_it_says_how_to_start_one(home: dict[str, str], tmp_path: Path) -> None:
    done = run(home, "-c", "/status")
    assert (done.returncode, done.stdout) == (1, "")
    assert "./puter.sh" in one_line(done.stderr)


def test_an_address_that_is_silent_is_told_from_one_where_nothing_listens(
    home: dict[str, str], tmp_path: Path
) -> None:
    from uvm.keys import ensure_keys

    ensure_keys(tmp_path / "keys")
    assert "./puter.sh" in one_line(run(home, "-c", "/status").stderr)
    with socket.create_server(("127.0.0.1", 0)) as other:
        endpoint = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        done = run(home, "-c", "/status", BATOS_ZMQ_ENDPOINT=endpoint)
    assert done.returncode == 1
    assert "does not answer" in one_line(done.stderr)


def test_a_missing_model_stops_sentences_only(home: dict[str, str], context: str, tmp_path: Path) -> None:
    missing = {"BATOS_LLAMA_MODEL_PATH": str(tmp_path / "none.gguf")}
    done = run(home, "--parse", "--context", context, say="square(2)\nsquare two\n", **missing)
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 1
    assert "none.gguf" in one_line(done.stderr)


def test_it_finds_the_projects_python(home: dict[str, str], tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "ran $(basename "$1") $2"\n', encoding="utf-8")
    python.chmod(0o755)
    done = run(home, "--help", BATOS_VENV=str(tmp_path / "venv"))
    assert done.stdout == "ran chat_client.py --help\n"


def test_bytes_that_are_no_text_do_no_harm(home: dict[str, str], context: str) -> None:
    done = subprocess.run(
        [sys.executable, CLIENT, "--parse", "--context", context],
        input=b"/remember \xff\xfe\n/remember '\\udc80'\n",
        env=home,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["command"] for line in done.stdout.splitlines()] == ["remember", "remember"]


def test_a_reader_that_goes_away_does_no_harm(home: dict[str, str], context: str) -> None:
    command = (
        f"yes /status | head -n 20000 | {sys.executable} {CLIENT} --parse --context {context} | head -n 1"
    )
    done = subprocess.run(
        command, shell=True, env=home, capture_output=True, text=True, timeout=120, check=True
    )
    assert (json.loads(done.stdout), done.stderr) == ({"command": "status"}, "")


# Values


@pytest.mark.parametrize(
    ("value", "form"),
    [
        ({"a": [1, None, True, 2.5, "x"]}, {"a": [1, None, True, 2.5, "x"]}),
        (2**80, 2**80),
        ((1, (2,)), {"$type": "tuple", "value": [1, {"$type": "tuple", "value": [2]}]}),
        ({3, 1}, {"$type": "set", "value": [1, 3]}),
        ({1: "a"}, {"$type": "dict", "value": [[1, "a"]]}),
        ({"$type": "x"}, {"$type": "dict", "value": [["$type", "x"]]}),
        (b"\x00\xff", {"$type": "bytes", "value": "AP8="}),
        (1 + 2j, {"$type": "complex", "value": [1.0, 2.0]}),
        (float("inf"), {"$type": "float", "value": "inf"}),
        (Decimal("1.20"), {"$type": "decimal", "value": "1.20"}),
        (Ref("00000000000000a1"), {"$type": "ref", "value": "00000000000000a1"}),
    ],
)
def test_values_as_json(value: Any, form: Any) -> None:
    assert as_json(value) == form
    json.dumps(as_json(value), allow_nan=False)


def test_an_answer_can_not_steer_the_terminal() -> None:
    assert as_text("a\x1b[2Jb\nc\td\u202e") == "a\\x1b[2Jb\nc\td\\x202e"
    assert as_text(["\x1b"]) == r"['\x1b']"


def test_commands_are_spelled_as_a_person_would() -> None:
    brief = {"type": "unhandled_message", "selector": "gcd", "parameters": ["a", "b"]}
    cycle = {"command": "initiate_cognitive_cycle", "target_oid": "genesis_obj", "mission_brief": brief}
    assert spell(cycle) == "learn genesis_obj.gcd(a, b)"
    assert (
        spell({**cycle, "mission_brief": {"type": "revision", "selector": "gcd"}}) == "change genesis_obj.gcd"
    )
    send = {"command": "send_message", "target_oid": "o", "selector": "m", "args": [1, "x"]}
    assert spell(send) == "o.m(1, 'x')"
    assert spell({**send, "kwargs": {"by": 2}}) == "o.m(1, 'x', by=2)"
    assert spell({**send, "args": [], "kwargs": {"by": "x"}}) == "o.m(by='x')"
    assert spell({"command": "revert_method", "target_oid": "o", "selector": "m"}) == "revert method o.m"
    assert spell({"command": "shutdown"}) == "shutdown"


# With a kernel


@pytest.fixture
def kernel(start_kernel: Start, tmp_path: Path) -> KernelProcess:
    return start_kernel(scripted(tmp_path, [*writes("greet_by_name", GREET), STALLS]))


@pytest.fixture
def joined(home: dict[str, str], kernel: KernelProcess) -> dict[str, str]:
    """The environment of a client that finds the kernel."""
    names = ("BATOS_HOME", "BATOS_ZMQ_ENDPOINT", "BATOS_ZMQ_EVENTS_ENDPOINT")
    return {**home, **{name: kernel.environment[name] for name in names}}


@pytest.mark.slow
def test_answers_in_a_pipe_stand_alone(joined: dict[str, str]) -> None:
    learned = run(joined, say="Create a function to greet me by name.\n", FORCE_COLOR="")
    assert learned.returncode == 0, learned.stderr
    assert learned.stdout.startswith("learned greet_by_name(name)")
    assert "Good day" in learned.stdout
    greeted = run(joined, say='Greet me as "Ada".')
    assert (greeted.returncode, greeted.stdout, greeted.stderr) == (0, "Good day, Ada.\n", "")
    failed = run(joined, say="Greet somebody.\n/ping\n")
    assert failed.returncode == 1
    assert "name" in one_line(failed.stderr)
    assert "uptime_s" in failed.stdout  # the next line is read all the same


@pytest.mark.slow
def test_one_command_and_its_status(joined: dict[str, str]) -> None:
    made = run(joined, "-c", "/create desk_obj")
    assert (made.returncode, made.stderr) == (0, "")
    assert run(joined, "-c", "/set desk_obj.owner = 'Ada'").returncode == 0
    shown = run(joined, "-c", "/inspect desk_obj").stdout
    assert "owner = 'Ada'" in shown
    assert "\x1b" not in shown
    again = run(joined, "-c", "/create desk_obj")
    assert (again.returncode, again.stdout) == (1, "")
    assert "desk_obj" in one_line(again.stderr)
    assert run(joined, "-c", "").returncode == 1
    assert "desk_obj" in run(joined, "-c", "/objects").stdout
    assert "pid" in run(joined, "-c", "/status").stdout
    assert run(joined, "-c", "/help").stdout.count("/") > 10
    assert run(joined, "-c", "/quit").returncode == 0


@pytest.mark.slow
def test_json_lines(joined: dict[str, str]) -> None:
    done = run(
        joined,
        "--json",
        say="/create desk_obj\n/set desk_obj.pair = (1, 2)\n/inspect desk_obj\n/inspect no\n",
    )
    assert done.returncode == 1
    made, put, shown, failed = map(json.loads, done.stdout.splitlines())
    assert (made["ok"], made["command"]) == (True, "create_object")
    assert put["result"] is None
    assert shown["result"]["slots"] == {"pair": {"$type": "tuple", "value": [1, 2]}}
    assert failed["error"]["type"] == "ObjectNotFound"


@pytest.mark.slow
def test_parse_asks_the_kernel_what_there_is(joined: dict[str, str]) -> None:
    done = run(joined, "--parse", say="Create a function to greet me by name.\n")
    assert json.loads(done.stdout)["target_oid"] == "genesis_obj"


def open_terminal(joined: dict[str, str], **more: str) -> Any:
    terminal = pexpect.spawn(
        sys.executable,
        [CLIENT],
        env={**joined, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **more},
        encoding="utf-8",
        timeout=60,
        dimensions=(40, 120),
    )
    terminal.expect("BAT OS>")
    return terminal


@pytest.mark.slow
def test_a_cycle_is_followed_live_and_the_method_is_used(joined: dict[str, str]) -> None:
    terminal = open_terminal(joined)
    terminal.sendline("Create a function to greet me by name.")
    for state in ("IDLE", "DECOMPOSING", "DELEGATING", "SYNTHESIZING", "VALIDATING", "COMPLETE"):
        terminal.expect(state)
    terminal.expect(r"greet_by_name\(name\)")
    terminal.expect("BAT OS>")
    terminal.sendline('Greet me as "Ada".')
    terminal.expect(r"Good day, Ada\.")
    terminal.expect("BAT OS>")
    assert "IDLE" not in terminal.before
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


@contextlib.contextmanager
def held_back(endpoint: str) -> Iterator[tuple[str, threading.Event]]:
    """Gives an address that leads to `endpoint`, for one connection, once the event is set."""
    go_on = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def relay() -> None:
        with listener, contextlib.suppress(ConnectionError):
            here, _ = listener.accept()
            go_on.wait()
            with here, socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2]))) as there:
                across, data = {here: there, there: here}, b"anything"
                while data:
                    end = select.select(across, [], [])[0][0]
                    data = end.recv(4096)
                    across[end].sendall(data)

    relaying = threading.Thread(target=relay)
    relaying.start()
    try:
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}", go_on
    finally:
        go_on.set()
        relaying.join()


@pytest.mark.slow
def test_a_command_waits_until_its_cycle_can_be_followed(joined: dict[str, str]) -> None:
    with (
        held_back(joined["BATOS_ZMQ_EVENTS_ENDPOINT"]) as (events, go_on),
        contextlib.closing(open_terminal(joined, BATOS_ZMQ_EVENTS_ENDPOINT=events)) as terminal,
    ):
        terminal.sendline("Create a function to greet me by name.")
        assert terminal.expect(["learned", pexpect.TIMEOUT], timeout=1) == 1
        go_on.set()
        terminal.expect("IDLE")
        terminal.expect("learned")


@pytest.mark.slow
def test_without_events_commands_are_carried_out_all_the_same(joined: dict[str, str]) -> None:
    terminal = open_terminal(joined, BATOS_ZMQ_EVENTS_ENDPOINT=free_endpoints(1)[0])
    terminal.sendline("Create a function to greet me by name.")
    terminal.expect("learned")
    terminal.expect("BAT OS>")
    terminal.close(force=True)


@pytest.mark.slow
def test_ctrl_c_cancels_the_mission_and_not_the_client(joined: dict[str, str]) -> None:
    terminal = open_terminal(joined)
    terminal.sendline("learn something slow")
    terminal.expect("SYNTHESIZING")
    terminal.sendintr()
    terminal.expect("interrupted")
    terminal.expect("BAT OS>")
    terminal.sendline("/missions")
    terminal.expect("cancelled")
    terminal.expect("BAT OS>")
    terminal.sendintr()
    terminal.expect(pexpect.EOF)


@pytest.mark.slow
@pytest.mark.parametrize("followed", [True, False], ids=["seen", "from the journal"])
async def test_ctrl_c_cancels_nobody_elses_mission(
    followed: bool, start_kernel: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stalls = [{**STALLS, "pattern": r"Write `def slow\w*"}]
    process = start_kernel(scripted(tmp_path, stalls, WORKER_COUNT="9"))
    display = Display()
    display.live = True  # as in a terminal: cycles are shown
    async with process.client() as others, process.client() as kernel:
        await others.request("create_object", name="shop_obj")
        session = Session(kernel, _no_model, display)
        async with session if followed else contextlib.nullcontext():
            saying = asyncio.create_task(session.say("shop_obj.slow()"))
            (own,) = await _running(others, 1)
            begun = [await _begin(others, target, "slow") for target in ("genesis_obj", "traits_obj")]
            seen = ""
            while followed and len(begun) < 8 and "slow_other" not in seen:  # until events come
                begun.append(await _begin(others, "genesis_obj", f"slow_other_{len(begun)}"))
                await _running(others, 1 + len(begun))
                seen += capsys.readouterr().out
            assert ("slow_other" in seen) is followed
            saying.cancel()
            with pytest.raises(asyncio.CancelledError):
                await saying
        states = {row["mission_id"]: row["state"] for row in await others.request("missions")}
        assert states == {own: "cancelled", **dict.fromkeys(begun, "running")}


@pytest.mark.slow
async def test_ctrl_c_on_what_learns_nothing_cancels_nothing(kernel: KernelProcess) -> None:
    async with kernel.client() as others:
        mission = await _begin(others, "genesis_obj", "slow")
        await _running(others, 1)
        session = Session(others, _no_model, Display())
        saying = asyncio.create_task(session.say("/history genesis_obj.slow"))
        await asyncio.sleep(0)  # it has begun
        saying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await saying
        assert (await others.request("mission", mission_id=mission))["state"] == "running"


async def _no_model(text: str, context: Context) -> Reading:
    raise AssertionError(f"{text!r} is exact syntax")


async def _begin(kernel: Kernel, target: str, selector: str) -> str:
    return str((await kernel.teach(target, selector, [], "Be slow.", wait=False))["mission_id"])


async def _running(kernel: Kernel, number: int) -> list[str]:
    """Waits until so many missions run, and returns their ids."""
    async with asyncio.timeout(60):
        while len(rows := await kernel.request("missions", state="running")) < number:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return [row["mission_id"] for row in rows]


@pytest.mark.slow
def test_a_sentence_that_destroys_is_confirmed(joined: dict[str, str], kernel: KernelProcess) -> None:
    terminal = open_terminal(joined)
    terminal.sendline("stop the system")
    terminal.expect("y/N")
    terminal.sendline("n")
    terminal.expect("BAT OS>")
    terminal.sendline("/ping")
    terminal.expect("uptime_s")
    terminal.expect("BAT OS>")
    terminal.sendline("stop the system")
    terminal.expect("y/N")
    terminal.sendline("y")
    terminal.expect("BAT OS>")
    assert kernel.process is not None
    assert kernel.process.wait(30) == 0
    terminal.sendline("/quit")
    terminal.expect(pexpect.EOF)


@pytest.mark.slow
def test_a_kernel_that_goes_and_comes_back(joined: dict[str, str], kernel: KernelProcess) -> None:
    terminal = open_terminal(joined)
    terminal.sendline("learn something slow")
    terminal.expect("SYNTHESIZING")
    kernel.kill()
    terminal.expect(r"error: .*puter\.sh")
    terminal.expect("BAT OS>")
    terminal.sendline("/create lost_obj")
    terminal.expect(r"error: .*puter\.sh")
    terminal.expect("BAT OS>")
    kernel.start()
    terminal.sendline("/objects")
    terminal.expect("traits_obj")
    assert "lost_obj" not in terminal.before  # what failed is not done later, behind the user's back
    terminal.close(force=True)


@pytest.mark.slow
def test_no_color_means_no_color(joined: dict[str, str]) -> None:
    terminal = open_terminal(joined, NO_COLOR="1")
    terminal.sendline("Create a function to greet me by name.")
    terminal.expect("COMPLETE")
    colours = re.findall(r"\x1b\[[0-9;]*m", terminal.before)
    assert not [code for code in colours if re.search(r"\b(3[0-7]|9[0-7]|38)\b", code)]
    terminal.close(force=True)


def test_a_mission_is_shown_with_its_times_and_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    error = {
        "type": "MissionFailed",
        "message": "mission 1-a is in quarantine",
        "details": {"cycles": ["1-a.1"]},
    }
    record = {
        "mission_id": "1-a",
        "state": "quarantined",
        "brief": {"selector": "square"},
        "created": 86_400.0 * 365,
        "deadline": None,
        "finished": 86_400.0 * 366,
        "error": error,
    }
    display = Display()
    display.answer("missions", [record])
    display.answer("mission", record)
    listed, *told = capsys.readouterr().out.splitlines()
    assert re.match(r"1-a  197[01]-\d\d-\d\d \d\d:", listed)
    assert listed.endswith("quarantined  square")
    assert any(re.fullmatch(r"error +MissionFailed: mission 1-a is in quarantine", line) for line in told)
    assert not any(line.startswith("deadline") for line in told)
    assert all(str(record["created"]) not in line for line in told)


def test_a_mission_that_ended_out_of_sight_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    method = {"selector": "square", "parameters": ["x"], "doc": "", "sha256": "ab" * 32}
    record = {"mission_id": "1-a", "state": journal.COMPLETE, "method": method, "transaction_id": "0" * 16}
    Display().answer("initiate_cognitive_cycle", settled(record))
    Display().answer("initiate_cognitive_cycle", settled({**record, "attempts": 1, "seconds": 2.0}))
    assert capsys.readouterr().out.splitlines() == [
        "learned square(x)",
        "learned square(x)  1 attempt, 2.0 s",
    ]


def test_the_protocol_names_every_branch_of_the_errors() -> None:
    text = (PROJECT / "docs" / "PROTOCOL.md").read_text(encoding="utf-8")
    section = text.partition("## Errors")[2].partition("\n## ")[0]
    branches = {kind.__name__ for kind in errors.BatosError.__subclasses__()}
    assert branches - set(re.findall(r"`(\w+)`", section)) == set()
