# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""OpenVLA-OFT: converted checkpoints against the numbers that the reference computed with the same weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIXTURES, GOLDEN, TINY_POLICY, golden_towers
from convert_checkpoint import convert
from load_policy import load_policy
from oft_checkpoint import OFTOptions
from PIL import Image
from safetensors.torch import load_file


OFT = FIXTURES / "oft_tiny"
LIBERO = OFTOptions(platform="libero", num_images=2)
HEAD, PROPRIO = "action_head--latest_checkpoint.pt", "proprio_projector--latest_checkpoint.pt"
FILM = "vision_backbone--latest_checkpoint.pt"
COMPONENTS = {
    "l1": {HEAD: HEAD, PROPRIO: PROPRIO},
    "diffusion": {
        HEAD: f"diffusion/{HEAD}",
        "noisy_action_projector--latest_checkpoint.pt": "diffusion/noisy_action_projector--latest_checkpoint.pt",
        PROPRIO: PROPRIO,
    },
    "film": {HEAD: HEAD, PROPRIO: PROPRIO, FILM: "film_plain_vision_backbone.pt"},
    "film_lora": {HEAD: HEAD, PROPRIO: PROPRIO, FILM: f"film_lora/{FILM}"},
}
ONE_IMAGE = {"num_images": 1, "use_proprio": False, "proprio_dim": None}
TOKENS = {"head_type": "tokens"}
# Name of the reference's run: the converted checkpoint, and what is overridden while loading.
RUNS = {
    "l1_1img": ("l1", ONE_IMAGE),
    "l1_proprio": ("l1", {}),
    "discrete_1img": ("l1", ONE_IMAGE | TOKENS),
    "discrete_proprio": ("l1", TOKENS),
    "film_l1_proprio": ("film", {}),
    "filmlora_l1_proprio": ("film_lora", {}),
}


def make_published(directory: Path, kind: str) -> Path:
    """A repository of OpenVLA-OFT as it lies on the Hub, with towers of this size."""
    directory.mkdir()
    shutil.copy(GOLDEN / "ckpt" / "model.safetensors", directory)
    for name in ("preprocessor_config.json", "generation_config.json"):
        shutil.copy(GOLDEN / "ckpt" / name, directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_POLICY / name, directory)
    shutil.copy(OFT / "ckpt" / "dataset_statistics.json", directory)
    config = json.loads((GOLDEN / "ckpt" / "config.json").read_text()) | {"tower_configs": golden_towers()}
    (directory / "config.json").write_text(json.dumps(config))
    for name, source in COMPONENTS[kind].items():
        shutil.copy(OFT / "ckpt" / source, directory / name)
    return directory


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Directory of a converted checkpoint in float32, made at its first use."""
    root, made = tmp_path_factory.mktemp("oft"), {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = root / f"{kind}_converted"
            convert(make_published(root / kind, kind), made[kind], dtype="float32", oft=LIBERO)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def golden():
    return json.loads((OFT / "golden_float32.json").read_text()), load_file(OFT / "golden_float32.safetensors")


@pytest.fixture(scope="module")
def pixels(golden_image_processor):
    """(12, 224, 224) of both camera images, and of both in the other order."""
    names = ("img0_320x240", "img2_224x224")
    views = [
        golden_image_processor(Image.open(GOLDEN / "images" / f"{name}.png"))["pixel_values"][0] for name in names
    ]
    return torch.stack([torch.cat(views), torch.cat(views[::-1])])  # (2, 12, 224, 224)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to 2e-5 of the scale of the expected values."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual.float(), expected.float(), atol=2e-5 * scale, rtol=0)


def inputs_of(model, golden, pixels) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": golden[1]["input_ids"], "pixel_values": pixels[:1, : 6 * model.config.num_images]}
    if model.config.use_proprio:
        inputs["proprio"] = golden[1]["proprio_norm"][None].float()
    return inputs


@pytest.mark.parametrize("run", RUNS)
def test_actions(converted, golden, pixels, run):
    """Hidden states of the actions, and the actions in the dataset's units."""
    kind, overrides = RUNS[run]
    model, _ = load_policy(converted(kind), dtype=torch.float32, **overrides)
    seen = {}
    head = model.get_output_embeddings() if model.action_head is None else model.action_head
    head.register_forward_pre_hook(lambda _, inputs: seen.update(hidden=inputs[0]))
    inputs = inputs_of(model, golden, pixels)
    output = model.predict_action(**inputs, return_dict=True)
    assert output.actions.shape == (8, 7)
    expected, hidden = golden[1][f"{run}.actions"].numpy(), golden[1][f"{run}.actions_hidden"]
    assert_close(seen["hidden"].view(hidden.shape), hidden)
    if model.action_head is None:
        assert_same_where_the_reference_is_valid(output, expected, hidden, model)
        return
    np.testing.assert_allclose(output.actions, expected, atol=2e-5 * np.abs(expected).max())


