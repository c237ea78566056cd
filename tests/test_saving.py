"""A saved policy is a complete repository: code, weights, processor, statistics, on disk and on the Hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import REMOTE_CODE, REPOSITORY, TINY_POLICY
from hub_server import HubServer
from load_policy import load_policy, repository_class
from safetensors.torch import load_file, save_file


CODE = {path.name for path in REMOTE_CODE}
PROCESSOR_FILES = {"preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", "dataset_statistics.json"}

# What a user of the repository runs, who has nothing of this checkout.
PREDICT = """
import json, sys
import numpy as np
from transformers import AutoModelForImageTextToText, AutoProcessor

source = sys.argv[1]
model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True, dtype="auto").eval()
processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
inputs = processor(instruction="pick up the cube", images=image).to("cpu", dtype=model.dtype)
print(json.dumps(model.predict_action(**inputs, unnorm_key=next(iter(model.norm_stats)), do_sample=False).tolist()))
"""

LOAD_ALONE = """
import sys
import transformers

loaded = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1], trust_remote_code=True)
# Not what only travels with the model: their imports take a second.
assert not any(name.endswith((".handler", ".pipeline_openvla")) for name in sys.modules), "imported in vain"
print(type(loaded).__name__)
"""


def run(code: str, *arguments: str | Path, environment: dict[str, str]) -> str:
    """The last line that a fresh interpreter prints, away from this checkout."""
    result = subprocess.run(
        [environment.pop("PYTHON", sys.executable), "-c", code, *map(str, arguments)],
        env=environment,
        cwd=environment["HF_HOME"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


@pytest.fixture
def empty_home(tmp_path):
    """The environment of a process with empty caches."""
    home = tmp_path / "home"
    home.mkdir()
    return {**os.environ, "HF_HOME": str(home)}


def predict(model, processor) -> list[float]:
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    inputs = processor(instruction="pick up the cube", images=image).to("cpu", dtype=model.dtype)
    return model.predict_action(**inputs, unnorm_key=next(iter(model.norm_stats)), do_sample=False).tolist()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved policy, other than the one of this checkout, with its action."""
    model, processor = load_policy(TINY_POLICY, dtype=torch.bfloat16)
    torch.manual_seed(5)
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    directory = tmp_path_factory.mktemp("saved") / "my-policy.v1"
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory, predict(model, processor)


def test_files(saved):
    directory, _ = saved
    optional = {"special_tokens_map.json"}
    assert {path.name for path in directory.iterdir()} - optional == CODE | PROCESSOR_FILES | MODEL_FILES
    for name in CODE:
        assert (directory / name).read_text() == (REPOSITORY / name).read_text()
    assert "norm_stats" not in (directory / "processor_config.json").read_text()
    config = json.loads((directory / "config.json").read_text())
    assert not any("--" in reference for reference in config["auto_map"].values())


@pytest.mark.slow
def test_fresh_process_predicts_the_same(saved, empty_home):
    directory, action = saved
    assert json.loads(run(PREDICT, directory, environment=empty_home)) == action


@pytest.mark.slow
def test_saved_again_it_is_still_complete(saved, empty_home, tmp_path):
    """Through the Auto classes, from the copy, without this checkout."""
    directory, action = saved
    code = PREDICT + "\nmodel.save_pretrained(sys.argv[2]); processor.save_pretrained(sys.argv[2])\nprint('saved')\n"
    run(code, directory, tmp_path / "again", environment=dict(empty_home))
    again = {path.name for path in (tmp_path / "again").iterdir()}
    assert {path.name for path in directory.iterdir()} == again
    assert json.loads(run(PREDICT, tmp_path / "again", environment=empty_home)) == action


@pytest.mark.slow
@pytest.mark.parametrize(
    "auto_class, expected",
    [
        ("AutoConfig", "OpenVLAConfig"),
        ("AutoModel", "OpenVLAForActionPrediction"),
        ("AutoModelForCausalLM", "OpenVLAForActionPrediction"),
        ("AutoModelForImageTextToText", "OpenVLAForActionPrediction"),
        ("AutoModelForVision2Seq", "OpenVLAForActionPrediction"),
        ("AutoProcessor", "OpenVLAProcessor"),
        ("AutoImageProcessor", "OpenVLAImageProcessor"),
        ("AutoTokenizer", None),
    ],
)
def test_each_auto_class_alone(saved, empty_home, auto_class, expected):
    if not hasattr(transformers, auto_class):
        pytest.skip(f"transformers {transformers.__version__} has no {auto_class}")
    loaded = run(LOAD_ALONE, saved[0], auto_class, environment=empty_home)
    assert loaded == expected or (expected is None and loaded in ("PreTrainedTokenizerFast", "TokenizersBackend"))


