"""What a kernel does where the sandbox is weaker than it should be, and what it says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Start, scripted, writes
from uvm import errors
from uvm.hands import sandbox

pytestmark = pytest.mark.slow

SQUARE = "def square(self, x):\n    return x * x"


def without_seccomp(folder: Path) -> dict[str, str]:
    """Returns an environment in which the library behind the seccomp filter can't be loaded."""
    (folder / "pyseccomp.py").write_text("raise RuntimeError('Unable to find libseccomp')\n")
    return {"PYTHONPATH": str(folder)}


async def test_a_kernel_without_a_sandbox_learns_nothing_and_says_why(
    start_kernel: Start, tmp_path: Path
) -> None:
    settings = scripted(tmp_path, writes("square", SQUARE))
    process = start_kernel(settings, environment=without_seccomp(tmp_path))
    async with process.client() as kernel:
        assert (await kernel.request("status"))["sandbox"]["tier"] == "C"
        with pytest.raises(errors.MissionFailed, match="ALLOW_WEAK_SANDBOX"):
            await kernel.send("genesis_obj", "square", 12)
        assert await kernel.send("genesis_obj", "selectors") == ["clone", "selectors", "understands"]
    assert "tier C" in process.log
    assert "is refused (ALLOW_WEAK_SANDBOX)" in process.log
    assert "sandboxed" not in process.log


async def test_the_architect_may_allow_a_weak_sandbox(start_kernel: Start, tmp_path: Path) -> None:
    settings = scripted(tmp_path, writes("square", SQUARE)) | {"ALLOW_WEAK_SANDBOX": "true"}
    process = start_kernel(settings, environment=without_seccomp(tmp_path))
    async with process.client() as kernel:
        assert await kernel.send("genesis_obj", "square", 12) == 144
        told = (await kernel.request("status"))["sandbox"]
    assert (told["tier"], told["layers"]["seccomp"], told["layers"]["memory"]) == ("C", False, True)
    assert "runs all the same" in process.log


@pytest.mark.parametrize(
    ("missing", "tier"),
    [((), "A"), (("landlock",), "B"), (("namespaces",), "B"), (("seccomp",), "C"), (sandbox.NAMES, "C")],
)
def test_a_tier_tells_what_the_layers_are_worth(missing: tuple[str, ...], tier: str) -> None:
    assert sandbox.tier({name: name not in missing for name in sandbox.NAMES}) == tier
