"""eval/: readers, rivals and scores on the toy host. What is compared must be computed by the same, right code."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DENSE, SIZE, settings, shake, toy_base
from PIL import Image

from llava_fwd2bot import Fwd2BotConfig, add_fwd2bot, bottleneck, load_fwd2bot
from llava_fwd2bot.config import write_json
from llava_fwd2bot.eval import metrics, search, smol, smol_claims, smol_report
from llava_fwd2bot.eval.generate import contiguous_head
from llava_fwd2bot.eval.readers import (
    BaseReader,
    KeyValueReader,
    PooledReader,
    PrunedReader,
    SummaryReader,
    open_reader,
)
from llava_fwd2bot.eval.rivals import RIVALS, KeyValueLlava, LastTokenLlava, MeanPooledLlava, PooledLlava, QueryLlava

QBENCH = Path(__file__).parents[1] / "eval" / "llava_suite" / "qbench.py"
QUESTIONS = ["is there a dog", "what is in the picture and how many dogs are there", "a cat"]
PIXELS = torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def rival(processor, host: type, **changes) -> torch.nn.Module:
    config = Fwd2BotConfig(**{**settings().to_dict(), **changes})
    model = shake(add_fwd2bot(toy_base(processor, torch.float64), config, processor, host=host))
    return model.eval()


def answers(reader: BaseReader, k: int, batch_size: int = 2) -> list[str]:
    return reader.answer(reader.encode(PIXELS), [2, 0, 1], QUESTIONS, k, 4, batch_size)


def one_by_one(model: torch.nn.Module, processor, **more) -> list[str]:
    """The same through the processor and `generate`, as a user would, without batches."""
    found = []
    for image, question in zip([2, 0, 1], QUESTIONS, strict=True):
        message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(message, add_generation_prompt=True)
        text = text.replace("<image>", "<image>" * DENSE)
        ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(input_ids=ids, pixel_values=PIXELS[[image]], max_new_tokens=4, do_sample=False, **more)
        found.append(processor.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return found


def test_base_and_summary_readers_say_what_generate_says(processor, model64):
    """The readers batch, sort and pad; no answer may depend on it, or on which path the images take."""
    base = toy_base(processor, torch.float64)
    assert answers(BaseReader(base, processor), 0) == one_by_one(base, processor)
    for k in (1, 4):
        assert answers(SummaryReader(model64, processor), k) == one_by_one(model64.eval(), processor, num_tokens=k)


def test_pruning_keeps_the_most_attended_in_order(processor):
    """With k = n nothing is pruned, so the answers are the base's; fewer are a selection in the picture's order."""
    reader = PrunedReader(toy_base(processor, torch.float64), processor)
    assert answers(reader, DENSE) == answers(BaseReader(reader.model, processor), 0)
    state = reader.encode(PIXELS)
    with torch.no_grad():
        kept = reader.visual(state, 5, QUESTIONS)
    for row, all_tokens in zip(kept, state, strict=True):
        places = [int((all_tokens == token).all(-1).nonzero()[0]) for token in row]
        assert places == sorted(set(places))
    assert len(reader.model.model.language_model.layers) == 2


def test_pooling_is_a_mean_over_cells(processor):
    model = rival(processor, PooledLlava, num_summary_tokens=DENSE)
    dense = BaseReader(model, processor).encode(PIXELS)
    torch.testing.assert_close(model.compress(PIXELS), dense)
    torch.testing.assert_close(model.compress(PIXELS, num_tokens=1)[:, 0], dense.mean(1))
    left = dense.unflatten(1, (4, 4))[:, :, :2].flatten(1, 2).mean(1)
    torch.testing.assert_close(model.compress(PIXELS, num_tokens=2)[:, 0], left)
    assert answers(PooledReader(model, processor), 4) == one_by_one(model, processor, num_tokens=4)


@pytest.mark.parametrize("host", [QueryLlava, KeyValueLlava])
def test_fewer_tokens_are_a_prefix(processor, host):
    """One stored state serves every budget, as it does for Fwd2Bot; else the comparison would not be at equal terms."""
    model = rival(processor, host)
    whole = model.compress(PIXELS)
    assert whole.dtype == torch.float32 or host is KeyValueLlava
    for k in (1, 2):
        torch.testing.assert_close(model.compress(PIXELS, num_tokens=k), whole[:, :k])


def test_key_values_are_one_pass_with_a_mask(processor):
    """VoCo-LLaMA's definition: one sequence [V; prompt; R; text], in which the text sees R and itself alone."""
    model = rival(processor, KeyValueLlava, adapters="shared").eval()
    state = model.compress(PIXELS[:1])
    text = torch.tensor([5, 9, 30, 31, 12])
    words = model.get_input_embeddings()
    dense = BaseReader(model, processor).encode(PIXELS[:1])[0]
    tail = torch.cat([words(model.fwd2bot.image_prompt_ids), model.fwd2bot.tokens.double()])
    row = torch.cat([dense, tail, words(text)])[None]
    n, k = len(row[0]) - len(text), state.shape[1]
    mask = torch.ones(len(row[0]), len(row[0])).tril().bool()
    mask[n:, : n - k] = False
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    places = torch.arange(len(row[0]))[None] + k - n
    with torch.no_grad():
        language_model = model._language_model()
        joint = language_model(inputs_embeds=row, attention_mask=bias[None, None], position_ids=places, use_cache=False)
        places = k + torch.arange(len(text))[None]
        past = {model.past_name: model.stored(state)}
        two = language_model(inputs_embeds=words(text)[None], position_ids=places, **past)
    torch.testing.assert_close(two.last_hidden_state[0], joint.last_hidden_state[0, n:], rtol=1e-9, atol=1e-9)


