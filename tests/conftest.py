"""What several tests share: kernels of their own with personas that recite a script, and hands."""

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from evals.kernels import KernelProcess
from uvm.hands.pool import HandPool
from uvm.image.image import LivingImage

PERSONAS = ("ALFRED", "BRICK", "ROBIN", "BABS")
QUERIES = {"pattern": "short search queries", "reply": '{"queries": ["a method"], "sample_args": []}'}


def writes(selector: str, *answers: str) -> list[dict[str, Any]]:
    """Returns script lines: asked to write `selector`, the personas answer these, one after the other.

    A line without the fence is fenced as Python. Requests to mend are answered by the later lines too.
    """
    pattern = f"Write `def {selector}\\b|Write the whole corrected method"
    fenced = [text if "```" in text else f"```python\n{text}\n```" for text in answers]
    return [{"pattern": pattern, "reply": text} for text in fenced]


def scripted(folder: Path, lines: list[dict[str, Any]], **settings: str) -> dict[str, str]:
    """Returns the settings of a kernel that recites `lines`, with a memory that needs no model."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "script.json"
    script.write_text(json.dumps([QUERIES, *lines]), encoding="utf-8")
    return {
        "PERSONA_MODELS": json.dumps(dict.fromkeys(PERSONAS, f"scripted:{script}")),
        "SENTENCE_TRANSFORMER_MODEL": "hashing",
        "HAND_TIMEOUT_S": "2",
        "HAND_MEMORY_MIB": "128",
        **settings,
    }


@contextlib.contextmanager
def opened(folder: Path, told: list[str] | None = None) -> Iterator[LivingImage]:
    """Gives the image of this folder; `told` gets the lines of its opening."""
    image = LivingImage(str(folder / "live_image.fs"), folder / "blobs")
    image.open((told if told is not None else []).append)
    try:
        yield image
    finally:
        image.close()


Start = Callable[..., KernelProcess]


@pytest.fixture
def start_kernel(tmp_path: Path) -> Iterator[Start]:
    """Starts real kernels; the same `home` again is the same image. All are killed in the end."""
    started: list[KernelProcess] = []

    def start(
        settings: Mapping[str, str], home: str = "home", environment: Mapping[str, str] | None = None
    ) -> KernelProcess:
        kernel = KernelProcess(tmp_path / home, settings)
        kernel.environment.update(environment or {})
        started.append(kernel)
        kernel.start()
        return kernel

    yield start
    for kernel in started:
        kernel.kill()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pool() -> AsyncIterator[HandPool]:
    """Hands that a whole module shares."""
    pool = HandPool(count=2, timeout_s=30.0, memory_mib=128)
    await pool.start()
    yield pool
    await pool.close()
