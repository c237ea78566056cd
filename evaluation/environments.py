"""
Environments that a policy can be rolled out in.

Each is a `gymnasium.Env` in OpenVLA's terms; those of other benchmarks become so in an adapter, which holds the
benchmark's conventions: its cameras, units and frames, the gripper's sign, the limit of steps, the rules of success.

- `reset(seed=, options={"task": name})` sets a scene up; equal seeds give equal scenes.
- Observation: a dictionary with `image` (uint8, (H, W, 3), the main camera, the way up that policies are trained on),
  `instruction` (str) and, where there are any, `wrist_image` (uint8) and `state` (float32, (S,)).
- Action: float32 (7,), as a policy trained on the benchmark's data predicts it: displacement x, y, z, rotation
  (roll, pitch, yaw or a rotation vector), gripper from 0 (closed) to 1 (open).
- `info["outcome"]` after each step: None while the episode runs, then `success`, `timeout` or another kind of failure.
- `render()`: uint8 (H, W, 3) for people to look at.
- `tasks`: the names that `options` takes. `metadata["render_fps"]`: actions per second.
- `configure_policy(policy)`, where there is one, is called with a [`ModelPolicy`] before it is rolled out: a
  benchmark's protocol can say how pixels are made, and the processor makes them.
"""

import importlib
from dataclasses import dataclass, field
from typing import Any

import gymnasium


TABLETOP = "tabletop:Tabletop-v0"
# How the ids of benchmarks start that have an adapter, and its module. It is imported when it is asked for, since it
# needs packages of its own. Its function `make(name, cameras=, max_steps=, ...)` takes the names of the pictures that
# are looked at, and the actions before `timeout` where the benchmark's own number is not wanted.
ADAPTERS = {
    "robosuite": "evaluation.robosuite_adapter",
    "libero": "evaluation.libero_adapter",
    "simpler": "evaluation.simpler_adapter",
}


@dataclass(frozen=True)
class Environment:
    """
    Which environment to make, any number of times.

    Args:
        id (`str`): A Gymnasium id, with its module where one must be imported (`tabletop:Tabletop-v0`), or an id with
            a prefix of `ADAPTERS`.
        adapter (`str`, *optional*): `module:Class` of a `gymnasium.Wrapper` around the Gymnasium id.
        arguments (`dict[str, Any]`): For the environment's constructor.
    """

    id: str = TABLETOP
    adapter: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def make(self) -> gymnasium.Env:
        """
        A new environment.

        Raises:
            ValueError: If the id is unknown, its package or graphics library is missing, or what it gives is not in
                OpenVLA's terms.
        """
        try:
            env = self._make()
        except (gymnasium.error.Error, ImportError, AttributeError, TypeError, RuntimeError) as error:
            raise ValueError(f"The environment {self.id!r} cannot be made: {error}") from error
        missing = [] if env.has_wrapper_attr("tasks") else ["`tasks`"]
        if "render_fps" not in env.metadata:
            missing.append('`metadata["render_fps"]`')
        if missing:
            env.close()
            raise ValueError(f"The environment {self.id!r} has no {' and no '.join(missing)}; it needs an adapter.")
        return env

    def _make(self) -> gymnasium.Env:
        prefix, _, name = self.id.partition(":")
        if self.adapter is None and prefix in ADAPTERS:
            return importlib.import_module(ADAPTERS[prefix]).make(name, **self.arguments)
        env = gymnasium.make(self.id, disable_env_checker=True, **self.arguments)
        if self.adapter is None:
            return env
        module, _, class_name = self.adapter.partition(":")
        return getattr(importlib.import_module(module), class_name)(env)
