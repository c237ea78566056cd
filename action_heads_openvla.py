# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""
Parts that a policy may have beside the published ones: those of OpenVLA-OFT (heads that turn hidden states into
actions, the state's projector, FiLM in the towers), and the adapter that tells several robots apart.
"""

import torch
from torch import nn

from .configuration_openvla import OpenVLAConfig


# Parameters and modules carry the published names, without the `module.` in front of them on disk.


class ZeroLinear(nn.Linear):
    """Starts with zero weights: transformers initialises layer by layer, and knows them by their class."""


class HeadLinear(nn.Linear):
    """Starts with torch's own weights, as published; few inputs would be lost with the language model's small ones."""


class FiLM(nn.Module):
    """
    Feature-wise linear modulation by the instruction, https://arxiv.org/abs/1709.07871: x (1 + scale) + shift. A fresh
    one is the identity.

    Args:
        dim (`int`): Width of the vision tower.
        text_dim (`int`): Width of the instruction's embedding.
    """

    def __init__(self, dim: int, text_dim: int):
        super().__init__()
        self.scale = ZeroLinear(text_dim, dim)
        self.shift = ZeroLinear(text_dim, dim)

    def forward(self, hidden: torch.Tensor, instruction: torch.Tensor) -> torch.Tensor:
        """`hidden` (B, N, D), modulated alike at all N by `instruction` (B, H)."""
        # Beside an adapter these layers train in float32, in towers of 16 bits.
        instruction = instruction.to(self.scale.weight.dtype)
        scale, shift = (layer(instruction).to(hidden.dtype)[:, None] for layer in (self.scale, self.shift))
        return hidden * (1 + scale) + shift  # (B, N, D), by (B, 1, D)


class InputProjector(nn.Module):
    """Numbers of the robot, such as its state (`input_dim` of them) or one noisy action value, to an embedding."""

    def __init__(self, input_dim: int, dim: int):
        super().__init__()
        self.fc1 = HeadLinear(input_dim, dim)
        self.fc2 = HeadLinear(dim, dim)
        self.act = nn.GELU()

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(values.to(self.fc1.weight.dtype))))


class EmbodimentEmbedding(nn.Module):
    """What is learned of one robot; a tensor of its own, so that another robot changes no tensor that there is."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self) -> torch.Tensor:
        return self.weight


class EmbodimentAdapter(nn.Module):
    """
    Tells the policy which robot it drives: a residual bottleneck, https://arxiv.org/abs/1902.00751, with an embedding
    per robot between its layers, x + up(gelu(down(x) + robot)). A fresh one is the identity, to the bit.

    It is applied to the observation, patches and state, where that enters the language model. There it is the same
    for every head and attention, and with a cache all later tokens, FAST ones and the passes of a denoising head
    included, see the robot without being told again; on the last hidden states each of them would need it anew.

    Args:
        text_dim (`int`): Width of the language model.
        dim (`int`): Width of the bottleneck.
        num_embodiments (`int`): How many robots there are.
    """

    def __init__(self, text_dim: int, dim: int, num_embodiments: int):
        super().__init__()
        self.down = HeadLinear(text_dim, dim)
        self.embeddings = nn.ModuleList([EmbodimentEmbedding(dim) for _ in range(num_embodiments)])
        self.act = nn.GELU()
        self.up = ZeroLinear(dim, text_dim)

    def forward(self, features: torch.Tensor, embodiment: torch.LongTensor) -> torch.Tensor:
        """`features` (B, N, H) for the robots with these numbers (B,)."""
        # Stacked, the robots that a batch lacks get gradients of zero, which DDP waits for.
        table = torch.stack([embedding() for embedding in self.embeddings])  # (robots, dim)
        robot = table[embodiment.to(table.device)][:, None]  # (B, 1, dim)
        # Beside an adapter of the weights these layers train in float32, in a model of 16 bits.
        hidden = self.act(self.down(features.to(self.down.weight.dtype)) + robot)  # (B, N, dim)
        return features + self.up(hidden).to(features.dtype)


class MLPResNetBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(dim), HeadLinear(dim, dim), nn.ReLU())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.ffn(hidden)


