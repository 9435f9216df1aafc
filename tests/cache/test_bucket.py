"""A cache and its images in a bucket. moto answers as S3 does, on this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("lancedb")
server = pytest.importorskip("moto.server", reason="needs moto[server]")
s3fs = pytest.importorskip("s3fs")

from llava_fwd2bot.cache.reader import SummaryCache  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from torture_cache import together  # noqa: E402


@pytest.fixture
def bucket(monkeypatch):
    """An empty bucket, by its file system. Lance and fsspec find it by the environment, as they do S3."""
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    url = f"http://{host}:{port}"
    known = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**known, "AWS_ENDPOINT_URL": url, "AWS_ENDPOINT": url, "AWS_ALLOW_HTTP": "true"}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    system.mkdir("bucket")
    yield system
    s3fs.S3FileSystem.clear_instance_cache()
    running.stop()


def test_a_cache_in_a_bucket_of_images_in_a_bucket(bucket, run, checkpoint, photos, tmp_path):
    """What a cluster does: fill, fill again, search, verify and remove, and nothing of it is a local file."""
    for file in photos.rglob("*"):
        if file.is_file():
            bucket.pipe(f"bucket/photos/{file.relative_to(photos)}", file.read_bytes())
    cache = ("--cache", "s3://bucket/my.cache")
    model = ("--model", checkpoint, "--device", "cpu")

    def told(*arguments) -> dict:
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    fill = ("compress", *model, *cache, "--codec", "float16", "--batch-size", 1, "--images")
    first = told(*fill, "s3://bucket/photos")
    assert (first["compressed"], len(first["skipped"])) == (5, 2)
    assert told(*fill, "s3://bucket/photos")["known"] == 5
    bucket.pipe("bucket/photos/again.png", (photos / "b.png").read_bytes())
    assert told(*fill, "s3://bucket/photos")["renamed"] == 1  # the same picture: no summary is made or stored again
    assert told(*fill, photos)["renamed"] == 5

    assert told("cache", "stats", *cache[1:])["rows"] == 11
    code, out, err = run("cache", "verify", *cache[1:])
    assert code == 0, out + err
    assert told("cache", "optimize", *cache[1:])["rows"] == 11
    found = told("search", *model, *cache, "--top", 2, "a beach")
    assert len(found["hits"] if isinstance(found, dict) else found) == 2
    opened, local = SummaryCache.open("s3://bucket/my.cache"), str(photos / "b.png")
    assert (opened.get([local]) == opened.get(["s3://bucket/photos/b.png"])).all()
    code, _, err = run("cache", "rm", *cache[1:], local, "--yes")
    assert code == 0, err
    assert len(SummaryCache.open("s3://bucket/my.cache")) == 10
    assert not any(tmp_path.glob("**/*.lance"))


def test_writers_of_a_bucket_double_nothing(bucket):
    """A bucket has no lock: Lance's commits find by the key that two writers put in the same row."""
    assert together("s3://bucket/a.cache", 2, commits=2)["rows"] == 64
