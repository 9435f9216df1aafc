"""The original LLaVA (haotian-liu/LLaVA, `llava` 1.2.2) and LLaVA-NeXT (`llava` 1.7): their classes, their batch.

An image stands in `input_ids` as one IMAGE_TOKEN_INDEX (-200); pixels come as `images`. How crops become one row of
dense tokens (anyres), or the frames of a video, is decided by LLaVA itself, so they are compressed together.
"""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig

from ...extras import install_command
from ...mixin import Fwd2BotMixin

try:
    import llava.model
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.model import LlavaLlamaForCausalLM

    from .rows import untruncated, with_blanks  # imports llava as well
except ImportError as error:
    raise ImportError(
        f"The original LLaVA cannot be imported ({error}). It is `pip install --no-deps llava-torch==1.2.2.post1`, or "
        f"a checkout on PYTHONPATH; what it imports comes by {install_command('original')}. LLaVA 1.2.2 runs on "
        f"transformers 4.37.2 and from 5.4 on, LLaVA-NeXT on 4.37 to 4.40, and this is {transformers.__version__}."
    ) from error

# of the configuration: what an image becomes before the projector's tokens are read
_IMAGE_SETTINGS = (
    "image_",
    "mm_patch_merge_type",
    "mm_spatial_pool",
    "mm_newline_position",
    "add_faster_video",
    "faster_",
)


def check_version(base_generates: bool = False) -> None:
    """Refuses the versions of transformers between LLaVA's own and today's, before anything is loaded.

    Args:
        base_generates: the base's own `generate` is to run, not Fwd2Bot's.

    Raises:
        ImportError: this one misreads LLaVA's tokenizer, or calls its forward in a way that it does not know.
    """
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    takes_positions = "cache_position" in inspect.signature(LlavaLlamaForCausalLM.forward).parameters
    if (5, 0) <= version < (5, 4):
        problem = "reads the tokenizer of the original LLaVA wrongly"
    elif base_generates and not takes_positions and (4, 38) <= version < (5, 4):
        problem = "cannot generate with the original LLaVA (its forward takes no cache_position)"
    else:
        return
    raise ImportError(f"transformers {transformers.__version__} {problem}: install 4.37.2, or 5.4 or later.")


