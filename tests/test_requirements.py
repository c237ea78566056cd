# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""What each command imports is in the requirements files that are installed for it."""

import ast
import importlib.metadata
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


BASE, CLIENT, DATA, TABLETOP, EVALUATION, TRAIN = (
    f"requirements{name}.txt" for name in ("", "-client", "-data", "-tabletop", "-evaluation", "-train")
)
# What is installed for each part of the repository, beside what is run from the root and from tools/.
INSTALLED = {
    "robot_data/collation.py": [BASE, DATA],
    "robot_data/loader.py": [BASE, DATA],
    "tools/compute_statistics.py": [BASE, DATA],
    "tools/inspect_dataset.py": [BASE, DATA],
    "tabletop/record.py": [BASE, TABLETOP],
    "tools/init_policy.py": [BASE, TABLETOP],
    "tools/labelled_frames.py": [BASE, TABLETOP],
    "tools/pretrain_policy.py": [BASE, TABLETOP],
    "tools/evaluate_policy.py": [BASE, EVALUATION],
    "tools/record_corrections.py": [BASE, EVALUATION],
    "tools/demo.py": [BASE, EVALUATION],
    "evaluation/robosuite_adapter.py": ["requirements-robosuite.txt"],
    "evaluation/libero_adapter.py": ["requirements-libero.txt"],
    "serving/robot_loop.py": [CLIENT],
    "serving/remote_policy.py": [BASE, EVALUATION],
    "serving/ray_deployment.py": ["requirements-ray.txt"],
    "tools/merge_adapter.py": [TRAIN],
    "train_hf.py": [TRAIN],
    "serving/__main__.py": [BASE, "requirements-serving.txt"],
}
ENTRY_POINTS = {
    path.relative_to(REPOSITORY).as_posix(): [BASE]
    for folder in (REPOSITORY, REPOSITORY / "tools")
    for path in sorted(folder.glob("*.py"))
} | INSTALLED
# What may be missing: the file that imports it, the package, and why its absence is no error.
OPTIONAL = {
    ("tools/inspect_dataset.py", "matplotlib"): "draws for --output_dir alone, which is refused without it",
}
# What a declared distribution cannot do without comes with it, by its metadata.
BROUGHT_ALONG = {
    "tokenizers": "transformers",
    "tqdm": "transformers",
    "pyyaml": "huggingface-hub",
    "fsspec": "huggingface-hub",
    "starlette": "fastapi",
}
# Packages that are not installed here, and whose distributions have other names.
OTHER_NAMES = {"libero": "hf-libero"}
FOLDERS = ("", "tools")  # on the path of every command


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_imports_are_declared(entry):
    declared = set().union(*(requirements(name) for name in ENTRY_POINTS[entry]))
    declared |= {name for name, bringer in BROUGHT_ALONG.items() if bringer in declared}
    missing = {
        f"{path}: {name}"
        for path in reachable(entry)
        for name in third_party(path)
        if (path, name) not in OPTIONAL and not distributions(name) & declared
    }
    assert not missing, f"{ENTRY_POINTS[entry]} do not name what {entry} imports: correct them, or INSTALLED"


def test_exceptions_are_needed():
    assert all(name in third_party(path) for path, name in OPTIONAL)


@pytest.mark.parametrize(("name", "bringer"), BROUGHT_ALONG.items())
def test_what_is_brought_along(name, bringer):
    required = [Requirement(text) for text in importlib.metadata.requires(bringer)]
    assert name in {
        canonicalize_name(each.name) for each in required if each.marker is None or each.marker.evaluate({"extra": ""})
    }


def test_an_import_in_a_function_counts(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "import json, numpy.linalg\n"
        "if TYPE_CHECKING:\n    import pandas\nelse:\n    import polars\n"
        "def load():\n    try:\n        from yaml import safe_load\n    except ImportError:\n        import av as y\n"
    )
    assert set(imports(path)) == {
        "typing",
        "typing.TYPE_CHECKING",
        "json",
        "numpy.linalg",
        "polars",
        "yaml",
        "yaml.safe_load",
        "av",
    }


def test_requirements_files_are_read():
    assert {"torch", "pyyaml", "peft", "mujoco", "google-crc32c"} <= requirements("requirements-train.txt")
    assert "peft" not in requirements("requirements-evaluation.txt")
    assert distributions("PIL") == {"pillow"}


@cache
def requirements(name: str) -> frozenset[str]:
    """Distributions that a requirements file names, and those that it includes."""
    found = set()
    for line in (REPOSITORY / name).read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("-r "):
            found |= requirements(text.removeprefix("-r ").strip())
        elif text:
            found.add(canonicalize_name(Requirement(text).name))
    return frozenset(found)


@cache
def _installed() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())


def distributions(package: str) -> set[str]:
    """Distributions that bring a package; of one that is not installed, its own name."""
    return {canonicalize_name(name) for name in _installed().get(package, [OTHER_NAMES.get(package, package)])}


def imports(path: Path) -> Iterator[str]:
    """Names of everything that a file imports wherever it does, but for types alone."""
    return _imports_of(ast.parse(path.read_text(encoding="utf-8")), path)


def _imports_of(node: ast.AST, path: Path) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        folder = path.parents[node.level - 1].relative_to(REPOSITORY).parts if node.level else ()
        module = ".".join([*folder, *([node.module] if node.module else [])])
        yield from ([module] if module else [])
        yield from (".".join([*([module] if module else []), alias.name]) for alias in node.names)
    only_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    for child in node.orelse if only_types else ast.iter_child_nodes(node):
        yield from _imports_of(child, path)


def own_files(module: str) -> list[str]:
    """Files of this repository that an import runs: the module's and those of the packages around it."""
    parts, found = module.split("."), []
    for folder in FOLDERS:
        for end in range(1, len(parts) + 1):
            place = REPOSITORY.joinpath(folder, *parts[:end])
            files = [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
            found += [file.relative_to(REPOSITORY).as_posix() for file in files]
    return found


@cache
def reachable(entry: str) -> frozenset[str]:
    """Files of this repository that a command may run."""
    found, waiting = set(), [entry]
    package = Path(entry).parent / "__init__.py"
    waiting += [package.as_posix()] if (REPOSITORY / package).is_file() else []
    while waiting:
        if (path := waiting.pop()) not in found:
            found.add(path)
            waiting += [file for module in imports(REPOSITORY / path) for file in own_files(module)]
    return frozenset(found)


@cache
def third_party(path: str) -> frozenset[str]:
    """Top-level packages that a file imports from elsewhere."""
    modules = {module for module in imports(REPOSITORY / path) if not own_files(module)}
    own = {folder.name for folder in REPOSITORY.iterdir() if folder.is_dir()}
    return frozenset({module.partition(".")[0] for module in modules} - sys.stdlib_module_names - own)
