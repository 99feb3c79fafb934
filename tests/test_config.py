"""The settings: defaults, overrides, and refusals that say what is wrong and what is allowed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from config import CODER, PROJECT, SMALL_CODER, Settings
from uvm.errors import ConfigError


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("BATOS_")]:
        monkeypatch.delenv(name)


def test_home_moves_every_run_time_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATOS_HOME", str(tmp_path))
    settings = Settings()
    paths = [Path(settings.DB_FILE), settings.BLOB_DIR, settings.KEYS_DIR, settings.METACOGNITION_LOG_FILE]
    assert [path.parent for path in paths] == [tmp_path] * 4
    assert tmp_path not in settings.MODELS_DIR.parents


def test_an_absolute_path_and_a_uri_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATOS_DB_FILE", "zeo://localhost:9100")
    monkeypatch.setenv("BATOS_KEYS_DIR", str(tmp_path / "elsewhere"))
    assert Settings().DB_FILE == "zeo://localhost:9100"
    assert tmp_path / "elsewhere" == Settings().KEYS_DIR


def test_a_uri_of_a_file_is_that_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATOS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BATOS_DB_FILE", f"file://{tmp_path}/a/../i.fs?blobstorage_dir={tmp_path}/b")
    assert (str(tmp_path / "i.fs"), tmp_path / "b") == (Settings().DB_FILE, Settings().BLOB_DIR)
    monkeypatch.setenv("BATOS_DB_FILE", f"file://{tmp_path}/i.fs")
    assert (Settings().DB_FILE, Settings().BLOB_DIR.parent) == (str(tmp_path / "i.fs"), tmp_path / "home")
    monkeypatch.setenv("BATOS_DB_FILE", "file:///i.fs?quota=1mb")
    assert Settings().DB_FILE == "file:///i.fs?quota=1mb"


def test_the_embedded_personas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().PERSONA_MODELS == {
        "ALFRED": CODER,
        "BRICK": CODER,
        "ROBIN": CODER,
        "BABS": SMALL_CODER,
    }
    monkeypatch.setenv("BATOS_PERSONA_MODELS", json.dumps({"ALFRED": "other.gguf"}))
    assert Settings().PERSONA_MODELS["ALFRED"] == "other.gguf"
    assert Settings().PERSONA_MODELS["BRICK"] == CODER


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("HAND_COUNT", "many", "valid integer"),
        ("HAND_COUNT", "0", "greater than or equal to 1"),
        ("HAND_TIMEOUT_S", "-1", "greater than 0"),
        ("ZMQ_ENDPOINT", "127.0.0.1:5555", "must be a ZeroMQ address"),
        ("DEFAULT_PERSONA_MODEL", "JOKER", "'ALFRED', 'BRICK', 'ROBIN' or 'BABS'"),
        ("PERSONA_MODELS", '{"JOKER": "x"}', "personas are ALFRED, BRICK, ROBIN, BABS"),
        ("PERSONA_MODELS", "{", "PERSONA_MODELS"),
        ("APPROVAL", "perhaps", "'auto'"),
        ("HAND_COUNTS", "2", "no setting BATOS_HAND_COUNTS"),
    ],
)
def test_a_wrong_value_is_refused_with_name_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, allowed: str
) -> None:
    monkeypatch.setenv(f"BATOS_{name}", value)
    with pytest.raises(ConfigError) as refusal:
        Settings()
    assert name in str(refusal.value)
    assert allowed in str(refusal.value)


def test_both_sockets_need_addresses_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATOS_ZMQ_EVENTS_ENDPOINT", "tcp://127.0.0.1:5555")
    with pytest.raises(ConfigError, match="must differ"):
        Settings()


def test_every_setting_says_what_it_is() -> None:
    source = (PROJECT / "config.py").read_text(encoding="utf-8")
    for name in Settings.model_fields:
        line = next(line for line in source.splitlines() if line.strip().startswith(f"{name}:"))
        assert source.split(line, 1)[1].lstrip().startswith('"""'), name


def run(*names: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROJECT / "config.py"), *names],
        env={"PATH": "/usr/bin:/bin", "HOME": "/nowhere", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_prints_settings() -> None:
    assert run("HAND_COUNT").stdout == "2\n"
    assert "ZMQ_ENDPOINT = " in run().stdout
    assert run("NONSENSE").returncode == 2
    wrong = run(BATOS_HAND_COUNT="x")
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
