"""The Fractal Memory: remembered in the caller's transaction, found by meaning, never ahead of the image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config import Settings
from uvm.awakening import CATALOG, awaken
from uvm.image.image import LivingImage
from uvm.image.txn import Txn
from uvm.memory.catalog import KnowledgeCatalog
from uvm.memory.embedder import Hashing, MiniLM
from uvm.memory.fractal import FractalMemory
from uvm.mind.assets import locate

TEXTS = {
    "greet": "Greet a person by name.",
    "sort": "Sort a list of numbers in descending order.",
    "area": "Compute the area of a circle from its radius.",
    "leap": "Tell whether a year is a leap year.",
}


@pytest.fixture
async def image(tmp_path: Path) -> Any:
    image = LivingImage(str(tmp_path / "live_image.fs"), tmp_path / "blobs")
    image.open()
    assert await awaken(image)
    assert not await awaken(image)
    yield image
    image.close()


async def remember(
    image: LivingImage, memory: FractalMemory, texts: dict[str, str], kind: str = "method"
) -> None:
    vectors = await memory.embed(list(texts.values()))

    def unit(txn: Txn) -> None:
        for (subject, text), vector in zip(texts.items(), vectors, strict=True):
            memory.add(txn.find(CATALOG), text, vector, kind=kind, subject=subject)

    await image.attempt("remember", unit)


async def found(image: LivingImage, memory: FractalMemory, *queries: str, minimum: float = 0.1) -> list[str]:
    async with image.reading() as txn:
        hits = await memory.search(txn.find(CATALOG), queries, k=3, minimum=minimum)
    return [str(hit.subject) for hit in hits]


async def test_what_was_remembered_is_found(image: LivingImage) -> None:
    memory = FractalMemory(Hashing())
    assert await found(image, memory, "anything") == []
    await remember(image, memory, TEXTS)
    assert (await found(image, memory, "a leap year"))[0] == "leap"
    assert {"sort", "area"} <= set(await found(image, memory, "sort a list of numbers", "area of a circle"))


async def test_a_subject_is_known_once_and_by_its_newest_text(image: LivingImage) -> None:
    memory = FractalMemory(Hashing())
    await remember(image, memory, TEXTS)
    assert (await found(image, memory, "sort numbers"))[0] == "sort"
    await remember(image, memory, {"sort": "Shuffle cards at random."})
    await remember(image, memory, {"sort": "Shuffle cards at random."})
    async with image.reading() as txn:
        catalog = txn.find(CATALOG)
        assert isinstance(catalog, KnowledgeCatalog)
        assert len(catalog) == len(TEXTS)
    assert (await found(image, memory, "shuffle cards"))[0] == "sort"
    assert "sort" not in await found(image, memory, "descending list order", minimum=0.4)


async def test_what_was_aborted_is_not_found(image: LivingImage) -> None:
    memory = FractalMemory(Hashing())
    (vector,) = await memory.embed(["ghost story"])
    async with image.transaction("aborted") as txn:
        txn.doom()
        memory.add(txn.find(CATALOG), "ghost story", vector, kind="document")
        assert await memory.search(txn.find(CATALOG), ["ghost story"], k=1, minimum=0.5)
    await remember(image, memory, {"real": "true story"})
    async with image.reading() as txn:
        hits = await memory.search(txn.find(CATALOG), ["ghost story"], k=3, minimum=0.0)
    assert [hit.text for hit in hits] == ["true story"]


async def test_an_earlier_view_finds_what_was_there_then(image: LivingImage) -> None:
    memory = FractalMemory(Hashing())
    await remember(image, memory, {"greet": TEXTS["greet"]})
    then = image.last_transaction()
    await remember(image, memory, {"sort": TEXTS["sort"]})
    assert len(await found(image, memory, "a", minimum=-1)) == 2
    async with image.reading(then) as txn:
        assert len(await memory.search(txn.find(CATALOG), ["a"], k=3, minimum=-1)) == 1
    assert len(await found(image, memory, "a", minimum=-1)) == 2


@pytest.mark.model
async def test_minilm_finds_by_meaning(image: LivingImage, capfd: pytest.CaptureFixture[str]) -> None:
    memory = FractalMemory(MiniLM(locate("all-MiniLM-L6-v2", Settings().MODELS_DIR)))
    vectors = await memory.embed(list(TEXTS.values()))
    assert vectors.shape == (len(TEXTS), 384)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    await remember(image, memory, TEXTS)
    assert (await found(image, memory, "say hello to somebody", minimum=0.45))[0] == "greet"
    assert (await found(image, memory, "order the integers from large to small"))[0] == "sort"
    assert await found(image, memory, "bake a chocolate cake", minimum=0.45) == []
    assert capfd.readouterr() == ("", "")
