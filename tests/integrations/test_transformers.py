"""transformers' own doors: AutoModelForMultimodalLM, and what its server asks for a model's class."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import standard_batch

from llava_fwd2bot import register
from llava_fwd2bot.hosts.llava import Fwd2BotLlava

pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "AutoModelForMultimodalLM"), reason="this transformers has no AutoModelForMultimodalLM"
)


@pytest.fixture
def checkpoint(on_disk, processor, tmp_path):
    on_disk.save_pretrained(tmp_path / "m", processor=processor)
    return tmp_path / "m"


def test_multimodal_auto_class_opens_a_checkpoint(checkpoint, on_disk):
    """`any-to-any`, sentence-transformers and transformers' server open models by this class."""
    register()
    model = transformers.AutoModelForMultimodalLM.from_pretrained(checkpoint)
    assert type(model) is Fwd2BotLlava and not model.training
    batch = standard_batch(on_disk)
    assert torch.equal(model(**batch).loss, on_disk.eval()(**batch).loss)


def test_transformers_server_finds_the_class_and_reads_images(checkpoint):
    """The server goes by a list of names that `register` of the Auto classes leaves as it was."""
    manager = pytest.importorskip("transformers.cli.serving.model_manager")
    register()
    model, processor = manager.ModelManager(device="cpu", dtype="float32").load_model_and_processor(
        f"{checkpoint}@main"
    )
    assert type(model) is Fwd2BotLlava and hasattr(processor, "image_processor")
    modality = manager.ModelManager.get_model_modality(model, processor)
    assert modality in (manager.Modality.VLM, manager.Modality.MULTIMODAL)


def test_command_line_registers_before_it_runs(monkeypatch):
    """Registered afterwards, `serve` would not know the type of the checkpoint's configuration."""
    theirs = pytest.importorskip("transformers.cli.transformers")
    from llava_fwd2bot.integrations import transformers_cli

    seen = []
    monkeypatch.setattr(transformers_cli, "register", lambda: seen.append("register"))
    monkeypatch.setattr(theirs, "main", lambda: seen.append("main"))
    transformers_cli.main()
    assert seen == ["register", "main"]
