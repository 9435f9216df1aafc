"""The operations that the cost plot computes for 7B, held against torch's counter on a small model of that kind."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from eval.studies import cost_plot
from llava_fwd2bot import Fwd2BotConfig, add_fwd2bot

SHAPE = cost_plot.Shape(64, 128, 2, 4, 128, 32, 48, 3, 2, 32, 8)
RANK, PROMPT, K = 4, 5, 3


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    config = SHAPE.config()
    config._attn_implementation = "eager"  # torch does not count the CPU's fused kernel
    base = LlavaForConditionalGeneration(config).eval()
    base.generation_config.eos_token_id, base.generation_config.pad_token_id = None, 0
    settings = Fwd2BotConfig(num_summary_tokens=K, lora_r=RANK, lora_alpha=RANK)
    return add_fwd2bot(
        base, settings, lambda text, add_special_tokens: {"input_ids": list(range(3, 3 + PROMPT))}
    ).eval()


def counted(run) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# A formula that misses a part would move the break-even of a model that nobody here can measure.
def test_operations_are_those_that_torch_counts(model):
    pixels, words = torch.randn(1, 3, 32, 32), torch.randint(3, 100, (1, 7))
    image = torch.full((1, 16), 127)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}

    compress = counted(lambda: model.compress(pixels))
    assert SHAPE.tower() + SHAPE.decoder(16 + PROMPT + K, lora_r=RANK) == pytest.approx(compress, rel=1e-3)

    def base() -> None:
        with model.fwd2bot_disabled():
            model.generate(input_ids=torch.cat([image, words], 1), pixel_values=pixels, **options)

    assert SHAPE.tower() + SHAPE.generate(16 + 7, 4) == pytest.approx(counted(base), rel=1e-3)
    with torch.no_grad():
        summary = model.compress(pixels)
    answer = counted(lambda: model.generate(input_ids=torch.cat([image[:, :1], words], 1), summary=summary, **options))
    assert SHAPE.generate(K + 7, 4, lora_r=RANK) == pytest.approx(answer, rel=1e-3)


# The curve and the number beside it come from two formulas: at the break-even the curve must cross the base.
def test_the_curve_crosses_the_base_at_the_break_even():
    costs = cost_plot.computed(cost_plot.LLAVA_7B)
    at = cost_plot.break_even(costs["compress"], costs["answer"], costs["base"])
    values = cost_plot.relative(costs)
    assert at > 1 and values[at - 2] >= 1 > values[at - 1]
