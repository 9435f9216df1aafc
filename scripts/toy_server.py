"""What the server's scripts share: a toy checkpoint of the tests, written to a folder, and `fwd2bot serve` over it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def write_toy(folder: Path) -> Path:
    """A checkpoint of random weights whose answers are words; its base lies beside it."""
    from conftest import settings, shake, toy_base, toy_processor

    from llava_fwd2bot import add_fwd2bot

    processor = toy_processor()
    base = toy_base(processor)
    words = {at for word, at in processor.tokenizer.get_vocab().items() if word.strip("▁").isalpha()}
    base.generation_config.suppress_tokens = sorted(set(range(base.config.text_config.vocab_size)) - words)
    base.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    from transformers import LlavaForConditionalGeneration

    model = shake(add_fwd2bot(LlavaForConditionalGeneration.from_pretrained(folder / "base"), settings(), processor))
    model.save_pretrained(folder / "toy", processor=processor)
    return folder / "toy"


class Server:
    """`fwd2bot serve` in a process of its own; `url` once it answers."""

    def __init__(self, model: str | Path, *options: object, threads: int = 1) -> None:
        command = [sys.executable, "-m", "llava_fwd2bot", "serve", "--model", model, "--device", "cpu", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        started = time.perf_counter()
        self.process = subprocess.Popen(
            list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
        )
        said = []
        while not (said and (found := re.search(r"serving .* on (http://\S+)", said[-1]))):
            said.append(self.process.stderr.readline())
            if not said[-1]:
                raise RuntimeError(f"the server did not start: {''.join(said)}")
        self.url = found[1]
        # what it says later must be read, or it waits for its reader
        threading.Thread(target=self._read, daemon=True).start()
        self.seconds_to_start = time.perf_counter() - started

    def _read(self) -> None:
        for line in self.process.stderr:
            print(line, end="", file=sys.stderr)

    @property
    def resident(self) -> int:
        """Bytes of memory that the process has."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) * 1024

    @property
    def processor_seconds(self) -> float:
        """What the process has used of all processors; unlike time, little changed by what else runs."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
