"""How texts of a chat model begin, for a model that is to write both sides. Knows templates; not who continues."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.chat import ChatTemplateError, render_chat

if TYPE_CHECKING:
    from runtime.tokenizer import Tokenizer

_MARK = "\ue0f0"  # stands for what the user says; no template and no text has it


def openers(tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of the begin token, and of a chat up to where its user speaks; of what there is of the two."""
    found = [[tokenizer.bos_id]] if tokenizer.bos_id is not None else []
    try:
        parts = render_chat(tokenizer, [{"role": "user", "content": _MARK}], add_generation_prompt=False)
    except ChatTemplateError:
        return found
    head, mark, _ = "".join(part.text for part in parts).partition(_MARK)
    return [*found, tokenizer.encode(head, add_special=False)] if mark and head else found
