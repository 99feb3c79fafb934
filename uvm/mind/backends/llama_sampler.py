"""What picks the next token: greedy or by chance, under a grammar or free. Used by `llama_engine` only."""

from __future__ import annotations

import ctypes
import math
from contextlib import ExitStack
from typing import Any

import numpy as np

from uvm.errors import MindError

_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class Sampler:
    """A chain of llama.cpp's samplers, and the grammar that its choices must follow.

    A context manager: leaving it frees both.

    Args:
        lib: llama.cpp's C interface.
        vocab: the model's vocabulary.
        temperature: 0 or less takes the likeliest token each time.
        seed: of the chance at any other temperature.
        grammar: GBNF, or None.

    Raises:
        ValueError: llama.cpp refuses the grammar.
    """

    def __init__(self, lib: Any, vocab: Any, *, temperature: float, seed: int, grammar: str | None) -> None:
        self._lib = lib
        self._vocab = vocab
        with ExitStack() as stack:
            self._chain = self._open_chain(temperature, seed)
            stack.callback(lib.llama_sampler_free, self._chain)
            self._grammar = self._open_grammar(grammar) if grammar is not None else None
            if self._grammar:
                stack.callback(lib.llama_sampler_free, self._grammar)
            self._stack = stack.pop_all()

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _open_chain(self, temperature: float, seed: int) -> Any:
        lib = self._lib
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        if temperature <= 0:
            parts = [lib.llama_sampler_init_greedy()]
        else:
            parts = [
                lib.llama_sampler_init_top_k(40),
                lib.llama_sampler_init_top_p(0.95, 1),
                lib.llama_sampler_init_min_p(0.05, 1),
                lib.llama_sampler_init_temp(temperature),
                lib.llama_sampler_init_dist(seed % 0xFFFFFFFF),  # the number left out asks for chance
            ]
        for part in parts:
            lib.llama_sampler_chain_add(chain, part)
        return chain

    def _open_grammar(self, grammar: str) -> Any:
        opened = self._lib.llama_sampler_init_grammar(self._vocab, grammar.encode(), b"root")
        if not opened:
            raise ValueError("llama.cpp refuses the grammar of this schema")
        return opened

    def sample(self, ctx: Any) -> int:
        """Returns the token that follows what the context has read.

        Asks the grammar about the model's own choice first; only if that is refused about the whole
        vocabulary, which takes about as long as computing a token.
        """
        token = int(self._lib.llama_sampler_sample(self._chain, ctx, -1))
        if self._grammar is None:
            return token
        if not self._allows(token):
            token = self._best_allowed(ctx)
        if not self._lib.llama_vocab_is_eog(self._vocab, token):
            self._lib.llama_sampler_accept(self._grammar, token)
        return token

    def _allows(self, token: int) -> bool:
        own = self._lib.llama_token_data(token, 0.0, 0.0)
        choice = self._lib.llama_token_data_array(ctypes.pointer(own), 1, -1, False)
        self._lib.llama_sampler_apply(self._grammar, ctypes.byref(choice))
        return bool(own.logit > -math.inf)

    def _best_allowed(self, ctx: Any) -> int:
        size = self._lib.llama_vocab_n_tokens(self._vocab)
        table = np.zeros(size, dtype=_TOKEN_DATA)
        table["id"] = np.arange(size)
        table["logit"] = np.ctypeslib.as_array(self._lib.llama_get_logits_ith(ctx, -1), (size,))
        data = table.ctypes.data_as(self._lib.llama_token_data_p)
        choice = self._lib.llama_token_data_array(data, size, -1, False)
        self._lib.llama_sampler_apply(self._grammar, ctypes.byref(choice))
        if table["logit"].max() == -np.inf:  # to accept a refused token would end the process
            raise MindError("the grammar allows no token here")
        self._lib.llama_sampler_apply(self._chain, ctypes.byref(choice))
        return int(choice.data[choice.selected].id)
