"""
The whole loop in one command: load the policy, look at a picture, act, measure.

    python tools/demo.py --output_dir demo
"""

import argparse
import json
import sys
import time
from pathlib import Path

from evaluate_policy import REPOSITORY
from evaluate_policy import main as evaluate_policy
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from robot_data.episode import dimension_names
from tabletop.environment import TabletopEnv
from tabletop.scene import HELD_OUT


UNITS = ("m", "m", "m", "rad", "rad", "rad", "0 closed, 1 open")
SCENE = 100_000  # apart from the seeds of the rollouts


def load(source: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """As every user of the Hub does it."""
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True, dtype="auto").eval()
    return model, processor


def show_action(model: PreTrainedModel, processor: ProcessorMixin, output_dir: Path) -> None:
    """Print what the policy would do in one scene, and how sure it is."""
    side = processor.image_processor.input_sizes[0][-1]
    observation, _ = TabletopEnv(image_size=side, cameras=("image",), hold_out=HELD_OUT).reset(seed=SCENE)
    path = output_dir / "picture.png"
    Image.fromarray(observation["image"]).save(path)
    state = {"state": observation["state"]} if processor.use_proprio else {}
    inputs = processor(instruction=observation["instruction"], images=observation["image"], **state)
    inputs = inputs.to(model.device, dtype=model.dtype)
    began = time.perf_counter()
    output = model.predict_action(**inputs, return_dict=True)
    seconds = time.perf_counter() - began
    print(f"      picture      {path}")
    print(f"      instruction  {observation['instruction']}")
    print(f"      action       in {1000 * seconds:.0f} ms; how likely the chosen interval is, of 256:")
    likely = output.probabilities[0].max(dim=-1).values.tolist()  # (1, D, 256) -> (D,)
    for name, value, unit, share in zip(dimension_names(7), output.actions, UNITS, likely, strict=True):
        print(f"        {name:<8} {value:+.4f} {unit:<18} {share:6.1%}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default=str(REPOSITORY), help="directory or Hub id; by default this repository")
    parser.add_argument("--episodes", type=int, default=10, help="of each task")
    parser.add_argument("--output_dir", type=Path, default=Path("demo"))
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    print(f"[1/3] Loading {arguments.policy} through the Auto classes")
    began = time.perf_counter()
    model, processor = load(arguments.policy)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"      {parameters / 1e6:.1f} million parameters in {time.perf_counter() - began:.1f} s")
    print("[2/3] One picture, one instruction, one action")
    show_action(model, processor, arguments.output_dir)
    print(f"[3/3] {arguments.episodes} episodes of each task on the simulated tabletop, in scenes it has never seen,")
    print(f"      with objects to handle that it has learned (all but: {', '.join(HELD_OUT)})")
    rollouts = {"--policy": arguments.policy, "--episodes": arguments.episodes, "--output_dir": arguments.output_dir}
    rollouts |= {"--seed": SCENE + 1, "--env_arguments": json.dumps({"hold_out": HELD_OUT})}
    flags = [str(part) for flag in rollouts.items() for part in flag]
    status = evaluate_policy([*flags, "--trust_remote_code", "--overwrite"])
    if status == 0:
        print(f"      videos, sheet.png and results.json are in {arguments.output_dir}")
    return status


if __name__ == "__main__":
    sys.exit(main())
