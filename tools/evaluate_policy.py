"""
Judge a policy: roll it out in a simulator and report its success, or compare its predictions with recorded actions.

    python tools/evaluate_policy.py --policy . --episodes 20 --output_dir results
    python tools/evaluate_policy.py --policy expert --tasks pick push --video mp4 --output_dir results
    python tools/evaluate_policy.py --policy replay:demonstrations
    python tools/evaluate_policy.py --policy . --open_loop demonstrations --output_dir results
    python tools/evaluate_policy.py --policy ws://127.0.0.1:8000

`--policy` is a directory, a Hub id, the address of a policy server (`python -m serving`; its token is read from the
environment variable OPENVLA_TOKEN), or a baseline: `expert` (the scripted one), `random`, or `replay:DATASET`, the
actions of a dataset that `python -m tabletop.record` wrote, each episode in its own scene. A replay succeeds; where it
does and a model does not, the model is at fault and not the wiring.

In a rollout, episode i of every task uses seed `--seed` + i, so that all policies meet the same scenes. `--output_dir`
receives results.json, one video per task of its first episode, and sheet.png with a row of pictures per task.

`--open_loop` needs no simulator: it asks the policy about the frames of a dataset. `--output_dir` receives
open_loop.json and open_loop.png with the curves.

On a processor that has other work as well, set OMP_WAIT_POLICY=passive: PyTorch's threads otherwise burn their time
waiting for each other, and an action can take ten times as long.
"""

import argparse
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from load_policy import REPOSITORY, load_policy
from model_card import read_card, update_model_index
from tqdm import tqdm


sys.path.insert(0, str(REPOSITORY))

from evaluation.chunks import ChunkQueue, TemporalEnsemble
from evaluation.environments import ADAPTERS, TABLETOP, Environment
from evaluation.policies import ChunkedPolicy, ExpertPolicy, ModelPolicy, RandomPolicy
from evaluation.replay import Replay, ReplayPolicy, load_replay
from evaluation.report import (
    VIDEO_FORMATS,
    check_figures,
    check_video_format,
    file_name,
    format_open_loop,
    format_table,
    save_open_loop_figure,
    save_sheet,
    save_video,
)
from evaluation.rollout import ACTION_DIM, Episode, Job, Policy, rollout, summarize


if TYPE_CHECKING:
    from evaluation.open_loop import Comparison


logger = logging.getLogger("evaluate_policy")

BASELINES = {"expert": ExpertPolicy, "random": RandomPolicy}
REPLAY = "replay:"
SERVERS = ("http://", "https://", "ws://", "wss://")
DEFAULT_EPISODES = 20
PACKAGES = ("torch", "transformers", "numpy", "mujoco", "gymnasium", "pillow")
CHUNK_FLAGS = ("actions_per_chunk", "temporal_ensemble")
ROLLOUT_FLAGS = (
    "env",
    "adapter",
    "env_arguments",
    "tasks",
    "num_envs",
    "max_steps",
    "image_size",
    "video",
    "model_card",
    *CHUNK_FLAGS,
)
LOADING_FLAGS = ("dtype", "device", "trust_remote_code")
MODEL_FLAGS = (*CHUNK_FLAGS, "unnorm_key", *LOADING_FLAGS)
OPEN_LOOP_FLAGS = ("frames", "camera", "batch_size")


# Rollouts


def make_policy(arguments: argparse.Namespace) -> Policy:
    """
    The policy of the command line, unless it is a replay.

    Raises:
        ValueError: If the policy cannot be loaded; one line.
    """
    if arguments.policy in BASELINES:
        return BASELINES[arguments.policy]()
    if arguments.policy.startswith(SERVERS):
        return connect_policy(arguments)
    try:
        model, processor = load_policy(
            arguments.policy, trust_remote_code=arguments.trust_remote_code, dtype=arguments.dtype
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"The policy {arguments.policy!r} cannot be loaded, and is none of {[*sorted(BASELINES), REPLAY]}: "
            f"{reason}"
        ) from error
    make_queue = make_chunk_queue(arguments, processor.chunk_size)
    return ModelPolicy(model.to(arguments.device), processor, arguments.unnorm_key, make_queue)


