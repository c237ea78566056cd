"""Converted checkpoints: complete, loadable by the Auto classes alone, and equal to their source to the last bit."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import convert_checkpoint
import numpy as np
import pytest
import torch
from conftest import FIXTURES, GOLDEN, REMOTE_CODE, REPOSITORY, TINY_POLICY, golden_towers
from convert_checkpoint import convert
from hub_server import HubServer
from load_policy import repository_class
from model_card import model_card
from native_checkpoint import (
    BASE_VLMS,
    NORMALIZATION,
    build_model,
    choose_checkpoint,
    rename_native,
    resample_position_embedding,
)
from PIL import Image
from safetensors.torch import load_file, save_file


BASE_VLM = "prism-dinosiglip-224px+7b"
GROUPS = {
    "language_model.": ("llm_backbone", "llm."),
    "vision_backbone.featurizer.": ("vision_backbone", "dino_featurizer."),
    "vision_backbone.fused_featurizer.": ("vision_backbone", "siglip_featurizer."),
}


def to_native(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The modules of a native checkpoint, from the tensors of a model."""
    groups = {"vision_backbone": {}, "projector": {}, "llm_backbone": {}}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"projector\.fc(\d)\.(\w+)", name):
            groups["projector"][f"projector.{2 * int(match[1]) - 2}.{match[2]}"] = tensor
        for prefix, (group, native) in GROUPS.items():
            if name.startswith(prefix):
                groups[group][native + name.removeprefix(prefix).replace("scale_factor", "gamma")] = tensor
    return groups


@pytest.fixture(scope="module")
def golden_tensors():
    return load_file(GOLDEN / "ckpt" / "model.safetensors")


@pytest.fixture
def native_groups(golden_tensors):
    return to_native(golden_tensors)


@pytest.fixture(scope="module")
def llama_sized_tokenizer(tmp_path_factory):
    """The tiny policy's tokenizer with Llama's numbers: 32,000 tokens, "▁" at 29871, and no padding token."""
    directory = tmp_path_factory.mktemp("tokenizer")
    content = json.loads((TINY_POLICY / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<PAD>"]
    vocabulary = content["model"]["vocab"]
    free = vocabulary["▁"]
    vocabulary["▁"] = 29871
    unused = sorted({*range(len(vocabulary), 32000), free} - {29871})
    vocabulary |= {f"<unused{token_id}>": token_id for token_id in unused}
    (directory / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(special))
    return directory


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """The sizes of the golden checkpoint."""
    text = json.loads((GOLDEN / "ckpt" / "config.json").read_text())["text_config"]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    path = tmp_path_factory.mktemp("overrides") / "small.json"
    path.write_text(
        json.dumps({"tower_configs": golden_towers(), "text_config": {name: text[name] for name in names}})
    )
    return path


@pytest.fixture
def run(tmp_path, native_groups):
    """A native VLA's run directory; `write(groups, name)` adds a checkpoint."""
    directory = tmp_path / "run"
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"vla": {"base_vlm": BASE_VLM}, "seed": 7}))
    shutil.copy(GOLDEN / "ckpt" / "dataset_statistics.json", directory)
    torch.save({"model": native_groups}, directory / "checkpoints" / "step-000100-epoch-02-loss=0.5.pt")
    return directory


@pytest.fixture
def command(llama_sized_tokenizer, overrides):
    """Run the command in this process with the golden sizes; returns the exit status."""

    def call(*arguments):
        native = ("--tokenizer", llama_sized_tokenizer, "--config", overrides)
        return convert_checkpoint.main([str(argument) for argument in (*arguments, *native)])

    return call


def load(directory, **kwargs):
    model_class = repository_class("OpenVLAForActionPrediction")
    return model_class.from_pretrained(directory, **({"dtype": torch.float32} | kwargs)).eval()


def golden_inputs(image_processor):
    """Inputs of the first golden case, and the action that the reference gave for them."""
    record = json.loads((GOLDEN / "golden_float32.json").read_text())["cases"][0]
    pixel_values = image_processor(Image.open(GOLDEN / "images" / f"{record['image']}.png"))["pixel_values"]
    inputs = {"input_ids": torch.tensor([record["input_ids"]]), "pixel_values": pixel_values}
    return inputs, record["predict"]["bridge_orig"]["tail"]


