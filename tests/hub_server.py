"""An in-memory Hugging Face Hub, served over HTTP on 127.0.0.1 for the duration of a test.

The real `huggingface_hub` client talks to it unmodified, so `push_to_hub`, `upload_folder`, `from_pretrained` and
`snapshot_download` run their whole course without leaving the machine:

    with HubServer() as server:
        server.create_repo("org/tiny", {"config.json": b"{}"})
        subprocess.run([sys.executable, "client.py"], env=server.environment(tmp_path), check=True)
        assert "model.safetensors" in server.files("org/pushed")

The client reads its settings once, at import, hence the subprocess. Model and dataset repositories with branches,
git LFS uploads and range requests are covered. Spaces, tags, pull requests and Xet storage are not: asking for one
of them is an error, never a silent success.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_dummy"
USER = "tester"
LFS_SUFFIXES = (".arrow", ".bin", ".model", ".npz", ".parquet", ".pt", ".safetensors", ".zip")
LFS_MIN_SIZE = 10 * 1024**2
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()

Files = dict[str, bytes]


class Reply(NamedTuple):
    content: Any  # bytes, or anything that JSON can express
    status: int = 200
    headers: dict[str, str] | None = None


class HubError(Exception):
    """A refusal, with the status and the headers that the Hub would send."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | headers


def is_lfs(path: str, size: int) -> bool:
    # The client commits an empty file as a regular one whatever the server asks for.
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size >= LFS_MIN_SIZE)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def object_id(path: str, content: bytes) -> str:
    """What the Hub uses as ETag: the SHA-256 of an LFS file, the git blob id of any other."""
    return hashlib.sha256(content).hexdigest() if is_lfs(path, len(content)) else git_oid(content)


def folders_of(files: Files) -> set[str]:
    return {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}


