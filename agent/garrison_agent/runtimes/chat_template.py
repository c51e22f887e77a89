"""A model's chat template, rendered in a sandbox: it comes with the model, so it is data, not our code."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from garrison_protocol.errors import InvalidError

_REFUSALS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
    MemoryError,
)
"""What a template may end with, by mistake or on purpose: it is the model's, and may refuse whatever it likes."""


class ChatTemplate:
    """Turns messages into a prompt, the way the model was trained."""

    def __init__(self, source: str, *, begin_text: str, end_text: str) -> None:
        """Compile ``source``.

        Raises:
            InvalidError: ``model.load_failed``: the template is not valid Jinja.
        """
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InvalidError("model.load_failed", f"the model's chat template is not valid: {error}") from error
        self._begin_text = begin_text
        self._end_text = end_text

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Return the prompt that asks for the assistant's next turn.

        Raises:
            InvalidError: ``inference.messages_refused``: the template does not take this conversation.
        """
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=True,
                bos_token=self._begin_text,
                eos_token=self._end_text,
            )
        except _REFUSALS as error:
            raise InvalidError(
                "inference.messages_refused",
                f"the model's chat template refuses these messages: {error}",
                hint="check the order of roles; many models want user and assistant in turns",
            ) from error


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