def connect_policy(arguments: argparse.Namespace) -> ChunkedPolicy:
    """
    The policy of a server.

    Raises:
        ValueError: If there is no server, or it refuses; one line.
    """
    from serving.client import PolicyServerError
    from serving.remote_policy import RemotePolicy

    try:
        policy = RemotePolicy(arguments.policy, token=os.environ.get("OPENVLA_TOKEN"), unnorm_key=arguments.unnorm_key)
    except (PolicyServerError, TimeoutError) as error:
        raise ValueError(f"The policy server cannot be used: {error}") from error
    policy.make_queue = make_chunk_queue(arguments, policy.description["chunk_size"])
    return policy


def make_chunk_queue(arguments: argparse.Namespace, chunk_size: int) -> Callable[[], ChunkQueue | TemporalEnsemble]:
    """
    How the chunks of an episode are spent.

    Raises:
        ValueError: If more actions are to be taken of a chunk than it has.
    """
    if arguments.temporal_ensemble is not None:
        return partial(TemporalEnsemble, arguments.temporal_ensemble)
    if (arguments.actions_per_chunk or 1) > chunk_size:
        raise ValueError(
            f"`--actions_per_chunk {arguments.actions_per_chunk}`: the policy's chunks have {chunk_size} action(s)."
        )
    return partial(ChunkQueue, arguments.actions_per_chunk)


def read_replay(arguments: argparse.Namespace) -> Replay | None:
    """The recorded episodes that the command line asks for, if it does."""
    if not arguments.policy.startswith(REPLAY):
        return None
    return load_replay(Path(arguments.policy.removeprefix(REPLAY)), arguments.tasks, arguments.episodes)


def make_environment(arguments: argparse.Namespace, policy: Policy, recorded: dict[str, Any]) -> Environment:
    """
    The environment of the command line. It renders what the policy looks at, the tabletop in the policy's size; a
    Gymnasium environment that needs no adapter, or brings its own, is not told.

    Args:
        arguments (`argparse.Namespace`): Of the command.
        policy (`Policy`): To run in it.
        recorded (`dict[str, Any]`): Arguments of the environment that a replay was recorded in, else empty.
    """
    defaults = dict(recorded)
    if arguments.env == TABLETOP and isinstance(policy, ChunkedPolicy):
        defaults["image_size"] = policy.image_size
    if arguments.env == TABLETOP or (arguments.adapter is None and arguments.env.partition(":")[0] in ADAPTERS):
        defaults["cameras"] = policy.cameras
    given = {name: getattr(arguments, name) for name in ("image_size", "max_steps")}
    given = {name: value for name, value in given.items() if value is not None}
    return Environment(arguments.env, arguments.adapter, {**defaults, **(arguments.env_arguments or {}), **given})


def choose_tasks(asked: list[str] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """The tasks to run, each once; all by default."""
    if unknown := [task for task in asked or [] if task not in known]:
        raise ValueError(f"Tasks {unknown} are unknown; known: {list(known)}.")
    return tuple(dict.fromkeys(asked or known))


def make_jobs(arguments: argparse.Namespace, tasks: tuple[str, ...]) -> list[Job]:
    """Episodes of the command line's seeds, the first of each task with pictures if there is a place for them."""
    return [
        Job(task, arguments.seed + index, record=arguments.output_dir is not None and index == 0)
        for task in tasks
        for index in range(arguments.episodes or DEFAULT_EPISODES)
    ]


def evaluate(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Episode]]:
    """
    Roll the policy out.

    Returns:
        `tuple`: Results, and the episodes, the first of each task with its pictures. The results are a dictionary of

        - `policy` (str), `arguments` (dict, every flag), `versions` (dict of Python and the packages);
        - `environment` (dict): `id`, `control_rate` (actions per second) and `arguments` of its constructor;
        - `seconds` (float): the whole rollout took;
        - `tasks` (dict by task) and `all` (dict): numbers as [`summarize`] gives them;
        - `episodes` (list of dict): `task`, `seed`, `instruction`, `outcome`, `steps`, task by task.

        Keys may be added; these stay as they are.
    """
    replay = read_replay(arguments)
    policy = make_policy(arguments) if replay is None else ReplayPolicy(replay)
    environment = make_environment(arguments, policy, {} if replay is None else replay.environment_arguments)
    known_tasks, control_rate = introduce(policy, environment)
    if replay is None:
        jobs = make_jobs(arguments, choose_tasks(arguments.tasks, known_tasks))
    else:
        jobs = replay.jobs(record_first=arguments.output_dir is not None)
    began = time.perf_counter()
    episodes = run_jobs(policy, jobs, environment, arguments.num_envs)
    results = {
        **describe_run(arguments),
        "environment": {"id": environment.id, "control_rate": control_rate, "arguments": environment.arguments},
        "seconds": round(time.perf_counter() - began, 3),
        **summarize_tasks(episodes),
    }
    return results, episodes


