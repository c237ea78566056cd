"""The stand-in Hub as the real client sees it: pushing, reloading, and failing the way the Hub fails."""

import http.client
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer


PUSH_AND_RELOAD = """
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
words = Tokenizer(models.WordLevel({"[UNK]": 0, "pick": 1, "up": 2}, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")

model.push_to_hub("org/tiny")
tokenizer.push_to_hub("org/tiny")
reloaded = LlamaForCausalLM.from_pretrained("org/tiny")
same = [torch.equal(value, reloaded.state_dict()[name]) for name, value in model.state_dict().items()]
result = {"same": same, "ids": AutoTokenizer.from_pretrained("org/tiny")("pick up").input_ids}
"""

UPLOAD_AND_DELETE = """
from huggingface_hub import HfApi, snapshot_download

api = HfApi()
where = {"repo_id": api.create_repo("org/data", repo_type="dataset").repo_id, "repo_type": "dataset"}
commit = api.upload_folder(folder_path=home / "folder", delete_patterns="*.md", **where)
unchanged = api.upload_folder(folder_path=home / "folder", **where)
api.delete_folder("episodes/b", **where)
api.delete_file("meta.json", **where)
now = Path(snapshot_download(**where))
before = Path(snapshot_download(revision=commit.oid, local_dir=home / "before", **where))
root = {entry.path: type(entry).__name__ for entry in api.list_repo_tree(**where)}
result = {
    "now": sorted(str(path.relative_to(now)) for path in now.rglob("*") if path.is_file()),
    "before": (before / "episodes/b/1.parquet").read_bytes().decode(),
    "empty commit": unchanged.oid == commit.oid,
    "type": commit.repo_url.repo_type,
    "root": root,
    "sizes": [entry.size for entry in api.get_paths_info(paths=["episodes/a/0.parquet", "gone"], **where)],
}
"""

BRANCH = """
from huggingface_hub import HfApi

api = HfApi()
api.create_branch("org/tiny", branch="side/one")
api.upload_file(path_or_fileobj=b"two", path_in_repo="a b/\u00e9?#%.txt", repo_id="org/tiny", revision="side/one")
path = api.hf_hub_download("org/tiny", "a b/\u00e9?#%.txt", revision="side/one")
branches = [branch.name for branch in api.list_repo_refs("org/tiny").branches]
result = {"content": Path(path).read_text(), "branches": branches, "main": api.list_repo_files("org/tiny")}
"""

FAILURES = """
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

api, stale = HfApi(), "0" * 40
attempts = {
    "no repository": lambda: hf_hub_download("org/absent", "config.json"),
    "no repository, no owner": lambda: hf_hub_download("absent", "config.json"),
    "no repository to list": lambda: snapshot_download("org/absent"),
    "no file": lambda: hf_hub_download("org/tiny", "absent.json"),
    "no folder": lambda: list(api.list_repo_tree("org/tiny", "absent")),
    "no revision": lambda: hf_hub_download("org/tiny", "config.json", revision="absent"),
    "no such deletion": lambda: api.delete_file("absent.json", "org/tiny"),
    "a file, not a folder": lambda: api.delete_folder("config.json", "org/tiny"),
    "no space": lambda: api.create_repo("org/space", repo_type="space", space_sdk="static"),
    "repository exists": lambda: api.create_repo("org/tiny"),
    "stale parent": lambda: api.delete_file("config.json", "org/tiny", parent_commit=stale),
    "wrong token": lambda: api.create_repo("org/new", token="hf_wrong"),
    "wrong token, push": lambda: api.upload_file(
        path_or_fileobj=b"", path_in_repo="x", repo_id="org/tiny", token="hf_wrong"
    ),
    "no token": lambda: api.create_repo("org/new", token=False),
}
result = {}
for name, attempt in attempts.items():
    try:
        attempt()
    except Exception as error:
        result[name] = [error.response.status_code, [kind.__name__ for kind in type(error).__mro__]]
result["absences"] = [path.name for path in home.glob("hub/models--org--tiny/.no_exist/*/*")]
"""


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def run_client(server: HubServer, home: Path, code: str) -> dict:
    """The `result` that `code` leaves behind, run by a fresh interpreter that knows no Hub but `server`."""
    code = f"import json\nfrom pathlib import Path\nhome = Path({str(home)!r})\n{code}\nprint(json.dumps(result))"
    command = [sys.executable, "-c", code]
    client = subprocess.run(command, env=server.environment(home), capture_output=True, text=True, timeout=120)
    assert client.returncode == 0, client.stderr
    return json.loads(client.stdout.splitlines()[-1])


