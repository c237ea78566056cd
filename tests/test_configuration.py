"""Published configurations, towers against timm, and what a configuration refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import FIXTURES, GOLDEN, REPOSITORY, TINY_POLICY
from load_policy import repository_class
from safetensors.torch import load_file
from transformers import AutoConfig


# The config.json of openvla-7b without its statistics.
PUBLISHED_7B = {
    "arch_specifier": "no-align+fused-gelu-mlp",
    "architectures": ["OpenVLAForActionPrediction"],
    "auto_map": {
        "AutoConfig": "configuration_prismatic.OpenVLAConfig",
        "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
    },
    "hf_llm_id": "meta-llama/Llama-2-7b-hf",
    "image_resize_strategy": "resize-naive",
    "image_sizes": [224, 224],
    "llm_backbone_id": "llama2-7b-pure",
    "llm_max_length": 2048,
    "model_type": "openvla",
    "n_action_bins": 256,
    "output_projector_states": False,
    "pad_to_multiple_of": 64,
    "pad_token_id": 32000,
    "text_config": {"model_type": "llama", "pad_token_id": 32000, "torch_dtype": "bfloat16", "vocab_size": 32064},
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "timm_override_act_layers": [None, None],
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_fused_vision_backbone": True,
    "vision_backbone_id": "dinosiglip-vit-so-224px",
}
# Differs from it in what follows from one SigLIP tower and Vicuna.
PUBLISHED_V01 = PUBLISHED_7B | {
    "arch_specifier": "no-align+gelu-mlp",
    "hf_llm_id": "lmsys/vicuna-7b-v1.5",
    "image_sizes": [224],
    "llm_backbone_id": "vicuna-v15-7b",
    "timm_model_ids": ["vit_so400m_patch14_siglip_224"],
    "timm_override_act_layers": [None],
    "use_fused_vision_backbone": False,
    "vision_backbone_id": "siglip-vit-so400m",
}
VISION_BACKBONES = {
    "clip-vit-l": ["vit_large_patch14_clip_224.openai@224"],
    "clip-vit-l-336px": ["vit_large_patch14_clip_336.openai@336"],
    "dinov2-vit-l": ["vit_large_patch14_reg4_dinov2.lvd142m@224"],
    "in1k-vit-l": ["vit_large_patch16_224.augreg_in21k_ft_in1k@224"],
    "siglip-vit-so400m": ["vit_so400m_patch14_siglip_224@224"],
    "siglip-vit-so400m-384px": ["vit_so400m_patch14_siglip_384@384"],
    "dinoclip-vit-l-336px": ["vit_large_patch14_reg4_dinov2.lvd142m@336", "vit_large_patch14_clip_336.openai@336"],
    "dinosiglip-vit-so-224px": ["vit_large_patch14_reg4_dinov2.lvd142m@224", "vit_so400m_patch14_siglip_224@224"],
    "dinosiglip-vit-so-384px": ["vit_large_patch14_reg4_dinov2.lvd142m@384", "vit_so400m_patch14_siglip_384@384"],
}
LANGUAGE_MODELS = {
    "llama2-7b-pure": ("llama", 4096, 32),
    "llama2-13b-pure": ("llama", 5120, 40),
    "llama2-7b-chat": ("llama", 4096, 32),
    "llama2-13b-chat": ("llama", 5120, 40),
    "vicuna-v15-7b": ("llama", 4096, 32),
    "vicuna-v15-13b": ("llama", 5120, 40),
    "mistral-v0.1-7b-pure": ("mistral", 4096, 32),
    "mistral-v0.1-7b-instruct": ("mistral", 4096, 32),
    "phi-2-3b": ("phi", 2560, 32),
}
TIMM = json.loads((FIXTURES / "timm_towers.json").read_text())["towers"]


@pytest.fixture(scope="module")
def config_class():
    return repository_class("OpenVLAConfig")


def meta_model(config) -> torch.nn.Module:
    with torch.device("meta"):
        return repository_class("OpenVLAForActionPrediction")(config)


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("published", [PUBLISHED_7B, PUBLISHED_V01], ids=["openvla-7b", "openvla-7b-v01"])
def test_published_config_is_read_and_written_unchanged(config_class, published, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = config_class.from_pretrained(tmp_path)
    assert config.text_config.rms_norm_eps == 1e-6
    assert config.text_config.max_position_embeddings == 2048
    config.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    changed = {"auto_map", "text_config", "torch_dtype", "transformers_version"}
    for name in published.keys() - changed:
        assert saved[name] == published[name], name
    assert saved["auto_map"]["AutoModelForVision2Seq"] == "modeling_openvla.OpenVLAForActionPrediction"
    assert saved["dtype"] == "bfloat16"
    restored = config_class.from_pretrained(tmp_path / "saved")
    ours, theirs = restored.to_dict(), config.to_dict()
    for name in ours.keys() - {"_name_or_path", "auto_map", "architectures", "transformers_version"}:
        assert ours[name] == theirs[name], name


def test_default_is_openvla_7b(config_class):
    default, published = config_class().to_dict(), config_class(**PUBLISHED_7B).to_dict()
    for name in published.keys() - {"architectures", "dtype", "text_config"}:
        assert default[name] == published[name], name
    for name in published["text_config"].keys() - {"dtype"}:
        assert default["text_config"][name] == published["text_config"][name], name


def test_names_and_shapes_of_openvla_7b(config_class):
    expected = json.loads((FIXTURES / "openvla_7b_weight_shapes.json").read_text())
    model = meta_model(config_class(**PUBLISHED_7B))
    assert len(expected) == 982
    assert shapes(model) == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_541_237_184


def test_parameters_of_v01(config_class):
    model = meta_model(config_class(**PUBLISHED_V01))
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_188_124_608


class TestTowers:
    @pytest.mark.parametrize("vision_backbone_id", VISION_BACKBONES)
    def test_names_shapes_and_options_of_timm(self, config_class, vision_backbone_id):
        small = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
        small |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32064}
        config = config_class(vision_backbone_id=vision_backbone_id, text_config=small)
        towers = list(meta_model(config).vision_backbone.children())
        records = [TIMM[name] for name in VISION_BACKBONES[vision_backbone_id]]
        assert config.timm_model_ids == [name.split("@")[0] for name in VISION_BACKBONES[vision_backbone_id]]
        assert len(towers) == len(records)
        for tower, record in zip(towers, records, strict=True):
            assert shapes(tower) == timm_shapes(record)
            assert {m.eps for m in tower.modules() if isinstance(m, torch.nn.LayerNorm)} == set(
                record["norm_eps"].values()
            )
            assert type(tower.blocks[0].mlp.act).__name__ == record["act"]
            assert tower.blocks[0].attn.num_heads == record["num_heads"]
            assert tower.config.num_used_blocks == record["depth"] - 1

    @pytest.mark.parametrize("name", ["clip", "in1k"])
    def test_features_of_timm(self, name):
        """CLIP and in1k towers have no published checkpoint to be checked with; timm's own code gave these."""
        golden = load_file(FIXTURES / "timm_small_towers.safetensors")
        sizes = {"embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_dim": 256}
        options = {
            "clip": {"hidden_act": "quick_gelu", "norm_eps": 1e-5, "pre_norm": True},
            "in1k": {"patch_size": 16},
        }[name]
        config = repository_class("OpenVLAConfig")(
            tower_configs=[{**sizes, **options, "class_token": True, "embed_class_token": True}]
        )
        tower = meta_model_tower(config)
        prefix = f"{name}.weights."
        weights = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
        tower.load_state_dict(weights, strict=True, assign=True)
        images = golden[f"{name}.input"].float() / 127.5 - 1
        with torch.no_grad():
            torch.testing.assert_close(tower(images), golden[f"{name}.output"], atol=1e-4, rtol=0)