def assert_same_tensors(directory, expected):
    actual = load_file(directory / "model.safetensors")
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def one_error(capsys) -> str:
    """The only line on the error stream."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


# Native checkpoints


def test_native_vla(command, run, tmp_path, golden_model, golden_tensors):
    out = tmp_path / "out"
    assert command(run, out) == 0
    assert_same_tensors(out, golden_tensors)
    model, processor = load(out), repository_class("OpenVLAProcessor").from_pretrained(out)
    inputs, action = golden_inputs(processor.image_processor)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, golden_model(**inputs).logits)
    predicted = model.predict_action(**inputs, unnorm_key="bridge_orig")
    np.testing.assert_array_equal(predicted, golden_model.predict_action(**inputs, unnorm_key="bridge_orig"))
    np.testing.assert_allclose(predicted, action, rtol=0, atol=1e-12)


def test_native_vla_is_written_as_published(command, run, tmp_path, capsys):
    out, published = tmp_path / "out", GOLDEN / "ckpt"
    assert command(run, out) == 0
    printed = capsys.readouterr().out
    assert "step-000100-epoch-02-loss=0.5.pt" in printed
    assert "<PAD> added with id 32000" in printed
    config, wanted = read_json(out / "config.json"), read_json(published / "config.json")
    same = ("vision_backbone_id", "llm_backbone_id", "arch_specifier", "image_resize_strategy", "image_sizes")
    same += ("pad_token_id", "pad_to_multiple_of", "n_action_bins", "llm_max_length", "timm_model_ids", "hf_llm_id")
    assert {name: config[name] for name in same} == {name: wanted[name] for name in same}
    assert config["dtype"] == "bfloat16"
    assert config["text_config"]["vocab_size"] == 32064
    assert config["text_config"]["rms_norm_eps"] == 1e-6
    assert (config["action_token_end"], config["closing_token_id"]) == (32000, 29871)
    for name in ("config.json", "dataset_statistics.json"):
        statistics = read_json(out / name)
        assert statistics.get("norm_stats", statistics) == read_json(published / "dataset_statistics.json")
    special = read_json(out / "generation_config.json")
    assert [special[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 32000]
    pixels, wanted = read_json(out / "preprocessor_config.json"), read_json(published / "preprocessor_config.json")
    wanted.pop("image_processor_type")
    assert {name: pixels.get(name) for name in wanted} == wanted
    tokenizer = repository_class("OpenVLAProcessor").from_pretrained(out).tokenizer
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.padding_side) == ("<PAD>", 32000, "right")
    assert tokenizer.model_max_length == 2048


def test_native_rms_norm_eps_and_dtype(command, run, tmp_path, golden_tensors):
    out = tmp_path / "out"
    assert command(run, out, "--rms_norm_eps", "1e-5", "--dtype", "float32") == 0
    assert read_json(out / "config.json")["text_config"]["rms_norm_eps"] == 1e-5
    assert_same_tensors(out, {name: tensor.float() for name, tensor in golden_tensors.items()})


def test_choice_of_checkpoint():
    steps = [f"checkpoints/step-{step}-epoch-{epoch}-loss=0.1.pt" for step, epoch in (("000900", 1), ("1000000", 2))]
    others = ["config.json", "checkpoints/step-9999999.pt", "step-9999999-epoch-9-loss=0.1.pt"]
    assert choose_checkpoint([*steps, *others]) == steps[1]
    assert choose_checkpoint([*steps, "checkpoints/latest-checkpoint.pt"]) == "checkpoints/latest-checkpoint.pt"
    with pytest.raises(FileNotFoundError, match=r"but checkpoints/step-9999999\.pt"):
        choose_checkpoint(others)
    with pytest.raises(FileNotFoundError, match="but nothing"):
        choose_checkpoint([])


def test_native_file_of_a_run(command, run, tmp_path, native_groups, golden_tensors, capsys):
    newer = {name: {key: tensor + 1 for key, tensor in group.items()} for name, group in native_groups.items()}
    # Prefixes as some trainers save them, and a module without tensors.
    newer["projector"] = {name.removeprefix("projector."): tensor for name, tensor in newer["projector"].items()}
    torch.save({"model": newer | {"downsampler": {}}}, run / "checkpoints" / "step-000200-epoch-04-loss=0.4.pt")
    older = run / "checkpoints" / "step-000100-epoch-02-loss=0.5.pt"
    assert command(older, tmp_path / "older") == 0
    assert_same_tensors(tmp_path / "older", golden_tensors)
    assert command(run, tmp_path / "newest") == 0
    assert_same_tensors(tmp_path / "newest", {name: tensor + 1 for name, tensor in golden_tensors.items()})
    assert command(run / "checkpoints" / "step-000300-epoch-04-loss=0.4.pt", tmp_path / "none") == 1
    assert "neither a directory, nor a .pt file" in one_error(capsys)


def test_every_tensor_of_openvla_7b():
    shapes = read_json(FIXTURES / "openvla_7b_weight_shapes.json")
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    renamed = rename_native(to_native(tensors))
    model = build_model(repository_class("OpenVLAConfig")(), renamed, torch.bfloat16)
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("vision_backbone_id", "modules"),
    [
        ("clip-vit-l-336px", {"featurizer": "vit_large_patch14_clip_336.openai@336"}),
        ("dinov2-vit-l", {"featurizer": "vit_large_patch14_reg4_dinov2.lvd142m@224"}),
        ("in1k-vit-l", {"featurizer": "vit_large_patch16_224.augreg_in21k_ft_in1k@224"}),
        ("siglip-vit-so400m", {"featurizer": "vit_so400m_patch14_siglip_224@224"}),
        (
            "dinoclip-vit-l-336px",
            {
                "dino_featurizer": "vit_large_patch14_reg4_dinov2.lvd142m@336",
                "clip_featurizer": "vit_large_patch14_clip_336.openai@336",
            },
        ),
    ],
)
def test_every_tensor_of_timm(vision_backbone_id, modules):
    text_config = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 32064}
    config = repository_class("OpenVLAConfig")(vision_backbone_id=vision_backbone_id, text_config=text_config)
    with torch.device("meta"):
        groups = to_native(repository_class("OpenVLAForActionPrediction")(config).state_dict())
    timm = read_json(FIXTURES / "timm_towers.json")["towers"]
    groups["vision_backbone"] = {
        f"{module}.{name.replace('blocks.0.', f'blocks.{block}.')}": torch.empty(shape, device="meta")
        for module, tower in modules.items()
        for name, shape in timm[tower]["parameters"].items()
        for block in range(timm[tower]["depth"] if name.startswith("blocks.") else 1)
    }
    build_model(config, rename_native(groups), torch.bfloat16)


def test_differing_tensors_are_listed(command, run, tmp_path, native_groups, capsys):
    path = run / "checkpoints" / "latest-checkpoint.pt"

    def refusal(group, **changes):
        changed = {name: tensor for name, tensor in (native_groups[group] | changes).items() if tensor is not None}
        torch.save({"model": native_groups | {group: changed}}, path)
        assert command(run, tmp_path / "out") == 1
        return one_error(capsys)

    assert "2 missing: language_model.lm_head.weight, language_model.model.norm.weight" in refusal(
        "llm_backbone", **{"llm.lm_head.weight": None, "llm.model.norm.weight": None}
    )
    assert "1 not of this model: projector: projector.6.weight" in refusal(
        "projector", **{"projector.6.weight": torch.zeros(2)}
    )
    # Known names, of a tower and a layer that this model does not have.
    assert "1 not of this model: vision_backbone.featurizer.head.weight" in refusal(
        "vision_backbone", **{"dino_featurizer.head.weight": torch.zeros(2)}
    )
    assert "1 not of this model: projector: 0.bias" in refusal("projector", **{"0.bias": torch.zeros(2)})
    assert "projector.fc3.bias (5,) instead of (32,)" in refusal("projector", **{"projector.4.bias": torch.zeros(5)})
    assert not (tmp_path / "out").exists()


def test_pickled_objects_are_refused(command, run, tmp_path, capsys):
    class Surprise:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"model": {"projector": {"0.weight": Surprise()}}}, run / "checkpoints" / "latest-checkpoint.pt")
    assert command(run, tmp_path / "out") == 1
    assert "is not a file of tensors alone and is not loaded: it holds a pickled posix.mkdir." in one_error(capsys)
    assert not (tmp_path / "ran").exists()
    (run / "checkpoints" / "latest-checkpoint.pt").write_bytes(b"no archive")
    assert command(run, tmp_path / "out") == 1
    assert "is not a file of tensors alone" in one_error(capsys)
    torch.save({"model": {"projector": {"0.weight": 1.5}}}, run / "checkpoints" / "latest-checkpoint.pt")
    assert command(run, tmp_path / "out") == 1
    assert "0.weight of projector are not tensors" in one_error(capsys)


def test_incomplete_runs(command, run, tmp_path, native_groups, overrides, capsys):
    out = tmp_path / "out"
    assert convert_checkpoint.main([str(run), str(out), "--config", str(overrides)]) == 1
    assert "give a directory or Hub id with --tokenizer" in one_error(capsys)
    assert convert_checkpoint.main([str(run), str(out), "--config", str(overrides), "--tokenizer", str(run)]) == 1
    assert "has no tokenizer.json" in one_error(capsys)
    assert command(run, out, "--dtype", "auto") == 1
    assert "no dtype of its own" in one_error(capsys)
    torch.save({"model": {"projector": native_groups["projector"]}}, run / "checkpoints" / "latest-checkpoint.pt")
    assert command(run, out) == 1
    assert "no language model (`llm_backbone`), only projector" in one_error(capsys)
    (run / "dataset_statistics.json").unlink()
    assert command(run, out) == 1
    assert "has no dataset_statistics.json" in one_error(capsys)
    (run / "config.json").write_text(json.dumps({"optimizer": "adam"}))
    assert command(run, out) == 1
    assert "it has optimizer" in one_error(capsys)
    (run / "config.json").unlink()
    assert command(run, out) == 1
    assert "has no config.json" in one_error(capsys)


def test_backbone_ids(command, run, tmp_path, capsys):
    (run / "config.json").write_text(json.dumps({"vla": {"base_vlm": "somewhere/my-vlm+7b"}}))
    assert command(run, tmp_path / "out") == 1
    assert "No `vision_backbone_id` follows from the base VLM 'somewhere/my-vlm+7b'" in one_error(capsys)
    ids = ("--vision_backbone_id", "dinosiglip-vit-so-224px", "--llm_backbone_id", "vicuna-v15-7b")
    assert command(run, tmp_path / "out", *ids) == 0
    assert read_json(tmp_path / "out" / "config.json")["llm_backbone_id"] == "vicuna-v15-7b"
    assert read_json(tmp_path / "out" / "processor_config.json")["prompt_style"] == "vicuna"


def test_known_base_vlms():
    config_class = repository_class("OpenVLAConfig")
    assert BASE_VLMS["siglip-224px+7b"] == ("siglip-vit-so400m", "vicuna-v15-7b", "letterbox")
    assert BASE_VLMS[BASE_VLM] == ("dinosiglip-vit-so-224px", "llama2-7b-pure", "resize-naive")
    assert BASE_VLMS["prism-clip+13b"] == ("clip-vit-l-336px", "llama2-13b-pure", "resize-naive")
    assert "prism-siglip+13b" not in BASE_VLMS
    for vision_backbone_id, llm_backbone_id, strategy in set(BASE_VLMS.values()):
        config_class(vision_backbone_id=vision_backbone_id, llm_backbone_id=llm_backbone_id)
        assert strategy in ("letterbox", "resize-crop", "resize-naive")


def test_another_tokenizer_is_refused(run, tmp_path, llama_sized_tokenizer, overrides, capsys):
    arguments = [str(run), str(tmp_path / "out"), "--config", str(overrides), "--tokenizer"]
    assert convert_checkpoint.main([*arguments, str(TINY_POLICY)]) == 1
    assert "1025 tokens, which do not make the 32064 rows" in one_error(capsys)
    renumbered = tmp_path / "tokenizer"
    shutil.copytree(llama_sized_tokenizer, renumbered)
    text = (renumbered / "tokenizer.json").read_text(encoding="utf-8")
    text = text.replace('"▁": 29871', '"▁": 29870').replace('"<unused29870>": 29870', '"<unused29870>": 29871')
    (renumbered / "tokenizer.json").write_text(text, encoding="utf-8")
    assert convert_checkpoint.main([*arguments, str(renumbered)]) == 1
    assert "'▁' has id 29870, that of llama2-7b-pure 29871" in one_error(capsys)


def test_overrides_are_checked(run, tmp_path, llama_sized_tokenizer, capsys):
    path = tmp_path / "overrides.json"
    arguments = [str(run), str(tmp_path / "out"), "--tokenizer", str(llama_sized_tokenizer), "--config", str(path)]
    for content, message in (
        ('{"tower_sizes": []}', "['tower_sizes'] are not fields of OpenVLAConfig"),
        ("[]", "must hold an object"),
        ("{", "is not JSON"),
        ('{"text_config": []}', "`text_config` must be an object"),
    ):
        path.write_text(content)
        assert convert_checkpoint.main(arguments) == 1
        assert message in one_error(capsys)


# Vision weights


@pytest.fixture
def vlm(tmp_path, native_groups):
    """A native vision-language model whose frozen towers are not in the file."""
    directory = tmp_path / "vlm"
    (directory / "checkpoints").mkdir(parents=True)
    model = {"vision_backbone_id": "dinosiglip-vit-so-224px", "llm_backbone_id": "llama2-7b-pure"}
    model |= {"arch_specifier": "no-align+fused-gelu-mlp", "image_resize_strategy": "letterbox", "model_id": "mine"}
    (directory / "config.json").write_text(json.dumps({"model": model, "stage": "finetune"}))
    groups = {name: group for name, group in native_groups.items() if name != "vision_backbone"}
    torch.save({"model": groups}, directory / "checkpoints" / "latest-checkpoint.pt")
    return directory


@pytest.fixture
def timm_files(tmp_path, native_groups):
    """timm's checkpoints of the golden towers: as timm saves them, and inside an OpenCLIP model."""
    dino, siglip = tmp_path / "dino.safetensors", tmp_path / "open_clip_pytorch_model.bin"
    towers = native_groups["vision_backbone"]
    dino_tensors = {name[16:]: value for name, value in towers.items() if name.startswith("dino_featurizer.")}
    save_file(dino_tensors | {"mask_token": torch.zeros(1, 64)}, dino)
    trunk = {f"visual.trunk.{name[18:]}": value for name, value in towers.items() if name.startswith("siglip_")}
    torch.save(trunk | {"visual.trunk.head.weight": torch.zeros(2), "logit_scale": torch.ones(())}, siglip)
    return dino, siglip


