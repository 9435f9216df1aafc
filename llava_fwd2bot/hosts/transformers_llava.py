"""What transformers' LLaVA classes share (5.4 to < 6): a `.model` of tower, projector and bare decoder, and a head."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto import modeling_auto
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from ..mixin import Fwd2BotMixin
from .opening import base_of, local_folder, open_checkpoint


class TransformersHost(Fwd2BotMixin):
    """A subclass names its `base_class`, the `config_class` of its checkpoints, and its processor's image inputs."""

    base_class: type
    config_class: type
    quantization_skip = ("model.vision_tower", "model.multi_modal_projector", "lm_head")  # full names, hosts of 5.x

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "base_class" not in vars(cls):  # a host of somebody's own, derived from one of ours
            return
        signature = inspect.signature(cls.base_class.forward)
        names = list(signature.parameters)[1:]
        cls.past_name = "cache" if "cache" in names else "past_key_values"  # renamed in transformers 5.24

        def forward(self: Any, *args: Any, **given: Any) -> Any:
            """`Fwd2BotMixin.forward`, with the arguments of the base in the base's order."""
            given = {**dict(zip(names, args, strict=False)), **given}
            return Fwd2BotMixin.forward(self, **{name: value for name, value in given.items() if value is not None})

        forward.__signature__ = signature  # generate, and trainers, read there what may be given
        cls.forward = forward

        def embed_image(self: Any, *args: Any, **given: Any) -> Tensor:
            return Fwd2BotMixin.embed_image(self, *args, **given)

        embed_image.__doc__ = Fwd2BotMixin.embed_image.__doc__
        options = ["summary", "num_tokens", *cls.image_input_names[1:]]
        given = [("self", True), (cls.image_input_names[0], True), *((name, False) for name in options)]
        # sentence-transformers gives what is named there, of all that the processor made
        embed_image.__signature__ = inspect.Signature([_parameter(*one) for one in given])
        cls.embed_image = embed_image

    def _init_fwd2bot(self, *args: Any, **kwargs: Any) -> None:
        super()._init_fwd2bot(*args, **kwargs)
        self._host_backbone = self.model.forward
        # on the instance: some trainers (TRL) run the backbone without our forward
        self.model.forward = self._backbone_forward

    def _language_model(self) -> nn.Module:
        return self.model.language_model

    def _image_token_id(self) -> int:
        return self.config.image_token_id

    def _projector_slot(self) -> tuple[nn.Module, str]:
        return self.model, "multi_modal_projector"

    def _blank_image(self) -> dict[str, Tensor]:
        vision = self.config.vision_config
        like = self.fwd2bot.tokens
        shape = (1, vision.num_channels, vision.image_size, vision.image_size)
        return {"pixel_values": like.new_zeros(shape, dtype=self.dtype)}

    def _dense_tokens(self, **image_inputs: Any) -> list[Tensor]:
        return list(self.model.get_image_features(**image_inputs, return_dict=True).pooler_output)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *args: Any, config: Any = None, **loading: Any) -> nn.Module:
        """Opens a Fwd2Bot checkpoint: its base (or `base=`), then what was trained. Other arguments load the base."""
        attention = getattr(config, "_attn_implementation_internal", None)  # where AutoConfig puts the argument
        if attention is not None:
            loading.setdefault("attn_implementation", attention)
        return open_checkpoint(path, **loading)


def _parameter(name: str, positional: bool) -> inspect.Parameter:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if positional else inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=inspect.Parameter.empty if name == "self" else None)


def one_crop_each(model: TransformersHost, blank: dict[str, Tensor]) -> dict[str, Tensor]:
    """A blank image as the crops that LLaVA-NeXT's processor would make of one of the size of its tower."""
    side = model.config.vision_config.image_size
    pinpoints = model.config.image_grid_pinpoints
    crops = image_size_to_num_patches([side, side], pinpoints, side)
    pixels = blank["pixel_values"].expand(crops, -1, -1, -1)[None]  # [1, crops, 3, side, side]
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[side, side]], device=pixels.device)}


class _BaseProcessor:
    """Found by AutoProcessor for a checkpoint that was saved without a processor: gives the base's."""

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **kwargs: Any) -> Any:
        return AutoProcessor.from_pretrained(base_of(local_folder(path, kwargs)), **kwargs)


def register_host(host: type[TransformersHost], processor: type) -> None:
    """Lets the Auto classes open the host's checkpoints; `processor` is the class of its base's processor."""
    config = host.config_class
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForImageTextToText.register(config, host, exist_ok=True)
    if hasattr(transformers, "AutoModelForMultimodalLM"):
        transformers.AutoModelForMultimodalLM.register(config, host, exist_ok=True)
        # `transformers serve` asks these names, which `register` leaves as they were, for the class and what it reads
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[config.model_type] = host.__name__
    own = type(f"{host.__name__}Processor", (_BaseProcessor, processor), {"__module__": host.__module__})
    AutoProcessor.register(config, own, exist_ok=True)
