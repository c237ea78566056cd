# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""One policy for several robots: the adapter that tells them apart, and actions of different dimension."""

import copy

import numpy as np
import pytest
import torch
from conftest import TINY_POLICY
from load_policy import load_policy, repository_class
from safetensors.torch import load_file
from test_action_heads import make_config, make_policy, noise_image

from robot_data.collation import Collator
from robot_data.episode import Step


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
        with pytest.raises(ValueError, match="goes with `pixel_values`"):
            model(input_ids=inputs["input_ids"], embodiment=torch.tensor([0, 1, 0]))
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

    def test_fast_tokens_spell_each_dimension(self, make):
        """A chunk of any dimension is a chain of numbers."""
        model, processor = make("fast", statistics(arm=2, other_arm=3))
        for key, size in (("arm", 2), ("other_arm", 3)):
            actions = model.predict_action(**observations(processor), unnorm_key=key)
            assert actions.shape == (3, CHUNK, size)

    @pytest.mark.parametrize("kind", ["causal", "tokens"])
    def test_tokens_are_as_many_as_numbers(self, make, kind):
        """A batch of both robots has the loss of each alone, over all that is learned, however long its rows are."""
        model, processor = make(kind, UNLIKE)
        batch, is_pad = both_robots(processor)
        tokens = [(row != -100).sum().item() for row in batch["labels"]]
        assert tokens == [CHUNK * 7 + 1, CHUNK * 14 + 1, CHUNK * 7 + 1]
        assert not {"actions", "action_dims"} & set(batch)
        with torch.no_grad():
            whole = model(**batch, action_is_pad=is_pad).loss.item()
            alone = [
                model(**part, action_is_pad=is_pad[row : row + 1]).loss.item() for row, part in each_row(processor)
            ]
        learned = np.array([CHUNK * 7 + 1, (CHUNK - 1) * 14 + 1, CHUNK * 7 + 1])
        assert whole == pytest.approx((learned * alone).sum() / learned.sum(), rel=1e-4)

    @pytest.mark.parametrize("kind", HEADS)
    def test_padding_of_a_head_counts_nowhere(self, make, kind):
        """Neither in the loss, nor in its gradients, nor as an item of a batch, nor as noise that others see."""
        model, processor = make(kind, UNLIKE)
        batch, is_pad = both_robots(processor)
        assert batch["action_dims"].tolist() == [7, 14, 7]
        assert not batch["actions"][0, :, 7:].any()
        assert [(row != -100).sum().item() for row in batch["labels"]] == [CHUNK * 14 + 1] * 3
        losses, gradients = [], []
        for rubbish in (0.0, 5.0):
            model.zero_grad()
            torch.manual_seed(5)
            noise = torch.randn(3, CHUNK, 14)
            noise[[0, 2], :, 7:] += rubbish
            actions = batch["actions"].clone()
            actions[[0, 2], :, 7:] += rubbish
            corruption = {"noise": noise, "time": torch.tensor([0.0, 1.0, 1.0])} if kind != "l1" else {}
            loss = model(**{**batch, "actions": actions}, action_is_pad=is_pad, **corruption).loss
            loss.backward()
            losses.append(loss.item())
            gradients.append(model.projector.fc1.weight.grad.clone())
        assert losses[0] == losses[1]
        assert torch.equal(*gradients)
        predictions = model(**batch, **corruption).head_predictions
        with torch.no_grad():
            items = (CHUNK * 7 + 1) * 2 + (CHUNK - 1) * 14 + 1
            shared = model(**batch, action_is_pad=is_pad, **corruption, num_items_in_batch=items).loss
            whole = model(**batch, action_is_pad=is_pad, **corruption).loss
        torch.testing.assert_close(shared, whole)
        if kind == "l1":
            own = [predictions[0, :, :7], predictions[1, :1], predictions[2, :, :7]]
            targets = [batch["actions"][0, :, :7], batch["actions"][1, :1], batch["actions"][2, :, :7]]
            errors = torch.cat([(o - t).abs().flatten() for o, t in zip(own, targets, strict=True)])
            torch.testing.assert_close(whole, errors.mean().detach())

    @pytest.mark.parametrize("kind", ["diffusion", "flow"])
    def test_actions_are_made_of_their_own_noise(self, make, kind):
        model, processor = make(kind, UNLIKE)
        inputs, noise = observations(processor), noise_for(model, 3)["noise"]
        other = noise.clone()
        other[..., 7:] += 3
        narrow, wide = (
            [model.predict_action(**inputs, unnorm_key=key, noise=each) for each in (noise, other)]
            for key in ("arm", "two_arms")
        )
        np.testing.assert_array_equal(*narrow)
        assert not np.allclose(*wide)

    def test_states_are_padded_by_zeros(self, make):
        model, processor = make("l1", UNLIKE, use_proprio=True, proprio_dim=28)
        states = [np.full(14, 0.5), np.full(28, 0.5), np.full(14, -0.5)]
        keys = ["arm", "two_arms", "arm"]
        proprio = observations(processor, state=states, unnorm_key=keys)["proprio"]
        assert proprio.shape == (3, 28)
        for row, state in enumerate(states):
            np.testing.assert_allclose(proprio[row, : len(state)], state)
            assert not proprio[row, len(state) :].any()
        alone = observations(processor, slice(0, 1), state=states[0], unnorm_key="arm")
        assert torch.equal(alone["proprio"], proprio[:1])
        assert model.predict_action(**alone, unnorm_key="arm").shape == (CHUNK, 7)
        with pytest.raises(ValueError, match=r"`state` must be of shape .* got \[\(14,\), \(28,\)\]"):
            observations(processor, state=states[:2], unnorm_key=keys)
        processor.norm_stats = {"arm": processor.norm_stats["arm"]}
        with pytest.raises(ValueError, match=r"states have 28 numbers \(`proprio_dim`\), and \[14\] were given"):
            observations(processor, slice(0, 1), state=states[0], unnorm_key="arm")

    def test_the_collator_mixes_robots(self, make):
        model, processor = make("l1", UNLIKE, embodiments=["arm", "two_arms"])
        sizes = {"two_arms": 14, "arm": 7}
        steps = [
            Step(
                images={"primary": np.zeros((28, 28, 3), np.uint8)},
                instruction="push it",
                action=np.full((CHUNK, size), 0.5, np.float32),
                action_is_pad=np.zeros(CHUNK, dtype=bool),
                state=None,
                dataset=name,
                episode=0,
                frame=0,
            )
            for name, size in sizes.items()
        ]
        batch = Collator(processor)(steps)
        assert batch["embodiment"].tolist() == [1, 0]
        assert batch["action_dims"].tolist() == [14, 7]
        assert torch.isfinite(model(**batch).loss)
        processor.head_type = "tokens"
        batch = Collator(processor)(steps)
        assert batch["embodiment"].tolist() == [1, 0]
        assert [(row != -100).sum().item() for row in batch["labels"]] == [CHUNK * 14 + 1, CHUNK * 7 + 1]

    def test_refused(self, make):
        model, processor = make("l1", UNLIKE)
        batch, _ = both_robots(processor)
        for dims in ([7, 15, 7], [0, 14, 7]):
            with pytest.raises(ValueError, match=r"at most `action_dim`; got .* `action_dim=14`"):
                model(**{**batch, "action_dims": torch.tensor(dims)})
        with pytest.raises(ValueError, match=r"`action_dims` must be of shape \(3,\), got \(2,\)"):
            model(**{**batch, "action_dims": torch.tensor([7, 14])})
        tokens, processor = make("causal", UNLIKE)
        batch, _ = both_robots(processor)
        with pytest.raises(ValueError, match=r"for a head on the hidden states .* `head_type='tokens'`"):
            tokens(**batch, action_dims=torch.tensor([7, 14, 7]))
        with pytest.raises(ValueError, match=r"Rows of one batch need the same action dimension"):
            processor.normalize_actions(robot_actions(), ["arm", "two_arms", "arm"])
        with pytest.raises(ValueError, match=r"statistics are of 14 dimensions, and the values of 7"):
            observations(processor, actions=robot_actions(), unnorm_key="two_arms")
        model.config.norm_stats = statistics(arm=7)
        with pytest.raises(ValueError, match=r"are of 14 numbers .*, the statistics of 7. Those of a robot with"):
            model.predict_action(**observations(processor), unnorm_key="arm")


def robot_actions() -> list[np.ndarray]:
    """Chunks of a single arm, a bimanual robot and the single arm again."""
    rng = np.random.default_rng(6)
    return [rng.uniform(-0.9, 0.9, (CHUNK, size)) for size in (7, 14, 7)]


def both_robots(processor) -> tuple[dict, torch.Tensor]:
    """A batch of both robots, and which of its actions are padding: the last one of the bimanual robot."""
    is_pad = torch.zeros(3, CHUNK, dtype=torch.bool)
    is_pad[1, 1:] = True
    batch = observations(processor, actions=robot_actions(), unnorm_key=["arm", "two_arms", "arm"])
    return dict(batch), is_pad


def each_row(processor):
    """The rows of [`both_robots`], each as a batch of its own."""
    for row, (actions, key) in enumerate(zip(robot_actions(), ["arm", "two_arms", "arm"], strict=True)):
        yield row, observations(processor, slice(row, row + 1), actions=actions, unnorm_key=key)
