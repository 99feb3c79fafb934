"""The frame of the benches: names, figures, the table and the JSON. What they measure needs real parts."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bench import __main__ as bench
from bench.figures import Figure, beside, percentile
from uvm.errors import AssetError


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fine() -> list[Figure]:
        return [beside("tokens written", 19.0, "1/s", 20.0), Figure("messages", 5.0, "1/s")]

    async def poor() -> list[Figure]:
        raise AssetError("the model is missing; get it")

    for name, run in (("fine", fine), ("poor", poor)):
        module = ModuleType(f"bench_of_this_test_{name}")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(bench.BENCHES, name, module.__name__)


@pytest.mark.usefixtures("benches")
def test_figures_go_to_the_terminal_and_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert bench.main(["fine", "--json", str(out)]) == 0
    assert json.loads(out.read_text("utf-8")) == {
        "name": "fine",
        "figures": [
            {"name": "tokens written", "value": 19.0, "unit": "1/s", "raw": 20.0, "ratio": 0.95},
            {"name": "messages", "value": 5.0, "unit": "1/s", "raw": None, "ratio": None},
        ],
    }
    assert "0.95" in capsys.readouterr().out


@pytest.mark.usefixtures("benches")
def test_a_bench_that_can_not_run_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["poor", "--json", str(tmp_path / "out.json")]) == 1
    assert "get it" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_an_unknown_bench_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(["coffee"])
    assert caught.value.code == 2
    assert "mind" in capsys.readouterr().err


@pytest.mark.parametrize(("percent", "expected"), [(0, 1), (50, 2), (51, 3), (95, 4), (100, 4)])
def test_percentiles_are_measured_values(percent: float, expected: float) -> None:
    assert percentile([4, 2, 1, 3], percent) == expected


def test_no_values_have_no_percentile() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)
