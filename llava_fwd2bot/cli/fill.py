"""`fwd2bot compress --cache`: options, settings of the cache, and the printed result."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import checked, load_model, model_folders, number, quantisation, warn_untrained

if TYPE_CHECKING:
    from ..cache.format import CacheSettings
    from ..files.pixels import Reading

DEFAULT_CODEC = "int4"  # a quarter of float16's bytes, with equal answers (eval/results/cache.md)
PROBED = 1000  # first entries of a new cache's source, of which one must be usable


def fill_options(compress: argparse.ArgumentParser, count: Any) -> None:
    group = compress.add_argument_group("with --cache")
    codec = f"float16, int8, int4 or int2; default: the cache's, or {DEFAULT_CODEC} for a new cache"
    group.add_argument("--codec", metavar="NAME", help=codec)
    group.add_argument("--workers", type=count, metavar="N", help="threads that read images; default: processors - 1")
    group.add_argument("--retry", action="store_true", help="retry files that were skipped before")
    group.add_argument(
        "--shard", type=_shard, default=(1, 1), metavar="I/N", help="only the I-th of N parts, for Slurm"
    )
    fast = "decode large JPEGs at a smaller scale; fixed when the cache is created"
    group.add_argument("--fast-decode", action="store_true", help=fast)
    group.add_argument("--ray", action="store_true", help="use Ray Data with one actor per GPU, also on a cluster")
    served = "compress by the vLLM server there, started by the compress command of `fwd2bot export --to vllm`"
    group.add_argument("--engine", metavar="URL", help=served)
    group.add_argument("--engine-key", metavar="KEY", help="the server's key; default: VLLM_API_KEY")
    every = number(float, 0.1, "a number of seconds")
    group.add_argument(
        "--watch", nargs="?", type=every, const=5.0, metavar="SECONDS", help="keep running for new files"
    )


def _shard(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N, such as 1/8 to 8/8")
    return int(number), int(parts)


def run_fill(args: argparse.Namespace) -> int:
    """Fills the cache and prints the result; after a signal, of what was stored until then."""
    from ..cache.signals import Interrupted

    code = 0
    with ExitStack() as stack:
        if args.json:
            stack.enter_context(redirect_stdout(sys.stderr))
        run = Run(args)
        try:
            run.fill()
        except Interrupted as stop:
            code = stop.code
        except KeyboardInterrupt:  # while --watch waits
            code = 130
    print(json.dumps(run.done()) if args.json else format_result(run.done()))
    if code:
        print("fwd2bot: interrupted; what was finished is stored", file=sys.stderr)
    return code


class Run:
    """One call of the command: source, cache, result, and the model, which is loaded when it is first needed."""

    def __init__(self, args: argparse.Namespace) -> None:
        from ..cache.format import is_cache
        from ..cache.plan import Filled
        from ..cache.reader import SummaryCache
        from ..cache.sources import Source
        from ..files.outputs import refuse_overlap

        folders = {f"--images {name}": name for name in args.images if Path(name).is_dir()}
        refuse_overlap("--cache", args.cache, models=model_folders(args), images=folders, inside_images=True)
        self.args, self.total, self.source = args, Filled(), Source(args.images, args.shard)
        known = SummaryCache.open(args.cache) if is_cache(args.cache) else None
        if known is None and not args.model:
            raise ValueError(f"{args.cache} is a new cache: give --model.")
        if known is None and args.watch is None and "-" not in args.images:
            self._check_source()
        args.model = args.model or known.settings.model
        if not args.model:
            raise ValueError(f"{args.cache} does not record the model that filled it: give --model.")
        if known is not None and self._keeps(known.settings):
            self.cache, self.settings = known, known.settings
        else:
            self.settings = self._settings(None if known is None else known.settings)
            self.cache = SummaryCache.create(args.cache, self.settings)

    def _check_source(self) -> None:
        """Raises ValueError if the source has no usable image, so that a mistyped name creates no cache."""
        first = ""
        for seen, entry in enumerate(self.source, 1):
            if entry.problem is None or seen == PROBED:
                return
            first = first or entry.problem
        if not first:
            raise self._nothing()
        raise ValueError(f"None of the {seen} image(s) could be used. The first: {first}")

    def _nothing(self) -> ValueError:
        from ..files.folders import format_counts

        left = format_counts(self.source.left_out)
        also = f" Left out: {left}." if left else ""
        return ValueError(
            f"There is no image file in {', '.join(self.args.images)}. "
            f"Files are found by extension (.jpg, .png, …).{also}"
        )

    def _keeps(self, known: CacheSettings) -> bool:
        """Whether the requested settings equal the cache's; then the checkpoint is not read before it is needed."""
        from ..cache.format import FORMAT
        from ..cache.naming import fingerprint_of

        args, folder = self.args, Path(self.args.model)
        same = args.model == known.model or (folder.is_dir() and fingerprint_of(folder) == known.fingerprint)
        same = same and args.k in (None, known.k) and args.codec in (None, known.codec)
        same = same and (quantisation(args) or "") == known.quantised and known.format == FORMAT
        return same and reading_of(args, known) == known.reading and (known.decoding == "fast" or not args.fast_decode)

    def _path(self) -> Path:
        """The checkpoint's folder, after checking that it is complete and filled this cache."""
        from ..cache.naming import fingerprint_of
        from ..cache.tables import checked_settings

        path, _ = checked(self.args.model, self.args.k)
        checked_settings(self.args.cache, vars(self.settings), fingerprint_of(path))
        return path

    def _settings(self, known: CacheSettings | None) -> CacheSettings:
        from ..cache.format import CacheSettings
        from ..cache.naming import fingerprint_of
        from ..config import CONFIG_NAME
        from ..files.text import read_json

        args = self.args
        path, most = checked(args.model, args.k)
        warn_untrained(path, args.k)
        saved = read_json(path / CONFIG_NAME)  # verified by `checked`
        size, pooling = saved["base"]["fingerprint"]["hidden_size"], saved["fwd2bot"]["pooling"]
        name = str(Path(args.model).absolute()) if Path(args.model).is_dir() else args.model
        k = args.k or (known.k if known else most)
        codec = args.codec or (known.codec if known else DEFAULT_CODEC)
        more = reading_of(args, known).as_settings()
        if args.fast_decode or (known and known.decoding == "fast"):
            more["decoding"] = "fast"
        more |= {"model": name, "quantised": quantisation(args) or ""}
        return CacheSettings(fingerprint_of(path), k, size, codec, pooling, **more)

    def fill(self) -> None:
        from ..cache.maintenance import keep_stats
        from ..cache.watch import watch

        args = self.args
        self._again(self.source)
        if self.total.compressed or self.total.renamed or self.total.skipped:
            keep_stats(self.cache)
        if args.watch is not None:
            print(f"fwd2bot: watching {', '.join(args.images)} every {args.watch:g} s; Ctrl-C ends", file=sys.stderr)
            watch(self.source, self._again, args.watch)
            return
        done = self.total
        if not (done.skipped or done.compressed or done.known or done.renamed):
            raise self._nothing()
        if done.skipped and not (done.compressed or done.known or done.renamed):
            reason = done.skipped[0]["reason"]
            raise ValueError(f"None of the {len(done.skipped)} image(s) could be used. The first: {reason}")

    def _again(self, source: Any) -> None:
        from ..cache.pipeline import fill

        args = self.args
        if args.ray:
            from ..cache.ray_fill import fill_by_ray

            loading = {name: getattr(args, name) for name in ("base", "device", "dtype", "load_4bit", "load_8bit")}
            options = {"batch_size": args.batch_size, "max_pixels": args.max_pixels, "retry": args.retry}
            result = fill_by_ray(self.cache, source, self._path(), loading, result=self.total, **options)
        else:
            result = fill(
                self.cache, source, self._compressor(), retry=args.retry, workers=args.workers, result=self.total
            )
        self.total = result

    def _compressor(self) -> Any:
        from ..cache.pipeline import Later

        def load() -> Any:
            from ..cache.compressor import Compressor

            args, fast, settings = self.args, self.settings.decoding == "fast", self.settings
            own = (settings.k, args.batch_size, args.max_pixels, settings.reading, fast)
            if args.engine:
                from ..serving.vllm_compressor import VLLMCompressor

                key = args.engine_key or os.environ.get("VLLM_API_KEY")
                return VLLMCompressor(args.engine, self._path(), *own, api_key=key)
            model = load_model(self._path(), args)
            return Compressor(*model, *own)

        if not hasattr(self, "_loaded"):
            self._loaded = Later(load, self.args.batch_size)
        return self._loaded

    def done(self) -> dict[str, Any]:
        """The result of the run, ready for JSON."""
        result = self.total
        skipped = [{"id": row["id"], "reason": row["reason"]} for row in result.skipped]
        return {
            "cache": self.args.cache,
            "images": len(self.cache),
            "compressed": result.compressed,
            "renamed": result.renamed,
            "known": result.known,
            "skipped": [*self.source.refused, *skipped],
            "left_out": dict(self.source.left_out),
            **self.settings.reading.as_settings(),
            "k": self.settings.k,
            "dim": self.settings.size,
            "codec": self.settings.codec,
            "seconds": round(result.seconds, 3),
        }