def assert_same_where_the_reference_is_valid(output, expected, hidden, model) -> None:
    """
    The reference takes the best of the whole vocabulary, which in a random model may be no action token; ours the best
    of the action tokens.
    """
    begin, end = model.config.action_token_begin, model.config.action_token_end
    with torch.no_grad():
        logits = torch.nn.functional.linear(hidden, model.get_output_embeddings().weight)  # (56, V)
    assert torch.equal(output.token_ids[0], begin + logits[:, begin:end].argmax(dim=-1))
    best = logits.argmax(dim=-1)
    valid = (best >= begin) & (best < end)
    assert (output.token_ids[0][valid] == best[valid]).all()
    where = valid.view(8, 7).numpy()
    assert where.sum() >= 3
    np.testing.assert_allclose(output.actions[where], expected[where], atol=1e-6)


@pytest.fixture(scope="module")
def models(converted):
    """The converted checkpoints, each loaded once. Do not change them."""
    made = {}

    def get(kind: str, **overrides):
        key = (kind, *overrides.items())
        if key not in made:
            made[key] = load_policy(converted(kind), dtype=torch.float32, **overrides)[0]
        return made[key]

    return get


def training_batch(golden, pixels) -> dict[str, torch.Tensor]:
    """The reference's right-padded batch of two."""
    tensors = golden[1]
    names = ("input_ids", "labels", "proprio", "actions")
    batch = {name: tensors[f"train.{name}"] for name in names} | {"pixel_values": pixels}
    return batch | {"attention_mask": tensors["train.attention_mask"].long()}


def assert_gradients(model, golden, run: str, names: dict[str, str]) -> None:
    """Gradients kept whole in the goldens, by the reference's name and ours."""
    parameters = dict(model.named_parameters())
    for theirs, ours in names.items():
        expected = golden[1][f"{run}.grad.{theirs}"]
        assert ((parameters[ours].grad - expected).norm() / expected.norm()).item() < 1e-5, ours


GRADIENTS = {
    "proprio.fc1.weight": "proprio_projector.fc1.weight",
    "vla.projector.fc1.weight": "projector.fc1.weight",
    "vla.projector.fc2.bias": "projector.fc2.bias",
    "vla.language_model.model.layers.0.self_attn.q_proj.weight": (
        "language_model.model.layers.0.self_attn.q_proj.weight"
    ),
}


def test_training_l1(models, golden, pixels):
    model, record = models("l1"), golden[0]["runs"]["train_l1"]
    model.zero_grad()
    output = model(**training_batch(golden, pixels))
    assert output.logits is None
    assert output.loss.item() == pytest.approx(record["loss"], rel=2e-6)
    assert_close(output.head_predictions.detach(), golden[1]["train_l1.pred"])
    output.loss.backward()
    assert_gradients(model, golden, "train_l1", GRADIENTS | {"head.model.fc1.weight": "action_head.model.fc1.weight"})
    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    prefixes = {"vla.": "", "head.": "action_head.", "proprio.": "proprio_projector."}
    for name, norm in record["grad_norms"].items():
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        gradient = own.pop(name.replace(prefix, prefixes[prefix], 1))
        assert (gradient is None) if norm is None else gradient.norm().item() == pytest.approx(norm, rel=2e-5), name
    assert all(gradient is None for gradient in own.values())


def test_training_discrete(models, golden, pixels):
    model = models("l1", head_type="tokens")
    model.zero_grad()
    batch = training_batch(golden, pixels)
    del batch["actions"]
    output = model(**batch)
    assert output.logits.shape == (2, 57, 32064)
    assert output.loss.item() == pytest.approx(golden[0]["runs"]["train_discrete"]["loss"], rel=2e-6)
    output.loss.backward()
    assert_gradients(model, golden, "train_discrete", GRADIENTS)


def test_training_diffusion(models, golden, pixels):
    """One denoising step; the times are those of the reference's stored time embeddings."""
    model = models("diffusion")
    model.zero_grad()
    noise, time = golden[1]["train_diffusion.noise"], torch.tensor([8.0, 14.0])
    head = model.action_head
    assert_close(head.embed_time(time, 32), golden[1]["train_diffusion.t_emb"][:, 0])
    assert_close(head.corrupt(golden[1]["train.actions"], noise, time)[0], golden[1]["train_diffusion.noisy_actions"])
    output = model(**training_batch(golden, pixels), noise=noise, time=time)
    assert_close(output.head_predictions.detach(), golden[1]["train_diffusion.noise_pred"])
    assert output.loss.item() == pytest.approx(golden[0]["runs"]["train_diffusion"]["loss"], rel=2e-6)
    output.loss.backward()
    names = {
        "diff.noise_predictor.mlp_resnet.fc1.weight": "action_head.noise_predictor.mlp_resnet.fc1.weight",
        "nap.fc1.weight": "noisy_action_projector.fc1.weight",
    }
    assert_gradients(model, golden, "train_diffusion", GRADIENTS | names)