class OriginalHost(Fwd2BotMixin):
    """What the original's classes share: `get_model()`, `mm_projector`, images by their placeholder."""

    image_input_names = ("images", "image_sizes", "modalities")
    text_class: type  # the language model's class in transformers, which LLaVA's derives from
    prompt_in_output = False  # the original's generate gives new ids alone
    default_num_tokens: int | None = None  # j for programs that know nothing of it
    quantization_skip = ("model.mm_projector", "model.vision_tower", "lm_head")

    @classmethod
    def load_base(cls, source: str, **loading: Any) -> nn.Module:
        check_version()
        if "dtype" in loading:  # its name in the versions that the original was written for
            loading["torch_dtype"] = loading.pop("dtype")
        model = super().load_base(source, **loading)
        tower = model.get_vision_tower()
        if not tower.is_loaded:  # it comes by its own name, and after the model
            tower.load_model(device_map=loading.get("device_map"))
        tower.to(dtype=model.dtype)
        return model

    def _init_fwd2bot(self, *args: Any, **kwargs: Any) -> None:
        super()._init_fwd2bot(*args, **kwargs)
        if self.fwd2bot_config.adapters == "none":  # the language model was set to train, and these hang in it
            self.get_vision_tower().requires_grad_(False)
            projector = self.get_model().mm_projector
            getattr(projector, "original", projector).requires_grad_(False)

    def adopt_settings(self, checkpoint: Path) -> None:
        """How images were cropped, padded and joined in training, where it was otherwise than in the base."""
        saved = PretrainedConfig.get_config_dict(checkpoint)[0]
        for name in (name for name in saved if name.startswith(_IMAGE_SETTINGS)):
            setattr(self.config, name, saved[name])

    def load_processor(self, source: str) -> Any:
        from .processor import OriginalProcessor

        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=False)
        return OriginalProcessor(tokenizer, self.get_vision_tower().image_processor, self.config)

    def _language_model(self) -> nn.Module:
        return self.get_model()

    def _image_token_id(self) -> int:
        return IMAGE_TOKEN_INDEX

    def _projector_slot(self) -> tuple[nn.Module, str]:
        return self.get_model(), "mm_projector"

    def _blank_image(self) -> dict[str, Tensor]:
        side = self.get_vision_tower().config.image_size
        return {"images": self.fwd2bot.tokens.new_zeros(1, 3, side, side, dtype=self.dtype)}

    def _rows(self, ids: Tensor, mask: Tensor, labels: Tensor | None, images: Any, sizes: Any, kinds: Any) -> tuple:
        """LLaVA's own (ids, positions, mask, cache, embeddings, labels) of expanded rows."""
        prepare = self.prepare_inputs_labels_for_multimodal
        more = {"image_sizes": sizes}
        if "modalities" in inspect.signature(prepare).parameters:  # LLaVA-NeXT's
            # it drops rows beyond the list's length, and its default is a list of one
            more["modalities"] = list(kinds or ["image"] * max(len(images), len(ids)))
        return prepare(ids, None, mask, None, labels, images, **more)

    def _dense_tokens(
        self,
        images: Any = None,
        image_sizes: Any = None,
        modalities: Any = None,
        pixel_values: Any = None,
        **unknown: Any,
    ) -> list[Tensor]:
        images = pixel_values if images is None else images
        # one row, in which an id follows each image, so that the host embeds ids once for any number of images: under
        # ZeRO-3 ranks with unlike numbers of calls wait for each other for ever
        ids = torch.tensor([[IMAGE_TOKEN_INDEX, 0] * len(images)], device=self.get_input_embeddings().weight.device)
        marks = (ids == 0).long()  # labels, which move with their ids
        with untruncated(self.config):
            *_, rows, marks = self._rows(ids, torch.ones_like(ids), marks, images, image_sizes, modalities)
        ends = torch.where(marks[0] == 1)[0].tolist()
        starts = [0, *(end + 1 for end in ends)]
        return [rows[0, start:end] for start, end in zip(starts, ends, strict=False)]

    def _host_backbone(self, input_ids: Tensor, attention_mask: Tensor | None, **given: Any) -> Any:
        """The base's last hidden states at the caller's positions; at an image's, that of its last dense token."""
        images, sizes, kinds = (given.pop(name, None) for name in self.image_input_names)
        if images is None:
            return self.get_model()(input_ids=input_ids, attention_mask=attention_mask, **given)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        # labels travel with their tokens, so positions in their place tell where each token came from
        places = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)
        images = with_blanks(input_ids, images, torch.zeros_like(images[0]))
        sizes, kinds = (v and with_blanks(input_ids, v, blank) for v, blank in ((sizes, (1, 1)), (kinds, "image")))
        with untruncated(self.config):
            _, positions, long_mask, _, rows, origin = self._rows(input_ids, mask, places, images, sizes, kinds)
        out = self.get_model()(inputs_embeds=rows, attention_mask=long_mask, position_ids=positions, **given)
        hidden, at = out.last_hidden_state, origin >= 0
        flat = hidden.new_zeros(input_ids.numel(), hidden.shape[-1]).index_copy(0, origin[at], hidden[at])
        before_text = ~at[:, :-1] & at[:, 1:]  # an image's last token, which predicts the text after it
        flat = flat.index_copy(0, origin[:, 1:][before_text] - 1, hidden[:, :-1][before_text])
        out.last_hidden_state = flat.view(*input_ids.shape, -1)
        return out

    def _own_images(self, input_ids: Tensor, images: Any, *more: Any) -> dict[str, Any]:
        """The images that have a placeholder: the original's collator adds a blank one for a row of text alone."""
        counts = (input_ids == IMAGE_TOKEN_INDEX).sum(1).tolist()
        taken = {n: v for n, v in zip(self.image_input_names, (images, *more), strict=True) if v is not None}
        if len(images) != sum(counts) and len(images) == sum(max(count, 1) for count in counts):
            kept = [bool(count) for count in counts for _ in range(max(count, 1))]
            for name, values in taken.items():
                # LLaVA-NeXT's list of kinds may be shorter: by default it is ["image"]
                taken[name] = [v for v, keep in zip(values, kept, strict=len(values) == len(kept)) if keep]
            if isinstance(images, Tensor) and taken["images"]:
                taken["images"] = torch.stack(taken["images"])
        return taken if len(taken["images"]) else {}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Any = None,
        image_sizes: Any = None,
        return_dict: bool | None = None,
        modalities: Any = None,
        dpo_forward: bool = False,
        cache_position: Any = None,
        caption_input_ids: Tensor | None = None,
        caption_attention_mask: Tensor | None = None,
        summary: Tensor | None = None,
        num_tokens: int | None = None,
        return_logits: bool = True,
        cache: Any = None,
        num_items_in_batch: Tensor | int | None = None,
        micro_batches: int | None = None,
        plan: Any = None,
    ) -> Any:
        """`Fwd2BotMixin.forward` in the original's order of arguments; the last three of them are LLaVA-NeXT's.

        Without labels the logits are of the collapsed row, as the original's are of the expanded one.
        """
        if dpo_forward:
            raise ValueError("dpo_forward is not supported with Fwd2Bot: train with its two losses.")
        past_key_values = past_key_values if cache is None else cache  # its name since transformers 5.24
        given: dict[str, Any] = {"use_cache": use_cache, "output_attentions": output_attentions}
        given |= {"output_hidden_states": output_hidden_states, "return_dict": return_dict}
        if not self._fwd2bot_enabled or input_ids is None or (images is None and summary is None):
            own = dict(zip(self.image_input_names, (images, image_sizes, modalities), strict=True))
            own = {} if images is None else {name: value for name, value in own.items() if value is not None}
        else:
            own = {} if images is None else self._own_images(input_ids, images, image_sizes, modalities)
        trains = labels is not None or caption_input_ids is not None
        if self._fwd2bot_enabled and not trains and (own or summary is not None):
            summary, lengths = self._summaries(summary, own, num_tokens)
            plan = self._collapse(input_ids, attention_mask, summary, lengths)
            rows, mask = self._answer_rows(plan, input_ids, summary)
            given |= {"inputs_embeds": rows, "attention_mask": mask.long(), self.past_name: past_key_values}
            return self.text_class.forward(self, **given)
        given |= {"position_ids": position_ids, "past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        if trains and self._fwd2bot_enabled:  # what the losses do not take
            given = {"return_dict": return_dict, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        step = {"num_items_in_batch": num_items_in_batch, "micro_batches": micro_batches, "plan": plan}
        step = step if trains and self._fwd2bot_enabled else {}  # the base knows no such thing
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            caption_input_ids=caption_input_ids,
            caption_attention_mask=caption_attention_mask,
            summary=summary,
            num_tokens=num_tokens,
            return_logits=return_logits,
            **own,
            **step,
            **{name: value for name, value in given.items() if value is not None},
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Any = None,
        image_sizes: Any = None,
        modalities: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The original's `generate`: new ids alone. `summary=` may stand for `images=`, `num_tokens=` is j ≤ k."""
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        if not self._fwd2bot_enabled or (images is None and kwargs.get("summary") is None):
            for name in ("summary", "num_tokens"):
                if kwargs.pop(name, None) is not None and name == "summary":
                    raise ValueError("Fwd2Bot is disabled here: the base knows no summaries.")
            kwargs |= {} if modalities is None else {"modalities": modalities}
            return self.base_class.generate(self, inputs, images, image_sizes, **kwargs)
        own = {} if images is None else self._own_images(inputs, images, image_sizes, modalities)
        if kwargs.get("num_tokens") is None:
            kwargs["num_tokens"] = self.default_num_tokens
        return super().generate(input_ids=inputs, **own, **kwargs)

    def _host_generate(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return self.text_class.generate(self, **kwargs)  # past the original's own, which refuses embeddings


@cache
def __getattr__(name: str) -> type:
    """`Fwd2BotLlavaLlama` and its like: the host of a class that this installation's `llava.model` has."""
    base_name = f"{name.removeprefix('Fwd2Bot')}ForCausalLM"
    if not name.startswith("Fwd2Bot") or not hasattr(llava.model, base_name):
        raise AttributeError(f"The installed llava ({llava.model.__path__[0]}) has no {base_name}.")
    base = getattr(llava.model, base_name)
    text_class = base.__bases__[0]
    past = "cache" if "cache" in inspect.signature(text_class.forward).parameters else OriginalHost.past_name
    about = {"__module__": __name__, "base_class": base, "text_class": text_class, "past_name": past}
    return type(name, (OriginalHost, base), about)