def test_native_vlm(command, vlm, timm_files, tmp_path, golden_tensors, capsys):
    out = tmp_path / "out"
    assert command(vlm, out) == 1
    error = one_error(capsys)
    assert "--vision_weights" in error
    assert "vit_large_patch14_reg4_dinov2.lvd142m, vit_so400m_patch14_siglip_224, in this order" in error
    assert command(vlm, out, "--vision_weights", timm_files[0]) == 1
    assert "1 files were given" in one_error(capsys)
    assert command(vlm, out, "--vision_weights", timm_files[0], tmp_path / "absent.pt") == 1
    assert "absent.pt do not exist" in one_error(capsys)

    assert command(vlm, out, "--vision_weights", *timm_files) == 0
    assert_same_tensors(out, golden_tensors)
    config, pixels = read_json(out / "config.json"), read_json(out / "preprocessor_config.json")
    assert (config["norm_stats"], (out / "dataset_statistics.json").exists()) == ({}, False)
    assert config["image_resize_strategy"] == pixels["image_resize_strategy"] == "letterbox"
    # Exact for a plain VLM, rounded for a VLA.
    assert pixels["tvf_normalize_params"][0]["mean"] == [0.485, 0.456, 0.406]
    assert "it holds no action statistics yet" in (out / "README.md").read_text()


