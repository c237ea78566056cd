"""`make demo`: the whole loop on the policy of this repository."""

import json
import sys

import demo
import pytest
from conftest import REPOSITORY


@pytest.mark.slow
def test_demo(tmp_path, monkeypatch, capsys):
    arguments = ["demo.py", "--policy", str(REPOSITORY), "--episodes", "1", "--output_dir", str(tmp_path / "demo")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert demo.main() == 0
    printed = capsys.readouterr().out
    for step in ("[1/3] Loading", "[2/3] One picture", "[3/3] 1 episodes", "instruction", "gripper", "put_in_bowl"):
        assert step in printed
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert names == {"picture.png", "pick.gif", "push.gif", "put_in_bowl.gif", "sheet.png", "results.json"}
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["all"]["trials"] == 3


def test_makefile_installs_what_the_demo_needs():
    """The environment of `make demo` has no file of requirements of its own: those that the README names."""
    rule = (REPOSITORY / "Makefile").read_text().partition(".venv-demo/installed:")[2].partition("\ndemo:")[0]
    assert "--requirement requirements.txt --requirement requirements-evaluation.txt" in rule
