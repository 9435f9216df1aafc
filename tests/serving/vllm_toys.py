"""A stand-in for vLLM's server: another program on the same files, over real HTTP.

It opens the base by transformers and the exported adapters by PEFT, renders the exported template with jinja, decodes
the embeddings that were sent, and answers greedily. What a real engine does wrong can be switched on.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from peft import PeftModel
from transformers import AutoTokenizer, LlavaForConditionalGeneration


class StandIn:
    """The engine's state: `requests` are the bodies it got, `fault` is what it does wrong."""

    def __init__(self, export: Path, base: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        llava = LlavaForConditionalGeneration.from_pretrained(base)
        self.image, self.base = llava.config.image_token_id, str(base)
        self.model = PeftModel.from_pretrained(llava, str(export / "answer"), adapter_name="answer").eval()
        set_as_transformers = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self.template = set_as_transformers.from_string((export / "fwd2bot" / "vllm_template.jinja").read_text())
        self.other_template = set_as_transformers.from_string("{% for m in messages %}USER: {{ m }}{% endfor %}")
        self.adapters, self.requests, self.fault, self.key = ["answer"], [], None, None
        self.lock = threading.Lock()

    # ------------------------------------------------------------------ what vLLM does
    def prompt(self, body: dict[str, Any]) -> tuple[list[int], list[np.ndarray]]:
        """Ids with one placeholder for each token of an image, and the images' embeddings."""
        images, messages = [], []
        for message in body["messages"]:
            content = []
            for part in message["content"]:
                if part["type"] == "image_embeds":
                    images.append(np.load(io.BytesIO(base64.b64decode(part["image_embeds"])), allow_pickle=False))
                    part = {"type": "image"}
                content.append(part)
            messages.append({"role": message["role"], "content": content})
        template = self.other_template if self.fault == "template" else self.template
        text = template.render(messages=messages, add_generation_prompt=True, **body.get("chat_template_kwargs", {}))
        ids = self.tokenizer(text, add_special_tokens=body.get("add_special_tokens", False))["input_ids"]
        left = iter(images)
        return [i for one in ids for i in ([one] * len(next(left)) if one == self.image else [one])], images

    @torch.inference_mode()
    def answer(self, body: dict[str, Any]) -> tuple[list[int], torch.Tensor]:
        """New ids [T], and the log-probabilities of all words [T, V] before what generate suppresses."""
        ids, images = self.prompt(body)
        rows = self.model.get_input_embeddings()(torch.tensor(ids))
        if images:
            rows[torch.tensor(ids) == self.image] = torch.from_numpy(np.concatenate(images))
        given = {"inputs_embeds": rows[None], "max_new_tokens": body["max_tokens"], "do_sample": False}
        with self.lock:
            if body["model"] == "answer" and self.fault != "ignores":
                out = self.model.generate(**given, output_logits=True, return_dict_in_generate=True)
            else:
                with self.model.disable_adapter():
                    out = self.model.generate(**given, output_logits=True, return_dict_in_generate=True)
        return out.sequences[0].tolist(), torch.cat(out.logits).log_softmax(-1)


class _Handler(BaseHTTPRequestHandler):
    engine: StandIn

    def log_message(self, *args: Any) -> None:
        pass

    def _send(self, values: dict[str, Any] | bytes, status: int = 200) -> None:
        content = values if isinstance(values, bytes) else json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _refused(self) -> bool:
        if self.engine.key and self.headers.get("Authorization") != f"Bearer {self.engine.key}":
            self._send({"error": "Unauthorized"}, 401)
            return True
        if self.engine.fault == "not json":
            self._send(b"<html>hello</html>")
            return True
        return False

    def do_GET(self) -> None:
        if self._refused():
            return
        models = [{"id": "llava", "root": self.engine.base, "parent": None}]
        self._send({"data": models + [{"id": name, "parent": "llava"} for name in self.engine.adapters]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        self.engine.requests.append((self.path, body))
        if body["model"] not in ("llava", *self.engine.adapters):
            self._send({"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}, 404)
        elif self.path == "/tokenize" and self.engine.fault == "no tokenize":
            self._send({"detail": "Not Found"}, 404)
        elif self.path == "/tokenize":
            self._send({"tokens": self.engine.prompt(body)[0]})
        elif self.engine.fault == "dead":
            self._send({"error": {"message": "EngineCore encountered an issue.", "code": 500}}, 500)
        elif body.get("stream"):
            self._stream(body)
        else:
            ids, logs = self.engine.answer(body)
            text = self.engine.tokenizer.decode(ids, skip_special_tokens=True)
            choice: dict[str, Any] = {"message": {"content": text}, "token_ids": ids, "finish_reason": "length"}
            if body.get("logprobs"):
                choice["logprobs"] = {"content": [_logprob(row, body["top_logprobs"]) for row in logs]}
            usage = {"prompt_tokens": len(self.engine.prompt(body)[0])}
            self._send({"choices": [choice], "usage": usage})

    def _stream(self, body: dict[str, Any]) -> None:
        """Event by event, a piece a token; the connection is closed at the end, as HTTP/1.0 has it."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        ids, said = self.engine.answer(body)[0], ""
        self.wfile.write(b": a comment that keeps the connection open\n\n")
        for at in range(len(ids)):
            if at == 2 and self.engine.fault == "dies":
                return
            if at == 2 and self.engine.fault == "error event":
                self._event({"error": {"message": "EngineCore encountered an issue.", "code": 500}})
                return
            text = self.engine.tokenizer.decode(ids[: at + 1], skip_special_tokens=True)
            self._event({"choices": [{"delta": {"content": text[len(said) :]}, "index": 0}]})
            said = text
        self._event({"choices": [], "usage": {"prompt_tokens": 1}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, values: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(values).encode() + b"\n\n")


def _logprob(row: torch.Tensor, top: int) -> dict[str, Any]:
    best = row.topk(top)
    entries = [{"token": f"token_id:{i}", "logprob": float(x)} for x, i in zip(*best, strict=True)]
    return {**entries[0], "top_logprobs": entries}


@contextmanager
def served(engine: StandIn) -> Iterator[str]:
    """The stand-in's address, for as long as the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"engine": engine}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