@pytest.mark.slow
def test_the_other_line_of_transformers_reads_it(saved, empty_home):
    """What this version saves, the other one loads; `make test-all` names the other environment's interpreter."""
    if "OTHER_PYTHON" not in os.environ:
        pytest.skip("set OTHER_PYTHON to an interpreter with the other line of transformers")
    directory, action = saved
    environment = {**empty_home, "PYTHON": os.environ["OTHER_PYTHON"]}
    np.testing.assert_allclose(json.loads(run(PREDICT, directory, environment=environment)), action, atol=1e-12)


def test_rope_theta_survives_both_ways(tmp_path):
    config_class = repository_class("OpenVLAConfig")
    config = config_class(text_config={"rope_theta": 500000.0, "vocab_size": 32064})
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["rope_theta"] == 500000.0
    text_config = config_class.from_pretrained(tmp_path).text_config
    rope = getattr(text_config, "rope_parameters", None) or {"rope_theta": text_config.rope_theta}
    assert rope["rope_theta"] == 500000.0


def test_rotary_settings_survive_both_ways(tmp_path):
    """transformers 5 moves them into one dictionary; what it writes, 4.57 must read too."""
    config_class = repository_class("OpenVLAConfig")
    scaling = {"rope_type": "linear", "factor": 4.0}
    config = config_class(text_config={"rope_scaling": scaling, "rope_theta": 20000.0})
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert saved["rope_theta"] == 20000.0
    assert saved["rope_scaling"]["rope_type"] == "linear"
    assert saved["rope_scaling"]["factor"] == 4.0
    text_config = config_class.from_pretrained(tmp_path).text_config
    rope = getattr(text_config, "rope_parameters", None) or text_config.rope_scaling
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)
    config_class(llm_backbone_id="phi-2-3b").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert saved["partial_rotary_factor"] == 0.4


@pytest.mark.parametrize("auto_class", [None, "AutoModelForImageTextToText"])
def test_only_the_main_process_writes(auto_class, tmp_path, monkeypatch):
    monkeypatch.setattr(repository_class("OpenVLAForActionPrediction"), "_auto_class", auto_class)
    model, _ = load_policy(TINY_POLICY)
    model.save_pretrained(tmp_path / "other", False)
    assert not list((tmp_path / "other").glob("*_openvla.py"))
    model.save_pretrained(tmp_path / "main", True)
    assert (tmp_path / "main" / "modeling_openvla.py").exists()
    with pytest.raises(ValueError, match="does not go with `state_dict`"):
        model.save_pretrained(tmp_path / "main", push_to_hub=True, state_dict=model.state_dict())


def test_code_of_a_repository_runs_when_trusted_alone(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "with_code")
    path = tmp_path / "with_code" / "modeling_openvla.py"
    path.write_text("raise RuntimeError('the code of the repository ran')\n" + path.read_text())
    assert predict(*load_policy(tmp_path / "with_code")) == saved[1]
    with pytest.raises(RuntimeError, match="the code of the repository ran"):
        load_policy(tmp_path / "with_code", trust_remote_code=True)
    assert predict(*load_policy(saved[0], trust_remote_code=True)) == saved[1]


def test_shards(saved, tmp_path):
    directory, action = saved
    model, processor = load_policy(directory)
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert predict(*load_policy(tmp_path)) == action


def test_tied_embeddings(policy, tmp_path):
    model, processor = policy
    config = model.config
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = True
    tied = type(model)(config).eval()
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    tied.save_pretrained(tmp_path)
    restored, _ = type(model).from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert restored.get_output_embeddings().weight is restored.get_input_embeddings().weight
    assert predict(restored.eval(), processor) == predict(tied, processor)


def test_assigned_statistics_are_saved(saved, tmp_path):
    model, processor = load_policy(saved[0])
    model.norm_stats = {"my_robot": next(iter(model.norm_stats.values()))}
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, processor = load_policy(tmp_path)
    assert list(model.norm_stats) == list(processor.norm_stats) == ["my_robot"]


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "copy")
    return tmp_path / "copy"