class MLPResNet(nn.Module):
    """
    From the hidden states of one time step's action positions to its numbers.

    Args:
        dim (`int`): Width of the language model; one time step has `action_dim` hidden states.
        action_dim (`int`): Numbers per action.
    """

    def __init__(self, dim: int, action_dim: int):
        super().__init__()
        self.action_dim = action_dim
        self.layer_norm1 = nn.LayerNorm(action_dim * dim)
        self.fc1 = HeadLinear(action_dim * dim, dim)
        self.act = nn.ReLU()
        self.mlp_resnet_blocks = nn.ModuleList([MLPResNetBlock(dim) for _ in range(2)])
        self.layer_norm2 = nn.LayerNorm(dim)
        self.fc2 = HeadLinear(dim, action_dim)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.to(self.fc1.weight.dtype).unflatten(1, (-1, self.action_dim))  # (B, K * D, H) -> (B, K, D, H)
        hidden = self.act(self.fc1(self.layer_norm1(hidden.flatten(2))))  # (B, K, H)
        for block in self.mlp_resnet_blocks:
            hidden = block(hidden)
        return self.fc2(self.layer_norm2(hidden))  # (B, K, D)


class L1RegressionHead(nn.Module):
    """The normalised actions themselves, trained with the mean absolute error."""

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        self.model = MLPResNet(config.text_config.hidden_size, config.action_dim)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalised actions (B, K, D) of the hidden states (B, K * D, H)."""
        return self.model(hidden)

    def loss(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean absolute error."""
        return nn.functional.l1_loss(prediction.float(), target.float())


