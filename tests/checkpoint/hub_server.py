"""A stand-in for the hub's HTTP API: repositories are made, take commits and give their files back."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """`files`: of each repository. `cards`: what was given to be checked. `tokens`: with which it was asked."""

    daemon_threads = True

    def __init__(self, refuse: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refuse = refuse  # the status that every request gets
        self.files: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.settings: dict[str, dict] = {}
        self.commits: list[dict] = []
        self.cards: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def running(refuse: int | None = None) -> Iterator[Hub]:
    with Hub(refuse) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, content: bytes | dict | list, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _asked(self) -> list[str] | None:
        """The parts of the path; None where the request is refused."""
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.refuse is not None:
            self._body()
            self._send({"error": "refused"}, self.server.refuse)
            return None
        return [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]

    def do_POST(self) -> None:
        parts = self._asked()
        if parts is None:
            return
        hub, body = self.server, self._body()
        if parts == ["api", "repos", "create"]:
            told = json.loads(body)
            name = f"{told.get('organization') or 'someone'}/{told['name']}"
            hub.files.setdefault(name, {})
            hub.settings[name] = told
            self._send({"url": f"{hub.url}/{name}"})
        elif parts == ["api", "validate-yaml"]:
            hub.cards.append(json.loads(body)["content"])
            self._send({"errors": [], "warnings": []})
        elif parts[:2] == ["api", "models"] and parts[4] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            self._send({"files": files})
        elif parts[-3:] == ["lfs", "objects", "batch"]:
            told = json.loads(body)["objects"]
            told = [{**o, "actions": {"upload": {"href": f"{hub.url}/large/{o['oid']}"}}} for o in told]
            self._send({"transfer": "basic", "objects": told}, Content_Type="application/vnd.git-lfs+json")
        elif parts[:2] == ["api", "models"] and parts[4] == "paths-info":
            self._paths("/".join(parts[2:4]), body)
        elif parts[:2] == ["api", "models"] and parts[4] == "commit":
            self._commit("/".join(parts[2:4]), [json.loads(line) for line in body.splitlines()])
        else:
            self._send({"error": f"no {self.path}"}, 404)

    def _paths(self, name: str, body: bytes) -> None:
        files, asked = self.server.files[name], json.loads(body)["paths"]
        self._send([{"type": "file", "path": n, "size": len(files[n]), "oid": _digest(files[n])} for n in asked])

    def _commit(self, name: str, lines: list[dict]) -> None:
        files = self.server.files[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append(value)
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.server.large[value["oid"]]
        self._send({"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_PUT(self) -> None:
        parts = self._asked()
        if parts is not None:
            content = self._body()
            assert parts == ["large", _digest(content)]
            self.server.large[parts[1]] = content
            self._send({})

    def do_GET(self) -> None:
        parts = self._asked()
        if parts is None:
            return
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in self.server.files:
            name = "/".join(parts[2:4])
            if parts[4:5] == ["tree"]:
                files = self.server.files[name].items()
                self._send([{"type": "file", "path": n, "size": len(f), "oid": _digest(f)} for n, f in files])
                return
            siblings = [{"rfilename": file} for file in self.server.files[name]]
            self._send({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []})
        elif len(parts) > 4 and parts[2] == "resolve":
            content = self.server.files.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
            if content is None:
                self._send({"error": "no such file"}, 404, X_Error_Code="EntryNotFound")
            else:
                self._send(content, ETag=f'"{_digest(content)}"')
        else:
            self._send({"error": f"no {self.path}"}, 404)

    do_HEAD = do_GET
