"""
FAST tokens against 256 bins, on demonstrations of the simulated tabletop: how many tokens an action takes, and what is
lost on the way there and back.

    python benchmarks/fast.py --output benchmarks/results/fast.json

Records episodes, fits a tokenizer on chunks of some, and measures on chunks of the others: the expert's clean action,
and the one that was done, with noise. Actions are clipped to the 1% and 99% quantiles first, as the normalisation
does, so that the errors are the tokens' alone; they are in units of the normalised range [-1, 1], of the dimensions
that move. Those that do not (two rotations) still cost a bin's token each. The gripper is a decision, and counts as
lost where it comes back on the other side of one half.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import numpy as np
import pyarrow.parquet as pq
import tokenizers
from load_policy import repository_class
from preprocessing import machine
from transformers import ProcessorMixin


REPOSITORY = Path(__file__).resolve().parent.parent
KEY = "tabletop"
MASK = [True] * 6 + [False]  # displacements and rotations are normalised, the gripper is not
CHUNK_SIZES = (8, 16)
SCALES = (10, 20, 40)
VOCAB_SIZE = 1024
END = 32000  # of Llama 2's vocabulary, as in openvla-7b


def record(episodes: int, folder: Path) -> Path:
    """A dataset whose pictures are as small as they can be: no one looks at them."""
    command = [sys.executable, "-m", "tabletop.record", "--output", str(folder), "--episodes", str(episodes)]
    subprocess.run([*command, "--image_size", "8"], cwd=REPOSITORY, check=True, capture_output=True)
    return folder


def read_episodes(dataset: Path, column: str) -> list[np.ndarray]:
    """Actions (T, 7) of each episode."""
    table = pq.read_table(dataset / "data", columns=["episode_index", column])
    episodes, actions = table["episode_index"].to_numpy(), np.array(table[column].to_pylist())
    return [actions[episodes == episode] for episode in np.unique(episodes)]


def clip(actions: np.ndarray, statistics: dict) -> np.ndarray:
    return np.where(MASK, np.clip(actions, statistics["q01"], statistics["q99"]), actions)


def cut(episodes: list[np.ndarray], size: int) -> np.ndarray:
    """Chunks (N, K, 7) that begin at every step and end within the episode."""
    return np.stack([episode[t : t + size] for episode in episodes for t in range(len(episode) - size + 1)])


def make_processor(head_type: str, chunk_size: int, statistics: dict) -> ProcessorMixin:
    processor = repository_class("OpenVLAProcessor").from_pretrained(
        REPOSITORY, head_type=head_type, chunk_size=chunk_size, action_token_end=END
    )
    processor.norm_stats = {KEY: {"action": statistics}}
    return processor


def measure(processor: ProcessorMixin, chunks: np.ndarray, statistics: dict) -> dict[str, float]:
    """Tokens per action, the stop token aside, and errors of (N, K, 7)."""
    rows = processor.encode_actions(chunks, KEY)
    decoded = processor.decode_actions(rows if processor.head_type == "fast" else rows.reshape(len(rows), -1), KEY)
    num_tokens = sum(np.size(row) for row in rows)
    half_range = np.subtract(statistics["q99"], statistics["q01"]) / 2
    moves = (half_range > 0) & MASK
    error = (decoded - chunks)[..., moves] / half_range[moves]  # (N, K, D')
    flipped = (decoded[..., 6] > 0.5) != (chunks[..., 6] > 0.5)  # (N, K)
    actions = chunks.shape[0] * chunks.shape[1]
    return {
        "tokens_per_action": num_tokens / actions,
        "compression": chunks.shape[2] * actions / num_tokens,
        "tokens_of_the_longest_chunk": max(map(np.size, rows)),
        "rms_error": float(np.sqrt((error**2).mean())),
        "max_error": float(np.abs(error).max()),
        "rms_position_error_mm": float(1e3 * np.sqrt(((decoded - chunks)[..., :3] ** 2).mean())),
        "gripper_decisions_lost": float(flipped.mean()),
        "dimensions_that_move": int(moves.sum()),
    }


def compare(dataset: Path, column: str, held_out: int) -> dict[str, dict[str, float]]:
    """Measurements by chunk length and way of speaking; the last `held_out` episodes are measured."""
    episodes = read_episodes(dataset, column)
    known, others = episodes[:-held_out], episodes[-held_out:]
    low, high = np.quantile(np.concatenate(known), (0.01, 0.99), axis=0)
    statistics = {"q01": low.tolist(), "q99": high.tolist(), "mask": MASK}
    result = {}
    for size in CHUNK_SIZES:
        chunks = clip(cut(others, size), statistics)
        result[f"chunk {size}, 256 bins"] = measure(make_processor("tokens", size, statistics), chunks, statistics)
        for scale in SCALES:
            processor = make_processor("fast", size, statistics)
            processor.fit_fast_tokenizer(cut(known, size), KEY, scale=scale, vocab_size=VOCAB_SIZE)
            result[f"chunk {size}, FAST, scale {scale}"] = measure(processor, chunks, statistics)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=400)
    parser.add_argument("--held_out", type=int, default=100, help="of the episodes, those to measure on")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if not 0 < arguments.held_out < arguments.episodes:
        parser.error(f"--held_out must lie between 0 and --episodes {arguments.episodes}, got {arguments.held_out}")
    with tempfile.TemporaryDirectory() as folder:
        dataset = record(arguments.episodes, Path(folder, "dataset"))
        results = {column: compare(dataset, column, arguments.held_out) for column in ("expert_action", "action")}
    for column, rows in results.items():
        print(f"{column:26} tokens/action  compression  RMS error  largest  position RMS  gripper lost")
        for name, row in rows.items():
            tokens, errors = (row["tokens_per_action"], row["compression"]), (row["rms_error"], row["max_error"])
            print(
                f"{name:26} {tokens[0]:13.2f} {tokens[1]:11.1f}x {errors[0]:10.4f} {errors[1]:8.3f} "
                f"{row['rms_position_error_mm']:10.3f} mm {row['gripper_decisions_lost']:13.2%}"
            )
    if arguments.output:
        about = {"episodes": arguments.episodes, "held_out": arguments.held_out, "vocab_size": VOCAB_SIZE}
        result = {"machine": {**machine(), "tokenizers": tokenizers.__version__}, **about, "results": results}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
