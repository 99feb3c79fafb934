"""A granted folder and the real models: the method is written by one, without an example."""

from pathlib import Path

import pytest

from tests.conftest import Start
from uvm import errors

pytestmark = [pytest.mark.slow, pytest.mark.model]

MISSION = (
    "Read the text file notes.txt with self.files, count its lines, write the count to report.txt, "
    "return the count."
)


async def test_a_model_writes_a_method_that_reads_a_file_and_writes_a_report(
    start_kernel: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "notes.txt").write_text("one\ntwo\nthree\n")
    process = start_kernel({})
    async with process.client() as kernel:
        options = {"path": str(folder), "write": True}
        await kernel.request("grant", target_oid="genesis_obj", kind="files", options=options)
        done = await kernel.teach("genesis_obj", "count_notes", [], MISSION)
        assert "self.files" in done["method"]["source"]
        assert not (folder / "report.txt").exists()  # trials write nothing
        assert await kernel.send("genesis_obj", "count_notes") == 3
        assert "3" in (folder / "report.txt").read_text()
        (folder / "report.txt").unlink()
        await kernel.request("revoke", target_oid="genesis_obj", slot="files")
        with pytest.raises(errors.GrantMissing, match="/grant genesis_obj files PATH") as missing:
            await kernel.send("genesis_obj", "count_notes")
        assert missing.value.details["grant"] == "files"
        assert not (folder / "report.txt").exists()
