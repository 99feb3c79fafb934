"""A GGUF model at work: its chat format, its context, reading and writing. Used by `llama_cpp` only.

Works on llama.cpp's low-level interface. The library's `Llama` class redirects the whole process's standard
output while it loads, asks the grammar about every token of the vocabulary at each step, and can't be
stopped while it reads a prompt. llama.cpp's own abort callback would need the interpreter's lock at each
node of the graph, so a busy event loop would slow reading down; prompts are read in short batches instead.
Imports `llama_cpp` when an engine is made.
"""

from __future__ import annotations

import codecs
import ctypes
import os
import re
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from uvm.errors import GenerationCancelled, MindError, ModelUnavailable
from uvm.mind.backends import GET_MODELS, Finish, Message
from uvm.mind.backends.llama_sampler import Sampler

_BATCH = 128  # tokens read between two looks at `cancelled`
# A prompt's shared beginning is kept in steps of this many tokens, and the rest that fills no step is read
# by itself: a batch of few rows is summed up in another order, and an answer must not depend on what
# happened to be in the cache.
_STEP = 32
_QUOTE = "\uf8ff"  # for private use; goes around a mark that a message only talks about
_WORTH_TELLING = {2, 3}  # GGML_LOG_LEVEL_WARN, GGML_LOG_LEVEL_ERROR

_log: deque[str] = deque(maxlen=4)  # llama.cpp's latest complaints; it has one log for the process