def meta_model_tower(config) -> torch.nn.Module:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}
    config.text_config.update(small | {"num_key_value_heads": 2})
    return meta_model(config).vision_backbone.featurizer


def timm_shapes(record: dict) -> dict[str, list[int]]:
    expanded = {}
    for name, shape in record["parameters"].items():
        indices = range(record["depth"]) if name.startswith("blocks.0.") else [0]
        for index in indices:
            expanded[name.replace("blocks.0.", f"blocks.{index}.").replace(".gamma", ".scale_factor")] = shape
    return expanded


@pytest.mark.parametrize("llm_backbone_id", LANGUAGE_MODELS)
def test_language_models(config_class, llm_backbone_id):
    model_type, hidden_size, num_layers = LANGUAGE_MODELS[llm_backbone_id]
    config = config_class(llm_backbone_id=llm_backbone_id)
    text = config.text_config
    assert (text.model_type, text.hidden_size, text.num_hidden_layers) == (model_type, hidden_size, num_layers)
    model = meta_model(config)
    assert model.projector.fc3.out_features == hidden_size


@pytest.mark.parametrize("llm_backbone_id", ["llama2-7b-pure", "mistral-v0.1-7b-pure", "phi-2-3b"])
def test_small_language_models_predict(config_class, processor, camera_image, llm_backbone_id):
    """Every family decodes through the same code: with a cache, its tokens are those of one uncached forward."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4}
    settings = json.loads((TINY_POLICY / "config.json").read_text())
    config = config_class(
        llm_backbone_id=llm_backbone_id,
        text_config={**sizes, "num_key_value_heads": 2, "vocab_size": 1088, "pad_token_id": 1024},
        closing_token_id=processor.closing_token_id,
        **{name: settings[name] for name in ("tower_configs", "norm_stats", "action_token_end", "pad_token_id")},
    )
    torch.manual_seed(0)
    model = repository_class("OpenVLAForActionPrediction")(config).eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    inputs = processor(instruction="pick up the cube", images=camera_image)
    token_ids = model.predict_action(**inputs, return_dict=True).token_ids
    ids = torch.cat([inputs["input_ids"], token_ids], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -8:-1, 768:1024]
    assert (logits.argmax(dim=-1) + 768).tolist() == token_ids[0].tolist()


def test_overrides_while_loading(config_class):
    config = config_class.from_pretrained(TINY_POLICY, tower_configs=[{"image_size": 28}], closing_token_id=None)
    assert config.image_sizes == [28]
    assert config.use_fused_vision_backbone is False
    assert config.arch_specifier == "no-align+gelu-mlp"
    assert config.num_image_tokens == 4
    assert config.closing_token_id is None
    text_config = config_class.from_pretrained(TINY_POLICY, text_config={"num_hidden_layers": 5}).text_config
    assert (text_config.num_hidden_layers, text_config.hidden_size) == (5, 128)
    for arguments in ({"n_action_bins": 5000}, {"norm_type": "q99"}, {"norm_stats": {"a": 3}}):
        with pytest.raises(ValueError, match=r"do not fit|must be one of \['bounds_q99'|'a' has no"):
            config_class.from_pretrained(TINY_POLICY, **arguments)


def test_partial_text_config_keeps_the_published_vocabulary(config_class):
    config = config_class(text_config={"hidden_size": 64, "num_attention_heads": 2})
    assert config.text_config.vocab_size == 32064
    assert config.action_token_end == 32000


def test_own_entries_of_the_auto_map_survive(config_class, tmp_path):
    config = config_class.from_pretrained(TINY_POLICY)
    config.auto_map["AutoBackbone"] = "my_code.Backbone"
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoBackbone"] == "my_code.Backbone"


class TestStatistics:
    @pytest.fixture
    def source(self, tmp_path):
        for name in ("config.json", "dataset_statistics.json"):
            shutil.copyfile(GOLDEN / "ckpt" / name, tmp_path / name)
        return tmp_path

    def test_file_replaces_stale_statistics_whole(self, config_class, source):
        statistics = json.loads((source / "dataset_statistics.json").read_text())
        fresh = {"my_robot": statistics["bridge_orig"]}
        (source / "dataset_statistics.json").write_text(json.dumps(fresh))
        assert config_class.from_pretrained(source).norm_stats == fresh
        assert config_class.from_pretrained(source / "config.json").norm_stats == fresh

    def test_stale_statistics_are_not_judged(self, config_class, source):
        """A fine-tuned OpenVLA-OFT has the base model's in its config.json, of other robots than it drives."""
        bounds = {"q01": [0.0] * 14, "q99": [1.0] * 14}
        bimanual = {"action": bounds, "proprio": bounds}
        (source / "dataset_statistics.json").write_text(json.dumps({"aloha": bimanual}))
        asked = {"action_dim": 14, "use_proprio": True, "proprio_dim": 14}
        assert sorted(config_class.from_pretrained(source, **asked).norm_stats) == ["aloha"]
        (source / "dataset_statistics.json").unlink()
        with pytest.raises(ValueError, match=r"`action_dim` is 14, and the actions of \['bridge_orig', 'toy_5dof_no"):
            config_class.from_pretrained(source, **asked)
        assert config_class.from_pretrained(source, **asked, norm_stats={"aloha": bimanual}).action_dim == 14

    def test_config_is_used_without_the_file(self, config_class, source):
        (source / "dataset_statistics.json").unlink()
        assert sorted(config_class.from_pretrained(source).norm_stats) == ["bridge_orig", "toy_5dof_nomask"]

    def test_argument_wins(self, config_class, source):
        given = {"mine": {"action": {"q01": [0.0], "q99": [1.0]}}}
        assert config_class.from_pretrained(source, norm_stats=given).norm_stats == given

    def test_arrays_are_kept_as_lists(self, config_class, tmp_path):
        action = {"q01": np.zeros(2), "q99": np.ones(2, np.float32), "mask": np.array([True, False])}
        config = config_class(norm_stats={"mine": {"action": action}})
        config.save_pretrained(tmp_path)
        restored = config_class.from_pretrained(tmp_path).norm_stats["mine"]["action"]
        assert restored == {"q01": [0.0, 0.0], "q99": [1.0, 1.0], "mask": [True, False]}

    def test_a_missing_mask_scales_everything(self, config_class):
        config = config_class(norm_stats={"mine": {"action": {"q01": [0.0], "q99": [1.0], "mask": None}}})
        assert "mask" not in config.norm_stats["mine"]["action"]

    def test_no_statistics_leave_no_file(self, config_class, source, tmp_path):
        config = config_class.from_pretrained(source)
        config.norm_stats = {}
        config.save_pretrained(source)
        assert config_class.from_pretrained(source).norm_stats == {}

    def test_both_are_written_alike(self, config_class, source, tmp_path):
        config = config_class.from_pretrained(source)
        config.norm_stats = {"mine": config.norm_stats["bridge_orig"]}
        config.save_pretrained(tmp_path / "saved")
        in_config = json.loads((tmp_path / "saved" / "config.json").read_text())["norm_stats"]
        in_file = json.loads((tmp_path / "saved" / "dataset_statistics.json").read_text())
        assert in_config == in_file == config.norm_stats

    @pytest.mark.parametrize("text", ["{", '{"a": 3}', "[]"])
    def test_broken_file(self, config_class, source, text):
        (source / "dataset_statistics.json").write_text(text)
        with pytest.raises(ValueError, match=r"dataset_statistics\.json of .* cannot be used"):
            config_class.from_pretrained(source)


