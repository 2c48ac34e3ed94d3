"""A Hub on 127.0.0.1 for tests: as much of its HTTP interface as the real huggingface_hub client needs to create, upload, list and download.

Repositories live in memory. Large files go by Git LFS, in two requests (batch, then PUT); a commit names them by their SHA-256 and either takes
effect as a whole or not at all. Writing needs the token `TOKEN`, as reading a private repository does.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_test"


class HubServer(ThreadingHTTPServer):
    "`with HubServer() as hub: ... hub.url`; `die_after` bytes of a large file, the server breaks off and answers no more."

    daemon_threads = True

    def __init__(self, die_after: int | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, dict] = {}  # name -> {"private": bool, "branches": {branch: {"sha": str, "files": {path: bytes}}}}
        self.large: dict[str, bytes] = {}  # SHA-256 -> content
        self.requests: list[str] = []
        self.die_after, self.dead = die_after, False

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.dead = True  # connections that are still open get no answer either
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):  # a client that left is not news
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_):
        pass

    def answer(self, status: int, content=b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **{k.replace("_", "-"): v for k, v in headers.items()}}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self) -> None:
        if self.server.dead:
            self.close_connection = True
            return
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        size = int(self.headers.get("Content-Length") or 0)
        if self.command == "PUT" and self.server.die_after is not None:
            self.rfile.read(min(size, self.server.die_after))
            self.server.dead = self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(size) if size else b"".join(self.chunks())
        writing = self.command not in ("GET", "HEAD") and not path.startswith("/lfs/")
        if writing and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        parts = path.strip("/").split("/")
        if parts[0] == "lfs":
            return self.keep(parts[1], body)
        if parts[:2] == ["api", "validate-yaml"]:
            return self.validate(json.loads(body)["content"])
        if parts[:3] == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2]).removesuffix(".git")
        repo = self.server.repos.get(name)
        if repo is None or (repo["private"] and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            return self.answer(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if parts[0] == "api":
            return self.api(name, repo, parts[4] if len(parts) > 4 else "", "/".join(parts[5:]), body)
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            return self.batch(json.loads(body))
        self.resolve(repo, parts[3], "/".join(parts[4:]))

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def chunks(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()

    def keep(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "wrong content"})
        self.server.large[oid] = body
        self.answer(200)

    def validate(self, text: str) -> None:
        _, _, rest = text.partition("---\n")
        values = yaml.safe_load(rest.partition("\n---")[0])
        good = isinstance(values, dict) and isinstance(values.get("tags"), list) and isinstance(values.get("library_name"), str)
        self.answer(200 if good else 400, {"errors": [] if good else [{"message": "metadata missing"}], "warnings": []})

    def create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
        if name in self.server.repos:
            return self.answer(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
        private = bool(asked.get("private") or asked.get("visibility") == "private")
        self.server.repos[name] = {"private": private, "branches": {"main": {"sha": "0" * 40, "files": {".gitattributes": b""}}}}
        self.answer(200, {"url": f"{self.server.url}/{name}"})

    def api(self, name: str, repo: dict, action: str, rest: str, body: bytes) -> None:
        if action == "branch":
            repo["branches"].setdefault(rest, dict(repo["branches"]["main"]))
            return self.answer(200, {})
        branch = self.branch(repo, (rest or "main").split("/")[0])
        if branch is None:
            return self.answer(404, {"error": f"Invalid rev id: {rest}"}, X_Error_Code="RevisionNotFound")
        files = branch["files"]
        if action in ("", "revision"):
            return self.answer(200, {"id": name, "sha": branch["sha"], "private": repo["private"], "siblings": [{"rfilename": path} for path in files]})
        if action == "tree":
            return self.answer(200, [{"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()} for path, content in files.items()])
        if action == "preupload":
            asked = json.loads(body)["files"]
            large = (".safetensors", ".png")
            return self.answer(200, {"files": [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(large) else "regular", "shouldIgnore": False} for f in asked]})
        self.commit(name, branch, [json.loads(line) for line in body.splitlines()])

    def branch(self, repo: dict, revision: str) -> dict | None:
        return repo["branches"].get(revision) or next((b for b in repo["branches"].values() if b["sha"] == revision), None)

    def commit(self, name: str, branch: dict, lines: list[dict]) -> None:
        files = dict(branch["files"])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.large:
                    return self.answer(400, {"error": f"no such object: {value['oid']}"})
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        branch["files"], branch["sha"] = files, hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{branch['sha']}", "commitOid": branch["sha"]})

    def batch(self, asked: dict) -> None:
        self.answer(200, {"transfer": "basic", "objects": [
            {"oid": o["oid"], "size": o["size"], **({} if o["oid"] in self.server.large else {"actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}})}
            for o in asked["objects"]]})

    def resolve(self, repo: dict, revision: str, path: str) -> None:
        branch = self.branch(repo, revision)
        content = None if branch is None else branch["files"].get(path)
        if branch is None or content is None:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="RevisionNotFound" if branch is None else "EntryNotFound")
        self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=branch["sha"], Accept_Ranges="bytes")
