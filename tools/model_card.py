"""The model card of a repository that a command writes, and the success rates in the metadata of any card."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump


LLAMA_2_LICENSE = "https://huggingface.co/meta-llama/Llama-2-7b-hf/blob/main/LICENSE.txt"

# The library's own expression takes an empty block for the start of a longer one, and the text after it for metadata.
_METADATA = re.compile(r"---[ \t]*(?P<line_break>\r?\n)(?P<yaml>.*?)^---[ \t]*(\r?\n|\Z)", re.DOTALL | re.MULTILINE)

_CARD = """\
---
{metadata}
---

# {title}

{origin}

The code in this repository is the maintained OpenVLA remote code; it runs on transformers 4.57 and on transformers 5.

## Quick start

```python
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

repo, device = "{repo_id}", "cuda" if torch.cuda.is_available() else "cpu"
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, dtype="auto").to(device)
{usage}
```

{statistics}

## License

{license}
"""

_POLICY_USAGE = """\
inputs = processor(instruction="pick up the red block", images=Image.open("camera.png")).to(device)
action = model.predict_action(**inputs, unnorm_key="{unnorm_key}")"""

_VLM_USAGE = """\
inputs = processor("In: What is on the table?\\nOut:", Image.open("camera.png")).to(device)
tokens = model.generate(**inputs, max_new_tokens=32)
print(processor.tokenizer.decode(tokens[0], skip_special_tokens=True))"""

_LLAMA_2_NOTE = (
    f"The weights derive from Llama 2 and are subject to the [Llama 2 Community License]({LLAMA_2_LICENSE}), beside "
    "the licence of the checkpoint they were made from. The code is licensed under Apache 2.0."
)
_OTHER_NOTE = (
    "The weights keep the licence of the checkpoint they were made from. The code is licensed under Apache 2.0."
)


def model_card(
    repo_id: str,
    origin: str,
    *,
    unnorm_keys: Sequence[str] = (),
    base_model: str | None = None,
    llm_backbone_id: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """
    Text of a README.md: metadata for the Hub, where the weights come from, and a quick start.

    Args:
        repo_id (`str`): What the quick start loads: a Hub id, or the name of the directory.
        origin (`str`): Sentences that say how the weights came about.
        unnorm_keys (`Sequence[str]`): Datasets with action statistics. Without any, the card describes a
            vision-language model to start training from.
        base_model (`str`, *optional*): Hub id of the checkpoint behind the weights.
        llm_backbone_id (`str`, *optional*): Decides which licence is noted.
        tags (`Sequence[str]`): Beside `openvla`, `vla` and `robotics`.
    """
    is_llama = (llm_backbone_id or "").startswith(("llama2", "vicuna"))
    metadata = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        license="other",
        license_name="llama2" if is_llama else None,
        license_link=LLAMA_2_LICENSE if is_llama else None,
        pipeline_tag="robotics",
        tags=["openvla", "vla", "robotics", *tags],
    )
    keys = ", ".join(f"`{key}`" for key in unnorm_keys)
    return _CARD.format(
        metadata=metadata.to_yaml(),
        title=repo_id.rpartition("/")[2],
        origin=origin,
        repo_id=repo_id,
        usage=_POLICY_USAGE.format(unnorm_key=unnorm_keys[0]) if unnorm_keys else _VLM_USAGE,
        statistics=(
            f"`unnorm_key` names the dataset whose statistics scale the action: {keys}."
            if unnorm_keys
            else "This is a vision-language model to start training from: it holds no action statistics yet."
        ),
        license=_LLAMA_2_NOTE if is_llama else _OTHER_NOTE,
    )


def eval_results(results: dict[str, Any]) -> list[EvalResult]:
    """
    What results.json of `evaluate_policy.py` says, as the Hub has it: a success rate per task, and over all tasks
    where there are several. The number of trials and the 95% interval are arguments of the metric; the seeds, and what
    `--env_arguments` asked for, are those of the dataset.

    Args:
        results (`dict[str, Any]`): As in results.json.

    Returns:
        `list[EvalResult]`: For `ModelCardData(model_name=..., eval_results=...)`.
    """
    groups = dict(results["tasks"])
    if len(groups) > 1:
        groups[None] = results["all"]
    return [_eval_result(results, task, numbers) for task, numbers in groups.items()]


def _eval_result(results: dict[str, Any], task: str | None, numbers: dict[str, Any]) -> EvalResult:
    environment = results["environment"]["id"]
    seeds = sorted({episode["seed"] for episode in results["episodes"] if task in (None, episode["task"])})
    return EvalResult(
        task_type="robotics",
        task_name="Robotics",
        dataset_type=environment,
        dataset_name=f"{environment.rpartition(':')[2]}, {task or 'all tasks'}",
        dataset_config=task,
        dataset_args={"seeds": f"{seeds[0]}-{seeds[-1]}", **(results["arguments"].get("env_arguments") or {})},
        metric_type="success_rate",
        metric_name="Success rate",
        metric_value=round(numbers["success_rate"], 4),
        metric_args={
            "trials": numbers["trials"],
            "successes": numbers["successes"],
            "wilson_95": [round(bound, 4) for bound in numbers["wilson_95"]],
        },
    )


def read_card(path: Path) -> tuple[dict[str, Any], str, str]:
    """
    The parts of a card.

    Args:
        path (`Path`): A README.md.

    Returns:
        `tuple[dict, str, str]`: Metadata (empty where it has none), the text below them, and the line break.

    Raises:
        ValueError: If the file is missing, or its metadata cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"There is no model card at {path}.")
    try:
        content = path.read_bytes().decode("utf-8-sig")
        match = _METADATA.match(content)
        metadata = (yaml.safe_load(match["yaml"]) if match else None) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The metadata of {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"The metadata of {path} must be keys and values, got {metadata!r}.")
    index = metadata.get("model-index") or []
    if not isinstance(index, list) or not all(isinstance(entry, dict) for entry in index):
        raise ValueError(f"The `model-index` of {path} must be a list of models, got {index!r}.")
    return (metadata, content[match.end() :], match["line_break"]) if match else (metadata, content, "\n")


def update_model_index(path: Path, results: dict[str, Any]) -> None:
    """
    Write success rates into the `model-index` of a card. Its text stays to the byte, and so do its other metadata and
    its other results, but for YAML comments and layout; results for the same environment and tasks are replaced, and a
    rate over all tasks does not outlive those of its tasks.

    Args:
        path (`Path`): An existing README.md.
        results (`dict[str, Any]`): As in results.json.

    Raises:
        ValueError: If the card is missing or its metadata cannot be read.
    """
    metadata, text, line_break = read_card(path)
    index = metadata.get("model-index") or [{"name": path.resolve().parent.name, "results": []}]
    (new,) = eval_results_to_model_index(index[0].get("name"), eval_results(results))
    replaced = [_subject(result) for result in new["results"]]
    replaced += [(*subject[:2], None) for subject in replaced]
    kept = [result for result in index[0].get("results") or [] if _subject(result) not in replaced]
    index[0] = {**index[0], "results": kept + new["results"]}
    block = yaml_dump({**metadata, "model-index": index}, sort_keys=False, line_break=line_break)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(f"---{line_break}{block}---{line_break}{text}".encode())
    os.replace(partial, path)


def _subject(result: dict[str, Any]) -> tuple[Any, ...]:
    """What a result of a `model-index` is about."""
    dataset = result.get("dataset") or {}
    return (result.get("task") or {}).get("type"), dataset.get("type"), dataset.get("config")
