"""Evaluation while training: both losses, R@1 of a fixed pool, kept answers of a sample; for the best checkpoint.

Shapes: P pairs of the pool, D hidden size.
"""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import speed_metrics

from ..losses import Candidates
from ..modeling.blocks import contrastive_loss_by_blocks
from .kept_answers import KeptAnswers

if TYPE_CHECKING:
    _Trainer = Trainer  # any trainer of transformers stands behind the mixin
else:
    _Trainer = object


def pool_metrics(images: Tensor, texts: Tensor, keys: Tensor, logit_scale: Tensor) -> dict[str, float]:
    """The contrastive loss and R@1 of all pairs together; a pair that comes again counts once.

    Args:
        images, texts: unit vectors, [P, D]. keys: of each pair's image and text, [P, 2]; equal ones are equal.

    Returns:
        contrastive_loss, and image_to_text_R@1 and text_to_image_R@1 over the distinct images and texts: whether the
        nearest is one that it is paired with. Nothing for fewer than two distinct pairs.
    """
    known, kept = set(), []
    for at, key in enumerate(map(tuple, keys.tolist())):
        if key not in known:
            known.add(key)
            kept.append(at)
    if len(kept) < 2:
        return {}
    images, texts, keys = images[kept], texts[kept], keys[kept]
    image_keys, text_keys = keys.unbind(1)
    candidates = Candidates.of(image_keys, text_keys, images.dtype)
    loss, _ = contrastive_loss_by_blocks(images, texts, logit_scale, candidates)
    found = {"contrastive_loss": loss.item()}
    alike = images @ texts.T  # [P, P]
    for name, way, own, other in (
        ("image_to_text", alike, image_keys, text_keys),
        ("text_to_image", alike.T, text_keys, image_keys),
    ):
        first = {key: at for at, key in reversed(list(enumerate(own.tolist())))}  # each query once
        nearest = other[way.argmax(1)].tolist()
        pairs = set(zip(own.tolist(), other.tolist(), strict=True))
        hits = [(key, nearest[at]) in pairs for key, at in first.items()]
        found[f"{name}_R@1"] = sum(hits) / len(hits)
    return found


class Fwd2BotEvaluationMixin(_Trainer):
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The losses on the evaluation data, R@1 within the pool of its first `eval_pool` pairs, and kept answers.

        The answer loss is the mean over all labelled tokens, whatever batches they come in; the contrastive loss is
        that of the whole pool. `loss` is their sum, weighted as in training. With several processes the rows that fill
        up the last batch count twice in the answer loss. With `eval_kept_answers` N, N questions of the data are
        answered as well: see `KeptAnswers.measure`.

        Trainer's own evaluation runs for a model without Fwd2Bot, with `compute_metrics`, and for several data sets.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if not self._has_fwd2bot or self.compute_metrics is not None or not hasattr(data, "num_captioned"):
            if getattr(self.args, "eval_kept_answers", 0) and not isinstance(data, dict):  # which comes here one by one
                raise ValueError(
                    "eval_kept_answers asks questions of a LlavaDataset, by a model with Fwd2Bot and without "
                    f"compute_metrics, and this evaluation is on {type(data).__name__}: leave one of them out."
                )
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._memory_tracker.start()
        start, model = time.time(), self._for_evaluation()
        sums, pairs = self._run_evaluation(model, self.get_eval_dataloader(data))
        config = self._fwd2bot_model.fwd2bot_config
        metrics, loss = {}, 0.0
        answer, tokens, cosine, batches = self.accelerator.reduce(sums, reduction="sum").tolist()
        if tokens:
            metrics["answer_loss"] = answer / tokens
            loss += config.answer_weight * metrics["answer_loss"]
        if batches:
            metrics["summary_cosine"] = cosine / batches
        pool = [self._of_all_ranks(part)[: self._eval_pool] for part in pairs] if pairs else []
        if pool:
            metrics.update(pool_metrics(*pool, self._temperature()))
            loss += config.contrastive_weight * metrics.get("contrastive_loss", 0.0)
        if getattr(self.args, "eval_kept_answers", 0):
            metrics.update(self._kept_answers(data))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in {"loss": loss, **metrics}.items()}
        metrics.update(speed_metrics(metric_key_prefix, start, num_samples=len(data)))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    @property
    def _eval_pool(self) -> int:
        return getattr(self.args, "eval_pool", 1000)

    def _kept_answers(self, data: Any) -> dict[str, float]:
        """The metrics of the sample of `data`, which is chosen at its first evaluation. Every rank must call it."""
        if id(data) not in self._samples:
            count, length = self.args.eval_kept_answers, self.args.eval_kept_answers_tokens
            self._samples[id(data)] = KeptAnswers(data, count, length, self.processing_class)
            if self.is_world_process_zero():
                self._samples[id(data)].warn_of_fewer(count)
        folder, batch = Path(self.args.output_dir), self.args.eval_batch_size
        precision = self.compute_loss_context_manager
        return self._samples[id(data)].measure(self._fwd2bot_model, self.accelerator, folder, batch, precision)

    @cached_property
    def _samples(self) -> dict[int, KeptAnswers]:
        return {}  # by the data set's id; each keeps its data set

    def _for_evaluation(self) -> Any:
        """The model as it was wrapped to train, or prepared to evaluate alone."""
        if self.model_wrapped is not self.model or self.is_in_train:
            return self.model_wrapped
        return self.accelerator.prepare_model(self.model, evaluation_mode=True)

    @torch.no_grad()
    def _run_evaluation(self, model: Any, loader: Any) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
        """Sums of the answer loss, its tokens, the summaries' cosine and its batches, [4]; this rank's pairs.

        Those are image vectors and text vectors [P, D], and keys [P, 2]; None where no rank has a pair.
        """
        was_training = model.training
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device="cpu")
        own: list[tuple[Tensor, Tensor, Tensor]] = []
        for inputs in loader:
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                out = model(**inputs, return_logits=False)
            if out.answer_loss is not None:
                tokens = int(out.answer_tokens)
                sums[:2] += torch.tensor([float(out.answer_loss) * tokens, tokens])
            if out.summary_cosine is not None:
                sums[2:] += torch.tensor([float(out.summary_cosine), 1.0])
            if out.image_embeds is not None and sum(len(part[0]) for part in own) < self._eval_pool:
                own.append((out.image_embeds, out.text_embeds, out.pair_keys))
        model.train(was_training)
        size = self._fwd2bot_model.fwd2bot.tokens.shape[1]
        device = self.accelerator.device
        count = torch.tensor(sum(len(part[0]) for part in own), device=device)
        sums = sums.float() if device.type == "mps" else sums
        if not int(self.accelerator.reduce(count.clone(), reduction="sum")):
            return sums.to(device), None
        if not own:
            none = torch.zeros(0, size, device=device)
            own = [(none, none, torch.zeros(0, 2, dtype=torch.long, device=device))]
        return sums.to(device), tuple(torch.cat(parts) for parts in zip(*own, strict=True))

    def _of_all_ranks(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in order of rank; ranks may have different numbers of them."""
        if self.accelerator.num_processes == 1:
            return rows
        counts = self.accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = self.accelerator.gather(padded).split(max(counts))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def _temperature(self) -> Tensor:
        scale = self._fwd2bot_model.fwd2bot.logit_scale
        return scale.full_tensor() if hasattr(scale, "full_tensor") else scale
