"""A small stand-in of the Hugging Face hub on loopback: what huggingface_hub asks of it, and what can go wrong."""

import hashlib
import json
import threading
import time
from contextlib import suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_LARGE = (".gguf", ".safetensors", ".bin")  # files that lie beside the repository, as Git LFS has them


class Hub(ThreadingHTTPServer):
    """The hub.

    Attributes
    ----------
    repos : dict
        owner/name -> revision -> file -> bytes.
    tokens : dict
        owner/name -> the token without which its files aren't given (gated) or, of a name in `private`, nothing is.
    cuts : list of int
        After how many bytes the next answers end; 0: not at all.
    stall : bool
        Whether cut answers hang instead of ending.
    damage : set of str
        Names of files that are sent with a wrong byte.
    asked : list of (method, path, Range, Authorization)
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.tokens, self.private = {}, {}, set()
        self.cuts, self.stall, self.damage, self.asked = [], False, set(), []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def cdn(self):
        """Large files come from another host, as the hub has it."""
        return f"http://localhost:{self.server_port}/cdn"

    def add(self, repo, files, revision="main"):
        self.repos.setdefault(repo, {})[revision] = files

    def handle_error(self, request, client_address):
        """Clients may go away."""

    def gets(self, part):
        """The Range of each GET of a path with `part` in it."""
        return [asked for method, path, asked, _ in self.asked if method == "GET" and part in path]


def commit_of(files):
    return hashlib.sha1(repr([(name, digest_of(name, content)) for name, content in files.items()]).encode()).hexdigest()


@cache
def digest_of(name, content):
    if name.endswith(_LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.server.asked.append((self.command, path, self.headers.get("Range"), token))
        if path.startswith("cdn/"):
            return self._send_file(path)
        api = path.startswith("api/models/")
        owner, name, *rest = path.removeprefix("api/models/").split("/")
        repo = f"{owner}/{name}"
        revisions = self.server.repos.get(repo)
        known = token == self.server.tokens.get(repo, token)
        if revisions is None or (repo in self.server.private and not known):
            return self._refuse(401, "RepoNotFound")
        if api and rest == ["refs"]:
            branches = [{"name": r, "ref": f"refs/heads/{r}", "targetCommit": commit_of(f)} for r, f in revisions.items()]
            return self._send_json({"branches": branches, "tags": [], "converts": []})
        by_name = {**revisions, **{commit_of(files): files for files in revisions.values()}}
        revision = "/".join(rest[1:]) if api else rest[1]
        if revision not in by_name:
            return self._refuse(404, "RevisionNotFound")
        files = by_name[revision]
        if api:
            siblings = [self._sibling(*item) for item in files.items()]
            return self._send_json({"id": repo, "modelId": repo, "sha": commit_of(files), "siblings": siblings})
        if not known:
            return self._refuse(403 if token else 401, "GatedRepo")
        file = "/".join(rest[2:])
        if file not in files:
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit_of(files)})
        content, digest = files[file], digest_of(file, files[file])
        headers = {"X-Repo-Commit": commit_of(files), "ETag": f'"{digest}"'}
        if file.endswith(_LARGE):
            headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            return self._send(302, b"", headers | {"Location": f"{self.server.cdn}/{repo}/{commit_of(files)}/{file}"})
        self._send(200, content, headers)

    def _sibling(self, file, content):
        digest = digest_of(file, content)
        if not file.endswith(_LARGE):
            return {"rfilename": file, "size": len(content), "blobId": digest}
        lfs = {"sha256": digest, "size": len(content), "pointerSize": 130}
        return {"rfilename": file, "size": len(content), "blobId": "0" * 40, "lfs": lfs}

    def _send_file(self, path):
        _, owner, name, commit, *rest = path.split("/")
        files = next(f for f in self.server.repos[f"{owner}/{name}"].values() if commit_of(f) == commit)
        file = "/".join(rest)
        content = files[file]
        if file in self.server.damage:
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = self.headers.get("Range")
        first = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        headers = {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"} if asked else {}
        self._send(206 if asked else 200, content[first:], headers, cut=self.server.cuts.pop(0) if self.server.cuts else 0)

    def _send_json(self, value):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status, code, headers=None):
        self._send(status, b"", {"X-Error-Code": code, **(headers or {})})

    def _send(self, status, content, headers, cut=0):
        self.send_response(status)
        for key, value in {"Accept-Ranges": "bytes", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with suppress(OSError):
            self.wfile.write(content[:cut] if cut else content)
            if cut:
                self.wfile.flush()
                while self.server.stall:
                    time.sleep(0.01)
                self.close_connection = True
                self.connection.close()
