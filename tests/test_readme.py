"""The commands of the README, as they stand."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import transformers
from conftest import REMOTE_CODE, REPOSITORY, TINY_POLICY
from load_policy import load_policy

from tabletop.record import Recording, record


README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SHELL_BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
def test_commands_run_in_order(tmp_path):
    """All but those that install something, or ask the Hub."""
    clone = tmp_path / "clone"
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        if not name.startswith("tests/"):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, clone / name)
    commands = [shlex.split(line, comments=True) for block in SHELL_BLOCKS for line in block.splitlines()]
    commands = [command for command in commands if command[:1] == ["python"] and "openvla/openvla-7b" not in command]
    assert len(commands) >= 6
    for command in commands:
        run = subprocess.run([sys.executable, *command[1:]], cwd=clone, capture_output=True, text=True)
        assert run.returncode == 0, f"{shlex.join(command)}\n{run.stdout}\n{run.stderr}"
    for made in ("results/results.json", "results/sheet.png", "open_loop/open_loop.png", "statistics.json"):
        assert (clone / made).stat().st_size
    assert list((clone / "pictures").glob("*.png"))


def test_python_blocks_run_in_order(monkeypatch, tmp_path):
    """Where a block needs a class that this version of transformers lacks, the README says so above it."""
    demonstrations = record(Recording(episodes=3, image_size=32), tmp_path / "demonstrations")
    converted = tmp_path / "converted"  # a complete repository, in place of one that takes a download
    for part in load_policy(TINY_POLICY):
        part.save_pretrained(converted)
    monkeypatch.chdir(REPOSITORY)
    namespace: dict = {}
    ran = 0
    for block in PYTHON_BLOCKS:
        if "AutoModelForVision2Seq" in block and not hasattr(transformers, "AutoModelForVision2Seq"):
            continue
        for name, stand_in in (
            ("demonstrations", demonstrations),
            ("openvla-7b", converted),
            ("bridge_orig", "tabletop"),
        ):
            block = block.replace(f'"{name}"', repr(str(stand_in)))
        exec(block, namespace)
        ran += 1
    assert ran >= 3
    assert namespace["action"].shape == (7,)
    assert namespace["output"].probabilities.shape == (2, 7, 256)
    (side, _) = json.loads((REPOSITORY / "config.json").read_text())["image_sizes"]
    assert namespace["batch"]["pixel_values"].shape == (2, 6, side, side)
    trainable = [name for name, parameter in namespace["policy"].named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(".lora_" in name for name in trainable)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (REPOSITORY / target).exists(), target


def test_no_blanks_are_left():
    assert not re.search(r"\{[A-Z_]+\}|TODO|FIXME", README)


def test_metadata():
    from huggingface_hub import ModelCard

    data = ModelCard(README).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "robotics"
    assert data.license == "apache-2.0"


@pytest.mark.parametrize("path", REMOTE_CODE, ids=lambda path: path.name)
def test_remote_code_imports_nothing_else(path):
    """Every import in these files is a requirement for everyone who loads a checkpoint."""
    allowed = {
        "collections",
        "copy",
        "functools",
        "dataclasses",
        "inspect",
        "json",
        "pathlib",
        "shutil",
        "typing",
        "numpy",
        "torch",
        "PIL",
    }
    allowed |= {"base64", "codecs", "contextlib", "io", "tokenizers", "transformers"}
    source = path.read_text(encoding="utf-8")
    # The patterns that transformers looks for, in docstrings and functions too.
    found = re.findall(r"^\s*from\s+([^.\s]\S*)\s+import|^\s*import\s+(\S+)", source, flags=re.MULTILINE)
    assert {(first or second).split(".")[0] for first, second in found} <= allowed
    relative = re.findall(r"^\s*from \.(\S*) import", source, flags=re.MULTILINE)
    assert all((REPOSITORY / f"{name}.py").exists() for name in relative)
