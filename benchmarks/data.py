"""
Speed and memory of the data stream: from a dataset's files to training batches.

    python benchmarks/data.py

Datasets are made up in a temporary folder: pictures of 256 pixels as JPEG in parquet, as H.264 video and as RLDS.
Steps per second are taken after a warm-up, with two worker processes, from the files to the tensors of openvla-7b's
processor (two towers at 224 pixels). Memory is the peak of a process that draws from a buffer of 10,000 steps, less
that of one with a buffer of one step; and that of one that makes the statistics of a million steps. `--output FILE`
stores the result.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from load_policy import REPOSITORY, repository_class
from preprocessing import machine
from synthetic_data import write_lerobot, write_rlds

from robot_data.augmentation import Augmentation
from robot_data.collation import Collator
from robot_data.loader import StepLoader
from robot_data.mixture import Part
from robot_data.sources import open_source
from robot_data.standardize import config_for
from robot_data.stream import StepStream


SIDE = 256
MEANS = [[0.484375, 0.455078125, 0.40625], [0.5, 0.5, 0.5]]
STDS = [[0.228515625, 0.2236328125, 0.224609375], [0.5, 0.5, 0.5]]
RLDS_ENTRY = {
    "cameras": {"primary": "observation/image"},
    "action": "action",
    "state": "observation/state",
}


def make_processor(names: list[str]) -> Any:
    """The small policy's processor with openvla-7b's pictures and made-up statistics."""
    processor = repository_class("OpenVLAProcessor").from_pretrained(REPOSITORY)
    processor.image_processor = repository_class("OpenVLAImageProcessor")(
        use_fused_vision_backbone=True, image_resize_strategy="resize-naive", means=MEANS, stds=STDS
    )
    processor.norm_stats = dict.fromkeys(names, processor.norm_stats["tabletop"])
    return processor


def make_stream(path: Path, **options: Any) -> StepStream:
    source = open_source(path, name=path.name)
    entry = RLDS_ENTRY if path.name == "rlds" else None
    return StepStream([Part(source, config_for(path.name, source.columns, source.images, entry))], **options)


def steps_per_second(path: Path, augmentation: Augmentation | None, batches: int, batch_size: int = 32) -> float:
    """Median over stretches of ten batches."""
    collator = Collator(make_processor([path.name]), augmentation=augmentation)
    stream = make_stream(path, buffer_steps=500)
    # This process was spawned, and so would be its workers: torch 2.13's abort as they end.
    loader = StepLoader(stream, batch_size, collator, num_workers=2, multiprocessing_context="fork")
    iterator = iter(loader)
    for _ in range(20):
        next(iterator)
    rates = []
    for _ in range(batches // 10):
        start = time.perf_counter()
        for _ in range(10):
            next(iterator)
        rates.append(10 * batch_size / (time.perf_counter() - start))
    return statistics.median(rates)


def peak_of_drawing(path: Path, buffer_steps: int) -> float:
    """Peak memory of this process in MiB, after as many steps as the buffer holds."""
    stream = iter(make_stream(path, buffer_steps=buffer_steps))
    for _ in range(buffer_steps):
        next(stream)
    return peak_memory()


def measure_statistics(path: Path) -> tuple[float, float]:
    """Seconds, and this process's peak memory in MiB beyond what it began with."""
    from robot_data.statistics import compute_statistics

    before, start = peak_memory(), time.perf_counter()
    source = open_source(path, name=path.name)
    compute_statistics(source, config_for(path.name, source.columns, source.images))
    return time.perf_counter() - start, peak_memory() - before


def peak_memory() -> float:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(folder: Path, batches: int) -> dict[str, float]:
    """Figures by what was measured."""
    datasets = {
        "parquet": write_lerobot(folder / "parquet", 60, 100, SIDE),
        "video": write_lerobot(folder / "video", 60, 100, SIDE, video=True),
        "rlds": write_rlds(folder / "rlds", 60, 100, SIDE),
    }
    figures = {}
    for kind, path in datasets.items():
        for name, augmentation in (("", None), (", augmented", Augmentation())):
            figures[f"steps per second, {kind}{name}"] = in_new_process(steps_per_second, path, augmentation, batches)
    large = write_lerobot(folder / "buffer", 250, 100, SIDE)
    peaks = [in_new_process(peak_of_drawing, large, size) for size in (1, 10_000)]
    figures["MiB of a buffer of 10,000 steps"] = peaks[1] - peaks[0]
    million = write_lerobot(folder / "million", 5_000, 200)
    seconds, peak = in_new_process(measure_statistics, million)
    return figures | {"seconds for statistics of 1,000,000 steps": seconds, "MiB of these statistics": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=100, help="of 32 steps, for each rate")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), arguments.batches)
    for name, value in figures.items():
        print(f"{name:45} {value:8.1f}")
    if arguments.output:
        result = {"machine": {**machine(), "load average": os.getloadavg()[0]}, "figures": figures}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
