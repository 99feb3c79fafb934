"""Text to vectors: the sentence-transformers model of the memory, and a fake without a model.

The library is imported when the first text is embedded, in a thread, never before the kernel is live.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from uvm.errors import ModelUnavailable
from uvm.memory.catalog import Vectors


class Embedder(Protocol):
    """Turns texts into vectors."""

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """Returns float32[n, d] with rows of unit length; close meanings have close vectors."""
        ...


class MiniLM:
    """A sentence-transformers model from a folder on disk; nothing is fetched.

    Args:
        folder: as `sentence_transformers` saves a model.
        batch_size: texts that go through the model at once.
    """

    def __init__(self, folder: Path, batch_size: int = 32) -> None:
        self._folder = folder
        self._batch_size = batch_size
        self._model: Any = None
        self._lock = threading.Lock()

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """Returns float32[n, 384] with rows of unit length; text beyond the model's window is ignored.

        Raises:
            ModelUnavailable: the folder holds no model that loads.
        """
        return await _in_daemon_thread(lambda: self._embed(list(texts)))

    def _embed(self, texts: list[str]) -> Vectors:
        with self._lock:
            model = self._load()
            encoded = model.encode(
                texts, batch_size=self._batch_size, normalize_embeddings=True, show_progress_bar=False
            )
        return np.asarray(encoded, dtype=np.float32)

    def _load(self) -> Any:
        if self._model is None:
            _hush()
            from sentence_transformers import SentenceTransformer

            try:
                self._model = SentenceTransformer(str(self._folder), device="cpu", local_files_only=True)
            except (OSError, ValueError, KeyError) as error:
                raise ModelUnavailable(
                    f"the embedding model in {self._folder} does not load ({error}); run: ./puter.sh setup",
                    path=str(self._folder),
                ) from None
        return self._model


async def _in_daemon_thread(work: Callable[[], Vectors]) -> Vectors:
    """Runs `work` in a thread that nobody waits for at the end: loading the libraries takes seconds."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Vectors] = loop.create_future()

    def settle(setter: Callable[[Any], None], value: Any) -> None:
        if not done.done():
            setter(value)

    def run() -> None:
        try:
            outcome: tuple[Callable[[Any], None], Any] = (done.set_result, work())
        except BaseException as error:
            outcome = (done.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name="embedder", daemon=True).start()
    return await done


def _hush() -> None:
    """Keeps progress bars and advice of the libraries off the kernel's terminal."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class Hashing:
    """A fake for tests and demonstrations: words hashed into a vector, so shared words mean likeness."""

    dimension = 256

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """Returns float32[n, 256] with rows of unit length."""
        return np.stack([self._vector(text) for text in texts])

    def _vector(self, text: str) -> Vectors:
        vector = np.zeros(self.dimension, dtype=np.float32)
        for word in re.findall(r"\w+", text.lower()) or [""]:
            digest = hashlib.sha256(word.encode("utf-8", "surrogatepass")).digest()
            vector[digest[0]] += 1.0 if digest[1] & 1 else -1.0
        length = float(np.linalg.norm(vector))
        return vector / length if length else np.eye(1, self.dimension, dtype=np.float32)[0]
