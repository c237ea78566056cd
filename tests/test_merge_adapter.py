# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""Merged adapters: equal to what PEFT merges in memory, complete, and written whole or not at all."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import merge_adapter
import numpy as np
import pytest
import torch
from conftest import GOLDEN, REMOTE_CODE, REPOSITORY, TINY_POLICY, golden_towers, load_golden
from hub_server import HubServer
from load_policy import load_policy, repository_class
from merge_adapter import Adapter, merge
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, set_seed


PUBLISHED_TARGETS = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"),
    *("fc1", "fc2", "fc3", "qkv", "proj", "q", "kv"),
]
PREFIX = "base_model.model."
ADAPTER_NAME = "adapter_model.safetensors"

# One case for each rule of the arithmetic.
CONFIGS = {
    "published": {"target_modules": PUBLISHED_TARGETS, "lora_alpha": 16},
    "rslora": {"target_modules": ["qkv", "q_proj", "proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["qkv", "q_proj", "k_proj", "proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, r"featurizer\.blocks\.0\.attn\.qkv": 7, "patch_embed.proj": 3},
        "alpha_pattern": {r"layers\.\d+\.self_attn\.q_proj": 5, "qkv": 1},
    },
    "patterns_rslora": {
        "target_modules": ["q_proj", "lm_head"],
        "rank_pattern": {"lm_head": 2},
        "alpha_pattern": {"lm_head": 7},
        "use_rslora": True,
    },
    "embeddings": {"target_modules": ["embed_tokens", "up_proj"]},
    "modules_to_save": {"target_modules": "all-linear", "modules_to_save": ["projector", "lm_head"]},
    "biases": {"target_modules": ["qkv", "fc2"], "bias": "all"},
    "some_biases": {"target_modules": ["qkv", "fc2"], "bias": "lora_only"},
}