class DenoisingHead(nn.Module):
    """
    What diffusion and flow matching share: actions are made of noise in several passes, in which the noisy actions and
    their noise level are inputs of the language model. Times are float32 (B,).
    """

    def loss(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean squared error."""
        return nn.functional.mse_loss(prediction.float(), target.float())

    def draw_time(self, batch_size: int, device: torch.device) -> torch.Tensor:
        """Noise levels to train with, (B,)."""
        raise NotImplementedError

    def corrupt(
        self, actions: torch.Tensor, noise: torch.Tensor, time: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noisy actions, and what is to be predicted from them, both float32 (B, K, D)."""
        raise NotImplementedError

    def schedule(self, num_steps: int) -> list[tuple[float, float]]:
        """Noise levels of the passes, each with the one that its pass leads to."""
        raise NotImplementedError

    def step(self, prediction: torch.Tensor, sample: torch.Tensor, time: float, next_time: float) -> torch.Tensor:
        """`sample` (B, K, D) at the next noise level, from what the pass predicted."""
        raise NotImplementedError

    def embed_time(self, time: torch.Tensor, dim: int) -> torch.Tensor:
        """Sinusoids of the noise levels (B,), float32 (B, `dim`)."""
        return sinusoids(time, dim)


class DiffusionHead(DenoisingHead):
    """
    Predicts the noise in the actions, as a denoising diffusion model (https://arxiv.org/abs/2006.11239) with the
    squared-cosine schedule of https://arxiv.org/abs/2102.09672, and samples as DDIM without added noise
    (https://arxiv.org/abs/2010.02502).

    A time t is a whole number below `diffusion_steps`; with a(t) the part of the signal's variance that is left,
    the noisy actions are sqrt(a) x + sqrt(1 - a) noise.
    """

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        self.num_levels = config.diffusion_steps
        model = MLPResNet(config.text_config.hidden_size, config.action_dim)
        self.noise_predictor = nn.ModuleDict({"mlp_resnet": model})

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Noise (B, K, D) by the hidden states (B, K * D, H)."""
        return self.noise_predictor["mlp_resnet"](hidden)

    def draw_time(self, batch_size: int, device: torch.device) -> torch.Tensor:
        return torch.randint(self.num_levels, (batch_size,), device=device).float()

    def corrupt(
        self, actions: torch.Tensor, noise: torch.Tensor, time: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        left = signal_left(self.num_levels).to(time.device)[time.long(), None, None]  # (B, 1, 1)
        return left.sqrt() * actions.float() + (1 - left).sqrt() * noise.float(), noise.float()

    def schedule(self, num_steps: int) -> list[tuple[float, float]]:
        """
        Levels as far apart as so many steps allow, down to 0, then -1 for "no noise left": the "leading" spacing of
        the reference. Of 50 levels, 10 steps begin at 45 and 5 at 40, as if the noise that they begin with were such a
        level's; 26 to 49 steps take neighbouring levels and begin as low as 25.

        Raises:
            ValueError: If there are more steps than levels, or none.
        """
        if not 1 <= num_steps <= self.num_levels:
            raise ValueError(f"A diffusion head takes 1 to {self.num_levels} steps, got {num_steps}.")
        times = [float(index * (self.num_levels // num_steps)) for index in reversed(range(num_steps))]
        return list(zip(times, [*times[1:], -1.0], strict=True))

    def step(self, prediction: torch.Tensor, sample: torch.Tensor, time: float, next_time: float) -> torch.Tensor:
        left = signal_left(self.num_levels)
        now, then = left[int(time)], left[int(next_time)] if next_time >= 0 else torch.tensor(1.0)
        noise = prediction.float()
        actions = ((sample - (1 - now).sqrt() * noise) / now.sqrt()).clamp(-1, 1)
        return then.sqrt() * actions + (1 - then).sqrt() * noise


class FlowMatchingHead(DenoisingHead):
    """
    Predicts the velocity from noise to actions along straight lines: flow matching, https://arxiv.org/abs/2210.02747,
    with the linear path of https://arxiv.org/abs/2209.03003.

    A time t runs from 0 (noise) to 1 (actions): the noisy actions are (1 - t) noise + t x, and their velocity is
    x - noise. Sampling follows it by Euler steps of the same length.
    """

    # Sinusoids are made for positions in the hundreds.
    time_scale = 1000.0

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        self.model = MLPResNet(config.text_config.hidden_size, config.action_dim)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Velocity (B, K, D) by the hidden states (B, K * D, H)."""
        return self.model(hidden)

    def draw_time(self, batch_size: int, device: torch.device) -> torch.Tensor:
        return torch.rand(batch_size, device=device)

    def corrupt(
        self, actions: torch.Tensor, noise: torch.Tensor, time: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        actions, noise, time = actions.float(), noise.float(), time[:, None, None]  # (B, 1, 1)
        return torch.lerp(noise, actions, time), actions - noise

    def schedule(self, num_steps: int) -> list[tuple[float, float]]:
        """
        Steps of the same length from 0 to 1.

        Raises:
            ValueError: If there are none.
        """
        if num_steps < 1:
            raise ValueError(f"Flow matching takes at least one step, got {num_steps}.")
        return [(index / num_steps, (index + 1) / num_steps) for index in range(num_steps)]

    def step(self, prediction: torch.Tensor, sample: torch.Tensor, time: float, next_time: float) -> torch.Tensor:
        return sample + (next_time - time) * prediction.float()

    def embed_time(self, time: torch.Tensor, dim: int) -> torch.Tensor:
        return sinusoids(self.time_scale * time, dim)


_HEADS = {"l1": L1RegressionHead, "diffusion": DiffusionHead, "flow": FlowMatchingHead}


def make_action_head(config: OpenVLAConfig) -> nn.Module | None:
    """The head that `config.head_type` names; `None` where the language model's tokens are the actions."""
    return _HEADS[config.head_type](config) if config.is_continuous else None


def signal_left(num_levels: int) -> torch.Tensor:
    """
    Part of the signal's variance that is left at each noise level of the squared-cosine schedule, float32 (levels,).

    With f(u) = cos^2((u + 0.008) / 1.008 * pi / 2), each level keeps f((i + 1) / levels) / f(i / levels) of what the
    one before it left, and at least 0.001.
    """
    grid = torch.arange(num_levels + 1, dtype=torch.float64) / num_levels
    curve = torch.cos((grid + 0.008) / 1.008 * torch.pi / 2) ** 2  # (levels + 1,)
    lost = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    return (1 - lost.float()).cumprod(dim=0)


def sinusoids(position: torch.Tensor, dim: int) -> torch.Tensor:
    """Sines and then cosines of `position` (B,) at `dim` / 2 frequencies from 1 to 1 / 10,000, float32 (B, `dim`)."""
    half = dim // 2
    exponents = torch.arange(half, device=position.device) / (half - 1)
    angles = position[:, None].float() * 10_000.0**-exponents  # (B, dim / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


__all__ = ["DiffusionHead", "EmbodimentAdapter", "FlowMatchingHead", "L1RegressionHead", "make_action_head"]
