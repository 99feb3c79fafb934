"""The settings of BAT OS: one place, with the unit of each.

Every setting can be overridden by an environment variable `BATOS_<NAME>`; lists and maps are JSON.
`BATOS_HOME` moves every run-time file, so that several kernels, and every test, live side by side. A
relative path is relative to it.

    python config.py            prints every setting with its value
    python config.py DB_FILE    prints one value

`Settings()` reads the environment and raises a `ConfigError` that names the setting, its value and what is
allowed. The organs never import this module: `batos.py` hands them plain values.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qsl

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from uvm.errors import ConfigError
from uvm.mind.assets import default_models_dir

PROJECT = Path(__file__).resolve().parent
CODER = "qwen2.5-coder-1.5b-instruct-q4_k_m"
SMALL_CODER = "qwen2.5-coder-0.5b-instruct-q4_k_m"

# Variables that the launcher, the watchdog and the asset store read themselves.
_KNOWN_VARIABLES = {"BATOS_VENV", "BATOS_ASSET_PATH", "BATOS_WATCHDOG_FD"}

PROFILES: dict[str, dict[str, str]] = {
    "embedded": {"ALFRED": CODER, "BRICK": CODER, "ROBIN": CODER, "BABS": SMALL_CODER},
}


def _endpoint(value: str) -> str:
    scheme, _, rest = value.partition("://")
    if scheme not in ("tcp", "ipc") or not rest:
        raise ValueError("must be a ZeroMQ address, such as tcp://127.0.0.1:5555 or ipc:///run/batos.sock")
    return value


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Endpoint = Annotated[str, AfterValidator(_endpoint)]


class Settings(BaseSettings):
    """All settings, validated; attributes are the names that users set with the prefix `BATOS_`."""

    model_config = SettingsConfigDict(env_prefix="BATOS_", case_sensitive=True, extra="ignore", frozen=True)

    HOME: Path = PROJECT
    """Folder of every run-time file."""
    DB_FILE: str = "live_image.fs"
    """The living image: a file, or any zodburi URI (`zeo://…`, `postgresql://…`)."""
    BLOB_DIR: Path = Path("live_image.fs.blob")
    """Blobs of an image that is a file."""
    CACHE_OBJECTS: int = Field(default=10_000, ge=100)
    """Objects of the image that each connection keeps in memory between its units of work."""
    CACHE_MIB: int = Field(default=16, ge=1, le=65_536)
    """Memory that they may need, in MiB for each connection; one unit of work may need more."""
    KEYS_DIR: Path = Path("keys")
    """CURVE keys of the kernel and its clients; made on the first run, mode 0600."""
    METACOGNITION_LOG_FILE: Path = Path("metacognition.jsonl")
    """Every thought, one JSON object a line."""
    METACOGNITION_LOG_MAX_MIB: int = Field(default=512, ge=0)
    """MiB; at the start a larger log gets a name with the time in it, and a new one begins; 0: never."""
    MIN_FREE_MIB: int = Field(default=64, ge=0)
    """Free space on the image's disk, in MiB, below which nothing new is begun or written; 0: no limit."""
    LORA_STAGING_DIR: Path = Path("lora_adapters")
    """Where LoRA adapters wait to be adopted. (No organ reads this yet.)"""
    BACKUP_DIR: Path = Path("backups")
    """Backups of an image that is a file; better on another disk."""
    MODELS_DIR: Path = Field(default_factory=default_models_dir)
    """Downloaded models; in the user's cache folder, so that a second clone downloads nothing."""

    ZMQ_ENDPOINT: Endpoint = "tcp://127.0.0.1:5555"
    """Commands."""
    ZMQ_EVENTS_ENDPOINT: Endpoint = "tcp://127.0.0.1:5556"
    """Events."""
    MAX_MESSAGE_BYTES: int = Field(default=16 << 20, ge=1 << 10, le=1 << 30)
    """Largest message on the wire, in bytes."""
    QUEUE_LIMIT: int = Field(default=256, ge=1, le=100_000)
    """Requests, and missions, that may wait; one more is refused with QueueFull."""
    WORKER_COUNT: int = Field(default=2, ge=1, le=64)
    """Cognitive cycles under way at once. The language model still serves one request at a time."""

    PROFILE: Literal["embedded"] = "embedded"
    """Which family of models the personas run by default."""
    PERSONA_MODELS: dict[str, str] = {}
    """Persona -> asset name or path of a GGUF file; what is not named comes from PROFILE."""
    DEFAULT_PERSONA_MODEL: Literal["ALFRED", "BRICK", "ROBIN", "BABS"] = "ALFRED"
    """The persona that writes for objects without one of their own."""
    LLAMA_MODEL_PATH: str = CODER
    """The chat client's own model: an asset name, or a path of a GGUF file."""
    SENTENCE_TRANSFORMER_MODEL: str = "all-MiniLM-L6-v2"
    """The memory's embedding model: an asset name, or a folder."""
    CONTEXT_TOKENS: int = Field(default=4096, ge=1024, le=131_072)
    """Context window of each embedded model, in tokens."""
    INFERENCE_THREADS: int = Field(default_factory=_cores, ge=1, le=512)
    """Threads of the embedded engine; more than there are cores is slower."""
    MEMORY_BUDGET_MIB: int = Field(default=8192, ge=256)
    """Memory for resident models, in MiB."""

    MAX_SYNTHESIS_ATTEMPTS: int = Field(default=6, ge=1, le=50)
    """How many times a cycle has its method written before it ends in FAILED."""
    MAX_SYNTHESIS_TOKENS: int = Field(default=768, ge=64, le=8192)
    """Longest answer of the writing model, in tokens."""
    MAX_MISS_DEPTH: int = Field(default=5, ge=1, le=50)
    """How many missing selectors one message may have learned for it, one after the other."""

    HAND_COUNT: int = Field(default=2, ge=1, le=256)
    """Messages that run at once, each in a hand of its own."""
    HAND_TIMEOUT_S: float = Field(default=10.0, gt=0, le=3600)
    """Wall-clock limit of one message, in seconds."""
    HAND_MEMORY_MIB: int = Field(default=512, ge=32)
    """Memory limit of one message, in MiB."""

    ALLOW_WEAK_SANDBOX: bool = False
    """Whether generated code runs where the system has no sandbox for it (tier C; see docs/SECURITY.md)."""

    SAFE_MODE: bool = False
    """Whether nothing starts by itself: missions wait in the journal, and no upkeep is due. The watchdog sets
    it after crashes."""

    BACKUP_INTERVAL_S: float = Field(default=86_400.0, ge=0)
    """Seconds from one backup of the running kernel to the next; 0 is never."""
    BACKUP_KEEP: int = Field(default=4, ge=1)
    """Chains of backups, each a full one with its increments, that are kept."""
    BACKUP_FULL_EVERY: int = Field(default=7, ge=1)
    """Backups in a chain, the full one included; the next begins a new chain."""
    PACK_INTERVAL_S: float = Field(default=604_800.0, ge=0)
    """Seconds from one pack of the running kernel to the next; 0 is never."""
    PACK_KEEP_DAYS: float = Field(default=30.0, ge=0, le=36_500)
    """Days of history that a pack keeps: how far back `undo` and `as_of` reach."""

    AUTOTELIC_INTERVAL_S: float = Field(default=3600.0, ge=1)
    """Seconds between two heartbeats of the autotelic loop. (No organ reads this yet.)"""
    APPROVAL: Literal["auto"] = "auto"
    """Whether a verified method is installed at once, or the Architect is asked. (`ask` is not built yet.)"""

    def __init__(self, **values: Any) -> None:
        unknown = {name for name in os.environ if name.startswith("BATOS_")} - _KNOWN_VARIABLES
        unknown -= {f"BATOS_{name}" for name in type(self).model_fields}
        if unknown:
            raise ConfigError(f"no setting {', '.join(sorted(unknown))}; see: python config.py")
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _refusal(error) from None
        except SettingsError as error:
            raise ConfigError(f"{error}: {error.__cause__ or 'it must be JSON'}") from None

    @field_validator("HOME", "MODELS_DIR", mode="after")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator("PERSONA_MODELS", mode="after")
    @classmethod
    def _known_personas(cls, value: dict[str, str]) -> dict[str, str]:
        unknown = value.keys() - PROFILES["embedded"].keys()
        if unknown:
            raise ValueError(f"personas are {', '.join(PROFILES['embedded'])}; not {', '.join(unknown)}")
        return value

    @model_validator(mode="after")
    def _at_home(self) -> Self:
        for name in ("BLOB_DIR", "KEYS_DIR", "METACOGNITION_LOG_FILE", "LORA_STAGING_DIR", "BACKUP_DIR"):
            self.__dict__[name] = self.HOME / getattr(self, name).expanduser()
        self._take_file_uri()
        if "://" not in self.DB_FILE:
            self.__dict__["DB_FILE"] = str(self.HOME / Path(self.DB_FILE).expanduser())
        self.__dict__["PERSONA_MODELS"] = PROFILES[self.PROFILE] | self.PERSONA_MODELS
        if self.ZMQ_ENDPOINT == self.ZMQ_EVENTS_ENDPOINT:
            raise ValueError("ZMQ_ENDPOINT and ZMQ_EVENTS_ENDPOINT must differ")
        return self

    def _take_file_uri(self) -> None:
        """Lets a `file://` URI be the file that it names: it is looked at, backed up and packed like one.

        One with options that a file has not (`demostorage`, `quota`, …) stays what zodburi makes of it.
        """
        path, _, query = self.DB_FILE.removeprefix("file://").partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        if not self.DB_FILE.startswith("file://") or options.keys() - {"blobstorage_dir"}:
            return
        self.__dict__["DB_FILE"] = os.path.normpath(path)
        if options.get("blobstorage_dir"):
            self.__dict__["BLOB_DIR"] = self.HOME / options["blobstorage_dir"]


def _refusal(error: ValidationError) -> ConfigError:
    lines = []
    for problem in error.errors(include_url=False):
        name = "BATOS_" + ".".join(str(part) for part in problem["loc"]) if problem["loc"] else "settings"
        value = f" = {problem['input']!r:.80}" if problem["loc"] else ""
        lines.append(f"{name}{value}: {problem['msg'].removeprefix('Value error, ')}")
    return ConfigError("; ".join(lines))


def main(names: list[str]) -> int:
    """Prints the settings named, or all; returns the exit status."""
    try:
        values = Settings().model_dump(mode="json")
    except ConfigError as error:
        print(f"config: {error}", file=sys.stderr)
        return 2
    unknown = [name for name in names if name not in values]
    if unknown:
        print(f"config: no setting {', '.join(unknown)}", file=sys.stderr)
        return 2
    if names:
        for name in names:
            print(values[name] if isinstance(values[name], str) else json.dumps(values[name]))
    else:
        for name, value in values.items():
            print(f"{name} = {json.dumps(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
