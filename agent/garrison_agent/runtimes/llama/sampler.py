"""How the next token of an answer is chosen, by llama.cpp's samplers. Every call happens in the decode thread.

Source: llama.h of the version inside llama-cpp-python; the order of the chain is llama.cpp's own.
"""

from __future__ import annotations

import ctypes
import secrets
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from garrison_agent.runtimes.llama.backend import Sampler
from garrison_agent.runtimes.llama.generation import REPEAT_WINDOW, Options
from garrison_agent.runtimes.llama.native_grammar import LlamaGrammar
from garrison_agent.runtimes.llama.vocabulary import LlamaVocabulary
from garrison_protocol.errors import InvalidError

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
_REFUSED = -np.inf
_MAX_TRIES = 64
_COLDEST = 1e-4
"""A temperature below it is none: logits divided by less leave the range of llama.cpp's numbers, and mean nothing."""
GRAMMAR_STEP_S = 5.0
"""An ambiguous grammar can make one token take minutes, and meanwhile nobody else gets one."""


class Candidates:
    """Room for one choice among the whole vocabulary: megabytes, so all samplers of a model use the same."""

    def __init__(self, vocabulary_size: int) -> None:
        self.count = vocabulary_size
        self._ids = np.arange(vocabulary_size, dtype=np.int32)
        self._rows = np.empty(vocabulary_size, _CANDIDATE)
        pointer = self._rows.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
        self.native = llama_cpp.llama_token_data_array(pointer, vocabulary_size, -1, False)

    def fill(self, logits: npt.NDArray[np.float32], *, refused: list[int]) -> None:
        """Begin a choice in which all tokens take part but the ``refused``."""
        self._rows["id"] = self._ids
        self._rows["logit"] = logits
        self._rows["logit"][refused] = _REFUSED
        self.native.size, self.native.selected, self.native.sorted = self.count, -1, False

    @property
    def possible(self) -> bool:
        """Tell whether any token can be chosen."""
        return bool(np.isfinite(self._rows["logit"]).any())

    @property
    def chosen(self) -> int | None:
        """The token that was chosen, None if none was."""
        return int(self._rows["id"][self.native.selected]) if self.native.selected >= 0 else None


def make_sampler(
    context: Any,
    vocabulary: LlamaVocabulary,
    candidates: Candidates,
    options: Options,
    prompt: Sequence[int],
    *,
    window: int,
) -> Sampler:
    """Return a sampler for one answer. Presence and frequency penalties count its last ``window`` tokens.

    Raises:
        InvalidError: ``inference.grammar_invalid``.
    """
    if options.grammar is None:
        return _ChainSampler(context, _chain(vocabulary, options, prompt, window))
    grammar = LlamaGrammar(vocabulary, options.grammar, options.grammar_triggers)
    return _GrammarSampler(context, candidates, _chain(vocabulary, options, prompt, window), grammar)


def _chain(vocabulary: LlamaVocabulary, options: Options, prompt: Sequence[int], window: int) -> Any:
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())

    def add(sampler: Any) -> None:
        llama_cpp.llama_sampler_chain_add(chain, sampler)

    if options.logit_bias:
        pairs = [llama_cpp.llama_logit_bias(token, bias) for token, bias in options.logit_bias]
        biases = (llama_cpp.llama_logit_bias * len(pairs))(*pairs)
        add(llama_cpp.llama_sampler_init_logit_bias(vocabulary.size, len(biases), biases))
    if options.repeat_penalty != 1.0:
        repeats = llama_cpp.llama_sampler_init_penalties(
            vocabulary.size, REPEAT_WINDOW, options.repeat_penalty, 0.0, 0.0
        )
        for token in prompt[-REPEAT_WINDOW:]:
            llama_cpp.llama_sampler_accept(repeats, token)
        add(repeats)
    if options.presence_penalty or options.frequency_penalty:
        penalties = (1.0, options.frequency_penalty, options.presence_penalty)
        add(llama_cpp.llama_sampler_init_penalties(vocabulary.size, window, *penalties))
    if options.temperature < _COLDEST:
        add(llama_cpp.llama_sampler_init_greedy())
        return chain
    add(llama_cpp.llama_sampler_init_top_k(options.top_k))
    add(llama_cpp.llama_sampler_init_top_p(options.top_p, 1))
    add(llama_cpp.llama_sampler_init_min_p(options.min_p, 1))
    add(llama_cpp.llama_sampler_init_temp(options.temperature))
    seed = secrets.randbits(32) if options.seed is None else options.seed
    # 0xFFFFFFFF means "random" to llama.cpp; an asked-for seed never does.
    add(llama_cpp.llama_sampler_init_dist((seed & 0xFFFFFFFF) % 0xFFFFFFFF))
    return chain


class _ChainSampler:
    """A chain alone: one native call per token."""

    def __init__(self, context: Any, chain: Any) -> None:
        self._context = context
        self._chain = chain

    def sample(self, row: int) -> int:
        """Return the token that follows ``row`` of the last batch, and remember it for the penalties."""
        return int(llama_cpp.llama_sampler_sample(self._chain, self._context, row))

    def close(self) -> None:
        """Free the chain."""
        llama_cpp.llama_sampler_free(self._chain)
        self._chain = None


class _GrammarSampler:
    """A chain under a grammar.

    As llama.cpp does: choose freely first, since a model that was asked for JSON mostly writes it; only if that token
    does not fit, check the whole vocabulary and choose among what does.
    """

    def __init__(self, context: Any, candidates: Candidates, chain: Any, grammar: LlamaGrammar) -> None:
        self._context = context
        self._candidates = candidates
        self._chain = chain
        self._grammar = grammar

    def sample(self, row: int) -> int | None:
        """Return the token that follows ``row`` of the last batch; None if the grammar leaves none.

        Raises:
            InvalidError: ``inference.grammar_invalid``: it is so ambiguous that it holds up everybody.
        """
        began = time.monotonic()
        pointer = llama_cpp.llama_get_logits_ith(self._context, row)
        logits = np.ctypeslib.as_array(pointer, (self._candidates.count,))
        token = self._choose(logits, refused=[], masked=False)
        if token is None or not self._grammar.take(token):
            token = self._choose_fitting(logits, token)
        if time.monotonic() - began > GRAMMAR_STEP_S:
            raise InvalidError(
                "inference.grammar_invalid",
                f"the grammar is so ambiguous that one token took more than {GRAMMAR_STEP_S:g} s",
                hint="simplify the schema",
            )
        if token is not None:
            llama_cpp.llama_sampler_accept(self._chain, token)
        return token

    def close(self) -> None:
        """Free the chain and the grammar."""
        llama_cpp.llama_sampler_free(self._chain)
        self._chain = None
        self._grammar.close()

    def _choose_fitting(self, logits: npt.NDArray[np.float32], first: int | None) -> int | None:
        """Choose among the tokens that fit, and take the one chosen."""
        refused = [] if first is None else [first]
        while len(refused) < _MAX_TRIES:
            token = self._choose(logits, refused=refused, masked=True)
            if token is None or self._grammar.take(token):
                return token
            # Only a token that holds a trigger and something wrong behind it comes here: no mask knows of those.
            refused.append(token)
        return None

    def _choose(self, logits: npt.NDArray[np.float32], *, refused: list[int], masked: bool) -> int | None:
        candidates = self._candidates
        candidates.fill(logits, refused=refused)
        if masked:
            self._grammar.mask(candidates.native)
            if not candidates.possible:
                return None
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(candidates.native))
        return candidates.chosen
