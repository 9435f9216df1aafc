"""The client of vLLM against a stand-in over HTTP; the real engine is scripts/test_vllm.sh."""

from __future__ import annotations

import json
import socket
import threading
import warnings
from contextlib import nullcontext

import pytest
import torch
from cli_fixtures import QUESTION
from conftest import settings, shake, toy_base
from transformers import LlavaForConditionalGeneration
from vllm_toys import MergedStandIn, StandIn, served

from llava_fwd2bot import add_fwd2bot, answer, load_fwd2bot
from llava_fwd2bot.checkpoint.export import export
from llava_fwd2bot.processing.conversation import prompt_ids
from llava_fwd2bot.serving.vllm import VLLMAnswers
from llava_fwd2bot.serving.vllm_http import Engine, EngineError

QUESTIONS = ("What is this?", "Compare <image> with <image>.", "<image> and <image>\nand <image>: which?")


@pytest.fixture(scope="module")
def place(own_base, processor, tmp_path_factory):
    """A checkpoint with a bridge that is no identity, and its export."""
    model = shake(
        add_fwd2bot(LlavaForConditionalGeneration.from_pretrained(own_base), settings(bridge="linear"), processor)
    )
    with torch.no_grad():
        weight = model.fwd2bot.bridge.weight
        weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    folder = tmp_path_factory.mktemp("vllm")
    model.save_pretrained(folder / "m", processor=processor)
    export(folder / "m", "vllm", folder / "export", probe=True)
    return folder


@pytest.fixture(scope="module")
def loaded(place):
    return load_fwd2bot(place / "m")


@pytest.fixture(scope="module")
def summaries(loaded):
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return loaded[0].compress(pixels)


@pytest.fixture(scope="module")
def running(place, own_base):
    engine = StandIn(place / "export", own_base)
    with served(engine) as url:
        yield engine, url


@pytest.fixture
def engine(running):
    """The stand-in without a fault, and its address."""
    yield running
    running[0].fault = running[0].key = None
    running[0].requests.clear()
    running[0].adapters = ["answer"]


def test_answers_are_ours_token_for_token(engine, place, loaded, summaries):
    """One image and several, in any place of the question, all of the tokens or the first; streamed alike."""
    model, processor = loaded
    client = VLLMAnswers(engine[1] + "/v1/", model=place / "export")
    for question, images in zip(QUESTIONS, (1, 2, 3), strict=True):
        for k in (None, 2):
            given = summaries[:images]
            ids = prompt_ids(processor, client.formatter.prompt(question, images))["input_ids"]
            new = {"max_new_tokens": 6, "do_sample": False}
            expected = model.generate(input_ids=ids, summary=given, num_tokens=k, **new)[0, ids.shape[1] :]
            with pytest.warns(UserWarning) if k else nullcontext():  # k = 2 was not trained
                found = client.complete(question, summary=given, k=k, max_new_tokens=6)
                pieces = list(client.answer(question, summary=given, k=k, max_new_tokens=6, stream=True))
            assert found.token_ids == expected.tolist()
            assert found.prompt_tokens == ids.shape[1] + images * ((k or 4) - 1)
            assert len(pieces) > 1 and "".join(pieces).strip() == found.text
    told = client.answer("What is it?", summary=summaries[0], max_new_tokens=6)
    assert told == answer(model, processor, "What is it?", summary=summaries[0], max_new_tokens=6)
    assert client.answer("hello there", max_new_tokens=3) == answer(model, processor, "hello there", max_new_tokens=3)


