"""The numbers of the method, each with its meaning and its source, to and from JSON.

Sources: "paper" = arXiv 2503.21757; "VladVA" = arXiv 2412.04378, the same group's discriminative recipe; "our choice" =
the paper does not say (its ranks, weights, temperature and pooling are not public).
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

from .files.text import read_json
from .files.writing import write_json

CONFIG_NAME = "fwd2bot_config.json"
STAGES = ("compress", "answer")
POOLINGS = ("mean", "last", "first")
BRIDGES = ("none", "scale", "linear")
RESIDUALS = ("none", "average", "pool")  # compressors whose averages are added
ADAPTERS = ("stage", "shared", "none")


def _field(default: Any, help: str, source: str) -> Any:
    metadata = {"help": f"{help} [{source}]", "source": source}
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Fwd2BotConfig:
    """Configuration of Fwd2Bot. `dataclasses.fields(Fwd2BotConfig)` carries the help and the source of every field.

    Args:
        num_summary_tokens (int): k, how many summary tokens an image is compressed into.
        nested_k (list[int], optional): prefix lengths, one drawn per batch while training, so that one model and one
            cache serve every budget. None trains the full length alone.
        image_prompt (str): the prompt after the dense tokens in the compress pass.
        text_prompt (str): the prompt after a caption's tokens in the compress pass.
        pooling (str): how a summary becomes one vector for retrieval: "mean", "last" or "first".
        bridge (str): what stands between a summary and the answer pass: "none", "scale" (a gain per channel) or
            "linear" (a matrix). Both start at identity.
        residual (str): "none"; or each summary token has an average of the dense tokens added to R and, with a learned
            gain on the language model's part, to S: that of the compressor "average" or "pool". With "pool" there is
            one k (no `nested_k`), and `pooling` should be "mean".
        compressor (str): the way to make a summary of the dense tokens: "fwd2bot", or one of the others that `fwd2bot
            compressors` lists, to compare with.
        adapters (str): "stage" (one LoRA adapter per stage), "shared" (one for both) or "none" (the language model
            itself trains).
        contrastive_weight (float): weight of the contrastive loss.
        answer_weight (float): weight of the answer loss.
        distill_weight (float): weight of the divergence from the base's answers with dense tokens; 0 turns it off.
        temperature_init (float): first temperature of the contrastive loss. It is learned.
        lora_r (int): LoRA rank of each adapter.
        lora_alpha (int): LoRA alpha of each adapter.
        lora_dropout (float): LoRA dropout. Above 0 the two passes see different masks.
        lora_targets (list[str]): names of the linear layers, inside the language model's blocks only, that get LoRA.
        contrastive_chunk (int, optional): images (and captions) per chunk of the compress pass. Each chunk is
            recomputed in backward, so that the number of negatives is not bound by memory. None keeps all activations.

    Raises:
        ValueError: a value is out of its range; the message names the field and what it may be.
    """

    num_summary_tokens: int = _field(16, "k: how many summary tokens an image is compressed into.", "paper: 16 and 32")
    nested_k: list[int] | None = _field(
        None,
        "Prefix lengths, one drawn per batch while training, so that one model and one cache serve every budget "
        "(e.g. 1,2,4,8,16). None trains the full length alone.",
        "our choice",
    )
    image_prompt: str = _field("Summarize the image in a few words.", "Prompt after the dense tokens.", "paper")
    text_prompt: str = _field("Summarize the text in a few words.", "Prompt after a caption's tokens.", "our choice")
    pooling: str = _field("mean", "How a summary becomes one vector for retrieval: mean, last or first.", "our choice")
    bridge: str = _field(
        "none",
        "What stands between a summary and the answer pass: none (fed straight back), scale (a gain per channel) or "
        "linear (a matrix); both start at identity.",
        "paper: none is named; on a small LLaVA (one seed) none answered 67 %, scaling to the words' norm 44 %",
    )
    residual: str = _field(
        "none",
        "none: a summary is what the language model makes of R alone. average: each summary token has its own average "
        "of the dense tokens (see nested_averages) added to R going in and, with a learned gain on the language "
        "model's part, to S coming out; it starts as pooling and needs far less training. pool: the same with averages "
        "over the cells of a grid of k cells (the compressor pool), for one k: nested_k must be left out, and pooling "
        "should be mean, as the first and the last token are corners of the image.",
        "paper: none; average is measured in eval/results/recipe.md, pool is our choice",
    )
    compressor: str = _field(
        "fwd2bot",
        "The way to make a summary of the dense tokens: fwd2bot, or one that `fwd2bot compressors` lists.",
        "paper: fwd2bot",
    )
    adapters: str = _field(
        "stage",
        "stage: one LoRA adapter per stage; shared: one for both; none: no adapter, the language model itself trains.",
        "paper: stage",
    )
    contrastive_weight: float = _field(1.0, "Weight of the contrastive loss.", "our choice")
    answer_weight: float = _field(1.0, "Weight of the answer loss.", "our choice")
    distill_weight: float = _field(
        0.0, "Weight of KL(base with dense tokens || answer pass) on the answer tokens; 0 turns it off.", "our choice"
    )
    temperature_init: float = _field(0.07, "First temperature of the contrastive loss; it is learned.", "CLIP's")
    lora_r: int = _field(64, "LoRA rank of each adapter.", "our choice; VladVA: 16")
    lora_alpha: int = _field(128, "LoRA alpha of each adapter.", "our choice; VladVA: 16")
    lora_dropout: float = _field(0.0, "LoRA dropout. Above 0 the two passes see different masks.", "our choice")
    lora_targets: list[str] = _field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "Names of the linear layers, inside the language model's blocks only, that get LoRA.",
        "VladVA: all linear layers of the language model",
    )
    contrastive_chunk: int | None = _field(
        None,
        "Images (and captions) per chunk of the compress pass. Each chunk is recomputed in backward, so that the "
        "number of negatives is not bound by memory; gradients are unchanged. None keeps all activations.",
        "GradCache, arXiv 2101.06983",
    )

    def __post_init__(self) -> None:
        if isinstance(self.num_summary_tokens, bool) or not isinstance(self.num_summary_tokens, int):
            raise ValueError(f"num_summary_tokens must be a whole number, got {self.num_summary_tokens!r}.")
        if self.num_summary_tokens < 1:
            raise ValueError(
                f"num_summary_tokens must be at least 1, got {self.num_summary_tokens}. To run the base without "
                "Fwd2Bot use `with model.fwd2bot_disabled():`, or train without --fwd2bot."
            )
        if self.nested_k is not None:
            self.nested_k = sorted(set(self.nested_k))
            if not self.nested_k or not all(1 <= j <= self.num_summary_tokens for j in self.nested_k):
                raise ValueError(
                    f"nested_k must hold numbers from 1 to num_summary_tokens={self.num_summary_tokens}, "
                    f"got {self.nested_k}."
                )
        choices = {"pooling": POOLINGS, "bridge": BRIDGES, "residual": RESIDUALS, "adapters": ADAPTERS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if self.residual != "none" and self.compressor != "fwd2bot":
            raise ValueError(f"residual={self.residual!r} is for compressor='fwd2bot' alone, not {self.compressor!r}.")
        for name in ("contrastive_weight", "answer_weight", "distill_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}.")
        if not 0 < self.temperature_init < float("inf"):
            raise ValueError(f"temperature_init must be above 0, got {self.temperature_init}.")
        if self.adapters != "none" and (self.lora_r < 1 or self.lora_alpha <= 0 or not 0 <= self.lora_dropout < 1):
            raise ValueError(
                f"LoRA needs lora_r >= 1, lora_alpha > 0 and 0 <= lora_dropout < 1, got {self.lora_r}, "
                f"{self.lora_alpha}, {self.lora_dropout}."
            )
        self.lora_targets = list(self.lora_targets)
        if self.adapters != "none" and not self.lora_targets:
            raise ValueError("lora_targets is empty: name at least one linear layer, or set adapters='none'.")
        if self.contrastive_chunk is not None and self.contrastive_chunk < 1:
            raise ValueError(f"contrastive_chunk must be at least 1, or None, got {self.contrastive_chunk}.")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Fwd2BotConfig:
        """Raises ValueError on a name that this version does not know, rather than drop it without a word."""
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(
                f"Unknown Fwd2Bot settings: {', '.join(sorted(unknown))}. They may come from a newer llava_fwd2bot."
            )
        return cls(**values)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the settings alone as JSON; `model.save_pretrained` writes them within the checkpoint."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Fwd2BotConfig:
        return cls.from_dict(read_json(path))


def check_k(config: Any, k: int | None) -> None:
    """Whether a model of `config` can use its first k summary tokens; None stands for all.

    Raises:
        ValueError: k is below 1 or above `config.num_summary_tokens`.
    """
    most = config.num_summary_tokens
    if k is not None and not 1 <= k <= most:
        raise ValueError(f"k must be from 1 to this model's k = {most}, got {k}.")