def test_a_pushed_model_and_tokenizer_reload_unchanged(server: HubServer, tmp_path: Path) -> None:
    result = run_client(server, tmp_path, PUSH_AND_RELOAD)
    assert result["same"] and all(result["same"])
    assert result["ids"] == [1, 2]
    pushed = server.files("org/tiny")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= pushed.keys()
    assert json.loads(pushed["config.json"])["hidden_size"] == 8
    # The weights went through LFS, the configuration in the commit itself.
    assert [request.split("/")[1] for request in server.requests if request.startswith("PUT")] == ["lfs"]


def test_folders_of_a_dataset_are_uploaded_and_deleted(server: HubServer, tmp_path: Path) -> None:
    files = {"meta.json": "{}", "empty.bin": "", "episodes/a/0.parquet": "zero", "episodes/b/1.parquet": "one"}
    for name, content in files.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    result = run_client(server, tmp_path, UPLOAD_AND_DELETE)
    left = {".gitattributes", "empty.bin", "episodes/a/0.parquet"}
    assert set(result["now"]) == server.files("org/data", repo_type="dataset").keys() == left
    assert result["before"] == "one"
    assert result["empty commit"] and result["type"] == "dataset"
    assert result["root"] == {".gitattributes": "RepoFile", "empty.bin": "RepoFile", "episodes": "RepoFolder"}
    assert result["sizes"] == [4]


def test_a_branch_and_a_file_may_have_awkward_names(server: HubServer, tmp_path: Path) -> None:
    server.create_repo("org/tiny", {"config.json": b"{}"})
    result = run_client(server, tmp_path, BRANCH)
    assert result == {"content": "two", "branches": ["main", "side/one"], "main": ["config.json"]}
    assert server.files("org/tiny", "side/one") == {"config.json": b"{}", "a b/\u00e9?#%.txt": b"two"}


def test_failures_are_those_of_the_hub(server: HubServer, tmp_path: Path) -> None:
    server.create_repo("org/tiny", {"config.json": b"{}"})
    result = run_client(server, tmp_path, FAILURES)
    expected = {
        "no repository": (404, "RepositoryNotFoundError"),
        "no repository, no owner": (404, "RepositoryNotFoundError"),
        "no repository to list": (404, "RepositoryNotFoundError"),
        "no file": (404, "EntryNotFoundError"),
        "no folder": (404, "EntryNotFoundError"),
        "no revision": (404, "RevisionNotFoundError"),
        "no such deletion": (404, "EntryNotFoundError"),
        "a file, not a folder": (404, "EntryNotFoundError"),
        "no space": (400, "BadRequestError"),
        "repository exists": (409, "HfHubHTTPError"),
        "stale parent": (412, "HfHubHTTPError"),
        "wrong token": (401, "HfHubHTTPError"),
        "wrong token, push": (401, "HfHubHTTPError"),
        "no token": (401, "HfHubHTTPError"),
    }
    # The client keeps an absence in mind only if the answer says of which commit.
    assert result.pop("absences") == ["absent.json"]
    assert result.keys() == expected.keys()
    for name, (status, error) in expected.items():
        assert result[name][0] == status and error in result[name][1], name
    assert server.files("org/tiny") == {"config.json": b"{}"}


@pytest.mark.parametrize(
    ("asked", "status", "content", "answered"),
    [
        (None, 200, b"0123456789", None),
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-2", 206, b"89", "bytes 8-9/10"),
        ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
        ("bytes=10-", 416, None, "bytes */10"),
    ],
)
def test_ranges(
    server: HubServer, asked: str | None, status: int, content: bytes | None, answered: str | None
) -> None:
    server.create_repo("org/tiny", {"digits.txt": b"0123456789"})
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("GET", "/org/tiny/resolve/main/digits.txt", headers={"Range": asked} if asked else {})
    response = connection.getresponse()
    assert (response.status, response.headers["Content-Range"]) == (status, answered)
    assert content in (None, response.read())
    connection.close()


def test_no_thread_or_port_outlives_the_server() -> None:
    before = threading.active_count()
    with HubServer() as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
        connection.request("HEAD", "/org/tiny/resolve/main/config.json")
        assert connection.getresponse().headers["X-Error-Code"] == "RepoNotFound"
    assert threading.active_count() == before
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection("127.0.0.1", server.server_port).connect()