def test_a_merged_export_answers_alike(place, own_base, loaded, summaries, processor, tmp_path):
    """What vLLM has no LoRA for is served so: summaries as rows of the prompt of a plain language model."""
    model, _ = loaded
    merged = export(place / "m", "merged", tmp_path / "merged", stage="answer")
    engine = MergedStandIn(merged, own_base)
    engine.adapters = []
    with served(engine) as url:
        client = VLLMAnswers(url, model=merged)
        for question, images in zip(QUESTIONS, (1, 2, 3), strict=True):
            ids = prompt_ids(processor, client.formatter.prompt(question, images))["input_ids"]
            given = {"input_ids": ids, "summary": summaries[:images], "max_new_tokens": 6, "do_sample": False}
            expected = model.generate(**given)[0, ids.shape[1] :].tolist()
            assert client.complete(question, summary=summaries[:images], max_new_tokens=6).token_ids == expected
    other = export(place / "m", "merged", tmp_path / "base", stage="base")
    engine = MergedStandIn(other, own_base)  # without the adapter
    engine.template, engine.adapters = MergedStandIn(merged, own_base).template, []
    with served(engine) as url:
        with pytest.raises(EngineError, match="is on another base than .* or has another adapter"):
            VLLMAnswers(url, model=merged)
        with pytest.raises(ValueError, match="is an export for merged of base, and nothing that vLLM serves"):
            VLLMAnswers(url, model=other)


def test_an_image_has_one_name_and_no_two_share_it(engine, place, summaries):
    """The engine takes what it knows by that name, whatever numbers come with it."""
    client = VLLMAnswers(engine[1], model=place / "export", probe=False)
    for given in (summaries[:2], summaries[1:3]):
        client.answer(QUESTIONS[1], summary=given, max_new_tokens=1)
    names = [
        [part["uuid"] for part in body["messages"][0]["content"] if part["type"] == "image_embeds"]
        for _, body in engine[0].requests
    ]
    assert names[0][1] == names[1][0] and len({*names[0], *names[1]}) == 3
    client.answer("What?", summary=summaries[0, :2], max_new_tokens=1)  # another length is another image
    assert engine[0].requests[-1][1]["messages"][0]["content"][1]["uuid"] not in {*names[0], *names[1]}


def test_options_go_to_the_engine(engine, place, summaries):
    client = VLLMAnswers(engine[1], model=place / "export", probe=False)
    client.answer("What?", summary=summaries[0], max_new_tokens=2, temperature=0.5, seed=3, top_p=0.9)
    body = engine[0].requests[-1][1]
    assert (body["max_tokens"], body["temperature"], body["seed"], body["top_p"]) == (2, 0.5, 3, 0.9)


# ---------------------------------------------------------------------- the engine is another one
def test_an_adapter_that_is_ignored_is_seen(engine, place):
    """So vLLM treats an adapter whose names it does not know: without a word, it answers as the base."""
    engine[0].fault = "ignores"
    with pytest.raises(EngineError, match="exactly as without it.*vllm serve .* --lora-modules"):
        VLLMAnswers(engine[1], model=place / "export")


def test_an_engine_without_the_adapter_is_told_how_to_get_it(engine, place):
    engine[0].adapters = []
    with pytest.raises(EngineError, match="has no adapter 'answer', only llava. Start it by: vllm serve"):
        VLLMAnswers(engine[1], model=place / "export")
    engine[0].adapters = ["answer"]
    with pytest.raises(EngineError, match="has no adapter 'llava'"):  # the base itself is no adapter
        VLLMAnswers(engine[1], model=place / "export", name="llava")


def test_another_template_is_seen(engine, place):
    engine[0].fault = "template"
    with pytest.raises(EngineError, match="not the export's chat template"):
        VLLMAnswers(engine[1], model=place / "export")
    engine[0].fault = "no tokenize"  # an engine may not have that; the other checks are made
    VLLMAnswers(engine[1], model=place / "export")


def test_another_base_of_the_same_sizes_is_seen(place, processor, tmp_path):
    """Vicuna and LLaVA-1.5 differ in nothing that an engine tells."""
    other = toy_base(processor, seed=7)
    other.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with served(StandIn(place / "export", tmp_path / "other")) as url:
        with pytest.raises(EngineError, match="is on another base than .*cli-base, or has another adapter"):
            VLLMAnswers(url, model=place / "export")


def test_another_adapter_of_the_same_base_is_seen(place, own_base, processor, tmp_path):
    base = LlavaForConditionalGeneration.from_pretrained(own_base)
    shake(add_fwd2bot(base, settings(), processor), seed=5).save_pretrained(tmp_path / "m", processor=processor)
    other = export(tmp_path / "m", "vllm", tmp_path / "export")
    with served(StandIn(other, own_base)) as url:
        with pytest.raises(EngineError, match="its 'answer' does not say what the export has of it"):
            VLLMAnswers(url, model=place / "export")


