"""The knowledge catalog: chunks of text with their embeddings, inside the image, and the search over them.

`KnowledgeCatalog` and `Chunk` are persistent: their module path is the disk format. The index is not: each
kernel builds it from the catalog and brings it up to date before every search, so it is never the truth.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from BTrees.IOBTree import IOBTree
from BTrees.OIBTree import OIBTree
from persistent import Persistent

from uvm.image.prototypes import UvmObject
from uvm.image.shapes import Shape, a

Vectors = npt.NDArray[np.float32]


class Chunk(Persistent):
    """One remembered text: a method, a document, a reflection.

    Attributes:
        subject: what the text is about, such as `genesis_obj.greet_by_name`; None for a text of its own.
        created: Unix seconds.
        embedding: float32, little-endian, unit length.
    """

    _shape: ClassVar[Shape] = {
        "text": a(str),
        "embedding": a(bytes),
        "kind": a(str),
        "source": a(str),
        "persona": a(str, NoneType),
        "subject": a(str, NoneType),
        "created": a(float),
    }

    def __init__(
        self, text: str, embedding: bytes, kind: str, source: str, persona: str | None, subject: str | None
    ) -> None:
        self.text = text
        self.embedding = embedding
        self.kind = kind
        self.source = source
        self.persona = persona
        self.subject = subject
        self.created = time.time()

    @property
    def key(self) -> str:
        """What makes a chunk the same as another: two of one subject, or of one text, do not stay both."""
        return _key(self.kind, self.subject, self.text)


def _key(kind: str, subject: str | None, text: str) -> str:
    return f"{kind} {subject}" if subject else f"{kind} {hashlib.sha256(text.encode()).hexdigest()}"


class KnowledgeCatalog(UvmObject):
    """The object that holds the memory; `len` counts its chunks."""

    _own = UvmObject._own | {"_chunks", "_keys"}
    _shape = UvmObject._shape | {"_chunks": a(IOBTree), "_keys": a(OIBTree)}

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._chunks = IOBTree()
        self._keys = OIBTree()  # what makes a chunk the same as another -> its id

    def __len__(self) -> int:
        return len(self._chunks)

    def __bool__(self) -> bool:
        return True

    def add(
        self,
        text: str,
        vector: Vectors,
        *,
        kind: str,
        source: str,
        persona: str | None = None,
        subject: str | None = None,
    ) -> int:
        """Remembers a text and returns its id.

        A text with a subject replaces what was known of that subject; the same text again is the chunk that
        is there already.

        Args:
            vector: float32[d], unit length.
        """
        key = _key(kind, subject, text)
        known = self._keys.get(key)
        if known is not None and self._chunks[known].text == text:
            return int(known)
        if known is not None:
            del self._chunks[known]
        chunk_id = self._chunks.maxKey() + 1 if self._chunks else 1
        embedding = vector.astype("<f4").tobytes()
        self._chunks[chunk_id] = Chunk(text, embedding, kind, source, persona, subject)
        self._keys[key] = chunk_id
        return int(chunk_id)

    def known(self, key: str) -> Chunk | None:
        """Returns what is remembered under a chunk's key, or None."""
        chunk_id = self._keys.get(key)
        return None if chunk_id is None else self._chunks.get(chunk_id)

    def put(self, key: str, chunk: Chunk | None) -> None:
        """Lets a chunk that was remembered before take the place under its key; None clears the place."""
        known = self._keys.pop(key, None)
        if known is not None:
            self._chunks.pop(known, None)
        if chunk is not None:
            self._keys[key] = self._chunks.maxKey() + 1 if self._chunks else 1
            self._chunks[self._keys[key]] = chunk

    def chunks(self) -> Any:
        """Returns the BTree of the chunks: id -> Chunk."""
        return self._chunks


@dataclass(frozen=True, slots=True)
class Hit:
    """A chunk that a search found; `score` is the cosine of the best query, -1 to 1."""

    id: int
    score: float
    text: str
    source: str
    kind: str
    subject: str | None

    def record(self) -> dict[str, Any]:
        """Returns the hit as plain data."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class CatalogIndex:
    """The embeddings of a catalog as one matrix, kept from search to search."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, bytes], Vectors] = {}
        self._matrix: Vectors | None = None
        self._ids: list[int] = []

    def search(
        self,
        catalog: KnowledgeCatalog,
        queries: Vectors,
        k: int,
        *,
        minimum: float,
        kinds: Sequence[str] | None = None,
    ) -> list[Hit]:
        """Returns the `k` chunks nearest to any of the queries, the best first.

        Args:
            queries: float32[m, d], rows of unit length.
            minimum: cosine below which a chunk does not count.
            kinds: only chunks of these kinds.
        """
        self._follow(catalog)
        if self._matrix is None or not len(queries):
            return []
        scores = (self._matrix @ queries.T).max(axis=1)
        hits: list[Hit] = []
        for row in np.argsort(-scores, kind="stable"):
            if len(hits) == k or scores[row] < minimum:
                break
            chunk_id = self._ids[row]
            chunk = catalog.chunks()[chunk_id]
            if kinds is None or chunk.kind in kinds:
                score = float(scores[row])
                hits.append(Hit(chunk_id, score, chunk.text, chunk.source, chunk.kind, chunk.subject))
        return hits

    def _follow(self, catalog: KnowledgeCatalog) -> None:
        """Makes the matrix that of this very view of the catalog; known embeddings are not read again."""
        rows = {}
        for chunk_id, chunk in catalog.chunks().items():
            key = (chunk_id, chunk._p_oid or chunk.embedding[:16])
            known = self._rows.get(key)
            rows[key] = np.frombuffer(chunk.embedding, "<f4") if known is None else known
        if rows.keys() != self._rows.keys() or self._matrix is None:
            self._matrix = np.stack(list(rows.values())) if rows else None
        self._rows = rows
        self._ids = [chunk_id for chunk_id, _ in rows]