def test_training_film(models, golden, pixels):
    """
    The longest row; the reference's mean over the text counts the padding of the other, whose action would depend on
    its neighbours.
    """
    with torch.no_grad():
        predictions = models("film")(**training_batch(golden, pixels)).head_predictions
    assert_close(predictions[1], golden[1]["train_film_l1.pred"][1])


def test_noise_schedule(models, golden):
    from importlib import import_module

    head = models("diffusion").action_head
    signal_left = import_module(type(head).__module__).signal_left
    assert torch.equal(signal_left(50), golden[1]["diffusion.alphas_cumprod"])
    for steps in (10, 50):
        times = [time for time, _ in head.schedule(steps)]
        kept = golden[1].get(f"diffusion.timesteps{steps}")
        assert times == kept.tolist()
    # Where they do not divide the levels, as `timestep_spacing="leading"` of the reference's scheduler.
    assert [time for time, _ in head.schedule(20)] == list(range(38, -1, -2))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_changes_nothing(converted, golden, pixels, implementation, padding_side):
    """Rows of a padded batch, FiLM included, act as they do alone, whatever computes the attention."""
    model, _ = load_policy(converted("film"), dtype=torch.float32, attn_implementation=implementation)
    ids = golden[1]["input_ids"]
    shorter = torch.cat([ids[:, :9], ids[:, 12:]], dim=1)
    fill, side = ids.new_full((1, 3), 32000), padding_side == "left"
    padded = torch.cat([fill, shorter] if side else [shorter, fill], dim=1)
    proprio = golden[1]["train.proprio"]
    batch = model.predict_action(input_ids=torch.cat([ids, padded]), pixel_values=pixels, proprio=proprio)
    assert batch.shape == (2, 8, 7)
    for row, row_ids in enumerate((ids, shorter)):
        single = {"pixel_values": pixels[row : row + 1], "proprio": proprio[row : row + 1]}
        np.testing.assert_allclose(batch[row], model.predict_action(input_ids=row_ids, **single), atol=2e-5)


def test_converted_repository(converted):
    """One complete repository, whose configuration and processor know what the files knew."""
    directory = converted("film_lora")
    config = json.loads((directory / "config.json").read_text())
    expected = {
        "attention_mode": "bidirectional",
        "head_type": "l1",
        "chunk_size": 8,
        "action_dim": 7,
        "proprio_dim": 8,
        "use_proprio": True,
        "use_film": True,
        "num_images": 2,
        "norm_type": "bounds_q99",
        "append_stop_token": True,
    }
    assert {name: config[name] for name in expected} == expected
    processor = json.loads((directory / "processor_config.json").read_text())
    assert (processor["chunk_size"], processor["num_images"], processor["use_proprio"]) == (8, 2, True)
    assert not list(directory.glob("*.pt"))
    assert not any("lora_" in name for name in load_file(directory / "model.safetensors"))


def test_state_is_normalized_as_published(converted, golden):
    _, processor = load_policy(converted("l1"), dtype=torch.float32)
    state = processor.normalize_state(golden[1]["proprio_raw"].numpy())
    np.testing.assert_allclose(state[0], golden[1]["proprio_norm"], atol=1e-6)


