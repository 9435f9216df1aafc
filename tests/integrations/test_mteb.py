"""mteb runs tasks of texts, of images and of both on a checkpoint; the tasks here are local."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

mteb = pytest.importorskip("mteb", minversion="2")
Dataset = pytest.importorskip("datasets").Dataset

from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402

from eval import mteb_tasks  # noqa: E402
from llava_fwd2bot.integrations.mteb import Fwd2BotEncoder  # noqa: E402

TEXTS = [f"a picture of {what}" for what in ("a red dog", "two boats", "the blue sky", "grass")]
SETTINGS = {
    "dataset": {"path": "local/toy", "revision": "1"},
    "description": "toy",
    "type": "Any2AnyRetrieval",
    "eval_splits": ["test"],
    "eval_langs": ["eng-Latn"],
    "main_score": "hit_rate_at_1",
    "modalities": ["text", "image"],
    "bibtex_citation": "",
}


def task_of(queries, corpus, right, category):
    """A task of rows that are here; `right`: of each query, the place of its one document."""
    length = {name: len(next(iter(rows.values()))) for name, rows in (("q", queries), ("d", corpus))}
    ids = {name: [f"{name}{i}" for i in range(count)] for name, count in length.items()}

    class Toy(AbsTaskRetrieval):
        metadata = TaskMetadata(name=f"Toy{category}", category=category, **SETTINGS)

        def load_data(self, **_):
            self.dataset = {
                "default": {
                    "test": RetrievalSplitData(
                        queries=Dataset.from_dict({"id": ids["q"], **queries}),
                        corpus=Dataset.from_dict({"id": ids["d"], **corpus}),
                        relevant_docs={f"q{i}": {f"d{r}": 1} for i, r in enumerate(right)},
                        top_ranked=None,
                    )
                }
            }
            self.data_loaded = True

    return Toy()


@pytest.fixture
def checkpoint(on_disk, processor, tmp_path):
    on_disk.save_pretrained(tmp_path / "m", processor=processor)
    return tmp_path / "m"


@pytest.fixture
def pictures():
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 40 + 50 * i, (40, 50, 3), dtype="uint8")) for i in range(4)]


def vectors(model, processor, texts=None, images=None, k=None):
    with torch.inference_mode():
        if texts is not None:
            ids = processor.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            return model.embed_text(ids["input_ids"], ids["attention_mask"], num_tokens=k)
        return model.embed_image(**processor.image_processor(images, return_tensors="pt"), num_tokens=k)


def score(encoder, task, tmp_path):
    from mteb.cache import ResultCache

    done = mteb.evaluate(encoder, [task], cache=ResultCache(tmp_path / "results"), overwrite_strategy="always")
    return done.task_results[0].get_score()


@pytest.mark.parametrize("k", [None, 2])
def test_a_task_is_scored_by_the_models_own_vectors(checkpoint, on_disk, processor, pictures, tmp_path, k):
    """The nearest images by the model itself are the right ones: every hit. With others named right: none."""
    on_disk.eval()
    near = vectors(on_disk, processor, TEXTS, k=k) @ vectors(on_disk, processor, images=pictures, k=k).T
    best = near.argmax(1).tolist()
    encoder = Fwd2BotEncoder(checkpoint, k)
    given = ({"text": TEXTS}, {"image": pictures})
    assert score(encoder, task_of(*given, best, "t2i"), tmp_path) == 1.0
    assert score(encoder, task_of(*given, [(i + 1) % 4 for i in best], "t2i"), tmp_path) == 0.0


def test_queries_of_a_picture_and_a_text(checkpoint, on_disk, processor, pictures, tmp_path):
    """Of a query of both, neither may be passed over: the nearest to the sum is named right."""
    on_disk.eval()
    words, seen = vectors(on_disk, processor, TEXTS), vectors(on_disk, processor, images=pictures)
    both = torch.nn.functional.normalize(words + seen.flip(0), dim=-1)
    others = [f"{text} and a cat" for text in TEXTS]
    best = (both @ vectors(on_disk, processor, others).T).argmax(1).tolist()
    queries = {"text": TEXTS, "image": pictures[::-1]}
    encoder = Fwd2BotEncoder(checkpoint)
    assert score(encoder, task_of(queries, {"text": others}, best, "it2t"), tmp_path) == 1.0
    batches = [{"text": TEXTS, "image": pictures[::-1]}]
    found = torch.from_numpy(encoder.encode(batches, show_progress_bar=False))
    assert torch.allclose(found, both, atol=1e-6)


def test_rows_may_lack_a_column_and_not_both(checkpoint, on_disk, processor, pictures):
    """Collections of pages hold pictures without words; an empty row would be found by chance."""
    encoder = Fwd2BotEncoder(checkpoint)
    batch = {"text": [TEXTS[0], "", None], "image": [None, pictures[0], pictures[1]]}
    found = torch.from_numpy(encoder.encode([batch], show_progress_bar=False))
    assert torch.allclose(found[:1], vectors(on_disk.eval(), processor, TEXTS[:1]), atol=1e-6)
    assert torch.allclose(found[1:], vectors(on_disk, processor, images=pictures[:2]), atol=1e-6)
    with pytest.raises(ValueError, match=r"Rows \[1\] of a batch have neither a text nor an image"):
        encoder.encode([{"text": ["a", " "], "image": [pictures[0], None]}], show_progress_bar=False)


def test_k_beyond_the_checkpoints_is_refused(checkpoint):
    with pytest.raises(ValueError, match="from 1 to this model's k = 4, got 5"):
        Fwd2BotEncoder(checkpoint, 5)


def test_tasks_that_the_script_names_are_mtebs():
    """A name that mteb does not know would stop a run after hours."""
    names = [name for own in mteb_tasks.SETS.values() for name in own]
    assert {task.metadata.name for task in mteb.get_tasks(tasks=names)} == set(names)


def test_script_writes_a_table(checkpoint, pictures, tmp_path, monkeypatch, capsys):
    task = task_of({"text": TEXTS}, {"image": pictures}, [0, 1, 2, 3], "t2i")
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [task])
    mteb_tasks.main(["--model", str(checkpoint), "--k", "4", "1", "--output", str(tmp_path / "o"), "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert "| task | k = 4 | k = 1 |" in lines
    row = next(line for line in lines if line.startswith("| Toyt2i |"))
    assert all(cell.strip() in ("0.0", "25.0", "50.0", "75.0", "100.0") for cell in row.split("|")[2:4])
    assert (tmp_path / "o" / "table.md").read_text().splitlines()[-1] == row
