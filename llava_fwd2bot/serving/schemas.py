"""The bodies of requests: OpenAI's fields, and those that are ours, which say so.

A field that is not known is refused: what is ignored in silence is taken for done. Fields of OpenAI's that do not
change an answer are taken and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_SEED = 2**63 - 1
# one pixel, for the examples of the OpenAPI description
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)  # strict: 0 is not false, "1" is not 1


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer of status 4xx or 5xx."""

    error: ErrorDetail


# ---------------------------------------------------------------------- parts of messages
class TextPart(Body):
    type: Literal["text"]
    text: str


class ImageURL(Body):
    url: str = Field(description="data:image/…;base64,…, or cache://ID of an image of the cache", examples=[PIXEL])
    detail: Literal["auto", "low", "high"] | None = Field(None, description="ignored: the model has one resolution")


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = Field(None, description="ignored")


# ---------------------------------------------------------------------- chat
class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="ignored")


class TextFormat(Body):
    type: Literal["text"]


class ChatRequest(Body):
    """`k` is ours: the number of summary tokens of each image. `min_tokens` is vLLM's."""

    messages: list[Message] = Field(min_length=1)
    model: str | None = Field(None, description="a name of /v1/models; default: the first")
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, description="default: 0, which is greedy decoding")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-MAX_SEED, le=MAX_SEED)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    k: int | None = Field(None, ge=1, description="use the first k summary tokens; default: all")
    min_tokens: int | None = Field(None, ge=0, description="tokens before which the answer does not end by itself")
    # what would change the answer, and is not there: only the values that change nothing
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    # what changes no answer
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None


# ---------------------------------------------------------------------- embeddings, search, images
class EmbeddingRequest(Body):
    """`input` as OpenAI's; for images parts of messages, or `messages` of one message with one part each."""

    input: str | list[str | Part] | None = None
    messages: list[Message] | None = None
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, description="the model's own size, if anything")
    user: str | None = None


class SearchRequest(Body):
    """One of `query`, `image` and `id`."""

    query: str | None = Field(None, description="words", examples=["a dog on a beach"])
    image: str | None = Field(None, description="data:image/…;base64,… or cache://ID")
    id: str | None = Field(None, description="an image of the cache")
    cache: str | None = Field(None, description="the name of a cache; default: the first")
    top: int = Field(10, ge=1)
    filter: str | None = Field(None, description="an SQL condition, such as width > 1000 AND id LIKE 'beach/%'")


class ImageRequest(Body):
    image: str = Field(description="data:image/…;base64,…", examples=[PIXEL])
    id: str = Field(min_length=1, max_length=1024, description="the name that the image gets", examples=["beach/a.png"])
    cache: str | None = Field(None, description="the name of a cache; default: the first")


class LookRequest(Body):
    image: str = Field(description="data:image/…;base64,…", examples=[PIXEL])
    k: int | None = Field(None, ge=1)
