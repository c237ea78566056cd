# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""One policy for several robots: the adapter that tells them apart, and actions of different dimension."""

import copy

import numpy as np
import pytest
import torch
from conftest import TINY_POLICY
from load_policy import load_policy
from safetensors.torch import load_file
from test_action_heads import make_config, make_policy, noise_image



CHUNK = 2
PARALLEL = {"attention_mode": "bidirectional", "chunk_size": CHUNK}
# Of every way to speak of actions: what makes it.
KINDS = {
    "causal": {"chunk_size": CHUNK},
    "tokens": PARALLEL,
    "l1": PARALLEL | {"head_type": "l1"},
    "diffusion": PARALLEL | {"head_type": "diffusion", "diffusion_steps": 10, "num_inference_steps": 3},
    "flow": PARALLEL | {"head_type": "flow", "num_inference_steps": 3},
    "fast": {"chunk_size": CHUNK, "head_type": "fast"},
}
HEADS = ("l1", "diffusion", "flow")
ROBOTS = ["arm", "other_arm"]
IMAGES = [noise_image(row) for row in range(3)]
INSTRUCTIONS = ["pick up the cube", "put the blue cylinder into the bowl on the left", "push it"]


def block(size: int, low: float, high: float) -> dict:
    bounds = {"q01": [low] * size, "q99": [high] * size, "min": [low] * size, "max": [high] * size}
    return bounds | {"mean": [0.0] * size, "std": [1.0] * size}


def statistics(**sizes: int) -> dict[str, dict]:
    """Of datasets with actions of so many numbers, in [-1, 1], and twice as many in a state."""
    return {
        name: {"action": block(size, -1.0, 1.0), "proprio": block(2 * size, -1.0, 1.0)} for name, size in sizes.items()
    }


ALIKE = statistics(arm=3, other_arm=3)
# A single arm and a bimanual robot.
UNLIKE = statistics(arm=7, two_arms=14)


@pytest.fixture(scope="module")
def fast_tokenizer():
    from load_policy import repository_class

    return repository_class("FastTokenizer").fit(np.random.default_rng(0).uniform(-1, 1, (500, CHUNK, 3)))


@pytest.fixture
def make(fast_tokenizer):
    """Makes a policy of a kind, with large random weights, and its processor."""

    def make(kind: str, norm_stats: dict = ALIKE, **overrides):
        fields = dict(KINDS[kind])
        if kind in (*HEADS, "fast"):
            fields["action_dim"] = max(len(each["action"]["q01"]) for each in norm_stats.values())
        if kind == "fast":
            fields |= fast_tokenizer.config_fields
        model, processor = make_policy(norm_stats=copy.deepcopy(norm_stats), **fields, **overrides)
        if kind == "fast":
            model.fast_tokenizer = processor.fast_tokenizer = fast_tokenizer
        return model, processor

    return make


def with_fresh_adapter(model, robots=ROBOTS):
    """The same weights in a policy with a new adapter."""
    config = copy.deepcopy(model.config)
    config.embodiments = list(robots)
    torch.manual_seed(1)
    adapted = type(model)(config).eval()
    missing, surplus = adapted.load_state_dict(model.state_dict(), strict=False)
    assert missing and not surplus and all(name.startswith("embodiment_adapter.") for name in missing)
    adapted._fast_tokenizer = model._fast_tokenizer
    return adapted


def stir(model) -> None:
    """Let the adapter do something."""
    torch.manual_seed(2)
    torch.nn.init.normal_(model.embodiment_adapter.up.weight)


def noise_for(model, rows: int) -> dict[str, torch.Tensor]:
    if not model.config.is_denoising:
        return {}
    shape = (rows, CHUNK, model.config.action_dim)
    return {"noise": torch.randn(shape, generator=torch.Generator().manual_seed(7))}


def observations(processor, rows=slice(None), **kwargs):
    return processor(instruction=INSTRUCTIONS[rows], images=IMAGES[rows], **kwargs)


