"""What a prompt must be for a model to read it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from garrison_agent.runtimes.llama.backend import Backend
from garrison_agent.runtimes.llama.generation import Options
from garrison_protocol.errors import InvalidError


def check_prompt(backend: Backend, tokens: Sequence[int]) -> None:
    """Refuse a prompt that is empty, too long, or has tokens that the model does not.

    Raises:
        InvalidError: ``inference.prompt_empty``, ``.context_length_exceeded``, ``.token_unknown``.
    """
    if not tokens:
        raise InvalidError("inference.prompt_empty", "the prompt holds no token", hint="send some text")
    if len(tokens) >= backend.context_length:
        raise InvalidError(
            "inference.context_length_exceeded",
            f"the prompt has {len(tokens)} tokens; this model's context holds {backend.context_length}, "
            "and the answer needs room too",
            hint="shorten the prompt",
            prompt_tokens=len(tokens),
            context_length=backend.context_length,
        )
    _check_tokens(backend, tokens)


def check_options(backend: Backend, options: Options) -> None:
    """Refuse a bias for tokens that the model does not have.

    Raises:
        InvalidError: ``inference.token_unknown``.
    """
    _check_tokens(backend, [token for token, _ in options.logit_bias])


def _check_tokens(backend: Backend, tokens: Sequence[int]) -> None:
    if tokens and not (min(tokens) >= 0 and max(tokens) < backend.vocabulary):
        unknown = next(token for token in tokens if not 0 <= token < backend.vocabulary)
        raise InvalidError(
            "inference.token_unknown",
            f"the model has no token {unknown}; it has those from 0 to {backend.vocabulary - 1}",
            hint="use this model's own tokenizer",
        )