def test_vision_weights_that_the_checkpoint_has(command, run, timm_files, tmp_path, capsys):
    assert command(run, tmp_path / "out", "--vision_weights", *timm_files) == 1
    assert "holds its vision towers" in one_error(capsys)


def test_vision_weights_in_the_wrong_order(command, vlm, timm_files, tmp_path, capsys):
    assert command(vlm, tmp_path / "out", "--vision_weights", *reversed(timm_files)) == 1
    error = one_error(capsys)
    assert "missing: vision_backbone.featurizer" in error
    assert "not of this model: vision_backbone.featurizer.attn_pool" in error


def test_original_dinov2(command, vlm, timm_files, tmp_path, golden_tensors):
    tensors = load_file(timm_files[0])
    tensors["register_tokens"] = tensors.pop("reg_token")
    class_position = torch.full((1, 1, 64), 0.25, dtype=torch.bfloat16)
    tensors["pos_embed"] = torch.cat([class_position, tensors["pos_embed"]], dim=1)
    tensors["cls_token"] = tensors["cls_token"].float() - 0.25
    torch.save(tensors, tmp_path / "dinov2_vitl14_reg4_pretrain.pth")
    files = (tmp_path / "dinov2_vitl14_reg4_pretrain.pth", timm_files[1])
    assert command(vlm, tmp_path / "out", "--vision_weights", *files) == 0
    assert_same_tensors(tmp_path / "out", golden_tensors)


