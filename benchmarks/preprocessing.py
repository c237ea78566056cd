"""
Cost of turning one 640x480 camera frame into the six-channel tensor of openvla-7b, beside the reference's way.

    python benchmarks/preprocessing.py

The reference converts to RGB and then, for each of the two towers, resizes (PIL, bicubic), crops, converts to a
float tensor and normalises. Here that is written out with the same libraries, checked to give the same pixels to the
bit, and timed in turns with the image processor, so that both see the same machine. The promise is a ratio of at most
0.5. `--output FILE` stores the result.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from load_policy import repository_class


SIDE = 224
MEANS = [[0.484375, 0.455078125, 0.40625], [0.5, 0.5, 0.5]]
STDS = [[0.228515625, 0.2236328125, 0.224609375], [0.5, 0.5, 0.5]]


def reference(frame: Image.Image) -> torch.Tensor:
    """Pixel values (1, 6, S, S), tower by tower."""
    image = frame.convert("RGB")
    towers = []
    for mean, std in zip(MEANS, STDS, strict=True):
        resized = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        cropped = resized.crop((0, 0, SIDE, SIDE))
        levels = torch.from_numpy(np.array(cropped, copy=True)).permute(2, 0, 1).contiguous()  # (3, S, S)
        pixels = levels.to(torch.float32).div(255).clone()  # torchvision's `normalize` works on a copy
        shape = (3, 1, 1)
        towers.append(pixels.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape)))
    return torch.stack([torch.vstack(towers)])


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(repetitions: int) -> dict:
    """Times of both in turns, in milliseconds, with their ratio."""
    frame = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8))
    processor = repository_class("OpenVLAImageProcessor")(
        use_fused_vision_backbone=True,
        image_resize_strategy="resize-naive",
        input_sizes=[(3, SIDE, SIDE)] * 2,
        means=MEANS,
        stds=STDS,
    )
    if not torch.equal(processor(frame)["pixel_values"], reference(frame)):
        raise ValueError("The two ways give different pixels.")
    ways = {"reference": lambda: reference(frame), "image_processor": lambda: processor(frame)}
    times = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, function in ways.items():
            times[name].append(seconds(function) * 1e3)
    summary = {name: summarise(values) for name, values in times.items()}
    ratios = [ours / theirs for ours, theirs in zip(times["image_processor"], times["reference"], strict=True)]
    return {**summary, "ratio": summarise(ratios)}


def summarise(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return {"median": statistics.median(values), "lower_quartile": low, "upper_quartile": high}


def machine() -> dict[str, str | int | None]:
    """What a figure depends on beside the code; Linux names its processor, others their architecture."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "pillow": PIL.__version__}
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    hardware = {"processor": names[0] if names else platform.machine(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        hardware["gpu"] = torch.cuda.get_device_name()
    threads = {"threads": torch.get_num_threads(), "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY")}
    return {**hardware, **threads, **versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=300)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = {
        "command": shlex.join(["python", "benchmarks/preprocessing.py", *sys.argv[1:]]),
        "machine": {**machine(), "load_average": os.getloadavg()[0]},
        **measure(arguments.repetitions),
    }
    print(f"{'':16} {'median':>8} {'quartiles':>17}")
    for name in ("reference", "image_processor", "ratio"):
        row = result[name]
        unit = "" if name == "ratio" else " ms"
        quartiles = f"{row['lower_quartile']:.3f}..{row['upper_quartile']:.3f}"
        print(f"{name:16} {row['median']:8.3f} {quartiles:>17}{unit}")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
