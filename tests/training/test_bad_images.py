"""Images of the data that are missing or damaged: told before anything is loaded, or left out and counted."""

from __future__ import annotations

import pytest
import torch
from data_fixtures import TWO_ROUNDS, talk

from llava_fwd2bot.processing.images import ImageError


# One missing file ended a run after hours, when its batch came.
def test_all_files_are_checked_at_once(make, folder):
    (folder / "empty.png").touch()
    names = [f"gone{i}.png" for i in range(11)] + ["empty.png", "a.png", "gone0.png"]
    dataset = make([{"image": name, "conversations": TWO_ROUNDS} for name in names])
    with pytest.raises(ImageError, match="12 of 13 images cannot be used") as caught:
        dataset.check_files()
    text = str(caught.value)
    assert f"record 0: {folder / 'gone0.png'}: no such file" in text and "and 2 more" in text
    assert "gone9.png" in text and "gone10.png" not in text and "--on_bad_image skip" in text
    make([{"image": name, "conversations": TWO_ROUNDS} for name in ("a.png", "b.png")]).check_files()


def test_skipping_names_each_image_once(make, folder):
    (folder / "bad.png").write_bytes((folder / "a.png").read_bytes()[:50])
    names = ["a.png", "gone.png", "bad.png", "bad.png", "b.png"]
    records = [{"id": name, "image": name, "conversations": TWO_ROUNDS} for name in names]
    dataset = make([*records, {"conversations": talk("q", "a")}], on_bad_image="skip")
    with pytest.warns(UserWarning, match="skipped a picture: record 1.*gone.png: no such file"):
        dataset.check_files()
    assert len(dataset) == 5 and len(dataset.lengths) == 5
    with pytest.warns(UserWarning, match="skipped a picture: record 2.*bad.png") as told:
        rows = [[item["record"] for item in dataset] for _ in range(2)]
    assert len(told) == 1 and dataset.skipped_images == ["gone.png", "bad.png"]
    stand_in = 'record 4 (id "b.png")'
    assert rows[0] == rows[1] == ['record 0 (id "a.png")', stand_in, stand_in, stand_in, "record 5"]
    with pytest.raises(ImageError, match="record 2.*bad.png"):
        make(records)[2]


def test_skipping_everything_is_an_error(make, folder):
    records = [{"image": "gone.png", "conversations": TWO_ROUNDS}]
    with pytest.raises(ImageError, match="1 of 1 images cannot be used"):
        make(records, on_bad_image="skip").check_files()
    (folder / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="not one row is left"), pytest.warns(UserWarning):
        make([{"image": "bad.png", "conversations": TWO_ROUNDS}], on_bad_image="skip")[0]
    with pytest.raises(ValueError, match="on_bad_image must be one of raise, skip, got 'ignore'"):
        make(records, on_bad_image="ignore")


# Workers find the damaged files; the main process counts and the other epochs remember them.
def test_workers_share_what_they_skip(make, folder):
    (folder / "bad.png").write_bytes(b"no picture")
    dataset = make([{"image": n, "conversations": TWO_ROUNDS} for n in ("bad.png", "a.png")], on_bad_image="skip")
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1)
    assert [item["record"] for item in loader] == ["record 1", "record 1"]
    assert dataset.skipped_images == ["bad.png"]