def test_position_embedding_is_resampled(command, vlm, timm_files, tmp_path):
    position = torch.randn(1, 37 * 37, 64, generator=torch.Generator().manual_seed(0))
    save_file(load_file(timm_files[0]) | {"pos_embed": position}, timm_files[0])
    assert command(vlm, tmp_path / "out", "--dtype", "float32", "--vision_weights", *timm_files) == 0
    image = position[0].T.reshape(1, 64, 37, 37)
    expected = torch.nn.functional.interpolate(image, size=(16, 16), mode="bicubic", antialias=True)
    actual = load_file(tmp_path / "out" / "model.safetensors")["vision_backbone.featurizer.pos_embed"]
    assert torch.equal(actual, expected.reshape(1, 64, 256).mT)


def test_resampling_of_position_embeddings():
    resample = resample_position_embedding
    # A plane stays a plane: bicubic interpolation reproduces it away from the border.
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    plane = torch.stack([x, y, torch.full_like(x, 3.0)], dim=-1).reshape(1, 576, 3)
    prefix = torch.randn(1, 2, 3)
    resampled = resample(torch.cat([prefix, plane], dim=1), grid=12, num_prefix=2)
    assert torch.equal(resampled[:, :2], prefix)
    grid = resampled[0, 2:].reshape(12, 12, 3)[3:-3, 3:-3]
    centres = torch.arange(12.0)[3:-3] * 2 + 0.5
    torch.testing.assert_close(grid[..., 0], centres.expand(6, 6))
    torch.testing.assert_close(grid[..., 1], centres[:, None].expand(6, 6))
    torch.testing.assert_close(grid[..., 2], torch.full((6, 6), 3.0))
    assert resample(plane, grid=24) is plane
    with pytest.raises(ValueError, match="578 rows, 0 in front, is no square"):
        resample(torch.cat([prefix, plane], dim=1), grid=12)


