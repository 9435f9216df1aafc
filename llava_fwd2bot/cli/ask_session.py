"""`fwd2bot ask --interactive`: one question after the other; the model and the cache are loaded once."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .console import message_of, tell
from .options import checked, folder_of, json_alone, load_model, load_plain_model, warn_untrained
from .precision import check_precision
from .search import hits_for_answer, model_of

COMMANDS = """\
/image ID|PATH   ask about this image: an id of the cache, or a file
/search WORDS    ask about the images of the cache that these words find
/k N             use the first N summary tokens
/help            show this list
/quit            end; Ctrl-D does the same
Any other line is a question about the images that were chosen last. Questions do not know of each other."""


class Session:
    """What is loaded, and which images the next question is about.

    Args:
        args: of `fwd2bot ask`.
        ask: (args, model, processor, names, given) → the answer's figures; prints the answer unless --json is given.
    """

    def __init__(self, args: argparse.Namespace, ask: Callable[..., dict[str, Any]]) -> None:
        from ..checkpoint.load import is_plain

        self.args, self.ask = args, ask
        self.names: list[str] = []
        self.images: list[Any] | None = None  # PIL images; None where summaries are asked
        self.summary: Any = None  # [M, k, D]
        self.cache: Any = None
        args.model = args.model or model_of(args.cache)
        self.path = folder_of(args.model)
        self.plain = is_plain(self.path)
        if self.plain:
            tell(f"{args.model} has no Fwd2Bot: it answers from all dense tokens")
        else:
            self.path, self.most = checked(args.model, args.k)
        if self.plain and (args.cache or args.summaries or args.k or args.dense):
            raise ValueError(f"{args.model} has no Fwd2Bot: leave out --cache, --summaries, --k and --dense.")
        if args.cache:
            from ..cache.naming import fingerprint_of
            from ..cache.reader import SummaryCache

            self.cache = SummaryCache.open(args.cache, fingerprint_of(self.path))
            check_precision(args, self.cache.settings)
            self.most = self.cache.settings.k
        self.model, self.processor = (load_plain_model if self.plain else load_model)(self.path, args)
        if args.image:
            self.choose_files(args.image)
        elif args.id:
            self.choose_stored(args.id)
        elif args.search:
            self.search(args.search)

    # ------------------------------------------------------------------ choosing
    def choose(self, name: str) -> None:
        """An image by the id or path under which it is stored, or else a file."""
        from ..cache.format import DamagedCache

        if self.cache is None and not self.args.summaries:
            return self.choose_files([name])
        try:
            self.choose_stored([name])
        except DamagedCache:
            raise
        except ValueError:
            if not os.path.isfile(name):
                raise
            self.choose_files([name])

    def choose_stored(self, names: list[str]) -> None:
        if self.cache is not None:
            summary = self.cache.get(names)
        else:
            from ..cache.naming import fingerprint_of
            from ..cache.summary_file import read_summaries

            summary = read_summaries(self.args.summaries, names, fingerprint_of(self.path), None)
            self.most = summary.shape[1]
        self.names, self.summary, self.images = list(names), summary, None

    def choose_files(self, names: list[str]) -> None:
        from ..files.pixels import Reading
        from ..processing.images import open_image, prepared_size

        reading = Reading(self.args.exif_orientation != "off", on_white=True)
        size = prepared_size(self.processor)
        images = [open_image(name, reading=reading, prepared=size) for name in names]
        self.names, self.images, self.summary = list(names), images, None

    def search(self, words: str) -> None:
        if self.cache is None:
            raise ValueError("/search needs a cache: start with --cache PATH.")
        from ..cache.search import table

        hits = hits_for_answer(self.args, self.cache, self.model, self.processor, words)
        self.choose_stored([hit["id"] for hit in hits])
        if self.args.json:
            print(json.dumps({"search": words, "hits": hits}, default=str), flush=True)
        else:
            print(table(hits), flush=True)

    def set_k(self, text: str) -> None:
        if self.plain:
            raise ValueError(f"{self.args.model} has no Fwd2Bot: it answers from all dense tokens.")
        if not text.isdecimal() or not 1 <= int(text) <= self.most:
            raise ValueError(f"/k takes a number from 1 to {self.most}, not {text!r}.")
        self.args.k = int(text)
        warn_untrained(self.path, self.args.k)

    # ------------------------------------------------------------------ lines
    def line(self, text: str) -> bool:
        """Does what one line says; False where it ends the session.

        Raises:
            ValueError, OSError: it cannot be done; what was chosen before stays.
        """
        command, _, rest = text.partition(" ")
        rest = rest.strip()
        if command == "/quit":
            return False
        if command == "/help":
            print(COMMANDS, file=sys.stderr if self.args.json else sys.stdout, flush=True)
        elif command in ("/image", "/search") and not rest:
            raise ValueError(f"{command} takes a name: {command} {'ID|PATH' if command == '/image' else 'WORDS'}")
        elif command == "/image":
            self.choose(rest)
        elif command == "/search":
            self.search(rest)
        elif command == "/k":
            self.set_k(rest)
        elif command.startswith("/"):
            raise ValueError(f"There is no command {command}; /help lists them.")
        else:
            self.question(text)
        return True

    def question(self, text: str) -> None:
        if not self.names:
            raise ValueError("No image is chosen: /image ID|PATH" + (" or /search WORDS" if self.cache else ""))
        self.args.question = text
        every = range(len(self.names))
        for part in ([i] for i in every) if self.args.each else [list(every)]:
            names = [self.names[i] for i in part]
            if self.summary is None:
                given = {"images": [self.images[i] for i in part]}
            else:
                given = {"summary": self.summary[part, : self.args.k]}
            with json_alone(self.args.json):
                found = self.ask(self.args, self.model, self.processor, names, given)
            if self.args.json:
                print(json.dumps(found), flush=True)


def lines(terminal: bool) -> Iterator[str]:
    """Lines of stdin that are not empty, with a prompt on a terminal; ends at the end of the input."""
    if not terminal:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    while True:
        try:
            text = input("ask: ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        if text:
            yield text


def run(args: argparse.Namespace, ask: Callable[..., dict[str, Any]]) -> None:
    """Until /quit, Ctrl-D or the end of the input. A line that fails is reported, and the next one is read.

    Ctrl-C while an answer is generated ends the answer, if a terminal is there to go on with; else it ends the command.
    """
    if sys.stdin is None:
        raise ValueError("--interactive reads questions from stdin, which is closed.")
    terminal = sys.stdin.isatty()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    with json_alone(args.json):
        session = Session(args, ask)
    if terminal:
        tell("type a question, or /help")
    for text in lines(terminal):
        try:
            if not session.line(text):
                return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print(file=sys.stderr)
            tell("interrupted; Ctrl-D ends")
        except (ValueError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            tell(f"error: {message_of(error)}")
