"""Messages of OpenAI's format as a conversation of the model: where its images stand, and what is refused.

The model knows one system text, that of its chat template. A system message stands before the first question instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..processing.conversation import PLACEHOLDER
from .errors import invalid
from .schemas import ImagePart, Message


@dataclass
class Conversation:
    """Turns as `ConversationFormatter` takes them; the URLs of their images in order, with their places."""

    turns: list[dict[str, str]] = field(default_factory=list)
    images: list[tuple[str, str]] = field(default_factory=list)  # URL, field of the request

    @property
    def question(self) -> str:
        return self.turns[-1]["value"]


def conversation_of(messages: Sequence[Message]) -> Conversation:
    """Raises APIError for messages that are no conversation which ends with a question."""
    found, system = Conversation(), []
    for i, message in enumerate(messages):
        place = f"messages.{i}.content"
        text, count = _content(message, place, found.images)
        if message.role in ("system", "developer"):
            if found.turns:
                raise invalid("A system message comes before all others.", f"messages.{i}.role")
            if count:
                raise invalid("A system message holds no image.", place)
            system.append(text)
            continue
        who = "human" if message.role == "user" else "gpt"
        if who == "gpt" and count:
            raise invalid("An image stands in a message of the user's.", place)
        if who == "gpt" and not found.turns:
            raise invalid("The first message is the user's.", f"messages.{i}.role")
        if not text.replace(PLACEHOLDER, "").strip() and (who == "gpt" or not count):
            raise invalid("The message is empty.", place, "empty_message")
        if found.turns and found.turns[-1]["from"] == who:
            found.turns[-1]["value"] += f"\n{text}"
        else:
            found.turns.append({"from": who, "value": text})
    if not found.turns or found.turns[-1]["from"] != "human":
        raise invalid("The last message must be the user's: it is what is answered.", "messages")
    if not found.question.replace(PLACEHOLDER, "").strip():
        raise invalid("The question is empty: there is an image, but no text.", "messages", "empty_message")
    if system and (text := "\n".join(part for part in system if part.strip())):
        first = found.turns[0]["value"]
        lead = _leading(first)
        found.turns[0]["value"] = f"{first[:lead]}{text}\n{first[lead:]}"
    return found


def _leading(text: str) -> int:
    """Where the text begins after the images in front of it."""
    at, step = 0, len(PLACEHOLDER) + 1
    while text.startswith(f"{PLACEHOLDER}\n", at):
        at += step
    return at


def _content(message: Message, place: str, images: list[tuple[str, str]]) -> tuple[str, int]:
    """The text of a message, with a placeholder where each of its images stands, and how many there are."""
    if isinstance(message.content, str):
        return _plain(message.content, place), 0
    pieces: list[str] = []
    count = 0
    for j, part in enumerate(message.content):
        if isinstance(part, ImagePart):
            images.append((part.image_url.url, f"{place}.{j}.image_url.url"))
            pieces.append(PLACEHOLDER)
            count += 1
        else:
            pieces.append(_plain(part.text, f"{place}.{j}.text"))
    if count == 1:  # where LLaVA puts it
        pieces.sort(key=lambda piece: piece != PLACEHOLDER)
    return "\n".join(pieces), count


def _plain(text: str, place: str) -> str:
    if PLACEHOLDER in text:
        raise invalid(f"{PLACEHOLDER} in a text stands for an image: give images as parts of the message.", place)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid("The text holds half of a surrogate pair, which is no character.", place) from error
    return text


def prompt_of(formatter: Any, conversation: Conversation) -> str:
    """The prompt, exactly as training and `answer` write it, with one image token for each image."""
    try:
        return formatter.ask(conversation.turns)
    except ValueError as error:  # the chat template refuses it
        raise invalid(str(error), "messages") from error
