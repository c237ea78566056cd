"""The model card of a repository that a command writes."""

from collections.abc import Sequence

from huggingface_hub import ModelCardData


LLAMA_2_LICENSE = "https://huggingface.co/meta-llama/Llama-2-7b-hf/blob/main/LICENSE.txt"

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