class TestDamage:
    @pytest.mark.parametrize("damage", ["garbage", "cut off"])
    def test_weights(self, copy, damage):
        path = copy / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(b"x" * 1000 if damage == "garbage" else content[: len(content) // 2])
        with pytest.raises(OSError, match=r"The weights of .*copy cannot be read: .* remove it and fetch it again"):
            load_policy(copy)

    def test_missing_tensors(self, copy):
        path = copy / "model.safetensors"
        tensors = load_file(path)
        del tensors["projector.fc1.weight"]
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"lacks 1 tensors of the model, such as \['projector.fc1.weight'\]"):
            load_policy(copy)

    def test_missing_weights(self, copy):
        (copy / "model.safetensors").unlink()
        with pytest.raises(OSError, match="no file named"):
            load_policy(copy)

    def test_missing_directory(self, tmp_path):
        with pytest.raises(OSError, match="nowhere"):
            load_policy(tmp_path / "nowhere")


def test_published_repository(saved, tmp_path):
    """A source whose `auto_map` names other code: it is loaded all the same, and that code never runs."""
    published = tmp_path / "published"
    shutil.copytree(saved[0], published)
    for name in CODE:
        (published / name).unlink()
    for name in ("configuration_prismatic.py", "modeling_prismatic.py", "processing_prismatic.py"):
        (published / name).write_text("raise RuntimeError('this code must not run')\n")
    for name, auto_map in {
        "config.json": {
            "AutoConfig": "configuration_prismatic.OpenVLAConfig",
            "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
        },
        "preprocessor_config.json": {"AutoImageProcessor": "processing_prismatic.PrismaticImageProcessor"},
        "processor_config.json": {"AutoProcessor": "processing_prismatic.PrismaticProcessor"},
    }.items():
        content = json.loads((published / name).read_text()) | {"auto_map": auto_map}
        (published / name).write_text(json.dumps(content))
    model, processor = load_policy(published)
    assert predict(model, processor) == saved[1]
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    assert predict(*load_policy(tmp_path / "ours")) == saved[1]
    assert "prismatic" not in "".join(path.read_text() for path in (tmp_path / "ours").glob("*.json"))


PUSH = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor

source, repo_id = sys.argv[1:]
AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True, dtype="auto").push_to_hub(repo_id)
AutoProcessor.from_pretrained(source, trust_remote_code=True).push_to_hub(repo_id)
"""

SAVE_AND_PUSH = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor

source, directory = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True, dtype="auto")
model.save_pretrained(directory, push_to_hub=True, repo_id="me/saved")
AutoProcessor.from_pretrained(source, trust_remote_code=True).save_pretrained(
    directory, push_to_hub=True, repo_id="me/saved"
)
"""


@pytest.mark.slow
class TestHub:
    @pytest.fixture
    def server(self):
        with HubServer() as server:
            yield server

    def online(self, server: HubServer, home: Path) -> dict[str, str]:
        home.mkdir(exist_ok=True)
        return {**server.environment(home), "HF_HUB_OFFLINE": "0"}

    def test_push_and_reload(self, server, saved, tmp_path):
        directory, action = saved
        run(PUSH + "print('done')", directory, "me/policy", environment=self.online(server, tmp_path / "pusher"))
        pushed = server.files("me/policy")
        assert CODE | PROCESSOR_FILES | MODEL_FILES | {"README.md"} <= pushed.keys()
        assert pushed["dataset_statistics.json"] == (directory / "dataset_statistics.json").read_bytes()
        assert b"library_name: transformers" in pushed["README.md"]
        environment = self.online(server, tmp_path / "user")
        assert json.loads(run(PREDICT, "me/policy", environment=dict(environment))) == action

        # A policy that came from the Hub is saved whole, and no longer points there.
        code = PREDICT + "\nmodel.save_pretrained(sys.argv[2]); processor.save_pretrained(sys.argv[2])\nprint(1)\n"
        run(code, "me/policy", tmp_path / "local", environment=environment)
        assert "me/policy" not in (tmp_path / "local" / "config.json").read_text()
        assert predict(*load_policy(tmp_path / "local")) == action

    def test_unknown_statistics_offline_are_said(self, server, saved, tmp_path):
        """A cache that never saw dataset_statistics.json must not pass for a repository without one."""
        files = {path.name: path.read_bytes() for path in saved[0].iterdir()}
        server.create_repo("me/policy", files)
        environment = self.online(server, tmp_path / "user")
        code = "import sys; from huggingface_hub import hf_hub_download as get\n"
        code += "print([get(sys.argv[1], name) for name in ('config.json', 'configuration_openvla.py')])"
        run(code, "me/policy", environment=dict(environment))
        code = "import sys; from transformers import AutoConfig, logging\nlogging.set_verbosity_warning()\n"
        code += "import contextlib\nwith contextlib.redirect_stderr(sys.stdout):\n"
        code += "    AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        result = subprocess.run(
            [sys.executable, "-c", code, "me/policy"],
            env={**environment, "HF_HUB_OFFLINE": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        assert "unknown whether me/policy has a dataset_statistics.json" in result.stdout + result.stderr

    def test_push_while_saving(self, server, saved, tmp_path):
        directory, action = saved
        environment = self.online(server, tmp_path / "pusher")
        run(SAVE_AND_PUSH + "print('done')", directory, tmp_path / "local", environment=environment)
        assert server.files("me/saved").keys() >= CODE | PROCESSOR_FILES | MODEL_FILES
        environment = self.online(server, tmp_path / "user")
        assert json.loads(run(PREDICT, "me/saved", environment=environment)) == action
