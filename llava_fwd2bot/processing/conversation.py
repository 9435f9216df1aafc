"""Conversations as text: the host's chat template, or LLaVA's own formats, with the spans of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PLACEHOLDER = "<image>"  # in the data, whatever the processor's own image token is
SYSTEM_V1 = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# the same as a chat template, for a processor to carry
V1_TEMPLATE = (
    f"{{{{ '{SYSTEM_V1.replace(chr(39), chr(92) + chr(39))} ' }}}}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endif %}{{ '</s>' }}{% endif %}"
    "{% endfor %}"
)


class ConversationFormatter:
    """Turns a conversation into one text and the spans of its answers.

    Args:
        processor: the host's processor.
        version: "v1" (LLaVA-1.5's, = "vicuna_v1"), "plain" (LLaVA's first training stage: picture, caption, newline)
            or "auto" (the processor's chat template if it has one, else v1).
    """

    def __init__(self, processor: Any, version: str = "auto"):
        if version == "auto":
            version = "template" if getattr(processor, "chat_template", None) else "v1"
        elif version not in ("v1", "vicuna_v1", "plain"):
            raise ValueError(
                f"conversation version {version!r} is not known here; known are 'v1' (or 'vicuna_v1'), 'plain' and "
                "'auto' (the processor's chat template if it has one, else v1)"
            )
        self.version = "v1" if version == "vicuna_v1" else version
        self.processor = processor
        self.eos = processor.tokenizer.eos_token
        if not self.eos and self.version != "plain":
            raise ValueError("the tokenizer has no eos_token: a model trained without one never stops answering")

    def __call__(
        self, turns: Sequence[dict], name: str = "conversation", images: bool = True
    ) -> tuple[str, list[tuple[int, int]]]:
        """Format `turns` (human and gpt by turns).

        Args:
            images: whether the conversation has any; if not, "<image>" in it is text.

        Returns:
            the text, with one image token per picture, and [start, end) of each answer, its end token included.

        Raises:
            ValueError: the chat template does not extend its own prefix, or "plain" got more than picture and caption.
        """
        self.check(turns, name, images)
        text, spans, done = "", [], ""
        for i in range(0, len(turns), 2):
            prefix = self._render(turns[: i + 1], name, images)
            whole = self._render(turns[: i + 2], name, images)
            if not (prefix.startswith(done) and whole.startswith(prefix)):
                raise ValueError(
                    f"{name}: the chat template rewrites earlier turns (turn {i} is not a prefix of turn {i + 1}), so "
                    "training and inference prompts would differ; use a template that only appends, or version 'v1'"
                )
            text += prefix[len(done) :]
            answer, rest = self._close(whole[len(prefix) :], turns[i + 1]["value"].strip())
            spans.append((len(text), len(text) + len(answer)))
            text += answer + rest
            done = whole
        return text, spans

    def check(self, turns: Sequence[dict], name: str, images: bool = True) -> None:
        """Raise ValueError if this version cannot hold `turns`."""
        if self.version == "plain" and (len(turns) != 2 or not images or PLACEHOLDER not in turns[0]["value"]):
            raise ValueError(f"{name}: version 'plain' takes one human turn with {PLACEHOLDER} and one gpt turn only")

    def prompt(self, question: str, num_images: int = 1) -> str:
        """The inference prompt: exactly what stands before the first answer in training.

        Pictures go before the question unless it already holds its `<image>`s. "plain" has no question: it is dropped.
        """
        present = question.count(PLACEHOLDER)
        if present not in (0, num_images):
            raise ValueError(f"the question holds {present} {PLACEHOLDER} but num_images is {num_images}")
        value = question if present else f"{PLACEHOLDER}\n" * num_images + question
        return self._render([{"from": "human", "value": value}], "prompt")

    def ask(self, turns: Sequence[dict]) -> str:
        """The inference prompt after a conversation, which ends with a human turn and says where its images stand."""
        if not turns or turns[-1]["from"] != "human":
            raise ValueError("a conversation that is to be answered must end with a human turn")
        return self._render(turns, "prompt")

    def _render(self, turns: Sequence[dict], name: str, images: bool = True) -> str:
        """The raw text of `turns`; after a human turn, with what asks for an answer."""
        image_token = self.processor.image_token
        if self.version == "plain":
            tokens = image_token * turns[0]["value"].count(PLACEHOLDER)
            return tokens + "".join(f"{turn['value'].strip()}\n" for turn in turns[1:])
        if self.version == "v1":
            text = f"{SYSTEM_V1} "
            for turn in turns:
                if turn["from"] == "human":
                    question = turn["value"].strip()
                    if images:
                        question = _image_first(question).replace(PLACEHOLDER, image_token)
                    text += f"USER: {question} ASSISTANT:"
                else:
                    text += f" {turn['value'].strip()}{self.eos}"
            return text
        messages = [
            {"role": "user", "content": _content(turn["value"])}
            if turn["from"] == "human" and images
            else {"role": "user", "content": [{"type": "text", "text": turn["value"].strip()}]}
            if turn["from"] == "human"
            else {"role": "assistant", "content": [{"type": "text", "text": turn["value"].strip()}]}
            for turn in turns
        ]
        asks = turns[-1]["from"] == "human"
        try:
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        except Exception as error:  # templates refuse by raising, in jinja's own classes or any other
            raise ValueError(f"{name}: the chat template failed: {error}") from error

    def _close(self, chunk: str, answer: str) -> tuple[str, str]:
        """Cut the assistant's chunk into what is learnt (answer and end token) and what the template adds after it."""
        if self.version == "plain":
            return chunk, ""
        start = max(chunk.find(answer), 0) + len(answer)
        end = chunk.find(self.eos, start)  # not one that is quoted inside the answer
        if end >= 0:
            return chunk[: end + len(self.eos)], chunk[end + len(self.eos) :]
        return chunk.rstrip() + self.eos, ""


def needs_bos(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer must add its special tokens: chat templates may write the first one themselves."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def prompt_ids(processor: Any, prompt: str) -> Any:
    """One prompt's input_ids and attention_mask, [1, T], with one placeholder for each image.

    Not by the processor itself, which makes as many placeholders as there are dense tokens, and refuses one without an
    image; the original LLaVA's has a `tokenize` of its own.
    """
    options = {"return_tensors": "pt", "add_special_tokens": needs_bos(processor.tokenizer, prompt)}
    return getattr(processor, "tokenize", processor.tokenizer)(prompt, **options)


def _image_first(value: str) -> str:
    # One picture goes before the question, where LLaVA puts it; several stay where the text refers to them.
    if value.count(PLACEHOLDER) == 1:
        return f"{PLACEHOLDER}\n{value.replace(PLACEHOLDER, '').strip()}"
    return value.strip()


def _content(value: str) -> list[dict]:
    # Newlines beside a picture go: templates add their own. Spaces stay where text runs on around several pictures.
    content: list[dict] = []
    pieces = value.strip().split(PLACEHOLDER)
    has_text = False
    for i, piece in enumerate(pieces):
        if i:
            content.append({"type": "image"})
        piece = piece.strip() if len(pieces) <= 2 else piece.strip("\n")
        if piece.strip():
            content.append({"type": "text", "text": piece if has_text else piece.lstrip()})
            has_text = True
    return content
