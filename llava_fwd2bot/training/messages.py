"""Records with `messages`, as OpenAI and TRL have them, as LLaVA's `conversations`.

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many dogs?"}]},
                  {"role": "assistant", "content": "Two."}], "images": ["beach.jpg"]}

A typed part of an image may name its file itself, under `image`, `path` or `url`.
"""

from __future__ import annotations

from typing import Any

from ..processing.conversation import PLACEHOLDER

_ROLES = {"user": "human", "assistant": "gpt"}
_FILES = ("image", "path", "url", "image_url")
_IMAGES = ("image", "image_url")  # types of parts


def turns_of_messages(messages: Any, images: list[str], name: str) -> tuple[list[dict[str, str]], list[str]]:
    """The turns of `messages` with a placeholder where each image stands, and the images' names.

    Args:
        images: those that the record names beside its messages. Where no part stands for them they come before the
            first question, as TRL has it.

    Raises:
        ValueError: a role, a type of content or a file is not known here; the message begins with `name`.
    """
    if not isinstance(messages, list):
        raise ValueError(f"{name}: 'messages' should be a list of {{'role', 'content'}}, not {type(messages).__name__}")
    turns, named, shown = [], [], 0
    for i, message in enumerate(messages):
        where = f"{name}: message {i}"
        if not isinstance(message, dict) or "content" not in message:
            raise ValueError(f"{where} should be {{'role': 'user' or 'assistant', 'content': text or parts}}")
        role = message.get("role")
        if role not in _ROLES:
            hint = "; the conversation format has one of its own, so take it out" if role == "system" else ""
            raise ValueError(f"{where} is of role {role!r}; known are 'user' and 'assistant'{hint}")
        text, files, count = _content(message["content"], where)
        turns.append({"from": _ROLES[role], "value": text})
        named += files
        shown += count
    if named and images and named != images:
        raise ValueError(f"{name}: the messages name the images {named}, and the record names {images}; keep one")
    images = images or named
    if images and not shown and turns and not any(PLACEHOLDER in turn["value"] for turn in turns):
        turns[0] = {**turns[0], "value": f"{PLACEHOLDER}\n" * len(images) + turns[0]["value"]}
    return turns, images


def image_parts(messages: Any) -> list[dict[str, Any]]:
    """The parts of `messages` in whose places images stand; what is no list of messages has none."""
    contents = [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if isinstance(part, dict) and part.get("type") in _IMAGES]


def take_file(part: dict[str, Any]) -> str | None:
    """The file that a part of an image names, which is taken out of the part; None where it names none."""
    file = _file_of(part)
    for key in _FILES:
        part.pop(key, None)
    return file if isinstance(file, str) else None


def _file_of(part: dict[str, Any]) -> Any:
    file = next((part[key] for key in _FILES if part.get(key)), None)
    return file.get("url") if isinstance(file, dict) else file


def _content(content: Any, where: str) -> tuple[str, list[str], int]:
    """The text of one message, the files that its parts name, and how many images stand in it."""
    if isinstance(content, str):
        return content, [], 0
    if not isinstance(content, list):
        raise ValueError(f"{where}: its content should be a text or a list of parts, not {type(content).__name__}")
    text, files, count = "", [], 0
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in _IMAGES:
            text += f"{PLACEHOLDER}\n"
            count += 1
            file = _file_of(part)
            if isinstance(file, str) and file.startswith(("http://", "https://", "data:")):
                raise ValueError(f"{where}: {file[:60]!r} is no file; download the image and give its name")
            files += [file] if isinstance(file, str) else []
        else:
            raise ValueError(f"{where}: a part of type {kind!r}; known are 'text' and 'image'")
    return text, files, count