# ---------------------------------------------------------------------- the engine fails
@pytest.mark.parametrize(
    ("fault", "told"),
    [("dies", "ended in the middle of an answer"), ("error event", "stopped in the middle: EngineCore encountered")],
)
def test_an_engine_that_dies_in_an_answer_is_told_with_what_it_said(engine, place, summaries, fault, told):
    """Half an answer must not pass for one."""
    client = VLLMAnswers(engine[1], model=place / "export")
    whole = list(client.answer("What?", summary=summaries[0], max_new_tokens=6, stream=True))
    engine[0].fault = fault
    pieces = []
    with pytest.raises(EngineError, match=f"{told}.*It had written") as error:
        for piece in client.answer("What?", summary=summaries[0], max_new_tokens=6, stream=True):
            pieces.append(piece)
    assert pieces and pieces == whole[: len(pieces)] and repr("".join(pieces).strip()) in str(error.value)


def test_a_dead_engine_and_a_foreign_server(engine, place, summaries):
    client = VLLMAnswers(engine[1], model=place / "export")
    engine[0].fault = "dead"
    for stream in (False, True):
        with pytest.raises(EngineError, match="with 500: EngineCore encountered an issue") as error:
            list(client.answer("What?", summary=summaries[0], stream=stream))
        assert error.value.status == 500
    engine[0].fault = "not json"
    with pytest.raises(EngineError, match="did not answer with JSON: is an engine there"):
        VLLMAnswers(engine[1], model=place / "export")


def test_nobody_there_or_silent(place):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EngineError, match=f"There is no engine at http://127.0.0.1:{port} "):
        VLLMAnswers(f"http://127.0.0.1:{port}", model=place / "export")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(EngineError, match="gave no sign for 0.2 seconds"):
            VLLMAnswers(f"http://127.0.0.1:{silent.getsockname()[1]}", model=place / "export", timeout=0.2)


def test_a_connection_that_is_cut(place):
    """Before the head of an answer, and within a body of known length."""
    for sent in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()

            def cut(server=server, sent=sent):
                with server.accept()[0] as connection:
                    connection.recv(10_000)
                    connection.sendall(sent)

            thread = threading.Thread(target=cut)
            thread.start()
            with pytest.raises(EngineError, match="closed the connection|ended in the middle"):
                Engine(f"http://127.0.0.1:{server.getsockname()[1]}").get("/v1/models")
            thread.join()


def test_a_key(engine, place):
    engine[0].key = "secret"
    with pytest.raises(EngineError, match=r"401: Unauthorized \(give the engine's key\)"):
        VLLMAnswers(engine[1], model=place / "export")
    VLLMAnswers(engine[1], model=place / "export", api_key="secret")


@pytest.mark.parametrize("url", ["localhost:8000", "file:///etc/passwd", "http://", "http://a:x", "http://a/?b=c"])
def test_an_address_that_is_none(url):
    with pytest.raises(ValueError, match="is not the address of an engine"):
        Engine(url)


# ---------------------------------------------------------------------- what is asked is wrong
def test_bad_questions_never_reach_the_engine(engine, place, summaries):
    client = VLLMAnswers(engine[1], model=place / "export", probe=False)
    for error, given in (
        ("The question is empty", {"question": " <image> ", "summary": summaries[0]}),
        (r"holds 2 <image>, and 1 image\(s\)", {"question": "<image><image>?", "summary": summaries[0]}),
        ("k must be from 1 to this model's k = 4", {"question": "?", "summary": summaries[0], "k": 5}),
        ("hold 2 tokens per image, but k = 3", {"question": "?", "summary": summaries[0, :2], "k": 3}),
        (r"A summary is \[k, 64\]", {"question": "?", "summary": summaries[..., :8]}),
        ("either ids or summary", {"question": "?", "ids": ["a"], "summary": summaries[0]}),
        ("ids are of a cache, and there is none", {"question": "?", "ids": ["a"]}),
    ):
        with pytest.raises(ValueError, match=error), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            client.answer(**given)
    assert not engine[0].requests
    with pytest.raises(ValueError, match="Give the model"):
        VLLMAnswers(engine[1])
    with pytest.raises(FileNotFoundError):
        VLLMAnswers(engine[1], model=place / "nothing")
    with pytest.raises(ValueError, match="is an export for peft of compress and answer"):
        VLLMAnswers(engine[1], model=export(place / "m", "peft", place / "peft"))


