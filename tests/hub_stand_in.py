"""
A stand-in of the Hub on this machine, for tests: the part of its HTTP interface that uploading a folder and loading it
again call. Large files travel by LFS or, where a folder for `xet` is given, by Xet, whose client can keep them in a
local folder instead of a server.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


WRITE_TOKEN, READ_TOKEN = "hf_writer", "hf_reader"
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "other")
LARGE = (".safetensors", ".png", ".pth")

# Without the waits between attempts, ours and the client's.
UPLOAD = """
import runpy, time
time.sleep = lambda seconds: None
runpy.run_module("flowmo_diffusers.hub.upload", run_name="__main__", alter_sys=True)
"""


@dataclass
class File:
    """`oid` is the SHA-256 of a large file, git's blob id of a small one."""

    oid: str
    size: int
    large: bool
    data: bytes | None = None


@dataclass
class Repo:
    private: bool = False
    sha: str = "0" * 40
    files: dict[str, File] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


@dataclass
class Failure:
    pattern: str
    status: int | None  # None drops the connection in the middle of the request's body
    times: int


class HubStandIn:
    """
    Serves while used as a context.

    Attributes:
        repos: Repositories by id.
        blobs: Large files that came by LFS, by SHA-256.
        requests: "METHOD path" of every request that was answered and not made to fail.
        xet_hashes: Where large files travel by Xet, their Xet hashes by SHA-256, for downloads.
    """

    def __init__(self, xet: Path | None = None):
        self.xet = xet
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.xet_hashes: dict[str, str] = {}
        self._failures: list[Failure] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubStandIn":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, pattern: str, status: int | None = 500, times: int = 1000) -> None:
        """Lets the next `times` requests whose "METHOD path" matches fail: by status, or `None` by a dropped line."""
        self._failures.append(Failure(pattern, status, times))

    def heal(self) -> None:
        self._failures.clear()

    def failure(self, request: str) -> Failure | None:
        with self._lock:
            for failure in self._failures:
                if failure.times and re.search(failure.pattern, request):
                    failure.times -= 1
                    return failure
            self.requests.append(request)
        return None

    def content(self, repo_id: str) -> dict[str, bytes]:
        """What a repository holds, by path."""
        return {path: self.data(file) for path, file in self.repos[repo_id].files.items()}

    def data(self, file: File) -> bytes:
        return self.blobs[file.oid] if file.large else file.data


class Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"
    routes = [
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/models/([^/]+/[^/]+)/auth-check/write", "auth_check"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/main", "preupload"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/blobs/(\w+)", "put_blob"),
        ("GET", r"/api/models/([^/]+/[^/]+)/xet-(write|read)-token/\w+", "xet_token"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/main", "commit"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/\w+)?", "model_info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/\w+", "tree"),
        ("HEAD", r"/([^/]+/[^/]+)/resolve/\w+/(.+)", "resolve"),
        ("GET", r"/([^/]+/[^/]+)/resolve/\w+/(.+)", "resolve"),
    ]

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        failure = self.hub.failure(f"{self.command} {path}")
        if failure is not None and failure.status is None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            return
        self.body = self.read_body()
        if failure is not None:
            return self.answer(failure.status, {"error": "made to fail"})
        for method, pattern, name in self.routes:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                return getattr(self, name)(*match.groups())
        self.answer(404, {"error": f"the stand-in has no {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, *args) -> None:
        pass

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, status: int, content: dict | list | bytes = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def may(self, *tokens: str) -> bool:
        """Whether the request has one of these tokens; answers it if not."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token in tokens:
            return True
        if token in (WRITE_TOKEN, READ_TOKEN):
            self.answer(403, {"error": "You don't have the rights"}, {"X-Error-Message": "You don't have the rights"})
        else:
            self.answer(401, {"error": "Invalid username or password."})
        return False

    def repo(self, repo_id: str) -> Repo | None:
        """A repository that the request may read; answers it if there is none."""
        repo = self.hub.repos.get(repo_id)
        if repo is not None and (not repo.private or self.headers.get("Authorization")):
            return repo
        self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return None

    def create_repo(self) -> None:
        if not self.may(WRITE_TOKEN):
            return
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or 'anna'}/{wanted['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo_id}"}
        if repo_id in self.hub.repos:
            return self.answer(409, url | {"error": "You already created this model repo"})
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repos[repo_id] = Repo(private)
        self.answer(200, url)

    def validate_yaml(self) -> None:
        found = re.search(r"^license: (.*)$", json.loads(self.body)["content"], flags=re.MULTILINE)
        known = found is None or found[1] in LICENSES
        errors = [] if known else [{"message": f'"license" must be one of {LICENSES}'}]
        self.answer(200 if known else 400, {"errors": errors, "warnings": []})

    def auth_check(self, repo_id: str) -> None:
        if self.may(WRITE_TOKEN) and self.repo(repo_id):
            self.answer(200)

    def preupload(self, repo_id: str) -> None:
        if self.may(WRITE_TOKEN) and (repo := self.repo(repo_id)):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": repo.files[file["path"]].oid if file["path"] in repo.files else None,
                }
                for file in json.loads(self.body)["files"]
            ]
            self.answer(200, {"files": files})

    def lfs_batch(self, repo_id: str) -> None:
        if self.may(WRITE_TOKEN) and self.repo(repo_id):
            objects = json.loads(self.body)["objects"]
            for item in objects:
                if item["oid"] not in self.hub.blobs:
                    item["actions"] = {"upload": {"href": f"{self.hub.endpoint}/blobs/{item['oid']}"}}
            self.answer(200, {"transfer": "basic", "objects": objects})

    def put_blob(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer(400, {"error": "the content is not what was announced"})
        self.hub.blobs[oid] = self.body
        self.answer(200)

    def xet_token(self, repo_id: str, kind: str) -> None:
        if kind == "read" or self.may(WRITE_TOKEN):
            expiry = int(time.time()) + 3600
            url = f"local://{self.hub.xet}"
            headers = {
                "X-Xet-Cas-Url": url,
                "X-Xet-Access-Token": "xet",
                "X-Xet-Token-Expiration": str(expiry),
            }
            self.answer(200, {"casUrl": url, "accessToken": "xet", "exp": expiry}, headers)

    def commit(self, repo_id: str) -> None:
        if not self.may(WRITE_TOKEN) or not (repo := self.repo(repo_id)):
            return
        files = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                repo.messages.append(value["summary"])
            elif key == "file":
                data = base64.b64decode(value["content"])
                oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                files[value["path"]] = File(oid, len(data), large=False, data=data)
            elif key == "lfsFile" and (self.hub.xet or value["oid"] in self.hub.blobs):
                files[value["path"]] = File(value["oid"], value["size"], large=True)
            else:
                return self.answer(400, {"error": f"cannot commit {value}"})
        repo.files |= files
        repo.sha = hashlib.sha1(repo.sha.encode() + self.body).hexdigest()
        url = f"{self.hub.endpoint}/{repo_id}/commit/{repo.sha}"
        self.answer(200, {"success": True, "commitOid": repo.sha, "commitUrl": url})

    def model_info(self, repo_id: str) -> None:
        if repo := self.repo(repo_id):
            siblings = [{"rfilename": path} for path in repo.files]
            info = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": repo.sha, "private": repo.private}
            self.answer(200, info | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, repo_id: str) -> None:
        if repo := self.repo(repo_id):
            entries = []
            for path, file in repo.files.items():
                entry = {"type": "file", "path": path, "size": file.size, "oid": file.oid[:40]}
                if file.large:
                    entry["lfs"] = {"oid": file.oid, "size": file.size, "pointerSize": 134}
                    if self.hub.xet:
                        entry["xetHash"] = self.hub.xet_hashes[file.oid]
                entries.append(entry)
            self.answer(200, entries)

    def resolve(self, repo_id: str, path: str) -> None:
        if not (repo := self.repo(repo_id)):
            return
        headers = {"X-Repo-Commit": repo.sha}
        if path not in repo.files:
            return self.answer(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
        file = repo.files[path]
        headers |= {"ETag": f'"{file.oid}"', "Content-Length": str(file.size)}
        if file.large and self.hub.xet:
            if self.command == "GET":
                return self.answer(410, {"error": "this file is to be had by Xet"})
            route = f"{self.hub.endpoint}/api/models/{repo_id}/xet-read-token/{repo.sha}"
            headers |= {"X-Xet-Hash": self.hub.xet_hashes[file.oid], "Link": f'<{route}>; rel="xet-auth"'}
        self.answer(200, b"" if self.command == "HEAD" else self.hub.data(file), headers)


class Client:
    """Runs code in a process that takes the stand-in for the Hub."""

    def __init__(self, hub: HubStandIn, home: Path):
        self.home = home
        self.environment = os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(home / "hf_home"),
            "HF_TOKEN": WRITE_TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "0" if hub.xet else "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def __call__(self, code: str, *arguments: str | Path, **environment: str | None) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        env = {name: value for name, value in (self.environment | environment).items() if value is not None}
        return subprocess.run(command, env=env, cwd=self.home, capture_output=True, text=True)