def introduce(policy: Policy, environment: Environment) -> tuple[tuple[str, ...], float]:
    """
    Let the environment configure the policy.

    Returns:
        `tuple`: The environment's tasks, and its actions per second.

    Raises:
        ValueError: If the environment cannot be made, or the policy's actions are not of its dimension.
    """
    if isinstance(policy, ChunkedPolicy) and policy.action_dim != ACTION_DIM:
        raise ValueError(f"The robot takes actions of {ACTION_DIM} dimensions; the model's have {policy.action_dim}.")
    env = environment.make()
    if env.has_wrapper_attr("configure_policy"):
        if isinstance(policy, ModelPolicy):
            env.get_wrapper_attr("configure_policy")(policy)
        elif isinstance(policy, ChunkedPolicy):
            logger.warning("%s sets how a model's pictures are made, which a server decides itself.", environment.id)
    known_tasks, control_rate = env.get_wrapper_attr("tasks"), env.metadata["render_fps"]
    env.close()
    return known_tasks, control_rate


def run_jobs(policy: Policy, jobs: list[Job], environment: Environment, num_envs: int) -> list[Episode]:
    """The episodes of the jobs, with a progress bar."""
    successes = 0
    with tqdm(total=len(jobs), unit="episode", disable=None) as bar:

        def count(episode: Episode) -> None:
            nonlocal successes
            successes += episode.outcome == "success"
            bar.set_postfix(successes=successes, refresh=False)
            bar.update()

        return rollout(policy, jobs, environment.make, num_envs=num_envs, on_episode=count)


def summarize_tasks(episodes: list[Episode]) -> dict[str, Any]:
    """Numbers of each task and of all, and one line per episode."""
    fields = ("task", "seed", "instruction", "outcome", "steps")
    tasks = dict.fromkeys(episode.task for episode in episodes)
    return {
        "tasks": {task: summarize([episode for episode in episodes if episode.task == task]) for task in tasks},
        "all": summarize(episodes),
        "episodes": [{name: getattr(episode, name) for name in fields} for episode in episodes],
    }


def write_rollouts(arguments: argparse.Namespace, results: dict[str, Any], episodes: list[Episode]) -> None:
    """Write pictures, and results.json last: where it lies, everything does."""
    output_dir, control_rate = arguments.output_dir, results["environment"]["control_rate"]
    recorded = [episode for episode in episodes if episode.frames]
    for episode in recorded:
        save_video(episode, output_dir / f"{file_name(episode.task)}.{arguments.video}", control_rate)
    save_sheet(recorded, output_dir / "sheet.png", control_rate)
    write_json(output_dir / "results.json", results)


# Open-loop checks


def check_open_loop(arguments: argparse.Namespace) -> tuple[dict[str, Any], list["Comparison"]]:
    """
    Compare the policy's predictions with a dataset's actions.

    Returns:
        `tuple`: Results, and the episodes. The results are a dictionary of `policy` (str), `arguments` (dict),
        `versions` (dict), `dataset` (str), `cameras` (list), `seconds` (float), and the numbers as [`measure`] gives
        them. Keys may be added; these stay as they are.
    """
    from evaluation.open_loop import RandomPredictor, RecordedFrames, measure, predict, sample

    policy = None if arguments.policy == "random" else make_policy(arguments)
    looks = {} if policy is None else {name: getattr(policy.processor, name) for name in ("num_images", "use_proprio")}
    dataset = RecordedFrames(arguments.open_loop, arguments.camera, **looks)
    episodes = dataset.episodes(arguments.episodes)
    sample(episodes, arguments.frames)
    began = time.perf_counter()
    with tqdm(total=int(sum(episode.is_wanted.sum() for episode in episodes)), unit="frame", disable=None) as bar:
        predictor = policy or RandomPredictor(episodes, arguments.seed)
        predict(predictor, dataset, episodes, arguments.batch_size, bar.update)
    results = {
        **describe_run(arguments),
        "dataset": dataset.source.name,
        "cameras": list(dataset.cameras),
        "seconds": round(time.perf_counter() - began, 3),
        **measure(episodes, policy and policy.bins),
    }
    return results, episodes