# ---------------------------------------------------------------------- the command line, and a cache
@pytest.fixture(scope="module")
def cached(place, tmp_path_factory):
    pytest.importorskip("lancedb")
    import numpy as np
    from PIL import Image

    from llava_fwd2bot.cli.main import main

    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(random.integers(0, 255, (40, 50, 3)).astype("uint8")).save(folder / name)
    cache = folder.parent / "engine.cache"
    command = ["compress", "--model", str(place / "m"), "--images", str(folder), "--cache", str(cache)]
    assert main([*command, "--codec", "float16", "--device", "cpu"]) == 0
    return cache


def test_ask_by_an_engine_says_what_ask_says(engine, place, cached, run):
    """The same command with and without --engine; by default the model is the cache's own checkpoint."""
    ask = ("ask", "--cache", cached, "--id", "a.png", QUESTION, "--max-new-tokens", 6)
    code, ours, _ = run(*ask, "--device", "cpu")
    assert code == 0
    for more in ((), ("--model", place / "export"), ("--model", place / "m")):
        code, out, err = run(*ask, "--engine", engine[1], *more)
        assert (code, out) == (0, ours), err
    code, out, _ = run(*ask, "--engine", engine[1], "--json")
    told = json.loads(out)
    assert told["answer"] == ours.strip() and told["images"] == ["a.png"] and told["k"] == 4
    both = ("ask", "--cache", cached, "--id", "a.png", "--id", "b.png", QUESTION, "--max-new-tokens", 6)
    for way in ((), ("--each",)):
        assert run(*both, *way, "--engine", engine[1])[1] == run(*both, *way, "--device", "cpu")[1]
    assert run(*ask[:3], "--search", "a dog", QUESTION, "--max-new-tokens", 4, "--engine", engine[1])[0] == 0


def test_ask_by_an_engine_refuses_what_it_cannot(engine, place, cached, checkpoint, photos, run):
    ask = ("ask", QUESTION, "--engine", engine[1])
    code, _, err = run(*ask, "--model", place / "m", "--image", photos / "a.png")
    assert code == 2 and "answers from stored summaries" in err
    assert run("ask", QUESTION, "--cache", cached, "--id", "a.png", "--engine-key", "x")[0] == 2
    code, _, err = run(*ask, "--cache", cached, "--id", "z.png")
    assert code == 1 and "has no id 'z.png'" in err
    code, _, err = run(*ask, "--cache", cached, "--id", "a.png", "--k", 9)
    assert code == 1 and "holds 4 tokens per image, but --k asks for 9" in err
    code, _, err = run(*ask, "--cache", cached, "--id", "a.png", "--model", checkpoint)
    assert code == 1 and "was filled by another model" in err
    code, _, err = run(*ask, "--cache", cached, "--search", "dog", "--model", place / "export")
    assert code == 1 and "is an export: give --model CKPT" in err
    engine[0].fault = "dies"
    code, out, err = run(*ask, "--cache", cached, "--id", "a.png", "--max-new-tokens", 6)
    assert code == 1 and out and "ended in the middle of an answer" in err


def test_ask_by_an_engine_reads_a_file_of_summaries(engine, place, cached, run, tmp_path):
    pictures = cached.parent / next(p.name for p in cached.parent.iterdir() if p.name.startswith("pictures"))
    command = ("compress", "--model", place / "m", "--images", pictures, "--output", tmp_path / "s.safetensors")
    assert run(*command, "--device", "cpu")[0] == 0
    ask = ("ask", "--model", place / "m", "--summaries", tmp_path / "s.safetensors", "--id", "b.png", QUESTION)
    ask += ("--max-new-tokens", 6)
    assert run(*ask, "--engine", engine[1])[1] == run(*ask, "--device", "cpu")[1]
