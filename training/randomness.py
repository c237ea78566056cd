"""Random numbers that leave those of training as they are."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import set_seed


@contextmanager
def own_random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """
    Seed the random numbers of Python, numpy and torch; afterwards they go on as if nothing had been drawn.

    Args:
        seed (`int`): Not negative.
        device (`torch.device`): Whose generator counts beside that of the CPU.
    """
    states = random.getstate(), np.random.get_state()
    devices = {} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**(devices or {"devices": []})):
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