def test_key_value_reader_says_what_training_teaches(processor):
    """Its greedy loop is its own: each token must be the one that the training pass finds most likely there."""
    model = rival(processor, KeyValueLlava)
    reader = KeyValueReader(model, processor)
    state = reader.encode(PIXELS)
    with torch.inference_mode():
        found = reader._generate(state, QUESTIONS, 4, 5)
        for row, (image, question) in enumerate(zip(state, QUESTIONS, strict=True)):
            ids, _ = reader._ids([question], DENSE)
            whole = torch.cat([ids, found[row][None]], 1)
            plan = model._collapse(whole, None, image[None], None)
            hidden = model._answer_hidden(plan, whole, image[None])
            said = model.lm_head(hidden).argmax(-1)[-found.shape[1] - 1 : -1]
            ends = (found[row] == processor.tokenizer.eos_token_id).nonzero()
            until = int(ends[0]) + 1 if len(ends) else found.shape[1]
            assert said[:until].tolist() == found[row][:until].tolist()


@pytest.mark.parametrize("host", [PooledLlava, QueryLlava, KeyValueLlava, MeanPooledLlava, LastTokenLlava])
def test_rivals_train_and_come_back_from_disk(base_dir, processor, tmp_path, host):
    """A rival whose own parts got no gradient, or were not saved, would lose for the wrong reason."""
    from transformers import LlavaForConditionalGeneration

    searches = host in (MeanPooledLlava, LastTokenLlava)
    config = settings(num_summary_tokens=1 if searches else 4, contrastive_weight=1.0 if searches else 0.0)
    base = LlavaForConditionalGeneration.from_pretrained(base_dir)
    model = shake(add_fwd2bot(base, config, processor, host=host)).train()
    pixels, image = PIXELS[:2].float(), base.config.image_token_id
    ids = torch.tensor([[1, *[image] * DENSE, 20 + i, 30, 31] for i in range(2)])
    batch = {"input_ids": ids, "pixel_values": pixels}
    if searches:
        batch["caption_input_ids"] = torch.tensor([[20, 21, 22], [33, 34, 35]])
    else:
        batch["labels"] = ids.masked_fill(ids == image, -100)
    model(**batch).loss.backward()
    own = [n for n, p in model.fwd2bot.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    expected = {QueryLlava: "resampler.queries", KeyValueLlava: "tokens", MeanPooledLlava: "text_head.weight"}
    assert expected.get(host, "") in [*own, ""]
    stages = {"compress": host in (KeyValueLlava, LastTokenLlava), "answer": not searches}
    for stage, trains in stages.items():
        grads = [p.grad for p in model._stages.tensors(stage).values()]
        assert any(g is not None and g.abs().sum() > 0 for g in grads) == trains, stage
    model.eval().save_pretrained(tmp_path / "m", processor=processor)
    again, _ = load_fwd2bot(tmp_path / "m", host=host)
    assert torch.equal(model.compress(pixels), again.compress(pixels))
    # as the table opens it, in bfloat16
    reader = open_reader(next(name for name, kind in RIVALS.items() if kind is host), tmp_path / "m")
    assert torch.isfinite(reader.encode(pixels)).all()
    if searches:
        texts = reader.text_states(["a dog", "a cat"])
        assert (reader.embed_images(texts, 1).norm(dim=1) - 1).abs().max() < 0.01
    else:
        assert len(reader.answer(reader.encode(pixels), [1, 0], QUESTIONS[:2], 2, 3)) == 2


def test_retrieval_counts_by_hand():
    """Two images, three captions; the first image owns two of them."""
    scores = torch.tensor([[0.9, 0.1, 0.8], [0.2, 0.5, 0.3]])
    t2i, i2t = search.ranks(scores, torch.eye(3), torch.tensor([0, 0, 1]))
    found = search.recalls(t2i, i2t, (1, 2))
    assert found["t2i_r1"] == pytest.approx(1 / 3)  # captions 1 and 2 lie nearer to the other image
    assert found["t2i_r2"] == 1.0
    assert found["i2t_r1"] == 0.5  # image 0's best is its own; image 1's is not
    assert t2i.tolist() == [0, 1, 1]


def test_search_in_blocks_is_the_whole_search():
    """Ranks must not depend on how much is scored at once; also those of late interaction, by hand."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(40).repeat_interleave(3)
    images, captions = (torch.randn(n, 2, 8, generator=generator) for n in (40, 120))
    images, captions = search.unit_tokens(images), search.unit_tokens(captions + 2 * images[owner])
    for one, other, function in ((images[:, 0], captions[:, 0], search.cosine), (images, captions, bottleneck.maxsim)):
        scores = function(one, other)  # [N, C]
        right = scores[owner, torch.arange(120)]
        best = scores.masked_fill(owner != torch.arange(40)[:, None], -9).amax(1)
        mine = owner == torch.arange(40)[:, None]
        for block in (1, 500, 2**20):
            t2i, i2t = search.ranks(one, other, owner, function, block)
            assert torch.equal(t2i, ((scores > right) & ~mine).sum(0))
            assert torch.equal(i2t, ((scores > best[:, None]) & ~mine).sum(1))
    pair = torch.einsum("id,jd->ij", images[3], captions[7])
    assert bottleneck.maxsim(images[3:4], captions[7:8]).item() == pytest.approx(pair.max(0).values.mean().item())


@pytest.mark.parametrize("alike, screened", [(0, True), (5, False), (60, False)])
def test_a_search_screened_in_bfloat16_has_the_same_ranks(alike, screened):
    """What rounding leaves open is looked at exactly; where that is too much, all is, and nothing is screened."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(200).repeat_interleave(3)
    images = torch.randn(200, 256, generator=generator) + alike * torch.randn(256, generator=generator)
    images = torch.nn.functional.normalize(images, dim=1)
    images[5] = images[4]  # ties, which rounding must not break
    captions = images[owner] + 3 * torch.randn(600, 256, generator=generator) / 16
    captions = torch.nn.functional.normalize(captions, dim=1)
    seen = []

    def scores(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        seen.append(one.dtype)
        return one @ other.T

    for block in (2**14, 2**22):
        expected = search.ranks(images, captions, owner, block=block, screen=False)
        seen.clear()
        found = search.ranks(images, captions, owner, scores, block, screen=True)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        assert seen[0] == torch.bfloat16 and (torch.float32 in seen) != screened
    assert len(expected[0].unique()) > 3  # not trivial


def test_answers_are_compared_as_people_read_them():
    assert metrics.exact(["A night stand.", "lamp, bed", "two"], ["night stand", "bed, lamp", "three"]) == [1, 1, 0]
    found = metrics.yes_no(["Yes", "No.", "there is no dog", "yes"], ["yes", "no", "yes", "no"])
    assert (found["accuracy"], found["precision"], found["recall"], found["yes"]) == (0.5, 0.5, 0.5, 0.5)


def test_an_empty_answer_is_not_the_option_a():
    """Articles and end marks are dropped, and "A" without its article is as empty as no answer: that was right."""
    assert metrics.exact(["", "The", ".", "B", "a.", "A cat"], ["A", "A", "A", "A", "A", "cat"]) == [0, 0, 0, 0, 1, 1]
    assert metrics.exact(["", "", " "], [".", "?", ""]) == [0, 0, 1]


def test_paired_intervals_are_narrower_than_their_parts():
    """Retention's interval must use that both answered the same items."""
    items = np.random.default_rng(0).integers(0, 2, 400)
    low, high = metrics.bootstrap(items, items)
    assert low == high == 1.0
    low, high = metrics.bootstrap(items)
    assert low < items.mean() < high and high - low == pytest.approx(4 * (0.25 / 400) ** 0.5, rel=0.15)
    # a draw without any of the base's right answers has no ratio
    assert metrics.bootstrap([1.0, 1.0, 1.0], [0.0, 0.0, 1.0])[1] == 3.0
    with pytest.raises(ValueError, match="same items: 3 and 2"):
        metrics.bootstrap([1, 0, 1], [1, 0])


@pytest.fixture
def photographs(tmp_path):
    """The folders of the real data, in small."""
    data = tmp_path / "data"
    rng = np.random.default_rng(0)
    said = [["Two dogs run in the snow.", "A black dog on snow."], ["A man on a bike.", "A person rides a red bike."]]
    for name, file in (("flickr8k", "dev.jsonl"), ("coco_val2017", "captions.jsonl")):
        (data / name / "images").mkdir(parents=True)
        lines = []
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(data / name / "images" / f"{i}.png")
            lines.append(json.dumps({"image": f"{i}.png", "captions": said[i % 2]}))
        (data / name / file).write_text("\n".join(lines))
    (data / "bench" / "sugarcrepe").mkdir(parents=True)
    pairs = {"0": {"filename": "COCO_val2014_1.png", "caption": "a dog", "negative_caption": "a cat"}}
    (data / "bench" / "sugarcrepe" / "add_obj.json").write_text(json.dumps(pairs))
    return data


def test_the_whole_table_and_its_resume(base_dir, on_disk, processor, photographs, tmp_path, monkeypatch):
    """A stopped evaluation goes on: what is done is not answered again, and the report is of all that is there."""
    pytest.importorskip("pycocoevalcap")
    pytest.importorskip("matplotlib")
    on_disk.save_pretrained(tmp_path / "m", processor=processor)
    tasks = ["caption", "exists", "retrieval", "coco", "sugarcrepe"]
    command = ["--data", str(photographs), "--work", str(tmp_path / "w"), "--k", "1", "4", "--tasks", *tasks]
    command += ["--run", f"base={base_dir}", "--run", f"fwd2bot={tmp_path / 'm'}", "--run", f"prune={base_dir}"]
    assert smol.main([*command, "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    rows = {(r["task"], r["method"], r["k"]): r for r in report["results"]}
    assert len(rows) == 2 + 2 * 2 + 5 * 2  # base and pruning answer alone; Fwd2Bot does all
    assert {"retention", "retention_interval"} <= rows["exists", "fwd2bot", 4].keys()
    assert (tmp_path / "out.png").stat().st_size > 10_000
    assert "| fwd2bot |" in (tmp_path / "out.md").read_text()

    monkeypatch.setattr(smol, "open_reader", lambda *args: pytest.fail("everything was done already"))
    assert smol.main(command) == 0
    for other in (["--limit", "2"], ["--tuning"], ["--run", "fwd2bot=another"]):
        with pytest.raises(ValueError, match="give another --work, or delete it"):
            smol.main([*command, *other])
    kept = tmp_path / "w" / "fwd2bot.coco.k1.json"  # trained anew under its old path
    kept.write_text(re.sub(r'"fingerprint": "\w{4}', '"fingerprint": "0000', kept.read_text()))
    with pytest.raises(ValueError, match="is a result of fingerprint '0000"):
        smol.main(command)
    kept.unlink()
    (tmp_path / "w" / "fwd2bot.coco.k4.json").unlink()
    with pytest.raises(pytest.fail.Exception):
        smol.main(command)


@pytest.mark.parametrize("second", [{"limit": 10}, {"tuning": True}])
def test_results_of_other_items_are_not_mixed(tmp_path, second):
    for k, about in ((1, {}), (2, second)):
        result = {
            "task": "coco",
            "method": "fwd2bot",
            "path": "smol-llava",
            "k": k,
            "limit": None,
            "tuning": False,
            **about,
            "figures": {"t2i_r1": 0.5},
            "items": [1, 0],
        }
        write_json(smol.result_file(tmp_path, "fwd2bot", "coco", k), result)
    with pytest.raises(ValueError, match="different --limit"):
        smol_report.read_results(tmp_path)


@pytest.mark.parametrize("count", [10, 100])
def test_vectors_that_are_all_alike_find_nothing(count):
    """A collapsed model has its ties decided by rounding otherwise: R@1 was 0 or 1, as the number of images fell."""
    one = torch.nn.functional.normalize(torch.randn(1, 64), dim=-1).expand(count, -1)
    owner = torch.arange(count).repeat_interleave(2)
    t2i, i2t = search.ranks(one, one[owner], owner)
    assert set(t2i.tolist()) == {(count - 1) // 2} and set(i2t.tolist()) == {count - 1}
    with pytest.raises(ValueError, match="not finite"):
        search.ranks(one * float("nan"), one[owner], owner)


def test_claims_compare_the_same_items_at_the_budgets_that_are_named():
    """What the README says of rivals is read off this: the sign, the doubled budget and the ratio must be right."""
    ours, other = [1, 1, 1, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 0, 0, 0]
    results = {
        "exists": {"fwd2bot-short": {1: {"items": ours}, 2: {"items": ours}}, "pool": {2: {"items": other}}},
        "retrieval": {"fwd2bot-short": {1: {"items": ours}, 2: {"items": ours}}, "mean": {1: {"items": other}}},
    }

    def images_of(task):
        return range(8)

    found = {(e["claim"], r["against"], r["k"]): r for e in smol_claims.claims(results, images_of) for r in e["rows"]}
    assert [(key[2], row["value"]) for key, row in found.items() if "twice" in key[0]] == [(1, 0.625)]
    assert [row["value"] for key, row in found.items() if key[1] == "mean"] == [3.5]  # of the one vector, once
    low, high = next(row["interval"] for key, row in found.items() if key[1:] == ("pool", 2))
    assert 0 < low < 0.625 < high <= 1
    text = smol_claims.markdown(smol_claims.claims(results, images_of), smol_report.TITLES)
    assert "**+62.5 [" in text and "3.50 [" in text
    results["exists"]["pool"][2]["items"] = [1]
    with pytest.raises(ValueError, match="fwd2bot-short has 8 items, pool 1"):
        smol_claims.claims(results, images_of)


def test_the_head_of_a_batch_is_given_rows_that_lie_together(model):
    """A strided slice makes a CPU copy the head for each row in bfloat16; the hook is gone afterwards."""
    head, seen = model.get_output_embeddings(), []
    watch = head.register_forward_hook(lambda _, given, out: seen.append(given[0].is_contiguous()))
    states = torch.randn(3, 5, head.weight.shape[1])[:, -1:]
    with contiguous_head(model):
        inside = head(states)
    outside = head(states)
    watch.remove()
    assert seen == [True, False]
    torch.testing.assert_close(inside, outside)


def test_qbench_in_and_out():
    """LLaVA's module for it does not exist: the questions and the scorer are ours, so they are held here."""
    suite = runpy.run_path(str(QBENCH))
    records = [
        {"img_path": "a.jpg", "question": "How sharp?", "candidates": ["Blurry", "Sharp"], "correct_ans": "Sharp"},
        {"img_path": "b.jpg", "question": "Dark?", "candidates": ["Yes", "No"], "correct_ans": "No"},
    ]
    asked = suite["questions"](records)
    assert asked[0]["image"] == "a.jpg" and asked[0]["text"].startswith("How sharp?\nA. Blurry\nB. Sharp\nAnswer with")
    for first, second, expected in (("B", "No.", 1.0), ("(B) Sharp", "A", 0.5), ("Avoid", "sharp", 0.0)):
        said = [{"question_id": 0, "text": first}, {"question_id": 1, "text": second}]
        lines, accuracy = suite["submission"](records, said)
        assert accuracy == expected and lines[0]["response"] == first
    with pytest.raises(ValueError, match="the first is record 1"):
        suite["submission"](records, said[:1])
    assert suite["submission"]([{**records[0]}, {"img_path": "b", "question": "", "candidates": []}], said)[1] is None


def test_qbench_refuses_what_would_be_another_score():
    """A record answered twice or not at all, or an option without a letter, moved the accuracy and showed nowhere."""
    suite = runpy.run_path(str(QBENCH))
    assert suite["chosen"]("A bit dark", ["Dark", "Bright"]) is None
    said = ("A", "(B)", "A. x", "B: y", "B, y", "C", "B\nIt is.", "A - x", "B y", "A;", "A B", "Ay", "")
    assert [suite["chosen"](text, ["x", "y"]) for text in said] == [
        *(0, 1, 0, 1, 1, None, 1, 0, 1, 0, None, None, None)
    ]
    record = {"img_path": "a", "question": "q", "candidates": ["Good", "Bad"], "correct_ans": "Good"}
    for lines, message in (
        ([(0, "A"), (0, "B")], "Record 0 has two answers"),
        ([(0, "A"), (7, "A")], "Answer 2 is to question 7; records are 0 to 0"),
        ([("0", "A")], "Answer 1 is to question '0'"),
        ([(0, None)], "must be a text, not None"),
    ):
        with pytest.raises(ValueError, match=message):
            suite["submission"]([record], [{"question_id": name, "text": text} for name, text in lines])
    for records, message in (
        ([{**record, "candidates": list("abcdefghi")}], "record 0 has 9 options, more than the letters A to H"),
        ([{"question": "q", "candidates": ["a"]}], "record 0: img_path missing or of another kind"),
        ({"question": "q"}, "must hold a list of records"),
    ):
        with pytest.raises(ValueError, match=message):
            suite["checked"](records, Path("dev.json"))


def test_qbench_by_command(tmp_path, monkeypatch, capsys):
    """U+2028 ends no line of JSON; damage is named, not a traceback; answers that nobody gets are not scored."""
    main = runpy.run_path(str(QBENCH))["main"]
    records, answers = tmp_path / "dev.json", tmp_path / "a.jsonl"
    record = {"img_path": "a", "question": "q", "candidates": ["Good", "Bad"], "correct_ans": "Good"}
    records.write_text(json.dumps([record]))
    argv = [str(QBENCH), str(records), "--answers", str(answers), "--submission", str(tmp_path / "s.jsonl")]
    monkeypatch.setattr(sys, "argv", argv)
    answers.write_text('{"question_id": 0, "text": "A. Good\u2028."}\n', encoding="utf-8")
    main()
    assert capsys.readouterr().out == "accuracy: 1.0000\n"
    answers.write_text('{"question_id": 0, "text": " "}\n', encoding="utf-8")
    main()  # greedy decoding would say nothing again: it counts as LLaVA's own scorers count it, and is told
    told = capsys.readouterr()
    assert told.out == "accuracy: 0.0000\n" and "1 of 1 answers are empty, and wrong; the first: records 0" in told.err
    answers.write_text('{"question_id": 0, "te')
    with pytest.raises(SystemExit):
        main()
    assert "a.jsonl: not JSON at line 1" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", argv[:4])
    with pytest.raises(SystemExit):
        main()
    assert "--answers and --submission go together" in capsys.readouterr().err
