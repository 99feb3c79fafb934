"""Capabilities, end to end: real kernels, real folders, methods that the personas recite."""

import json
from pathlib import Path
from typing import Any

import pytest

from evals.kernels import KernelProcess
from tests.conftest import Start, scripted, writes
from uvm import errors

pytestmark = pytest.mark.slow

REPORT = (
    "def report(self):\n"
    "    lines = self.files.read_text('notes.txt').splitlines()\n"
    "    self.files.write_text('report.txt', str(len(lines)))\n"
    "    self.counted = len(lines)\n"
    "    self._p_changed = True\n"
    "    return len(lines)"
)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "notes.txt").write_text("one\ntwo\nthree\n")
    return folder


def thoughts(process: KernelProcess, event: str) -> list[dict[str, Any]]:
    lines = (process.home / "metacognition.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


async def test_a_granted_folder_is_read_and_written(start_kernel: Start, tmp_path: Path, notes: Path) -> None:
    process = start_kernel(scripted(tmp_path, writes("report", REPORT), MAX_SYNTHESIS_ATTEMPTS="1"))
    async with process.client() as kernel:
        with pytest.raises(errors.MissionFailed, match="/grant genesis_obj files PATH"):
            await kernel.send("genesis_obj", "report")
        grant = {"target_oid": "genesis_obj", "kind": "files", "options": {"path": str(notes), "write": True}}
        await kernel.request("grant", **grant)
        assert await kernel.send("genesis_obj", "report") == 3
        assert (notes / "report.txt").read_text() == "3"
        assert sorted(path.name for path in notes.iterdir()) == ["notes.txt", "report.txt"]
        (notes / "report.txt").unlink()
        await kernel.request("revoke", target_oid="genesis_obj", slot="files")
        with pytest.raises(errors.GrantMissing) as missing:
            await kernel.send("genesis_obj", "report")
        assert missing.value.details["grant"] == "files"
        assert not (notes / "report.txt").exists()
