"""The commands of the README, as they stand."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from conftest import REMOTE_CODE, REPOSITORY, TINY_POLICY
from hub_server import HubServer
from load_policy import load_policy

from tabletop.record import Recording, record


README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SHELL_BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)


# What takes minutes is done in little; everything else as it stands.
SHORTER = {
    "--episodes 50": "--episodes 2",
    "--episodes 100": "--episodes 1",
    "train_hf.py recipes/tabletop_lora.yaml": "train_hf.py recipes/tabletop_lora.yaml --max_steps 2 --save_steps 2",
}


def runs_here(command: list[str]) -> bool:
    """Whether a command neither installs something nor asks the Hub for published weights."""
    return command[:1] in (["python"], ["hf"]) and "openvla/openvla-7b" not in command


@pytest.mark.slow
def test_commands_run_in_order(tmp_path):
    """With a Hub on this machine."""
    clone = tmp_path / "clone"
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        if not name.startswith("tests/"):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, clone / name)
    text = "\n".join(SHELL_BLOCKS)
    for long, short in SHORTER.items():
        assert long in text
        text = text.replace(long, short)
    commands = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    commands = [command for command in commands if runs_here(command)]
    assert len(commands) >= 10
    programs = {"python": sys.executable, "hf": str(Path(sys.executable).with_name("hf"))}
    with HubServer() as server:
        environment = server.environment(tmp_path)
        for program, *arguments in commands:
            command = [programs[program], *arguments]
            run = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
            assert run.returncode == 0, f"{shlex.join(command)}\n{run.stdout}\n{run.stderr}"
        pushed = server.files("you/handles-new-objects")
    for made in ("results/results.json", "results/sheet.png", "open_loop/open_loop.png", "statistics.json"):
        assert (clone / made).stat().st_size
    for folder in ("pictures", "new_objects_pictures"):
        assert list((clone / folder).glob("*.png"))
    assert {"modeling_openvla.py", "model.safetensors", "README.md", "dataset_statistics.json"} <= set(pushed)
    assert not [name for name in pushed if name.startswith("checkpoint-")]


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
    assert namespace["info"]["outcome"] in ("success", "wrong_object", "dropped", "timeout")
    assert namespace["output"].probabilities.shape == (2, 7, 256)
    (side, _) = json.loads((REPOSITORY / "config.json").read_text())["image_sizes"]
    assert namespace["batch"]["pixel_values"].shape == (2, 6, side, side)
    trainable = [name for name, parameter in namespace["adapted"].named_parameters() if parameter.requires_grad]
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
    allowed = sys.stdlib_module_names | {"numpy", "torch", "PIL", "tokenizers", "transformers"}
    source = path.read_text(encoding="utf-8")
    # The patterns that transformers looks for, in docstrings and functions too.
    found = re.findall(r"^\s*from\s+([^.\s]\S*)\s+import|^\s*import\s+(\S+)", source, flags=re.MULTILINE)
    assert {(first or second).split(".")[0] for first, second in found} <= allowed
    relative = re.findall(r"^\s*from \.(\S*) import", source, flags=re.MULTILINE)
    assert all((REPOSITORY / f"{name}.py").exists() for name in relative)
