"""The chat template for an engine: the model's own, and one that passes on a prompt as the client has written it."""

from __future__ import annotations

from typing import Any

from ..processing.conversation import V1_TEMPLATE, ConversationFormatter, needs_bos

# of a request's chat_template_kwargs: the content is the whole prompt, in pieces, with images between them
PROMPT_FLAG = "fwd2bot_prompt"
_QUESTION = "What is in the picture?"


def served_template(processor: Any) -> tuple[str, bool]:
    """The template, and whether requests that leave PROMPT_FLAG out must say add_special_tokens.

    Clients of any kind get the model's conversation from it. Ours writes the prompt itself, by the code that training
    and `answer` use, so that it is the same to the last token, wherever in a question the images stand.
    """
    own = processor.chat_template or V1_TEMPLATE
    bos, special = processor.tokenizer.bos_token, False
    prompt = ConversationFormatter(processor).prompt(_QUESTION)
    if needs_bos(processor.tokenizer, prompt):
        expected = processor.tokenizer(prompt)["input_ids"]
        # some tokenizers read what follows a written <s> in another way than what stands at the beginning
        special = (
            processor.tokenizer(f"{bos}{prompt}", add_special_tokens=False)["input_ids"] != expected
            if bos
            else (processor.tokenizer(prompt, add_special_tokens=False)["input_ids"] != expected)
        )
        if bos and not special:
            own = f"{{{{ {bos!r} }}}}{own}"
    image = repr(processor.image_token)
    pieces = (
        "{%- for m in messages -%}{%- for c in m['content'] -%}"
        f"{{%- if c['type'] == 'image' -%}}{{{{ {image} }}}}{{%- else -%}}{{{{ c['text'] }}}}{{%- endif -%}}"
        "{%- endfor -%}{%- endfor -%}"
    )
    return f"{{%- if {PROMPT_FLAG} -%}}{pieces}{{%- else -%}}{own}{{%- endif -%}}", special


def pieces_of(prompt: str, image_token: str, images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A request's content: the prompt between its image tokens, and the parts of `images` in their places."""
    texts = prompt.split(image_token)
    content: list[dict[str, Any]] = []
    for at, text in enumerate(texts):
        if text:
            content.append({"type": "text", "text": text})
        if at < len(texts) - 1:
            content.append(images[at])
    return content