def test_normalization_constants():
    for name, tower in read_json(FIXTURES / "timm_towers.json")["towers"].items():
        pixels = tower.get("data") or tower["pretrained_cfg"]
        constants = [value for part, value in NORMALIZATION.items() if part in name]
        assert constants == [(tuple(pixels["mean"]), tuple(pixels["std"]))]


# The Hugging Face format


@pytest.fixture
def published(tmp_path):
    """The golden checkpoint with code that must not run and the statistics of its base model in config.json."""
    directory = tmp_path / "published"
    shutil.copytree(GOLDEN / "ckpt", directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_POLICY / name, directory)
    config = read_json(directory / "config.json") | {"tower_configs": golden_towers()}
    config["auto_map"] = {
        "AutoConfig": "configuration_prismatic.OpenVLAConfig",
        "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
    }
    config["norm_stats"] = dict.fromkeys(("kuka", "viola"), config["norm_stats"]["bridge_orig"])
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("configuration", "modeling", "processing"):
        (directory / f"{name}_prismatic.py").write_text("raise RuntimeError('this code ran')")
    (directory / "README.md").write_text("AutoModelForVision2Seq, transformers 4.40.1")
    return directory


def test_published_checkpoint(published, tmp_path, golden_tensors, capsys):
    out = tmp_path / "out"
    convert(published, out)
    printed = capsys.readouterr().out
    assert "statistics of config.json, stale and not used: kuka, viola\n" in printed
    assert "statistics of dataset_statistics.json, used: bridge_orig, toy_5dof_nomask\n" in printed
    assert_same_tensors(out, golden_tensors)
    assert sorted(read_json(out / "config.json")["norm_stats"]) == ["bridge_orig", "toy_5dof_nomask"]
    assert sorted(read_json(out / "dataset_statistics.json")) == ["bridge_orig", "toy_5dof_nomask"]
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    kept, given = read_json(out / "generation_config.json"), read_json(published / "generation_config.json")
    assert [kept[name] for name in ids] == [given[name] for name in ids]
    normalize = [read_json(directory / "preprocessor_config.json") for directory in (out, published)]
    assert normalize[0]["tvf_normalize_params"] == normalize[1]["tvf_normalize_params"]
    code = {path.name for path in REMOTE_CODE}
    assert {path.name for path in out.glob("*.py")} == code
    card = (out / "README.md").read_text()
    assert "4.40.1" not in card
    assert "Converted from `published`" in card
    assert "Its own model card" in card