def reading_of(args: argparse.Namespace, known: CacheSettings | None) -> Reading:
    """How image files are read: as the cache's settings say; for a new cache by --exif-orientation.

    Raises:
        ValueError: --exif-orientation differs from the cache's.
    """
    from ..files.pixels import Reading

    requested = Reading(args.exif_orientation != "off", on_white=True)
    if known is None:
        return requested
    if args.exif_orientation not in (None, known.exif_orientation):
        raise ValueError(
            f"{args.cache} was made with --exif-orientation {known.exif_orientation}, which cannot be mixed: leave "
            f"out --exif-orientation {args.exif_orientation}, or choose another --cache."
        )
    if known.reading != requested:
        kept = ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in known.reading.as_settings().items())
        print(f"fwd2bot: {args.cache} keeps its settings ({kept})", file=sys.stderr)
    return known.reading


def format_result(done: dict[str, Any]) -> str:
    """The result as text, with the skipped images at the end."""
    from collections import Counter

    from ..cache.naming import escaped
    from ..files.folders import format_counts

    rate = f", {done['compressed'] / max(done['seconds'], 1e-3):.1f} images/s" if done["compressed"] else ""
    text = (
        f"{done['images']:,} images in {done['cache']}: {done['compressed']:,} compressed, {done['known']:,} known, "
        f"{done['renamed']:,} under another name, {len(done['skipped']):,} skipped, {done['seconds']:.1f} s{rate}"
    )
    hint = ["  (--retry reads unchanged ones again)"] if done["skipped"] else []
    if done["left_out"]:
        hint.append(f"  left out of the folders: {format_counts(Counter(done['left_out']))}")
    return "\n".join([text, *_skipped(done["skipped"], escaped), *hint])


def _skipped(entries: list[dict[str, str]], escaped: Any, most: int = 100) -> Iterator[str]:
    yield from (f"  skipped {escaped(entry['reason'])}" for entry in entries[:most])
    if len(entries) > most:
        yield f"  and {len(entries) - most:,} more: `fwd2bot cache skipped` lists them"
