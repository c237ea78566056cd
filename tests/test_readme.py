"""The commands of the README, as they stand."""

import re

import pytest
import transformers
from conftest import REPOSITORY


README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run_in_order(monkeypatch):
    """Where a block needs a class that this version of transformers lacks, the README says so above it."""
    monkeypatch.chdir(REPOSITORY)
    namespace: dict = {}
    ran = 0
    for block in PYTHON_BLOCKS:
        if "AutoModelForVision2Seq" in block and not hasattr(transformers, "AutoModelForVision2Seq"):
            continue
        exec(block, namespace)
        ran += 1
    assert ran >= 3
    assert namespace["action"].shape == (7,)
    assert namespace["output"].probabilities.shape == (2, 7, 256)
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


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("*_openvla.py")), ids=lambda path: path.name)
def test_remote_code_imports_nothing_else(path):
    """Every import in these files is a requirement for everyone who loads a checkpoint."""
    allowed = {
        "collections",
        "copy",
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
    allowed.add("transformers")
    source = path.read_text(encoding="utf-8")
    # The patterns that transformers looks for, in docstrings and functions too.
    found = re.findall(r"^\s*from\s+([^.\s]\S*)\s+import|^\s*import\s+(\S+)", source, flags=re.MULTILINE)
    assert {(first or second).split(".")[0] for first, second in found} <= allowed
    relative = re.findall(r"^\s*from \.(\S*) import", source, flags=re.MULTILINE)
    assert all((REPOSITORY / f"{name}.py").exists() for name in relative)