def test_code_of_a_source_is_replaced_and_never_run(published, tmp_path):
    convert(published, tmp_path / "ours")
    for path in (tmp_path / "ours").glob("*.py"):
        path.write_text("raise RuntimeError('this code ran')")
    convert(tmp_path / "ours", tmp_path / "again", dtype="float32")
    for path in REMOTE_CODE:
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert read_json(tmp_path / "again" / "config.json")["dtype"] == "float32"


def test_published_vlm(published, tmp_path):
    """A Prismatic VLM in the Hugging Face format has no statistics and another model type."""
    config = read_json(published / "config.json") | {"model_type": "prismatic"}
    del config["norm_stats"], config["n_action_bins"]
    (published / "config.json").write_text(json.dumps(config))
    (published / "dataset_statistics.json").unlink()
    convert(published, tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["model_type"] == "openvla"


def test_incomplete_published_checkpoint(published, tmp_path, golden_tensors):
    tensors = dict(golden_tensors)
    tensors["projector.fc4.bias"] = tensors.pop("projector.fc3.bias").clone()
    save_file(tensors, published / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing: projector.fc3.bias; 1 not of this model: projector.fc4.bias"):
        convert(published, tmp_path / "out")


def test_native_options_with_a_published_checkpoint(command, published, tmp_path, capsys):
    assert command(published, tmp_path / "out") == 1
    assert "options for native checkpoints do not apply" in one_error(capsys)
    assert convert_checkpoint.main([str(published / "model.safetensors"), str(tmp_path / "out")]) == 1
    assert "Give the directory" in one_error(capsys)


@pytest.mark.parametrize("name", ["action_head", "proprio_projector", "noisy_action_projector", "vision_backbone"])
def test_openvla_oft_does_not_say_enough(published, tmp_path, name):
    """Parts of the policy in files of their own must not get lost, and chunks are not guessed."""
    torch.save({"module.model.fc2.bias": torch.zeros(7)}, published / f"{name}--150000_checkpoint.pt")
    with pytest.raises(ValueError, match=r"published is an OpenVLA-OFT checkpoint: .* give --num_images, and --chunk"):
        convert(published, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Writing


def test_overwrite(published, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    arguments = [str(published), str(out)]
    assert convert_checkpoint.main(arguments) == 1
    assert "--overwrite replaces it" in one_error(capsys)
    assert convert_checkpoint.main([*arguments, "--overwrite"]) == 1
    assert "not a model repository" in one_error(capsys)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (out / "config.json").write_text("{}")
    assert convert_checkpoint.main([*arguments, "--overwrite"]) == 0
    assert not (out / "notes.txt").exists()
    assert (out / "model.safetensors").is_file()
    for inside in (published, tmp_path):
        assert convert_checkpoint.main([str(published), str(inside), "--overwrite"]) == 1
        assert "is or contains the source" in one_error(capsys)


def test_a_failure_while_writing_leaves_nothing(published, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert(published, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(self, *arguments, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(repository_class("OpenVLAProcessor"), "save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        convert(published, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(OSError, match="no space left"):
        convert(published, tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "published"]


def test_shards(published, tmp_path, golden_tensors):
    convert(published, tmp_path / "out", max_shard_size="3MB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    state = load(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in golden_tensors.items())


LOAD_WITH_AUTO_CLASSES = """
import json, re, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("out", trust_remote_code=True, dtype=torch.float32)
processor = AutoProcessor.from_pretrained("out", trust_remote_code=True)
inputs = load_file("inputs.safetensors")
golden = model.predict_action(**inputs, unnorm_key="bridge_orig").tolist()
shown = {}
exec(re.search("```python(.*?)```", Path("out/README.md").read_text(), re.DOTALL)[1], shown)
print(json.dumps({"golden": golden, "quick start": shown["action"].tolist()}))
"""


@pytest.mark.slow
def test_auto_classes_alone_load_the_result(
    command, run, tmp_path, golden_model, golden_image_processor, camera_image
):
    out = tmp_path / "out"
    assert command(run, out) == 0
    inputs, _ = golden_inputs(golden_image_processor)
    save_file(inputs, tmp_path / "inputs.safetensors")
    camera_image.save(tmp_path / "camera.png")
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", LOAD_WITH_AUTO_CLASSES],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    actions = json.loads(result.stdout.splitlines()[-1])
    expected = golden_model.predict_action(**inputs, unnorm_key="bridge_orig")
    assert actions["golden"] == expected.tolist()
    processor = repository_class("OpenVLAProcessor").from_pretrained(out)
    shown = load(out, dtype="auto").predict_action(
        **processor(instruction="pick up the red block", images=camera_image), unnorm_key="bridge_orig"
    )
    assert actions["quick start"] == shown.tolist()


CONVERT_ON_THE_HUB = """
import sys
import convert_checkpoint

converted, overrides, tokenizer = sys.argv[1:]
status = convert_checkpoint.main(["org/published", f"{converted}/one", "--push_to_hub", "org/one"])
native = ["--tokenizer", tokenizer, "--config", overrides]
status += convert_checkpoint.main(["org/native", f"{converted}/two", "--push_to_hub", "org/two", *native])
status += 4 * convert_checkpoint.main(["org/absent", f"{converted}/three"])
status += 8 * convert_checkpoint.main(["org/oft", f"{converted}/four"])
sys.exit(status)
"""


def tensor_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"module.model.fc2.bias": torch.zeros(7)}, buffer)
    return buffer.getvalue()


@pytest.mark.slow
def test_from_hub_to_hub(published, run, tmp_path, overrides, llama_sized_tokenizer, golden_tensors):
    def files(directory):
        paths = (path for path in directory.rglob("*") if path.is_file())
        return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}

    with HubServer() as server:
        server.create_repo("org/published", files(published))
        server.create_repo("org/native", files(run))
        server.create_repo("org/oft", files(published) | {"action_head--150000_checkpoint.pt": tensor_file()})
        result = subprocess.run(
            [sys.executable, "-c", CONVERT_ON_THE_HUB, tmp_path / "converted", overrides, llama_sized_tokenizer],
            env=server.environment(tmp_path / "home") | {"PYTHONPATH": str(REPOSITORY / "tools")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 12, result.stderr
        assert "error: org/absent is not a" in result.stderr
        assert "error: org/oft is an OpenVLA-OFT checkpoint" in result.stderr
        pushed = {name: server.files(f"org/{name}") for name in ("one", "two")}
    for name, source in (("one", "published"), ("two", "native")):
        directory = tmp_path / "converted" / name
        assert_same_tensors(directory, golden_tensors)
        assert {path: pushed[name][path] for path in files(directory)} == files(directory)
        card = pushed[name]["README.md"].decode()
        assert f"base_model: org/{source}\n" in card
        assert f"[org/{source}](https://huggingface.co/org/{source})" in card
        assert f'repo, device = "org/{name}"' in card


# The model card


def test_model_card():
    card = model_card("org/mine", "Made for a test.", unnorm_keys=["a", "b"], llm_backbone_id="vicuna-v15-7b")
    assert card.startswith("---\nlibrary_name: transformers\nlicense: other\nlicense_name: llama2\n")
    assert 'unnorm_key="a"' in card
    assert "`a`, `b`" in card
    card = model_card("mine", "Made for a test.", base_model="org/base", tags=["tabletop"])
    assert "Llama" not in card
    assert "base_model: org/base" in card
    assert "- tabletop" in card