def describe(path: str, files: Files) -> dict[str, Any]:
    """The entry of a tree listing for a file or, when `path` is not one of `files`, a folder."""
    if path not in files:
        return {"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())}
    content = files[path]
    entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if is_lfs(path, len(content)):
        entry["lfs"] = {"oid": object_id(path, content), "size": len(content), "pointerSize": 134}
    return entry


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """The half-open interval that a `Range` header asks for, or None to serve the whole file."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if match is None or not any(match.groups()):
        return None
    first, last = match.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        raise HubError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
    return start, stop


class Repo:
    """Commits, each a complete snapshot of the files, and the branches pointing at them."""

    def __init__(self, kind: str, repo_id: str, files: Files) -> None:
        self.repo_id = repo_id
        self.page = repo_id if kind == "models" else f"{kind}/{repo_id}"
        self.commits: dict[str, Files] = {}
        self.branches = {"main": ""}
        self.commit("main", files)

    def commit(self, branch: str, files: Files) -> str:
        tree = {path: git_oid(content) for path, content in files.items()}
        sha = hashlib.sha1(json.dumps([self.page, self.branches[branch], tree]).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def at(self, revision: str) -> tuple[str, Files]:
        """The commit id and the files of a branch or of a commit id."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, "Invalid rev id", "RevisionNotFound")
        return sha, self.commits[sha]


class Endpoints(BaseHTTPRequestHandler):
    """What the Hub answers to one request; `ROUTES` says which of the methods is asked."""

    server: "HubServer"
    # A silent connection must not hold up the end of the test for long.
    timeout = 10
    # Headers and body are two writes; Nagle's algorithm would hold the second back until the first is acknowledged.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            self.server.requests.append(f"{self.command} {unquote(url.path)}")
            try:
                reply = self.dispatch(url.path)
            except HubError as error:
                reply = Reply({"error": str(error)}, error.status, error.headers)
        self.send(reply)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: `HubServer.requests` is the log."""

    def send(self, reply: Reply) -> None:
        is_binary = isinstance(reply.content, bytes)
        body = reply.content if is_binary else json.dumps(reply.content).encode()
        self.send_response(reply.status)
        self.send_header("Content-Type", "application/octet-stream" if is_binary else "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (reply.headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def dispatch(self, path: str) -> Reply:
        method = "GET" if self.command == "HEAD" else self.command
        for route in ROUTES:
            match = re.fullmatch(route.pattern, path)
            if match and route.method == method:
                self.authorize(route.needs_token)
                arguments = {name: unquote(value) for name, value in match.groupdict().items() if value}
                if "repo_id" in arguments:
                    arguments["repo"] = self.server.find(arguments.pop("kind", "models"), arguments.pop("repo_id"))
                return route.endpoint(self, **arguments)
        raise HubError(404, f"No such endpoint: {self.command} {path}")

    def authorize(self, needs_token: bool) -> None:
        """Like the Hub, refuse a wrong token everywhere and a missing one where the route needs it."""
        credentials = self.headers.get("Authorization")
        if credentials is None and needs_token:
            raise HubError(401, "Invalid username or password.")
        if credentials not in (None, f"Bearer {TOKEN}"):
            raise HubError(401, "Invalid credentials in Authorization header")

    def whoami(self) -> Reply:
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return Reply({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": auth})

    def validate_yaml(self) -> Reply:
        return Reply({"errors": [], "warnings": []})

    def create_repo(self) -> Reply:
        wanted = json.loads(self.body)
        kind = f"{wanted.get('type') or 'model'}s"
        if kind not in ("models", "datasets"):
            raise HubError(400, f"Repositories of kind {kind} are not supported")
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        new = Repo(kind, repo_id, {".gitattributes": GIT_ATTRIBUTES})
        repo = self.server.repos.setdefault((kind, repo_id), new)
        found = {"name": repo_id, "url": f"{self.server.url}/{repo.page}"}
        # A conflict carries the URL too: the client reads it there when told that the repository may exist.
        return Reply(found) if repo is new else Reply(found | {"error": "You already created this repo"}, 409)

    def info(self, repo: Repo, revision: str = "main") -> Reply:
        sha, files = repo.at(revision)
        siblings = [{"rfilename": path, "size": len(content)} for path, content in sorted(files.items())]
        flags = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        return Reply({"id": repo.repo_id, "sha": sha, "siblings": siblings} | flags)

    def refs(self, repo: Repo) -> Reply:
        branches = repo.branches.items()
        heads = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
        return Reply({"branches": heads, "tags": [], "converts": [], "pullRequests": []})

    def create_branch(self, repo: Repo, revision: str) -> Reply:
        if revision in repo.branches:
            raise HubError(409, "Reference already exists")
        repo.branches[revision], _ = repo.at(json.loads(self.body).get("startingPoint", "main"))
        return Reply({})

    def tree(self, repo: Repo, revision: str, folder: str = "") -> Reply:
        sha, files = repo.at(revision)
        folders = folders_of(files)
        if folder and folder not in folders:
            raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        prefix = f"{folder}/" if folder else ""
        paths = [path for path in sorted(folders | files.keys()) if path.startswith(prefix)]
        if self.query.get("recursive", [""])[0].lower() != "true":
            paths = [path for path in paths if "/" not in path.removeprefix(prefix)]
        return Reply([describe(path, files) for path in paths])

    def paths_info(self, repo: Repo, revision: str) -> Reply:
        _, files = repo.at(revision)
        known = folders_of(files) | files.keys()
        wanted = parse_qs(self.body.decode()).get("paths", [])
        return Reply([describe(path, files) for path in wanted if path in known])

    def preupload(self, repo: Repo, revision: str) -> Reply:
        _, files = repo.at(revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            path, mode = file["path"], "lfs" if is_lfs(file["path"], file["size"]) else "regular"
            oid = object_id(path, files[path]) if path in files else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Reply({"files": answers})

    def lfs_batch(self, repo: Repo) -> Reply:
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(self.body)["objects"]]
        for item in objects:
            # An object without actions is one that the client need not send.
            if item["oid"] not in self.server.lfs_objects:
                item["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}
        return Reply({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> Reply:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content does not match its SHA-256")
        self.server.lfs_objects[oid] = self.body
        return Reply({})

    def commit(self, repo: Repo, revision: str) -> Reply:
        parent, files = repo.at(revision)
        if "create_pr" in self.query or revision not in repo.branches:
            raise HubError(400, "A commit goes to a branch")
        header, *operations = map(json.loads, self.body.splitlines())
        if header["value"].get("parentCommit", parent) != parent:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(files)
        for operation in operations:
            self.apply(operation["key"], operation["value"], files)
        sha = repo.commit(revision, files)
        url = f"{self.server.url}/{repo.page}/commit/{sha}"
        return Reply({"success": True, "commitUrl": url, "commitOid": sha, "pullRequestUrl": None})

    def apply(self, key: str, value: dict[str, Any], files: Files) -> None:
        """Carry out one operation of a commit on `files`."""
        path = value["path"].rstrip("/")
        if key == "file":
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile" and value["oid"] in self.server.lfs_objects:
            files[path] = self.server.lfs_objects[value["oid"]]
        elif key in ("deletedFile", "deletedFolder"):
            doomed = [name for name in files if name == path or name.startswith(f"{path}/")]
            if not doomed or (key == "deletedFile") != (doomed == [path]):
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in doomed:
                del files[name]
        else:
            raise HubError(400, f"The server cannot carry out this {key}")

    def resolve(self, repo: Repo, revision: str, path: str) -> Reply:
        sha, files = repo.at(revision)
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        content = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{object_id(path, content)}"', "Accept-Ranges": "bytes"}
        interval = parse_range(self.headers.get("Range", ""), len(content)) if self.command == "GET" else None
        if interval is None:
            return Reply(content, 200, headers)
        start, stop = interval
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return Reply(content[start:stop], 206, headers)


class Route(NamedTuple):
    method: str
    pattern: str
    endpoint: Callable[..., Reply]
    needs_token: bool = False


REPO_ID = r"(?P<repo_id>[^/]+(?:/[^/]+)?)"
API = rf"/api/(?P<kind>models|datasets)/{REPO_ID}"
SITE = rf"/(?:(?P<kind>datasets)/)?{REPO_ID}"
REVISION = r"(?P<revision>[^/]+)"

# The first match wins. `info` is last because its pattern would take the `refs` of a repository for a repository.
ROUTES = (
    Route("GET", "/api/whoami-v2", Endpoints.whoami, needs_token=True),
    Route("POST", "/api/validate-yaml", Endpoints.validate_yaml),
    Route("POST", "/api/repos/create", Endpoints.create_repo, needs_token=True),
    Route("GET", rf"{API}/refs", Endpoints.refs),
    Route("POST", rf"{API}/branch/{REVISION}", Endpoints.create_branch, needs_token=True),
    Route("GET", rf"{API}/tree/{REVISION}(?:/(?P<folder>.+))?", Endpoints.tree),
    Route("POST", rf"{API}/paths-info/{REVISION}", Endpoints.paths_info),
    Route("POST", rf"{API}/preupload/{REVISION}", Endpoints.preupload, needs_token=True),
    Route("POST", rf"{API}/commit/{REVISION}", Endpoints.commit, needs_token=True),
    Route("POST", rf"{SITE}\.git/info/lfs/objects/batch", Endpoints.lfs_batch, needs_token=True),
    Route("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Endpoints.lfs_upload),  # a presigned address: the token stays away
    Route("GET", rf"{SITE}/resolve/{REVISION}/(?P<path>.+)", Endpoints.resolve),
    Route("GET", rf"{API}(?:/revision/{REVISION})?", Endpoints.info),
)


class HubServer(ThreadingHTTPServer):
    """A Hub of its own for each `with` block, empty at the start and gone with all its threads at the end."""

    # Each answer ends its connection (HTTP/1.0), so the threads to wait for at the end are done or about to be.
    daemon_threads = False
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Endpoints)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.requests: list[str] = []  # "METHOD /path" of all that was asked so far, in order, without the query

    def __enter__(self) -> "HubServer":
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        """The address that clients know as `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """This process's environment, changed for a client that knows only this Hub and keeps its cache in `home`."""
        foreign = re.compile(r"HF_|HUGGING_?FACE_|TRANSFORMERS_|.*_PROXY$", re.IGNORECASE)
        inherited = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        own = {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        return inherited | own | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def find(self, kind: str, repo_id: str) -> Repo:
        if (kind, repo_id) not in self.repos:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return self.repos[kind, repo_id]

    def create_repo(self, repo_id: str, files: dict[str, bytes], repo_type: str = "model") -> None:
        """Add a repository, or replace it, with `files` as its only commit."""
        with self.lock:
            self.repos[f"{repo_type}s", repo_id] = Repo(f"{repo_type}s", repo_id, dict(files))

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """The files of a repository, by path, at a branch or commit id."""
        with self.lock:
            return dict(self.find(f"{repo_type}s", repo_id).at(revision)[1])