class Engine:
    """A loaded model with its context, and what of each kept prompt the context still holds."""

    def __init__(
        self, path: Path, *, n_ctx: int, n_threads: int, prompts_kept: int, n_gpu_layers: int
    ) -> None:
        self._lib = _library()
        with ExitStack() as stack:
            self._model = self._open_model(path, n_gpu_layers)
            stack.callback(self._lib.llama_model_free, self._model)
            self._vocab = self._lib.llama_model_get_vocab(self._model)
            self._chat = self._chat_template(path)
            self._ctx = self._open_context(n_ctx, n_threads, prompts_kept)
            stack.callback(self._lib.llama_free, self._ctx)
            self._batch = self._lib.llama_batch_init(_BATCH, 0, 1)
            stack.callback(self._lib.llama_batch_free, self._batch)
            self.free = stack.pop_all().close
        self._memory = self._lib.llama_get_memory(self._ctx)
        self._n_vocab = self._lib.llama_vocab_n_tokens(self._vocab)
        self._marks = self._control_marks()
        self._pieces: dict[int, bytes | None] = {}
        self._kept: dict[int, list[int]] = {seq: [] for seq in range(prompts_kept)}
        self._seq, self._position = 0, 0

    def _open_model(self, path: Path, n_gpu_layers: int) -> Any:
        params = self._lib.llama_model_default_params()
        params.load_mode = self._lib.LLAMA_LOAD_MODE_MMAP
        params.n_gpu_layers = n_gpu_layers
        _log.clear()
        model = self._lib.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            reason = "; ".join(_log) or "no reason given"
            raise ModelUnavailable(
                f"llama.cpp refuses {path} ({reason}); get it anew with: {GET_MODELS}", path=str(path)
            )
        return model

    def _open_context(self, n_ctx: int, n_threads: int, prompts_kept: int) -> Any:
        params = self._lib.llama_context_default_params()
        params.n_ctx = n_ctx * prompts_kept
        params.n_seq_max = prompts_kept
        params.n_batch = params.n_ubatch = _BATCH
        params.n_threads = params.n_threads_batch = n_threads
        # Flash attention sums in an order that depends on where a batch begins.
        params.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.no_perf = True
        ctx = self._lib.llama_init_from_model(self._model, params)
        if not ctx:
            raise ModelUnavailable(f"no memory for a context of {params.n_ctx} tokens; set a smaller one")
        return ctx

    def _chat_template(self, path: Path) -> Any:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        template = self._lib.llama_model_chat_template(self._model, None)
        if not template:
            raise ModelUnavailable(
                f"{path} has no chat template; use an instruction-tuned model", path=str(path)
            )
        begin, end = self._lib.llama_vocab_bos(self._vocab), self._lib.llama_vocab_eos(self._vocab)
        return Jinja2ChatFormatter(
            template.decode(), bos_token=self._token_text(begin), eos_token=self._token_text(end)
        )

    def _token_text(self, token: int) -> str:
        return "" if token < 0 else str(self._lib.llama_vocab_get_text(self._vocab, token).decode())

    def _control_marks(self) -> re.Pattern[str]:
        """Returns what finds the texts by which the template marks turns, `<|im_end|>` for example."""
        control = [t for t in range(self._n_vocab) if self._lib.llama_vocab_is_control(self._vocab, t)]
        texts = sorted(filter(None, map(self._token_text, control)), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or "(?!)")

    def tokens_of(self, messages: Sequence[Message]) -> list[int]:
        """Returns a conversation in the model's own chat format; marks inside a message stay plain text."""
        rows = [
            {"role": message.role, "content": self._marks.sub(_quote, message.content.replace(_QUOTE, ""))}
            for message in messages
        ]
        parts = self._chat(messages=rows).prompt.split(_QUOTE)
        return [
            token for index, part in enumerate(parts) for token in self._tokenize(part, marks=index % 2 == 0)
        ]

    def _tokenize(self, text: str, *, marks: bool) -> list[int]:
        data = text.encode("utf-8", "replace")
        tokens = (self._lib.llama_token * (len(data) + 8))()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), tokens, len(tokens), False, marks)
        return list(tokens[:count])

    def read(self, prompt: Sequence[int], cancelled: Callable[[], bool]) -> int:
        """Brings the context to the end of `prompt`; returns how many of its tokens had to be read."""
        steps = (len(prompt) - 1) // _STEP * _STEP
        self._seq, start = self._claim(prompt[:steps])
        kept = self._kept[self._seq]
        for begin in range(start, steps, _BATCH):
            _check(cancelled)
            batch = prompt[begin : min(begin + _BATCH, steps)]
            self._decode(batch, begin)
            kept.extend(batch)
        _check(cancelled)
        self._decode(prompt[steps:], steps)
        self._position = len(prompt)
        return len(prompt) - start

    def _claim(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Returns the sequence that shares most with `tokens`, cut to that, and the length shared."""
        shared = {seq: _shared(kept, tokens) // _STEP * _STEP for seq, kept in self._kept.items()}
        # An empty one rather than one in use; among equals the first, which is the least recently used.
        seq = max(shared, key=lambda each: (shared[each], not self._kept[each]))
        kept, length = self._kept.pop(seq), shared[seq]
        if not self._lib.llama_memory_seq_rm(self._memory, seq, length, -1):
            self._lib.llama_memory_seq_rm(self._memory, seq, -1, -1)
            length = 0
        self._kept[seq] = kept[:length]
        return seq, length

    def _decode(self, tokens: Sequence[int], position: int) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = self._seq
            batch.logits[index] = index == len(tokens) - 1
        if status := self._lib.llama_decode(self._ctx, batch):
            raise MindError(f"llama.cpp could not go on ({status}): {'; '.join(_log)}", status=status)

    def sampler(self, *, temperature: float, seed: int, grammar: str | None) -> Sampler:
        return Sampler(self._lib, self._vocab, temperature=temperature, seed=seed, grammar=grammar)

    def write(
        self,
        sampler: Sampler,
        max_tokens: int,
        on_token: Callable[[str], None],
        cancelled: Callable[[], bool],
    ) -> tuple[str, int, Finish]:
        """Returns the text that follows in the context, its number of tokens, and why it ended."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a letter may span tokens
        texts: list[str] = []
        for written in range(max_tokens):
            _check(cancelled)
            token = sampler.sample(self._ctx)
            piece = self._piece(token)
            if piece is None:
                return "".join(texts), written, "stop"
            if text := decoder.decode(piece):
                texts.append(text)
                on_token(text)
            if written + 1 < max_tokens:
                self._decode((token,), self._position + written)
        return "".join(texts), max_tokens, "length"

    def _piece(self, token: int) -> bytes | None:
        """Returns the bytes of a token, or None if it ends the answer."""
        if token not in self._pieces:
            self._pieces[token] = self._look_up(token)
        return self._pieces[token]

    def _look_up(self, token: int) -> bytes | None:
        if self._lib.llama_vocab_is_eog(self._vocab, token):
            return None
        buffer = ctypes.create_string_buffer(256)
        size = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[: max(size, 0)]


def _check(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise GenerationCancelled("the generation was cancelled")


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns how many tokens two prompts have in common at their beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _quote(match: re.Match[str]) -> str:
    return _QUOTE + match.group() + _QUOTE


@cache
def _library() -> Any:
    """Returns llama.cpp's C interface; its log goes to `_log` instead of standard error."""
    # Threads that spin for long at every step fight over the cores with whoever else computes, a hand for
    # example: ten times slower then. Spinning briefly costs nothing where nobody else does.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from llama_cpp import llama_cpp as lib

    lib.llama_log_set(_on_log, None)
    lib.llama_backend_init()
    return lib


def _note(level: int, text: bytes, _data: Any) -> None:
    if level in _WORTH_TELLING:
        _log.append(text.decode("utf-8", "replace").strip())


_on_log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_note)