class TestConversion:
    @pytest.fixture
    def published(self, tmp_path):
        return make_published(tmp_path / "published", "l1")

    def test_lora_alpha_of_the_adapter(self, published, tmp_path):
        """Where the repository has the adapter's settings, they are followed."""
        from oft_checkpoint import read_component

        path = OFT / "ckpt" / "film_lora" / FILM
        name = "vision_backbone.featurizer.blocks.0.block.attn.qkv"
        default, doubled = (read_component(path, alpha)[f"{name}.weight"] for alpha in (None, 32))
        base = torch.load(path, weights_only=True)[f"{name}.base_layer.weight"].float()
        torch.testing.assert_close(doubled - base, 2 * (default - base))

    @pytest.mark.parametrize(
        "options, message",
        [
            (OFTOptions(), "give --num_images, and --chunk_size or --platform"),
            (OFTOptions(platform="libero"), "give --num_images"),
            (OFTOptions(num_images=2), "give --num_images, and --chunk_size or --platform"),
            (OFTOptions(platform="aloha", num_images=3), "has {'action_dim': 7, 'proprio_dim': 8}, other than the pl"),
            (OFTOptions(platform="pr2", num_images=1), "'pr2' is not known"),
            (OFTOptions(num_images=2, chunk_size=8), "give --norm_type or --platform"),
        ],
    )
    def test_nothing_is_guessed(self, published, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            convert(published, tmp_path / "out", oft=options)

    def test_an_adapter_that_is_no_pair(self):
        """Half of one, or what DoRA has beside it, is nothing that could be merged."""
        from oft_checkpoint import merge_lora

        tensors = torch.load(OFT / "ckpt" / "film_lora" / FILM, weights_only=True)
        half = next(name for name in tensors if name.endswith("attn.qkv.lora_A.default.weight"))
        magnitude = half.replace("lora_A", "lora_magnitude_vector")
        without = {name: tensor for name, tensor in tensors.items() if name != half}
        for wrong in (without, tensors | {magnitude: tensors[half]}):
            with pytest.raises(ValueError, match=r"adapter is not whole, or not plain LoRA: .*attn\.qkv"):
                merge_lora(wrong, None)

    def test_two_files_of_one_component(self, published, tmp_path):
        shutil.copy(published / HEAD, published / "action_head--50000_checkpoint.pt")
        with pytest.raises(ValueError, match=r"Both action_head--50000_checkpoint\.pt and action_head--latest"):
            convert(published, tmp_path / "out", oft=LIBERO)

    def test_tensors_must_fit(self, published, tmp_path):
        tensors = torch.load(published / HEAD, weights_only=True)
        tensors["module.model.fc3.weight"] = tensors.pop("module.model.fc1.bias")
        torch.save(tensors, published / HEAD)
        with pytest.raises(ValueError, match=r"1 missing: action_head.model.fc1.bias; 1 not of this model"):
            convert(published, tmp_path / "out", oft=LIBERO)

    def test_pickled_objects_are_not_loaded(self, published, tmp_path):
        torch.save({"module.model.fc1.weight": Path("x")}, published / HEAD)
        with pytest.raises(ValueError, match="not a file of tensors alone and is not loaded"):
            convert(published, tmp_path / "out", oft=LIBERO)


class TestDialects:
    """Checkpoints of reinforcement learning on OpenVLA-OFT, whose tokens one pass predicts; no files beside them."""

    @pytest.fixture
    def published(self, tmp_path):
        directory = make_published(tmp_path / "published", "l1")
        for name in (HEAD, PROPRIO):
            (directory / name).unlink()
        return directory

    @pytest.mark.parametrize("stop_token", [True, False])
    def test_tokens_in_one_pass(self, published, tmp_path, golden, pixels, stop_token):
        """With the stop token (official, SimpleVLA-RL) or without (RLinf), by one forward over all embeddings."""
        options = OFTOptions(platform="libero", num_images=1, stop_token=stop_token)
        convert(published, tmp_path / "out", dtype="float32", oft=options)
        model, _ = load_policy(tmp_path / "out")
        assert (model.config.head_type, model.config.append_stop_token) == ("tokens", stop_token)
        ids, image = golden[1]["input_ids"], pixels[:1, :6]
        output = model.predict_action(input_ids=ids, pixel_values=image, return_dict=True)
        assert output.token_ids.shape == (1, 56)
        assert output.probabilities.shape == (1, 56, 256)

        embed = model.get_input_embeddings()
        prompt = embed(torch.cat([ids, torch.tensor([[29871]])], dim=1))
        zeros, stop = torch.zeros(1, 56, prompt.shape[-1]), embed(torch.tensor([[2] if stop_token else []]).long())
        parts = [prompt[:, :1], model.get_image_features(image), prompt[:, 1:], zeros, stop]
        sequence = torch.cat(parts, dim=1)
        everything = torch.zeros(1, 1, sequence.shape[1], sequence.shape[1])
        with torch.no_grad():
            hidden = model.get_decoder()(inputs_embeds=sequence, attention_mask=everything).last_hidden_state
            start = 256 + ids.shape[1]
            logits = model.get_output_embeddings()(hidden[:, start : start + 56])[..., 31744:32000]
        assert (logits.argmax(dim=-1) + 31744).tolist() == output.token_ids.tolist()

    def test_sampling_with_temperature(self, published, tmp_path, golden, pixels):
        convert(published, tmp_path / "out", oft=OFTOptions(platform="libero", num_images=1))
        model, _ = load_policy(tmp_path / "out", dtype=torch.float32)
        inputs = {"input_ids": golden[1]["input_ids"], "pixel_values": pixels[:1, :6]}
        draws = [
            model.predict_action(
                **inputs, do_sample=True, temperature=1.6, generator=torch.Generator().manual_seed(seed)
            )
            for seed in (0, 0, 1)
        ]
        np.testing.assert_array_equal(draws[0], draws[1])
        assert not np.array_equal(draws[0], draws[2])
