"""Every option of generate that looks at the prompt: as in the base, whose prompt holds n placeholders, or refused."""

import pytest
import torch
from conftest import DENSE
from test_mixin import prompt
from transformers import GenerationConfig, LlavaForConditionalGeneration, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import MaxLengthCriteria, RepetitionPenaltyLogitsProcessor, WatermarkingConfig

NEW = {"max_new_tokens": 8, "do_sample": False}


def oracle(model, pixel_values, input_ids, **options):
    """The base's own generate, which calls our forward on the whole standard batch for every new token."""
    stock, summary = type(model), iter(model.compress(pixel_values))
    of_row = [[next(summary) for _ in range(n // DENSE)] for n in (input_ids == model.config.image_token_id).sum(1)]

    class Slow(stock):
        def forward(self, input_ids, attention_mask=None, logits_to_keep=0, **given):
            if not bool((input_ids == self.config.image_token_id).any()):  # the unconditional half of guidance
                return super().forward(input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep, **given)
            beams = len(input_ids) // len(of_row)
            images = torch.stack([image for row in of_row for _ in range(beams) for image in row])
            return super().forward(input_ids, attention_mask=attention_mask, summary=images)

        forward.__signature__ = stock.forward.__signature__

    model.__class__ = Slow
    try:
        return LlavaForConditionalGeneration.generate(model, input_ids=input_ids, use_cache=False, **options)
    finally:
        model.__class__ = stock


def prompts(model):
    """Left-padded as the base wants it; one row, with one image, then a batch with two images in one row and none."""
    batch = prompt(model, "left")
    real = batch["attention_mask"][0].bool()
    yield {
        "pixel_values": batch["pixel_values"][:1],
        **{k: batch[k][:1, real] for k in ("input_ids", "attention_mask")},
    }
    yield batch


# some are of the ids that greedy decoding says of the first prompt, whose last word is 304
OPTIONS = {
    "greedy": {},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1, "sequence_bias": [[[304], 50.0]]},
    "bad_words_ids": lambda said: {"bad_words_ids": [[304, said[0]], said[1:3], [7]]},
    "sequence_bias": {"sequence_bias": [[[304, 9], 30.0], [[9, 10], 30.0], [[312, 11], 30.0]]},
    "suppress_tokens": lambda said: {"suppress_tokens": said[1:2]},
    "begin_suppress_tokens": lambda said: {"begin_suppress_tokens": said[:1]},
    "forced_bos_token_id": {"forced_bos_token_id": 9},
    "forced_eos_token_id": {"forced_eos_token_id": 7, "min_new_tokens": 4},
    "min_new_tokens": lambda said: {"min_new_tokens": 2, "eos_token_id": said[:1]},
    "exponential_decay": {"exponential_decay_length_penalty": (2, 3.0), "eos_token_id": 9},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=20.0, context_width=1)},
    "watermark_wide": {
        "watermarking_config": WatermarkingConfig(bias=20.0, context_width=9, seeding_scheme="selfhash")
    },
    "beams": {"num_beams": 3},
    "beams_several": {"num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 1.5, "length_penalty": 0.5},
    "guidance": {"guidance_scale": 2.0},
    "allowed": {"prefix_allowed_tokens_fn": lambda row, ids: [int(ids.sum()) % 400 + 3, int(ids[-1]) + 1]},
    "renormalize": {"renormalize_logits": True, "num_beams": 2},
}


def chosen(name, said):
    return OPTIONS[name](said) if callable(OPTIONS[name]) else OPTIONS[name]


def greedy(model, **options):
    batch = next(iter(prompts(model)))
    return model.generate(**batch, **{**NEW, **options})[0, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_those_of_the_base(model64, name):
    """Ids of the collapsed prompt would give other penalties, other n-grams, other lengths."""
    said = greedy(model64)
    for batch in prompts(model64):
        options = {**NEW, **chosen(name, said)}
        found, expected = model64.generate(**batch, **options), oracle(model64, **batch, **options)
        assert torch.equal(found, expected), name


def test_the_oracle_tells_options_apart(model64):
    """A test that compares equal things proves nothing: most options change what is generated."""
    said = greedy(model64)
    same = {name for name in OPTIONS if greedy(model64, **chosen(name, said)) == said}
    # the last one forbids what its own bias asks for
    assert same <= {"greedy", "forced_bos_token_id", "beams", "renormalize", "encoder_no_repeat_ngram_size"}


def test_guidance_with_a_negative_prompt(model64):
    negative = {"negative_prompt_ids": torch.tensor([[1, 320, 321]]), "guidance_scale": 3.0}
    batch = next(iter(prompts(model64)))
    found = model64.generate(**batch, **NEW, **negative)
    assert torch.equal(found, oracle(model64, **batch, **NEW, **negative))
    assert not torch.equal(found, model64.generate(**batch, **NEW))


def test_stop_strings(model64, processor):
    """One that began within the prompt counts in the base, as it does here."""
    tokenizer = processor.tokenizer
    for batch in prompts(model64):
        said = model64.generate(**batch, **NEW)[0, batch["input_ids"].shape[1] :]
        last = tokenizer.decode(batch["input_ids"][0, -1:])
        for stop in (tokenizer.decode(said[1:3]), last + tokenizer.decode(said[:1])):
            options = {**NEW, "stop_strings": [stop], "tokenizer": tokenizer}
            assert torch.equal(model64.generate(**batch, **options), oracle(model64, **batch, **options)), stop


@pytest.mark.parametrize("source", ["call", "config", "model"])
@pytest.mark.parametrize("shortest", [0, 4])
def test_lengths_from_any_source(model64, source, shortest):
    """max_length and min_length count the prompt, wherever they are set; the model's own were not looked at."""
    batch = next(iter(prompts(model64)))
    length = batch["input_ids"].shape[1]
    # what greedy decoding says first ends the text, but for the minimal length
    ends = greedy(model64)[:1] if shortest else 399
    lengths = {"max_length": length + 6, "min_length": length + shortest}
    options = {"do_sample": False, "eos_token_id": ends}
    if source == "call":
        options |= lengths
    elif source == "config":
        options = {"generation_config": GenerationConfig(**lengths, **options, pad_token_id=0)}
    else:
        for name, value in lengths.items():
            setattr(model64.generation_config, name, value)
    found = model64.generate(**batch, **options)
    assert torch.equal(found, oracle(model64, **batch, **options))
    assert length + max(shortest, 1) < found.shape[1] <= length + 6


def test_new_tokens_win_over_lengths_of_the_model(model64):
    batch = next(iter(prompts(model64)))
    model64.generation_config.max_length = 5
    assert model64.generate(**batch, **NEW).shape[1] == batch["input_ids"].shape[1] + 8
    with pytest.raises(ValueError, match=r"prompt is \d+ tokens long.*max_length=5 leaves no room"):
        model64.generate(**batch, do_sample=False)


def test_processors_and_criteria_of_the_caller_take_the_place_of_generates_own(model64):
    """As in the base: one of a class that generate makes itself replaces it."""
    batch = next(iter(prompts(model64)))
    length = batch["input_ids"].shape[1]
    options = {
        **NEW,
        "repetition_penalty": 1.01,
        "logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(3.0)]),
        "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(length + 4)]),
    }
    found = model64.generate(**batch, **options)
    assert torch.equal(found, oracle(model64, **batch, **options)) and found.shape[1] == length + 4


def test_static_cache_says_the_same(model64):
    for batch in prompts(model64):
        static = model64.generate(**batch, **NEW, cache_implementation="static")
        assert torch.equal(static, model64.generate(**batch, **NEW))


@pytest.mark.parametrize("source", ["call", "config", "model"])
@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"prompt_lookup_num_tokens": 3}, "guessed tokens"),
        ({"assistant_early_exit": 1}, "guessed tokens"),
        ({"prefill_chunk_size": 4}, "read at once"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "from the Hub"),
        ({"dola_layers": "low"}, "from the Hub"),
        ({"num_beam_groups": 2, "num_beams": 2, "diversity_penalty": 0.5}, "from the Hub"),
        ({"force_words_ids": [[5]], "num_beams": 2}, "from the Hub"),
        ({"token_healing": True}, "end of the prompt"),
        ({"cache_implementation": "paged"}, "no image"),
    ],
)
def test_options_that_cannot_be_right_are_refused(model, source, option, reason):
    """Prompt lookup gave other ids than greedy decoding, without a word."""
    batch = next(iter(prompts(model)))
    with pytest.raises(ValueError, match=f"does not take .*{reason}.*fwd2bot_disabled"):
        if source == "call":
            model.generate(**batch, **NEW, **option)
        elif source == "config":
            config = GenerationConfig(**NEW)
            for name, value in option.items():
                setattr(config, name, value)
            model.generate(**batch, generation_config=config)
        else:
            for name, value in option.items():
                setattr(model.generation_config, name, value)
            model.generate(**batch, **NEW)


@pytest.mark.parametrize(
    "given",
    [{"assistant_model": torch.nn.Identity()}, {"custom_generate": print}, {"position_ids": torch.zeros(1, 3)}],
)
def test_arguments_that_cannot_be_right_are_refused(model, given):
    batch = next(iter(prompts(model)))
    with pytest.raises(ValueError, match=f"does not take {next(iter(given))} with images"):
        model.generate(**batch, **NEW, **given)


def test_text_alone_takes_all_options(model):
    """Nothing is collapsed there: prompt lookup is greedy decoding."""
    ids = torch.tensor([[1, 300, 301, 302, 300, 301]])
    assert torch.equal(model.generate(ids, **NEW, prompt_lookup_num_tokens=2), model.generate(ids, **NEW))
