"""save_pretrained: what it is asked for is done, or refused; pushing goes through huggingface_hub."""

import pytest
from huggingface_hub import HfApi


class Hub:
    """The two calls of HfApi, kept."""

    def __init__(self, monkeypatch, fails=False):
        self.calls, self.uploaded, self.fails = [], set(), fails
        monkeypatch.setattr(HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload_folder)

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))
        if self.fails:
            raise ConnectionError("no network")
        return type("Url", (), {"repo_id": f"someone/{repo_id}"})

    def upload_folder(self, *, folder_path, allow_patterns, **options):
        from pathlib import Path

        from huggingface_hub.utils import filter_repo_objects

        here = [p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*") if p.is_file()]
        self.uploaded = set(filter_repo_objects(here, allow_patterns=allow_patterns))
        self.calls.append(("upload", options.pop("repo_id"), options))
        return "https://hub/commit"


WRITTEN = {
    "README.md",
    "config.json",
    "fwd2bot_config.json",
    "fwd2bot.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    *(f"{stage}/adapter_{name}" for stage in ("compress", "answer") for name in ("config.json", "model.safetensors")),
}


def test_push_to_hub_pushes(on_disk, processor, tmp_path, monkeypatch):
    """It was accepted, and nothing was pushed."""
    hub = Hub(monkeypatch)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    on_disk.save_pretrained(tmp_path / "m", push_to_hub=True, private=True, token="t", commit_message="first")
    assert hub.uploaded == WRITTEN
    commit = {"token": "t", "commit_message": "first"}
    assert hub.calls == [
        ("create", "m", {"private": True, "token": "t", "exist_ok": True}),
        ("upload", "someone/m", commit),
    ]
    on_disk.push_to_hub("mine/other", processor=processor, create_pr=True)
    assert hub.calls[-2][1] == "mine/other" and hub.calls[-1][2]["create_pr"]
    assert hub.uploaded > WRITTEN and any("tokenizer" in name for name in hub.uploaded)


def test_a_push_that_fails_says_what_is_saved(on_disk, tmp_path, monkeypatch):
    Hub(monkeypatch, fails=True)
    with pytest.raises(OSError, match=r"saved in .*m, but was not pushed to m \(no network\).*hf auth login"):
        on_disk.save_pretrained(tmp_path / "m", push_to_hub=True)
    assert (tmp_path / "m" / "fwd2bot_config.json").exists()


def test_nothing_that_is_asked_for_is_passed_over(on_disk, tmp_path, monkeypatch):
    hub = Hub(monkeypatch)
    with pytest.raises(TypeError, match="unexpected keyword argument 'procesor'"):
        on_disk.save_pretrained(tmp_path / "m", procesor=None)
    with pytest.raises(ValueError, match="safetensors only"):
        on_disk.save_pretrained(tmp_path / "m", safe_serialization=False)
    with pytest.raises(ValueError, match="no variants"):
        on_disk.save_pretrained(tmp_path / "m", variant="fp16")
    on_disk.save_pretrained(tmp_path / "n", is_main_process=False, push_to_hub=True)
    assert not (tmp_path / "m").exists() and not (tmp_path / "n").exists() and not hub.calls
    on_disk.save_pretrained(tmp_path / "m", max_shard_size="5GB", save_function=print)  # what programs pass
    assert (tmp_path / "m" / "fwd2bot_config.json").exists()