class TestAdapter:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_fresh_one_is_the_identity_to_the_bit(self, make, kind):
        model, processor = make(kind)
        adapted, inputs = with_fresh_adapter(model), observations(processor)
        assert len(set(model.state_dict()) ^ set(adapted.state_dict())) == 6
        for key in (*ROBOTS, [ROBOTS[0], ROBOTS[1], ROBOTS[0]]):
            outputs = [
                each.predict_action(**inputs, unnorm_key=key, **noise_for(each, 3), return_dict=True)
                for each in (model, adapted)
            ]
            np.testing.assert_array_equal(outputs[0].actions, outputs[1].actions)
            if kind in ("causal", "tokens", "fast"):
                assert torch.equal(outputs[0].probabilities, outputs[1].probabilities)
        actions = np.random.default_rng(3).uniform(-0.9, 0.9, (3, CHUNK, 3))
        batch = observations(processor, actions=actions, unnorm_key=ROBOTS[0])
        losses = []
        for each in (model, adapted):
            torch.manual_seed(4)
            robot = {} if each is model else {"embodiment": torch.tensor([0, 1, 0])}
            losses.append(each(**batch, **robot).loss)
        assert torch.equal(*losses)

    @pytest.mark.parametrize("kind", KINDS)
    def test_each_row_is_its_robots(self, make, kind):
        """In a batch as alone, and the robots differ."""
        model, processor = make(kind, embodiments=ROBOTS)
        stir(model)
        noise = noise_for(model, 3)
        keys = [ROBOTS[0], ROBOTS[1], ROBOTS[0]]
        mixed = model.predict_action(**observations(processor), unnorm_key=keys, **noise)
        alone = {key: model.predict_action(**observations(processor), unnorm_key=key, **noise) for key in ROBOTS}
        for row, key in enumerate(keys):
            np.testing.assert_allclose(mixed[row], alone[key][row], atol=1e-5)
        assert not np.allclose(*alone.values(), atol=0.05)

    def test_generation_knows_the_robot(self, make):
        model, processor = make("causal", embodiments=ROBOTS)
        stir(model)
        inputs = observations(processor, slice(0, 1))
        texts = [
            model.generate(**inputs, embodiment=torch.tensor([row]), max_new_tokens=8, do_sample=False).tolist()
            for row in (0, 0, 1)
        ]
        assert texts[0] == texts[1] != texts[2]

    @pytest.mark.parametrize("kind", KINDS)
    def test_all_of_it_learns(self, make, kind):
        """The robots that a batch lacks get a gradient, too, of zeros: DDP waits for one."""
        model, processor = make(kind, embodiments=ROBOTS)
        stir(model)
        actions = np.random.default_rng(3).uniform(-0.9, 0.9, (3, CHUNK, 3))
        batch = observations(processor, actions=actions, unnorm_key="other_arm")
        assert batch["embodiment"].tolist() == [1, 1, 1]
        model(**batch).loss.backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        absent, present = (embedding.weight.grad for embedding in model.embodiment_adapter.embeddings)
        assert not absent.any()
        assert present.all()

    def test_in_float32_beside_16_bits(self, make):
        model, processor = make("l1", embodiments=ROBOTS)
        stir(model)
        inputs = observations(processor)
        expected = model.predict_action(**inputs, unnorm_key="arm")
        model.bfloat16().embodiment_adapter.float()
        rounded = model.predict_action(**inputs, unnorm_key="arm")
        assert np.abs(rounded - expected).mean() < 0.1 * np.abs(expected).mean()

    def test_refused(self, make):
        model, processor = make("causal", embodiments=ROBOTS)
        inputs = observations(processor)
        with pytest.raises(ValueError, match=r"hold 2 datasets; pass `unnorm_key`, one of \['arm', 'other_arm'\]"):
            model.predict_action(**inputs)
        with pytest.raises(ValueError, match=r"'hand'` is not in the statistics; they hold \['arm', 'other_arm'\]"):
            model.predict_action(**inputs, unnorm_key=["arm", "hand", "arm"])
        with pytest.raises(ValueError, match=r"needs `embodiment`, the place of each row's robot in \['arm', 'other"):
            model(**inputs)
        with pytest.raises(ValueError, match=r"`embodiment` must be of shape \(3,\), got \(2,\)"):
            model(**inputs, embodiment=torch.tensor([0, 1]))
        with pytest.raises(ValueError, match=r"must hold places in \['arm', 'other_arm'\], got \[0, 1, 2\]"):
            model(**inputs, embodiment=torch.tensor([0, 1, 2]))
        model.norm_stats = processor.norm_stats = statistics(arm=3, hand=3)
        unknown = r"tells the robots \['arm', 'other_arm'\] apart \(`embodiments`\), not \['hand'\]"
        with pytest.raises(ValueError, match=unknown):
            model.predict_action(**inputs, unnorm_key="hand")
        with pytest.raises(ValueError, match=unknown):
            observations(processor, actions=np.zeros((3, CHUNK, 3)), unnorm_key=["arm", "hand", "hand"])
        without, _ = make("causal")
        with pytest.raises(ValueError, match=r"tells no robots apart \(`embodiments=None`\)"):
            without(**inputs, embodiment=torch.tensor([0, 1, 0]))

    @pytest.mark.parametrize("embodiments", [[], "arm", ["arm", "arm"], ["arm", 3], ("arm",)])
    def test_no_list_of_names(self, embodiments):
        with pytest.raises(ValueError, match="`embodiments` must be a list of different names of datasets"):
            make_config(embodiments=embodiments)
        with pytest.raises(ValueError, match="`embodiment_adapter_dim` must be a positive integer, got 0"):
            make_config(embodiments=ROBOTS, embodiment_adapter_dim=0)