class TestBadConfigurations:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            (
                {"vision_backbone_id": "resnet"},
                r"`vision_backbone_id='resnet'` is not known; known are \['clip-vit-l'",
            ),
            ({"vision_backbone_id": None}, "`vision_backbone_id=None` is not known"),
            ({"llm_backbone_id": "gpt"}, r"`llm_backbone_id='gpt'` is not known; known are \['llama2-13b-chat'"),
            ({"llm_backbone_id": None, "text_config": {}}, "`closing_token_id` must be given"),
            ({"tower_configs": [{"width": 3}]}, r"unknown fields \['width'\]; known"),
            ({"tower_configs": [{}, {"image_size": 336}]}, "same image size"),
            ({"tower_configs": [{}] * 3}, "one or two vision towers, got 3"),
            ({"tower_configs": [{"num_heads": 5}]}, "not a multiple of `num_heads` 5"),
            ({"tower_configs": [{"hidden_act": "relu"}]}, "got 'relu'"),
            ({"tower_configs": [{"output_block": 27}]}, "does not exist in a tower of depth 27"),
            ({"use_fused_vision_backbone": False}, r"with 2 tower\(s\)"),
            ({"action_token_end": 40000}, "do not fit into a vocabulary of 32064"),
            ({"image_token_id": 32000}, "not the padding token 32000"),
            ({"image_token_id": 31800}, "is an action token"),
            ({"norm_type": "zscore"}, "got 'zscore'"),
            ({"norm_stats": {"a": {}}}, "'a' has no `action` statistics"),
            ({"norm_stats": {"a": {"action": {"q01": [0.0], "q99": [float("nan")]}}}}, "`action.q99` must be finite"),
            ({"norm_stats": {"a": {"action": {"q01": 0.0, "q99": 1.0}}}}, "`action.q01` must be a list of numbers"),
            ({"norm_stats": {"a": {"action": {"q01": [None], "q99": [1.0]}}}}, "`action.q01` must be a list of numb"),
            (
                {"norm_stats": {"a": {"action": {"q01": [0.0], "q99": [1.0], "mask": [1]}}}},
                "`action.mask` must be a list",
            ),
        ],
    )
    def test_refused(self, config_class, arguments, message):
        with pytest.raises(ValueError, match=message):
            config_class(**arguments)


def test_auto_config_alone(tmp_path):
    config = AutoConfig.from_pretrained(REPOSITORY, trust_remote_code=True)
    assert type(config).__name__ == "OpenVLAConfig"