def write_adapter(model: PreTrainedModel, directory: Path, **kwargs) -> PreTrainedModel:
    """An adapter of random weights over `model`, whose merged weights, PEFT's, are returned."""
    set_seed(0)
    adapted = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 8} | kwargs)))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(directory)
    return adapted.merge_and_unload()


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def assert_equal_tensors(directory: Path, expected: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    actual = {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint as a published repository: its own code, which must not run, and bfloat16 weights."""
    directory = tmp_path_factory.mktemp("base") / "published"
    shutil.copytree(GOLDEN / "ckpt", directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_POLICY / name, directory)
    auto_map = {
        "AutoConfig": "configuration_prismatic.OpenVLAConfig",
        "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
    }
    edit_json(directory / "config.json", tower_configs=golden_towers(), auto_map=auto_map)
    (directory / "modeling_prismatic.py").write_text("raise RuntimeError('this code ran')")
    return directory


@pytest.fixture(scope="module")
def tiny_merge(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """An adapter over the tiny policy, and that policy with it as PEFT merges them. Do not change them."""
    directory = tmp_path_factory.mktemp("adapters") / "adapter"
    model, _ = load_policy(TINY_POLICY, dtype=torch.float32)
    return directory, write_adapter(model, directory, target_modules=["qkv", "q_proj", "lm_head"])


@pytest.fixture
def adapter(tiny_merge, tmp_path: Path) -> Path:
    """A copy of the adapter, to change."""
    return shutil.copytree(tiny_merge[0], tmp_path / "adapter")


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Run the command, which must fail and write nothing; returns its error."""

    def run(*arguments: str | Path) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert merge_adapter.main([*map(str, arguments), "--output", str(tmp_path / "out")]) == 1
        assert sorted(tmp_path.rglob("*")) == before
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return run


class TestArithmetic:
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_as_peft_merges(self, kind, published, tmp_path):
        merged = write_adapter(load_golden(dtype=torch.float32), tmp_path / "adapter", **CONFIGS[kind])
        merge(tmp_path / "adapter", tmp_path / "out", base_model=published, dtype=torch.float32)
        assert_equal_tensors(tmp_path / "out", merged.state_dict())
        base = load_file(published / "model.safetensors")
        written = load_file(tmp_path / "out" / "model.safetensors")
        assert any(not torch.equal(written[name], tensor.float()) for name, tensor in base.items())

    def test_rounded_once(self, tiny_merge, tmp_path):
        """bfloat16 weights are the float32 sum, rounded; rounding the update first moves a third of them."""
        directory, merged = tiny_merge
        merge(directory, tmp_path / "out")
        expected = {name: tensor.bfloat16() for name, tensor in merged.state_dict().items()}
        assert_equal_tensors(tmp_path / "out", expected, atol=0)

    def test_more_rows_than_are_merged_at_a_time(self, tiny_merge, tmp_path, monkeypatch):
        monkeypatch.setattr(merge_adapter, "ROWS", 7)
        directory, merged = tiny_merge
        merge(directory, tmp_path / "out", dtype=torch.float32)
        assert_equal_tensors(tmp_path / "out", merged.state_dict())

    def test_a_stored_head_replaces_the_bases(self, tiny_merge, adapter, tmp_path):
        _, merged = tiny_merge
        tensors = load_file(adapter / ADAPTER_NAME)
        stored = f"{PREFIX}language_model.lm_head.base_layer.weight"
        tensors[stored] = tensors[stored].float() + 1
        save_file(tensors, adapter / ADAPTER_NAME)
        merge(adapter, tmp_path / "out", dtype=torch.float32)
        expected = dict(merged.state_dict())
        expected["language_model.lm_head.weight"] = expected["language_model.lm_head.weight"] + 1
        assert_equal_tensors(tmp_path / "out", expected)

    def test_shards(self, published, tmp_path):
        """Divided as the base is."""
        load_golden(dtype=torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="500KB")
        for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
            shutil.copy(published / name, tmp_path / "base")
        merged = write_adapter(load_golden(dtype=torch.float32), tmp_path / "adapter", **CONFIGS["published"])
        merge(tmp_path / "adapter", tmp_path / "out", base_model=tmp_path / "base", dtype=torch.float32)
        base, out = (
            json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in ("base", "out")
        )
        assert len(set(base["weight_map"].values())) > 5
        assert out["weight_map"] == base["weight_map"]
        assert out["metadata"]["total_size"] == 2 * base["metadata"]["total_size"]
        assert_equal_tensors(tmp_path / "out", merged.state_dict())
        model, _ = load_policy(tmp_path / "out")
        assert model.dtype == torch.float32
        torch.testing.assert_close(dict(model.state_dict()), dict(merged.state_dict()), rtol=0, atol=1e-6)


class TestRepository:
    def test_complete(self, tiny_merge, tmp_path, camera_image):
        directory, merged = tiny_merge
        merge(directory, tmp_path / "out_policy", dtype=torch.float32)
        merged.save_pretrained(tmp_path / "peft")
        config, expected = (json.loads((tmp_path / x / "config.json").read_text()) for x in ("out_policy", "peft"))
        for text_config in (config["text_config"], expected["text_config"]):
            text_config.pop("dtype", None)  # where the language model's is noted once more depends on transformers
        assert config == expected
        written = contents(tmp_path / "out_policy")
        assert {name: written[name] for name in written if name.endswith(".py")} == {
            path.name: path.read_bytes() for path in REMOTE_CODE
        }
        for name in ("generation_config.json", "dataset_statistics.json"):
            assert written[name] == (tmp_path / "peft" / name).read_bytes()
        card = written["README.md"].decode()
        assert "with the LoRA adapter `adapter` merged into its weights" in card
        assert 'unnorm_key="tabletop"' in card
        out = tmp_path / "out_policy"
        model = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True, dtype="auto")
        inputs = AutoProcessor.from_pretrained(out, trust_remote_code=True)(
            instruction="pick up the red block", images=camera_image
        )
        action = model.predict_action(**inputs, unnorm_key="tabletop")
        np.testing.assert_array_equal(action, merged.predict_action(**inputs, unnorm_key="tabletop"))

    def test_published_base(self, published, tmp_path):
        """A single file in bfloat16, statistics beside it, and code that never runs."""
        write_adapter(load_golden(dtype=torch.float32), tmp_path / "adapter", target_modules=["qkv"])
        merge(tmp_path / "adapter", tmp_path / "out", base_model=published)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["auto_map"]["AutoModel"] == "modeling_openvla.OpenVLAForActionPrediction"
        assert config["dtype"] == "bfloat16"
        assert config["norm_stats"] == json.loads((published / "dataset_statistics.json").read_text())
        assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {
            torch.bfloat16
        }
        assert not (tmp_path / "out" / "modeling_prismatic.py").exists()

    def test_statistics_beside_the_adapter_win(self, adapter, tmp_path):
        statistics = json.loads((TINY_POLICY / "dataset_statistics.json").read_text())
        statistics = {"my_robot": statistics["tabletop"]}
        (adapter / "dataset_statistics.json").write_text(json.dumps(statistics))
        merge(adapter, tmp_path / "out")
        model, processor = load_policy(tmp_path / "out")
        assert model.norm_stats == processor.norm_stats == statistics
        assert json.loads((tmp_path / "out" / "config.json").read_text())["norm_stats"] == statistics

    def test_broken_statistics_beside_the_adapter(self, adapter, refused):
        (adapter / "dataset_statistics.json").write_text('{"my_robot": {"action": {"q01": "low"}}}')
        assert "my_robot" in refused(adapter)

    def test_processor_beside_the_adapter_wins(self, adapter, tmp_path):
        processor = repository_class("OpenVLAProcessor").from_pretrained(TINY_POLICY, resample="tf_lanczos3")
        processor.save_pretrained(adapter)
        merge(adapter, tmp_path / "out")
        loaded = repository_class("OpenVLAProcessor").from_pretrained(tmp_path / "out")
        assert loaded.image_processor.resample == "tf_lanczos3"
        assert loaded.norm_stats.keys() == {"tabletop"}

    def test_the_adapter_names_its_base(self, adapter, tmp_path, refused):
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "moved"))
        assert "moved, which does not exist here; give --base_model" in refused(adapter)
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
        assert "names no base model; give --base_model" in refused(adapter)
        merge(adapter, tmp_path / "out", base_model=TINY_POLICY)
        assert (tmp_path / "out" / "config.json").is_file()


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"use_dora": True}, "['use_dora'], which cannot be merged"),
            ({"fan_in_fan_out": True}, "['fan_in_fan_out'], which cannot be merged"),
            ({"layer_replication": [[0, 2], [1, 2]]}, "['layer_replication'], which cannot be merged"),
            ({"init_lora_weights": "pissa"}, "initialised by 'pissa', which changes the base"),
            ({"peft_type": "ADALORA"}, "adapter of type ADALORA; only LORA"),
            ({"r": 5}, "does not fit the base"),
            ({"rank_pattern": {"q_proj": 5}}, "q_proj.weight"),
        ],
    )
    def test_configurations(self, adapter, refused, changes, message):
        edit_json(adapter / "adapter_config.json", **changes)
        assert message in refused(adapter)

    def test_another_method(self, tmp_path, refused):
        model, _ = load_policy(TINY_POLICY, dtype=torch.float32)
        config = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
        get_peft_model(model, config).save_pretrained(tmp_path / "ia3")
        assert "adapter of type IA3; only LORA" in refused(tmp_path / "ia3")

    @pytest.mark.parametrize("bias", [False, True])
    def test_tensors_without_a_place(self, adapter, refused, bias):
        """The second is what `LoraConfig(lora_bias=True)` adds, where the base has a layer but no such tensor."""
        tensors = load_file(adapter / ADAPTER_NAME)
        key = next(key for key in tensors if key.endswith("q_proj.lora_B.weight"))
        lost = key.replace(".weight", ".bias") if bias else key.replace("q_proj", "c_attn")
        tensors[lost] = torch.zeros(4) if bias else tensors.pop(key)
        save_file(tensors, adapter / ADAPTER_NAME)
        error = refused(adapter)
        assert f"1 tensors of the adapter change nothing that the base has: {lost}. Is it" in error

    @pytest.mark.parametrize("side", "AB")
    def test_half_an_update(self, adapter, refused, side):
        tensors = load_file(adapter / ADAPTER_NAME)
        del tensors[f"{PREFIX}language_model.model.layers.0.self_attn.q_proj.lora_{side}.weight"]
        save_file(tensors, adapter / ADAPTER_NAME)
        assert "lacks half of an update, at 1 tensors: language_model.model.layers.0.self_attn.q" in refused(adapter)

    def test_an_adapter_for_another_model(self, adapter, published, refused):
        error = refused(adapter, "--base_model", published)
        assert "does not fit the base" in error

    def test_missing_files(self, adapter, tmp_path, refused):
        (adapter / ADAPTER_NAME).rename(adapter / "adapter_model.bin")
        assert "no adapter_model.safetensors; save the adapter again" in refused(adapter)
        (adapter / "adapter_config.json").unlink()
        assert "no adapter_config.json: it is no PEFT adapter" in refused(adapter)
        assert "neither a directory" in refused(tmp_path / "absent")

    def test_incomplete_base(self, adapter, published, tmp_path, refused):
        base = shutil.copytree(published, tmp_path / "base")
        tensors = load_file(base / "model.safetensors")
        del tensors["projector.fc2.bias"]
        save_file(tensors, base / "model.safetensors")
        assert "1 missing: projector.fc2.bias" in refused(adapter, "--base_model", base)
        (base / "model.safetensors").unlink()
        assert "has no model.safetensors" in refused(adapter, "--base_model", base)
        (base / "config.json").unlink()
        assert "has no config.json" in refused(adapter, "--base_model", base)

    def test_quantized_base(self, adapter, published, tmp_path, refused):
        base = shutil.copytree(published, tmp_path / "base")
        edit_json(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
        assert "is quantised; give the full one with --base_model" in refused(adapter, "--base_model", base)

    def test_openvla_oft(self, adapter, published, tmp_path, refused):
        base = shutil.copytree(published, tmp_path / "base")
        (base / "action_head--150000_checkpoint.pt").touch()
        assert "OpenVLA-OFT" in refused(adapter, "--base_model", base)

    def test_output_in_the_way(self, adapter, refused, tmp_path, capsys):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        assert "out exists and is not empty; --overwrite" in refused(adapter)
        assert "holds no config.json" in refused(adapter, "--overwrite")
        assert merge_adapter.main([str(adapter), "--output", str(adapter.parent), "--overwrite"]) == 1
        assert "is or contains the source" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_an_interrupted_run_leaves_nothing(adapter, tmp_path, monkeypatch, error):
    merge(adapter, tmp_path / "out")
    before = contents(tmp_path / "out")
    calls = []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 20:
            raise error
        return original(*arguments)

    original = Adapter.merge
    monkeypatch.setattr(Adapter, "merge", stop)
    for output in ("out", "fresh"):
        calls.clear()
        with pytest.raises(type(error)):
            merge(adapter, tmp_path / output, overwrite=True)
        assert len(calls) == 20
    assert contents(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]
    monkeypatch.undo()
    edit_json(tmp_path / "out" / "config.json", norm_type="bounds")
    merge(adapter, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before


# The first merge, of a small policy, brings in the code; the second may add only what its tensors need.
MEASURE_MEMORY = """
import re, sys
from pathlib import Path
from merge_adapter import merge


def resident(name):
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])


small, large, outputs = sys.argv[1:]
merge(small, f"{outputs}/merged_small")
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
merge(large, f"{outputs}/merged_large")
print("growth", resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells the peak of a process")
@pytest.mark.slow
def test_peak_memory(adapter, tmp_path):
    """Twice the largest file, as it lies on the disk and what becomes of it, and the rows merged at a time."""
    config_class = repository_class("OpenVLAConfig")
    fields = config_class.from_pretrained(TINY_POLICY).to_dict()
    fields["text_config"] |= {
        **{"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 40},
        **{"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64},
    }
    set_seed(0)
    model = repository_class("OpenVLAForActionPrediction")(config_class(**fields)).bfloat16()
    model.save_pretrained(tmp_path / "base", max_shard_size="24MB")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        shutil.copy(TINY_POLICY / name, tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "large")
    environment = {
        **{"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        **{"PYTHONPATH": str(REPOSITORY / "tools"), "OMP_NUM_THREADS": "1"},
        # Give freed tensors back to the system at once, as those of a 7B policy, which are larger, always are.
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    result = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, adapter, tmp_path / "large", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    growth = int(result.stdout.split("growth ")[1])
    sizes = [path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors")]
    assert len(sizes) >= 12
    assert max(sizes) < growth < 2 * max(sizes) + 16e6 < sum(sizes) / 4


MERGE_ON_THE_HUB = """
import sys
import merge_adapter

status = merge_adapter.main(["org/adapter", "--output", sys.argv[1], "--push_to_hub", "org/merged"])
status += 2 * merge_adapter.main(["org/absent", "--output", f"{sys.argv[1]}2"])
sys.exit(status)
"""


@pytest.mark.slow
def test_from_hub_to_hub(adapter, tiny_merge, published, tmp_path):
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="org/base")
    base = {path.name: path.read_bytes() for path in TINY_POLICY.iterdir() if path.suffix in (".json", ".safetensors")}
    with HubServer() as server:
        server.create_repo("org/base", base)
        server.create_repo("org/adapter", contents(adapter))
        result = subprocess.run(
            [sys.executable, "-c", MERGE_ON_THE_HUB, tmp_path / "out"],
            env=server.environment(tmp_path / "home") | {"PYTHONPATH": str(REPOSITORY / "tools")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 2, result.stderr
        assert "error: org/absent is not a" in result.stderr
        pushed = server.files("org/merged")
    written = contents(tmp_path / "out")
    assert {name: pushed[name] for name in written} == written
    assert "base_model: org/base\n" in written["README.md"].decode()
    expected = {name: tensor.bfloat16() for name, tensor in tiny_merge[1].state_dict().items()}
    assert_equal_tensors(tmp_path / "out", expected, atol=0)