def write_open_loop(arguments: argparse.Namespace, results: dict[str, Any], episodes: list["Comparison"]) -> None:
    """Write the figure, and open_loop.json last."""
    title = f"{arguments.policy} on {results['dataset']}: predicted and recorded actions"
    save_open_loop_figure(episodes, list(results["dimensions"]), arguments.output_dir / "open_loop.png", title)
    write_json(arguments.output_dir / "open_loop.json", results)


# The command


def describe_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, and the versions it ran with."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    installed = {distribution.name.lower() for distribution in distributions()}
    versions = {name: version(name) for name in PACKAGES if name in installed}
    versions = {"python": platform.python_version(), **versions}
    return {"policy": arguments.policy, "arguments": given, "versions": versions}


def write_json(path: Path, results: dict[str, Any]) -> None:
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_arguments(arguments: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """
    Refuse what cannot work before anything is loaded.

    Args:
        arguments (`argparse.Namespace`): Of the command.
        defaults (`dict[str, Any]`): Of its flags.

    Raises:
        ValueError: On a count below 1, a flag that would be ignored, a baseline's results for a model card, results
            that would be overwritten, or a package that is missing.
    """
    for name in ("episodes", "num_envs", "max_steps", "image_size", "actions_per_chunk", "frames", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {value}.")
    if not isinstance(arguments.env_arguments, dict | None):
        raise ValueError(f"`--env_arguments` must be names and values in JSON, got {arguments.env_arguments!r}.")
    if arguments.seed < 0:
        raise ValueError(f"`--seed` must not be negative, got {arguments.seed}.")
    given = [name for name, value in vars(arguments).items() if value != defaults[name]]
    for flags, why in ignored_flags(arguments):
        if useless := [f"--{name}" for name in given if name in flags]:
            raise ValueError(f"{', '.join(useless)} would be ignored: {why}.")
    if arguments.model_card and (arguments.policy in BASELINES or arguments.policy.startswith(REPLAY)):
        raise ValueError(f"`--model_card` takes the success of a model, and {arguments.policy!r} is none.")
    if arguments.open_loop and (arguments.policy == "expert" or arguments.policy.startswith(REPLAY)):
        raise ValueError(f"`--open_loop` compares a model, or `random`, with the dataset; got {arguments.policy!r}.")
    if arguments.open_loop and arguments.policy.startswith(SERVERS):
        raise ValueError("`--open_loop` needs the model itself, not a server: its statistics scale what is compared.")
    check_output(arguments)


def ignored_flags(arguments: argparse.Namespace) -> list[tuple[tuple[str, ...], str]]:
    """Flags that this way of judging does not use, and why not."""
    is_replay, is_baseline = arguments.policy.startswith(REPLAY), arguments.policy in BASELINES
    no_model = (is_replay or is_baseline, MODEL_FLAGS, f"the policy {arguments.policy!r} is not a model")
    is_remote = arguments.policy.startswith(SERVERS)
    no_loading = (is_remote, LOADING_FLAGS, "the server has loaded its policy")
    no_rollout = (bool(arguments.open_loop), ROLLOUT_FLAGS, "`--open_loop` rolls nothing out")
    no_dataset = (not arguments.open_loop, OPEN_LOOP_FLAGS, "it goes with `--open_loop`")
    own_scenes = (is_replay, ("env", "adapter", "env_arguments", "seed"), "a replay has the scenes of its dataset")
    no_place = (arguments.output_dir is None, ("video",), "videos go to `--output_dir`")
    reasons = (no_model, no_loading, no_rollout, no_dataset, own_scenes, no_place)
    return [(flags, why) for applies, flags, why in reasons if applies]


def check_output(arguments: argparse.Namespace) -> None:
    """
    Refuse what could not be written at the end, and make the folder.

    Raises:
        ValueError: If results would be overwritten, a package is missing, or the model card cannot be read.
    """
    if arguments.model_card:
        read_card(arguments.model_card)
    if arguments.output_dir is None:
        return
    path = arguments.output_dir / ("open_loop.json" if arguments.open_loop else "results.json")
    if path.exists() and not arguments.overwrite:
        raise ValueError(f"{path} exists; pass --overwrite to replace it.")
    if arguments.open_loop:
        check_figures()
    else:
        check_video_format(arguments.video)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--policy",
        required=True,
        help="directory, Hub id, address of a policy server, `expert`, `random` or `replay:DATASET`",
    )
    parser.add_argument(
        "--episodes",
        type=int,
        help=f"per task, {DEFAULT_EPISODES} by default; of a dataset altogether, all by default",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first episode of each task")
    parser.add_argument("--unnorm_key", help="dataset whose statistics scale the actions, where there are several")
    parser.add_argument("--output_dir", type=Path, help="where results and pictures go; by default nowhere")
    parser.add_argument("--overwrite", action="store_true", help="replace existing results")
    parser.add_argument("--dtype", default="auto", help="of the weights: `auto` (as saved), `float32`, `bfloat16`")
    parser.add_argument("--device", default="cpu", help="such as `cuda`")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the repository's own copy of the code")
    group = parser.add_argument_group("rollouts")
    group.add_argument("--env", default=TABLETOP, help="Gymnasium id; by default the tabletop")
    group.add_argument("--adapter", help="`module:Class` of a wrapper that puts --env in OpenVLA's terms")
    group.add_argument(
        "--env_arguments",
        type=json.loads,
        metavar="JSON",
        help="""of its constructor, such as '{"randomize": true}' or '{"objects": ["red cube"]}', held-out targets""",
    )
    group.add_argument("--tasks", nargs="+", help="those of the environment or the replay to run; all by default")
    group.add_argument("--num_envs", type=int, default=8, help="environments side by side: the size of a batch")
    group.add_argument("--max_steps", type=int, help="actions before `timeout`; by default the environment's")
    group.add_argument(
        "--image_size", type=int, help="side of the camera picture; on the tabletop by default the policy's"
    )
    spending = group.add_mutually_exclusive_group()
    spending.add_argument(
        "--actions_per_chunk", type=int, help="actions to take of each chunk before the next; by default all"
    )
    spending.add_argument(
        "--temporal_ensemble",
        type=float,
        metavar="DECAY",
        help="predict a chunk at every step and average what all say of it, the i-th oldest weighing exp(-DECAY i); "
        "0.01 is common",
    )
    group.add_argument("--video", choices=VIDEO_FORMATS, default="gif", help="format of the videos")
    group.add_argument("--model_card", type=Path, help="README.md whose metadata receive the success rates")
    group = parser.add_argument_group("open-loop checks")
    group.add_argument("--open_loop", metavar="DATASET", help="compare predictions with this dataset's actions")
    group.add_argument(
        "--camera",
        nargs="+",
        help="keys of the pictures that the policy sees, in its order; by default the dataset's main one, then those "
        "at the wrists",
    )
    group.add_argument("--frames", type=int, default=500, help="at most so many, evenly spread")
    group.add_argument("--batch_size", type=int, default=8, help="frames per call of the policy")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Judge, print and write."""
    judge, write, to_text = evaluate, write_rollouts, format_table
    if arguments.open_loop:
        judge, write, to_text = check_open_loop, write_open_loop, format_open_loop
    results, episodes = judge(arguments)
    print(to_text(results))
    if arguments.output_dir:
        write(arguments, results, episodes)
        print(f"written to {arguments.output_dir}")
    if arguments.model_card:
        update_model_index(arguments.model_card, results)
        print(f"success rates written to {arguments.model_card}")


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        check_arguments(arguments, vars(parser.parse_args(["--policy", arguments.policy])))
        run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
