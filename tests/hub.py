"""A Hub on the loopback interface, speaking what the real `huggingface_hub` client speaks, all in memory."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


@dataclass(frozen=True)
class File:
    content: bytes
    is_lfs: bool

    @property
    def git_oid(self):
        content = self.content
        if self.is_lfs:
            content = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.etag}\nsize {len(content)}\n".encode()
            )
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self):
        return hashlib.sha256(self.content).hexdigest() if self.is_lfs else self.git_oid

    def entry(self, path):
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.git_oid}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.etag, "size": len(self.content), "pointerSize": 134}
        return entry


@dataclass
class Repo:
    private: bool
    commits: list = field(default_factory=list)  # (oid, message, {path: File}), oldest first
    is_gated: bool = False

    def __post_init__(self):
        self.commit("initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})

    def commit(self, message, files):
        oid = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits.append((oid, message, files))
        return oid

    @property
    def files(self):
        return self.commits[-1][2]


class Refusal(Exception):
    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.code = status, code


class Hub:
    """Context manager: a running Hub at `endpoint`, with the state that tests look at.

    Attributes:
        tokens (`dict`): user name by token.
        repos (`dict`): `Repo` by "owner/name".
        requests (`list` of `str`): "METHOD path" of every request so far.
        faults (`dict`): status to answer by pattern of "METHOD path"; with `None` the connection is dropped.
    """

    def __init__(self):
        self.tokens = {"hf_alice": "alice", "hf_bob": "bob"}
        self.repos, self.objects, self.requests, self.faults = {}, {}, [], {}
        self.lock = threading.Lock()

    def __enter__(self):
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}/storage"  # another host: the client sends no token
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def user(self, headers):
        token = (headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def repo(self, repo_id, user, write=False):
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and user != repo_id.split("/")[0]):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != repo_id.split("/")[0]:
            raise Refusal(403 if user else 401, "You don't have the rights to write here")
        return repo

    def commit(self, repo_id, revision, user):
        commits = self.repo(repo_id, user).commits
        if revision == "main":
            return commits[-1]
        for commit in commits:
            if commit[0] == revision:
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    # Each route gets (user, query, body, *groups of its pattern) and returns a JSON value

    def whoami(self, user, query, body):
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def validate_yaml(self, user, query, body):
        header = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        try:
            yaml.safe_load(header[1]) if header else None
        except yaml.YAMLError as error:
            raise Refusal(400, str(error)) from error
        return {"errors": [], "warnings": [] if header else [{"message": "empty or missing yaml metadata"}]}

    def create_repo(self, user, query, body):
        body = json.loads(body)
        owner = body.get("organization") or user
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if owner != user:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        repo_id = f"{owner}/{body['name']}"
        answer = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.repos:
            return answer | {"error": "You already created this model repo", "status": 409}
        self.repos[repo_id] = Repo(private=body.get("visibility") == "private" or body.get("private") is True)
        return answer

    def preupload(self, user, query, body, repo_id, revision):
        files = self.repo(repo_id, user, write=True).files
        answers = []
        for file in json.loads(body)["files"]:
            is_lfs = file["path"].endswith(".safetensors") or file["size"] > 10_000_000
            oid = files[file["path"]].etag if file["path"] in files else None
            mode = "lfs" if is_lfs else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def lfs_batch(self, user, query, body, repo_id):
        self.repo(repo_id, user, write=True)
        answers = []
        for item in json.loads(body)["objects"]:
            if item["oid"] not in self.objects:
                verify = {"href": f"{self.endpoint}/{repo_id}.git/info/lfs/verify"}
                item = item | {"actions": {"upload": {"href": f"{self.storage}/{item['oid']}"}, "verify": verify}}
            answers.append(item)
        return {"transfer": "basic", "objects": answers}

    def lfs_put(self, user, query, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "The content does not match its checksum")
        self.objects[oid] = body
        return {}

    def lfs_verify(self, user, query, body, repo_id):
        self.repo(repo_id, user, write=True)
        item = json.loads(body)
        if len(self.objects.get(item["oid"], b"")) != item["size"]:
            raise Refusal(404, "Object not found")
        return {}

    def create_commit(self, user, query, body, repo_id, revision):
        repo = self.repo(repo_id, user, write=True)
        files, header = dict(repo.files), {}
        for line in body.splitlines():
            line = json.loads(line)
            key, value = line["key"], line["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), is_lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refusal(400, f"LFS object of {value['path']} was never uploaded")
                files[value["path"]] = File(self.objects[value["oid"]], is_lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"Unknown operation {key!r}")
        oid = repo.commit(header["summary"], files)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{oid}"}

    def model_info(self, user, query, body, repo_id, revision=None):
        oid, _, files = self.commit(repo_id, revision or "main", user)
        siblings = [{"rfilename": path} for path in sorted(files)]
        if "blobs" in query:
            siblings = [each | {"size": len(files[each["rfilename"]].content)} for each in siblings]
        private = self.repos[repo_id].private
        info = {"_id": repo_id, "id": repo_id, "sha": oid, "private": private, "tags": [], "siblings": siblings}
        if "README.md" in files and (header := re.match(rb"---\n(.*?)\n---\n", files["README.md"].content, re.DOTALL)):
            info["cardData"] = yaml.safe_load(header[1])
        return info

    def auth_check(self, user, query, body, repo_id):
        self.repo(repo_id, user)
        return {}

    def refs(self, user, query, body, repo_id):
        oid, _, _ = self.commit(repo_id, "main", user)
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": oid}
        return {"branches": [branch], "converts": [], "tags": []}

    def tree(self, user, query, body, repo_id, revision, folder=None):
        _, _, files = self.commit(repo_id, revision, user)
        prefix = f"{folder}/" if folder else ""
        paths = sorted(path for path in files if path.startswith(prefix))
        if query.get("recursive") == ["true"]:
            folders = sorted(
                {"/".join(path.split("/")[:depth]) for path in paths for depth in range(1, path.count("/") + 1)}
            )
        else:
            folders = sorted({prefix + path[len(prefix) :].split("/")[0] for path in paths} - set(paths))
            paths = [path for path in paths if "/" not in path[len(prefix) :]]
        entries = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]
        return entries + [files[path].entry(path) for path in paths]

    def paths_info(self, user, query, body, repo_id, revision):
        _, _, files = self.commit(repo_id, revision, user)
        try:
            paths = json.loads(body)["paths"]
        except ValueError:
            paths = parse_qs(body.decode())["paths"]
        return [files[path].entry(path) for path in paths if path in files]


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Hub.whoami),
    ("POST", r"/api/validate-yaml", Hub.validate_yaml),
    ("POST", r"/api/repos/create", Hub.create_repo),
    ("POST", rf"/api/models/{REPO}/preupload/([^/]+)", Hub.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Hub.lfs_batch),
    ("PUT", r"/storage/(\w+)", Hub.lfs_put),
    ("POST", rf"/{REPO}\.git/info/lfs/verify", Hub.lfs_verify),
    ("POST", rf"/api/models/{REPO}/commit/([^/]+)", Hub.create_commit),
    ("GET", rf"/api/models/{REPO}", Hub.model_info),
    ("GET", rf"/api/models/{REPO}/revision/([^/]+)", Hub.model_info),
    ("GET", rf"/api/models/{REPO}/auth-check", Hub.auth_check),
    ("GET", rf"/api/models/{REPO}/refs", Hub.refs),
    ("GET", rf"/api/models/{REPO}/tree/([^/]+)(?:/(.+))?", Hub.tree),
    ("POST", rf"/api/models/{REPO}/paths-info/([^/]+)", Hub.paths_info),
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_request(self):
        url = urlsplit(self.path)
        path, body = unquote(url.path), self.read_body()
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            faults = [self.hub.faults[key] for key in self.hub.faults if re.fullmatch(key, self.hub.requests[-1])]
            if None in faults:
                self.close_connection = True
                return
            try:
                if faults:
                    raise Refusal(faults[0], "Out of order")
                if path.startswith("/storage/") and self.headers.get("Authorization"):
                    raise Refusal(400, "The token was sent to the storage host")
                user = self.hub.user(self.headers)
                if match := re.fullmatch(rf"/{REPO}/resolve/([^/]+)/(.+)", path):
                    self.send_file(user, *match.groups())
                elif self.command == "GET" and path.startswith("/storage/"):
                    self.send_content(self.hub.objects[path.split("/")[-1]])
                else:
                    self.send_json(*self.route(user, path, parse_qs(url.query), body))
            except Refusal as refusal:
                headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
                self.send_json(refusal.status, {"error": str(refusal)}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def route(self, user, path, query, body):
        for method, pattern, answer in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                groups = [group for group in match.groups() if group is not None]
                content = answer(self.hub, user, query, body, *groups)
                return (content.pop("status", 200) if isinstance(content, dict) else 200), content
        raise Refusal(404, f"This Hub does not know {self.command} {path}")

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send_file(self, user, repo_id, revision, path):
        oid, _, files = self.hub.commit(repo_id, revision, user)
        headers = {"X-Repo-Commit": oid}
        if self.hub.repos[repo_id].is_gated:
            raise Refusal(403, "Access to this repo is restricted", "GatedRepo")
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        file = files[path]
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
            self.send_content(b"", 302, headers | {"Location": f"{self.hub.storage}/{file.etag}"})
        else:
            self.send_content(file.content, 200, headers | {"ETag": f'"{file.etag}"'})

    def send_json(self, status, content, headers=None):
        self.send_content(json.dumps(content).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def send_content(self, content, status=200, headers=None):
        headers = {"Accept-Ranges": "bytes"} | (headers or {})
        if status == 200 and (match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            start, end = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            status, content = 206, content[start : end + 1]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def start(arguments, hub, home, cwd, **environment):
    """Run Python with the stand-in as its Hub and return the finished process."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
    environment = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "*",
        "OMP_NUM_THREADS": "1",  # tiny models: threads would cost more than they give
    } | environment
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
