"""A checkpoint goes to the hub and comes back, over HTTP: a stand-in answers as the hub does; and the card's header."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hub_server import running
from huggingface_hub import ModelCard, metadata_load

from llava_fwd2bot import load_fwd2bot
from llava_fwd2bot.checkpoint.card import TASK, results_of
from llava_fwd2bot.checkpoint.write import write_card

# in a process of its own: huggingface_hub reads where the hub is when it is imported
PUSH = """
import json, sys
from llava_fwd2bot import load_fwd2bot
model, processor = load_fwd2bot(sys.argv[1])
options = json.loads(sys.argv[3])
if options.pop("save", None):
    model.save_pretrained(options.pop("save_directory"), push_to_hub=True, processor=processor, **options)
else:
    model.push_to_hub(sys.argv[2], processor=processor, **options)
"""
PULL = """
import sys, torch
from llava_fwd2bot import load_fwd2bot
model, _ = load_fwd2bot("someone/toy", cache_dir=sys.argv[1])
torch.save(model.fwd2bot.tokens.detach(), sys.argv[2])
"""
CARD = {
    "license": "apache-2.0",
    "datasets": ["liuhaotian/LLaVA-Instruct-150K"],
    "results": [{"benchmark": "captioning Flickr8k", "metric": "cider", "value": 0.61, "k": 16}],
}


@pytest.fixture
def checkpoint(on_disk, processor, tmp_path):
    on_disk.save_pretrained(tmp_path / "toy", processor=processor)
    return tmp_path / "toy"


def python(program, hub, home, *args):
    remove = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN")
    kept = {name: value for name, value in os.environ.items() if name not in remove}
    about = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", "no_proxy": "*"}
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, args)], env={**kept, **about}, capture_output=True, text=True
    )


def test_a_checkpoint_goes_to_the_hub_and_comes_back(checkpoint, tmp_path):
    """The repository is made, every file is there byte for byte, and the name opens the model that was pushed."""
    with running() as hub:
        options = {"private": True, "token": "hf_secret", "commit_message": "first", "card": CARD}
        done = python(PUSH, hub, tmp_path / "home", checkpoint, "someone/toy", json.dumps(options))
        assert done.returncode == 0, done.stderr
        pushed = hub.files["someone/toy"]
        kept = {f.relative_to(checkpoint).as_posix(): f.read_bytes() for f in checkpoint.rglob("*") if f.is_file()}
        assert pushed.keys() == kept.keys()
        weights = {name for name in kept if name.endswith(".safetensors")}
        assert weights and {name: pushed[name] for name in weights} == {name: kept[name] for name in weights}
        told = hub.settings["someone/toy"]
        assert told.get("visibility") == "private" or told.get("private")  # either, by huggingface_hub's version
        assert hub.commits[0]["summary"] == "first" and "Bearer hf_secret" in hub.tokens
        assert set(hub.cards) == {pushed["README.md"].decode()}  # the hub was asked whether its header is right
        done = python(PULL, hub, tmp_path / "home2", tmp_path / "cache", tmp_path / "tokens.pt")
        assert done.returncode == 0, done.stderr
    own = load_fwd2bot(checkpoint)[0].fwd2bot.tokens
    assert torch.equal(torch.load(tmp_path / "tokens.pt", weights_only=True), own)


def test_save_pretrained_pushes_as_well(checkpoint, tmp_path):
    with running() as hub:
        options = {"save": True, "save_directory": str(tmp_path / "mine"), "token": "hf_secret"}
        done = python(PUSH, hub, tmp_path / "home", checkpoint, "", json.dumps(options))
        assert done.returncode == 0, done.stderr
        assert "fwd2bot.safetensors" in hub.files["someone/mine"] and (tmp_path / "mine" / "config.json").exists()


def test_a_hub_that_refuses_is_told_of(checkpoint, tmp_path):
    """A wrong token ends as one sentence with the way out; what was saved stays."""
    with running(refuse=401) as hub:
        options = {"save": True, "save_directory": str(tmp_path / "mine"), "token": "hf_wrong"}
        done = python(PUSH, hub, tmp_path / "home", checkpoint, "", json.dumps(options))
    last = done.stderr.strip().splitlines()
    assert done.returncode == 1 and any("was not pushed to mine" in line for line in last)
    assert "hf auth login" in done.stderr and (tmp_path / "mine" / "fwd2bot_config.json").exists()


# ---------------------------------------------------------------------- the card
def test_header_says_what_the_hub_files_a_model_by(on_disk, tmp_path):
    """Without these the hub shows no task, no library and no base."""
    on_disk.name_or_path = "llava-hf/llava-1.5-7b-hf"
    on_disk.save_pretrained(tmp_path / "m")
    told = metadata_load(tmp_path / "m" / "README.md")
    assert told["pipeline_tag"] == TASK and told["library_name"] == "llava_fwd2bot"
    assert told["base_model"] == "llava-hf/llava-1.5-7b-hf" and told["base_model_relation"] == "adapter"
    assert told["license"] == "other" and set(told["tags"]) >= {"llava", "fwd2bot"}


def test_a_local_base_gives_its_licence_and_not_its_place(on_disk, base_dir, tmp_path):
    """A path of this machine says nothing on the hub; the licence of the base binds what is made of it."""
    (base_dir / "README.md").write_text("---\nlicense: llama2\n---\n# base\n")
    try:
        on_disk.save_pretrained(tmp_path / "m")
    finally:
        (base_dir / "README.md").unlink()
    told = metadata_load(tmp_path / "m" / "README.md")
    assert told["license"] == "llama2" and "license_name" not in told
    assert str(base_dir) not in (tmp_path / "m" / "README.md").read_text()


def test_facts_come_into_the_header_and_the_text_stays(on_disk, tmp_path):
    """Results in the form that the hub draws its tables from; a card with the trainer's figures keeps them."""
    on_disk.save_pretrained(tmp_path / "m")
    write_card(on_disk, tmp_path / "m", {"steps": 5})
    on_disk.save_pretrained(tmp_path / "m", card=CARD)
    card = ModelCard.load(tmp_path / "m" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.datasets == CARD["datasets"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.metric_name) == ("cider", 0.61, "cider, k = 16")
    assert (result.dataset_name, result.dataset_type) == ("captioning Flickr8k", "captioning-flickr8k")
    index = metadata_load(tmp_path / "m" / "README.md")["model-index"]
    assert index[0]["name"] == "m" and index[0]["results"][0]["task"]["type"] == TASK
    assert "| steps | 5 |" in card.text


def test_results_of_the_evaluators_are_taken(on_disk, tmp_path):
    found = [SimpleNamespace(benchmark="pope (random)", metric="f1", value=0.8, k="dense")]
    on_disk.save_pretrained(tmp_path / "m", card={"results": results_of(found)})
    (result,) = ModelCard.load(tmp_path / "m" / "README.md").data.eval_results
    assert (result.dataset_type, result.metric_name) == ("pope-random", "f1, k = dense")


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ({"licence": "mit"}, "takes license, datasets, results, not licence"),
        ({"datasets": ["/home/me/data.json"]}, "names on the hub"),
        ({"results": [{"benchmark": "pope"}]}, "needs benchmark, metric, value.*no metric"),
    ],
)
def test_facts_that_no_card_takes_are_refused_before_anything_is_saved(on_disk, tmp_path, card, said):
    with pytest.raises(ValueError, match=said):
        on_disk.save_pretrained(tmp_path / "m", card=card)
    assert not (tmp_path / "m").exists()
