"""The double forward bottleneck on plain tensors and a language model; knows no host.

    compress pass   [V ; prompt ; R] ──► S          (paper, equation 1)
    answer pass     [… S … question] ──► answer     (paper, equation 2)

Shapes: B rows, T tokens of a row, M images, n dense tokens of an image, k summary tokens, D hidden size, N tokens of
all rows without padding. Rows are padded on the right wherever order allows: the mask is causal, so real tokens never
see the padding, no attention mask is needed, and the fast attention kernels stay usable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Fwd2BotConfig
from .losses import MAX_LOGIT_SCALE
from .processing.movable import Movable


class SummaryTokens(nn.Module):
    """R, the temperature, and the bridge: all that Fwd2Bot adds beside the adapters.

    R starts as draws from the distribution of the word embeddings, channel by channel (our choice).
    """

    def __init__(
        self, config: Fwd2BotConfig, embeddings: Tensor, image_prompt_ids: list[int], text_prompt_ids: list[int]
    ) -> None:
        super().__init__()
        words = embeddings.detach().float()  # [vocabulary, D]
        noise = torch.randn(config.num_summary_tokens, words.shape[1], dtype=torch.float32)
        tokens = words.mean(0) + words.std(0) * noise.to(words.device)
        self.tokens = nn.Parameter(tokens)  # [k, D]
        # one number each, but with a dimension: DeepSpeed and FSDP split no scalars
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / config.temperature_init)], device=words.device))
        self.bridge = make_bridge(config.bridge, words.shape[1]).to(words.device)
        if config.residual != "none":
            # S starts as the averages with a tenth of the language model's output; log, so that it stays above 0
            self.log_gain = nn.Parameter(torch.tensor([math.log(0.1)], device=words.device))
        for name, ids in (("image_prompt_ids", image_prompt_ids), ("text_prompt_ids", text_prompt_ids)):
            ids = torch.tensor(ids, dtype=torch.long, device=words.device)
            self.register_buffer(name, ids, persistent=False)

    def bounded_logit_scale(self) -> Tensor:
        """ln(1 / temperature), at most MAX_LOGIT_SCALE, [1]; in training the parameter is brought down to it too.

        A parameter that is split over ranks is only a copy here, which `bound_temperature` after a step sees to; until
        then what is above the bound gets no gradient that would raise it further.
        """
        if self.training:
            self.bound_temperature()
        return _Bounded.apply(self.logit_scale)

    @torch.no_grad()
    def bound_temperature(self) -> None:
        """Brings the parameter down to MAX_LOGIT_SCALE, a temperature of 0.01."""
        self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)


class _Bounded(torch.autograd.Function):
    # at the bound, a gradient passes that lowers the value again

    @staticmethod
    def forward(ctx, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale > MAX_LOGIT_SCALE)
        return scale.clamp(max=MAX_LOGIT_SCALE)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (above,) = ctx.saved_tensors
        return grad.masked_fill(above & (grad < 0), 0)


class _Scale(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def make_bridge(kind: str, size: int) -> nn.Module:
    """From the output space to the input space of the language model; every kind starts at identity."""
    if kind == "scale":
        return _Scale(size)
    if kind == "linear":
        bridge = nn.Linear(size, size, bias=False)
        nn.init.eye_(bridge.weight)
        return bridge
    return nn.Identity()


def compress_pass(
    language_model: nn.Module,
    contexts: Sequence[Tensor],
    prompt: Tensor,
    tokens: Tensor,
    residual: Sequence[Tensor] | None = None,
) -> Tensor:
    """Equation 1: what the language model says at the positions of the summary tokens.

    Args:
        language_model: the bare decoder; the head is never run.
        contexts: dense tokens of each image, or embeddings of each text, M × [n_i, D].
        prompt: embeddings of the prompt, [p, D].
        tokens: the first j rows of R, [j, D].
        residual: added to R, of each context, M × [j, D].

    Returns:
        The summaries S, the last hidden states (after the final norm) at R's positions, [M, j, D].
    """
    count, j, dtype = len(contexts), len(tokens), prompt.dtype
    starts = [len(c) + len(prompt) for c in contexts]
    inputs = [tokens] * count if residual is None else [tokens + r for r in residual]  # M × [j, D]
    if len(set(starts)) == 1:  # a few copies for all rows
        dense = torch.stack([c.to(dtype) for c in contexts])  # [M, n, D]
        last = torch.stack(inputs) if residual is not None else tokens.expand(count, -1, -1)
        rows = torch.cat([dense, prompt.expand(count, -1, -1), last.to(dtype)], dim=1)  # [M, L, D]
        hidden = language_model(inputs_embeds=rows, use_cache=False).last_hidden_state
        return hidden[:, starts[0] :].clone()  # [M, j, D], without the rest of the rows
    longest, pieces = max(starts) + j, []
    for context, end, start in zip(contexts, inputs, starts, strict=True):
        pieces += [context.to(dtype), prompt, end.to(dtype), prompt.new_zeros(longest - start - j, prompt.shape[1])]
    rows = torch.cat(pieces).view(count, longest, -1)  # [M, L, D]
    hidden = language_model(inputs_embeds=rows, use_cache=False).last_hidden_state
    # slices at places that are known on the CPU: nothing waits for the device
    return torch.stack([row[start : start + j] for row, start in zip(hidden, starts, strict=True)])  # [M, j, D]


def pool(summary: Tensor, pooling: str) -> Tensor:
    """One vector per summary, [M, j, D] → [M, D], float32 or wider."""
    summary = summary if summary.dtype == torch.float64 else summary.float()  # before the mean, which would round
    if pooling == "mean":
        return summary.mean(dim=1)
    return summary[:, -1 if pooling == "last" else 0]


def embed(summary: Tensor, pooling: str) -> Tensor:
    """One unit vector per summary, for retrieval. `summary` [M, j, D] → [M, D], float32 or wider."""
    return F.normalize(pool(summary, pooling), dim=-1)


def summary_cosine(summary: Tensor) -> Tensor:
    """Mean cosine between two different tokens of a summary, over M of them: 1 where all tokens say the same.

    `summary` [M, j, D], j ≥ 2 → one number, float32 or wider.
    """
    tokens = F.normalize(summary if summary.dtype == torch.float64 else summary.float(), dim=-1)
    count = tokens.shape[1]
    return ((tokens.sum(1).square().sum(-1) - count) / (count * (count - 1))).mean()


@dataclass
class Collapsed(Movable):
    """A standard batch with each image's n placeholders collapsed to k, rows laid end to end without padding.

    All sizes are known on the CPU, so that nothing here waits for the device that the tensors are on.
    """

    origin: Tensor  # [N] position in the flattened batch [B * T] that each token comes from
    is_summary: Tensor  # [N] True where a summary token goes
    lengths: Tensor  # [B] tokens of each row
    image_row: Tensor  # [M] the row of each image
    row: Tensor  # [N] the row of each token
    summary_at: Tensor  # [M * k] where the summary tokens go, in order
    longest: int  # tokens of the longest row

    def embeds(self, words: Tensor, summary: Tensor | None) -> Tensor:
        """Word embeddings [N, D] with the summaries [M, k, D] put at their places, in order."""
        if summary is None:
            return words
        return words.index_copy(0, self.summary_at, summary.flatten(0, 1).to(words.dtype))

    def _place(self, side: str) -> Tensor:
        """Where each token stands in the flattened rows [B * L], [N]."""
        starts = self.lengths.cumsum(0) - self.lengths
        if side == "left":
            starts = starts - (self.longest - self.lengths)
        offset = torch.arange(len(self.row), device=self.row.device) - starts[self.row]
        return self.row * self.longest + offset

    def pad(self, packed: Tensor, side: str = "right") -> tuple[Tensor, Tensor]:
        """Packed tokens [N, …] → rows [B, L, …] and the mask of real tokens [B, L]."""
        place = torch.arange(self.longest, device=packed.device)
        lengths = self.lengths[:, None]
        mask = place < lengths if side == "right" else place >= self.longest - lengths  # [B, L]
        rows = packed.new_zeros(mask.numel(), *packed.shape[1:])
        return rows.index_copy(0, self._place(side), packed).view(*mask.shape, *packed.shape[1:]), mask

    def pack(self, rows: Tensor, side: str = "right") -> Tensor:
        """The inverse of `pad`: rows [B, L, …] → packed tokens [N, …]."""
        return rows.flatten(0, 1).index_select(0, self._place(side))

    def spread(self, packed: Tensor, shape: torch.Size) -> Tensor:
        """Packed outputs [N, D] back to the caller's positions, [B, T, D]; zeros where nothing ran.

        The summary tokens stand at the last placeholders of their image, so that the last of them predicts the next
        token there, as the base's last dense token does.
        """
        last = torch.ones_like(self.origin, dtype=torch.bool)
        last[:-1] = self.origin[1:] != self.origin[:-1]  # an image of fewer placeholders than k repeats its first
        at = self.origin.masked_fill(~last, shape.numel())  # one place more, for what is not wanted
        out = packed.new_zeros(shape.numel() + 1, packed.shape[-1])
        return out.index_copy(0, at, packed)[:-1].view(*shape, -1)


def collapse(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    image_token_id: int,
    num_images: int,
    k: int,
    image_lengths: Sequence[int] | None = None,
) -> Collapsed:
    """Finds each image's placeholders in a standard batch, and makes k of them.

    Accepted: n placeholders per image (what processors write), also of images that touch; or one placeholder per image.
    It is computed on the CPU, whatever device the ids are on: the sizes of all that follows depend on it.

    Args:
        input_ids: [B, T]; attention_mask: [B, T] or None; padding on either side.
        num_images: how many images come with the batch, in the order of their placeholders.
        image_lengths: n of each image, where known.

    Raises:
        ValueError: the placeholders do not fit the images.
    """
    device, input_ids = input_ids.device, input_ids.cpu()
    attention_mask = None if attention_mask is None else attention_mask.cpu()
    batch, length = input_ids.shape
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask is {tuple(mask.shape)}, but input_ids are {tuple(input_ids.shape)}.")
    is_image = (input_ids == image_token_id) & mask
    position = is_image.flatten().nonzero().squeeze(1)  # [P]
    row = position // length
    # a run ends where the next placeholder is not the next token of the same row
    starts_run = torch.ones_like(position, dtype=torch.bool)
    starts_run[1:] = (position[1:] != position[:-1] + 1) | (row[1:] != row[:-1])
    spans = _span_lengths(position, starts_run, num_images, image_lengths)
    if spans is None:
        per_row = is_image.sum(1).tolist()
        raise ValueError(
            f"{num_images} image(s) were given, but the rows hold {per_row} image placeholders (id {image_token_id})"
            + (f", and the images have {list(image_lengths)} dense tokens" if image_lengths is not None else "")
            + ". Give each image in the text exactly one image, in order, and do not truncate placeholders."
        )
    span = torch.repeat_interleave(torch.arange(num_images, device=position.device), spans)  # [P] image of each
    offset = torch.arange(len(position), device=position.device) - (spans.cumsum(0) - spans)[span]
    if bool((starts_run & (offset != 0)).any()):
        broken = row[starts_run & (offset != 0)].unique().tolist()
        raise ValueError(f"The image placeholders of row(s) {broken} are cut or interrupted: raise the length limit.")
    n = spans[span]
    counts = mask.flatten().long()  # how often each position is kept
    counts[position] = torch.where(n >= k, (offset >= n - k).long(), torch.where(offset == 0, k - n + 1, 1))
    origin = torch.repeat_interleave(torch.arange(batch * length, device=input_ids.device), counts)
    is_summary, lengths = is_image.flatten()[origin], counts.view(batch, length).sum(1)
    collapsed = Collapsed(
        origin,
        is_summary,
        lengths,
        image_row=row[offset == 0],
        row=origin // length,
        summary_at=is_summary.nonzero().squeeze(1),
        longest=int(lengths.max()),
    )
    return collapsed if device.type == "cpu" else collapsed.to(device)


def _span_lengths(
    position: Tensor, starts_run: Tensor, num_images: int, image_lengths: Sequence[int] | None
) -> Tensor | None:
    """How many placeholders each image has, [M]; None when no reading fits."""
    total = len(position)

    def full(value: int) -> Tensor:
        return torch.full((num_images,), value, dtype=torch.long, device=position.device)

    if total == 0 or num_images == 0:
        return full(0) if total == num_images == 0 else None
    if image_lengths is not None and sum(image_lengths) == total:
        return torch.tensor(list(image_lengths), dtype=torch.long, device=position.device)
    if total == num_images:
        return full(1)
    if image_lengths is None:  # a stored summary: the image that would tell n is gone
        starts = starts_run.nonzero().squeeze(1)
        if len(starts) == num_images:
            return torch.diff(starts, append=starts.new_tensor([total]))
        if total % num_images == 0:
            return full(total // num_images)
    return None
