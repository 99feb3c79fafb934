"""The Fractal Memory as the other organs use it: embed, add, search. Layer 2.

The catalog itself is an object of the image (`knowledge_catalog_obj`), handed in with each call: what is
added belongs to the caller's transaction, and what is found is of the caller's view.
"""

from __future__ import annotations

from collections.abc import Sequence

from uvm.image.prototypes import UvmObject
from uvm.memory.catalog import CatalogIndex, Hit, KnowledgeCatalog, Vectors
from uvm.memory.embedder import Embedder

RELEVANT = 0.45  # cosine from which a chunk is worth a model's attention


class FractalMemory:
    """Embeddings and search over the catalog of an image."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._index = CatalogIndex()

    async def warm(self) -> None:
        """Loads the embedding model, so that the first text does not wait for it."""
        await self._embedder.embed(["a text to begin with"])

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """Returns float32[n, d] with rows of unit length."""
        return await self._embedder.embed(texts)

    async def search(
        self, catalog: UvmObject, queries: Sequence[str], *, k: int, minimum: float = RELEVANT
    ) -> list[Hit]:
        """Returns the `k` chunks nearest to any of the queries, the best first."""
        if not len(_known(catalog)):
            return []  # nothing to find: spare the embedding
        vectors = await self._embedder.embed(queries)
        return self._index.search(_known(catalog), vectors, k, minimum=minimum)

    def add(
        self,
        catalog: UvmObject,
        text: str,
        vector: Vectors,
        *,
        kind: str,
        source: str = "",
        persona: str | None = None,
        subject: str | None = None,
    ) -> int:
        """Adds a text to the catalog, in the caller's transaction, and returns its id."""
        return _known(catalog).add(text, vector, kind=kind, source=source, persona=persona, subject=subject)


def method_text(description: str | None, doc: str, selector: str, source: str) -> str:
    """Returns what the memory keeps of a method: its purpose and its source."""
    return f"{description or doc or selector.replace('_', ' ')}\n```python\n{source}```"


def _known(catalog: UvmObject) -> KnowledgeCatalog:
    assert isinstance(catalog, KnowledgeCatalog), "the awakening makes the catalog of this class"
    return catalog
