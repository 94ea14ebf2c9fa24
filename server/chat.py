"""Chat templates: messages to the text of a prompt, as transformers renders them. Knows Jinja, not token ids.

Who writes a message must not write the template's control tokens: such text within the values that a request brings is
replaced by random placeholders while the template runs, and comes back as untrusted parts of the prompt.

A template comes with the model and is not trusted: it runs in jinja2's immutable sandbox. The environment (trim_blocks,
lstrip_blocks, loop controls, `raise_exception`, `strftime_now`, `tojson` without HTML escapes, `{% generation %}`) is
that of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cache.errors import RequestError
from runtime.tokenizer import Part

if TYPE_CHECKING:
    from runtime.tokenizer import Tokenizer

_PLACEHOLDER = re.compile("\ue000[0-9]+\ue001")
_RESERVED = frozenset({"messages", "add_generation_prompt", "bos_token", "eos_token"})


class ChatTemplateError(RequestError):
    """The model has no template, or its template refuses these messages."""


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    extra: Mapping[str, Any] | None = None,
) -> list[Part]:
    """The prompt's text; only its trusted parts may hold control tokens. Raises ChatTemplateError."""
    if tokenizer.chat_template is None:
        raise ChatTemplateError("This model has no chat template; use /v1/completions.")
    clash = _RESERVED & set(extra or {})
    if clash:
        raise ChatTemplateError(f"chat_template_kwargs may not set {sorted(clash)[0]}.")
    guard = _Guard(tokenizer)
    try:
        values: dict[str, Any] = {"tools": None, "documents": None, **guard.hide(dict(extra or {}))}
        text = compile_template(tokenizer.chat_template).render(
            values,
            messages=[{name: guard.hide(value) for name, value in message.items()} for message in messages],
            add_generation_prompt=add_generation_prompt,
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.eos_token or "",
        )
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        RecursionError,
        ArithmeticError,
    ) as error:
        raise ChatTemplateError(f"The model's chat template refuses these messages: {error}") from error
    return guard.reveal(text)


class _Guard:
    """Hides untrusted text from a template, and finds it again in what the template made.

    A placeholder is a random number between private-use characters: nobody can write one, and a template that cuts it
    apart leaves a number behind, never a control token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._hidden: dict[str, str] = {}  # placeholder -> text

    def hide(self, value: Any) -> Any:
        """The value, with the control tokens in all of its texts replaced."""
        if isinstance(value, str):
            return self._hide_text(value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, list) else value

    def _hide_text(self, text: str) -> str:
        out, done = [], 0
        for start, end in self._tokenizer.untrusted_spans(text):
            placeholder = f"\ue000{secrets.randbits(64)}\ue001"
            self._hidden[placeholder] = text[start:end]
            out += [text[done:start], placeholder]
            done = end
        return "".join([*out, text[done:]])

    def reveal(self, text: str) -> list[Part]:
        """The rendered text in parts, the hidden ones untrusted."""
        parts, done = [], 0
        for found in _PLACEHOLDER.finditer(text):
            hidden = self._hidden.get(found[0])
            if hidden is not None:
                parts += [Part(text[done : found.start()]), Part(hidden, False)]
                done = found.end()
        parts.append(Part(text[done:]))
        return [part for part in parts if part.text]


@lru_cache(maxsize=8)
def compile_template(source: str) -> jinja2.Template:
    """A template that may be rendered from any thread. Raises jinja2.TemplateSyntaxError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own attribute)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