class TestSaving:
    def test_round_trip(self, make, tmp_path):
        model, processor = make("l1", embodiments=ROBOTS, embodiment_adapter_dim=5)
        stir(model)
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        again, loaded = load_policy(tmp_path)
        assert (again.config.embodiments, again.config.embodiment_adapter_dim) == (ROBOTS, 5)
        assert loaded.embodiments == ROBOTS
        inputs = observations(loaded)
        for key in ROBOTS:
            np.testing.assert_array_equal(
                again.predict_action(**inputs, unnorm_key=key), model.predict_action(**inputs, unnorm_key=key)
            )

    @pytest.mark.parametrize("kind", ["causal", "flow"])
    def test_another_robot_leaves_the_others_to_the_bit(self, make, tmp_path, kind):
        model, processor = make(kind, embodiments=ROBOTS)
        stir(model)
        model.save_pretrained(tmp_path / "two")
        processor.save_pretrained(tmp_path / "two")
        robots = [*ROBOTS, "new"]
        more, loaded = load_policy(tmp_path / "two", changes={"embodiments": robots})
        assert loaded.embodiments == robots
        weights, added = model.state_dict(), more.state_dict()
        assert set(added) - set(weights) == {"embodiment_adapter.embeddings.2.weight"}
        assert all(torch.equal(added[name], tensor) for name, tensor in weights.items())
        assert added["embodiment_adapter.embeddings.2.weight"].std() > 0.5
        inputs, noise = observations(loaded), noise_for(model, 3)
        before, after = (each.predict_action(**inputs, unnorm_key=ROBOTS[1], **noise) for each in (model, more))
        np.testing.assert_array_equal(before, after)
        more.save_pretrained(tmp_path / "three")
        stored = load_file(tmp_path / "three" / "model.safetensors")
        assert all(torch.equal(stored[name], tensor) for name, tensor in weights.items())

    def test_a_policy_without_it_has_nothing_of_it(self, policy):
        model, processor = policy
        assert (model.config.embodiments, model.embodiment_adapter, processor.embodiments) == (None, None, None)
        assert set(model.state_dict()) == set(load_file(TINY_POLICY / "model.safetensors"))


def overfit(model, batch: dict[str, torch.Tensor], steps: int) -> float:
    """Loss after so many steps on one batch."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return model(**batch).loss.item()


class TestContradiction:
    """Two robots are to do the opposite, for the same picture and the same words."""

    ACTIONS = np.array([[[0.5, -0.5, 0.25]] * CHUNK, [[-0.5, 0.5, -0.25]] * CHUNK])

    def learn(self, make, kind: str, steps: int, **overrides):
        model, processor = make(kind, **overrides)
        same = {"instruction": [INSTRUCTIONS[0]] * 2, "images": [IMAGES[0]] * 2}
        loss = overfit(model, processor(**same, actions=self.ACTIONS, unnorm_key=ROBOTS), steps)
        return loss, model.predict_action(**processor(**same), unnorm_key=ROBOTS)

    @pytest.mark.parametrize("kind, steps", [("causal", 60), ("tokens", 60), ("l1", 150), ("fast", 60)])
    def test_the_adapter_tells_them_apart(self, make, kind, steps):
        _, actions = self.learn(make, kind, steps, embodiments=ROBOTS)
        assert np.abs(actions - self.ACTIONS).max() < 0.1
        loss, actions = self.learn(make, kind, steps)
        np.testing.assert_allclose(actions[0], actions[1], atol=1e-5)
        assert np.abs(actions - self.ACTIONS).max() > 0.2
        # Where one action is to be two: the best guess of tokens, and of a number.
        assert loss > (0.2 if kind == "l1" else 0.1)


class TestDimensions:
    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fast"])
    @pytest.mark.parametrize("adapter", [{}, {"embodiments": ["arm", "two_arms"]}])
    def test_each_robot_has_its_own(self, make, kind, adapter):
        model, processor = make(kind, UNLIKE, **adapter)
        inputs = observations(processor)
        for key, size in (("arm", 7), ("two_arms", 14)):
            output = model.predict_action(**inputs, unnorm_key=key, return_dict=True)
            assert output.actions.shape == output.normalized_actions.shape == (3, CHUNK, size)
            if kind in ("causal", "tokens"):
                assert output.token_ids.shape == (3, CHUNK * size)
        with pytest.raises(ValueError, match=r"same action dimension, got {'arm': 7, 'two_arms': 14}"):
            model.predict_action(**inputs, unnorm_key=["arm", "two_arms", "arm"])
