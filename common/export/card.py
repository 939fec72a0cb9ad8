"""Write the model card of an exported folder, and send the folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from common.config.schema import NO_FAMILY, Config
from common.counted import counted
from common.models.files import ADAPTERS, check_links
from common.run.result import Result
from common.types import UserError

# README.md of an exported folder: the hub's model card, with the run's own numbers.
PRODUCT = "fewshot-vlm-rl"
RESIZED = {  # by model.resize: as in common/data/images.py, except that crop may differ by a pixel's rounding
    "squash": "photo.resize((size, size), Image.Resampling.LANCZOS)",
    "crop": "ImageOps.fit(photo, (size, size), Image.Resampling.LANCZOS)",
    "pad": "ImageOps.pad(photo, (size, size), Image.Resampling.LANCZOS)",
}
CODE = Template("""```python
import json
from pathlib import Path
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = Path(".")  # where this file lies
asking = json.loads((folder / "asking.json").read_text())
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
photo, size = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGBA"), asking["image"]["size"]
photo = Image.alpha_composite(Image.new("RGBA", photo.size, asking["image"]["background"]), photo).convert("RGB")
(part,) = (part for turn in asking["messages"] for part in turn["content"] if part["type"] == "image")
part["image"] = $resized
inputs = processor.apply_chat_template(
    asking["messages"], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
reply = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(reply, skip_special_tokens=True))
```""")
IMAGE_CODE = Template("""```python
import json, math
import numpy, $library
from PIL import Image, ImageOps

facts = json.load(open("preprocessing.json"))
photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGBA")
photo = Image.alpha_composite(Image.new("RGBA", photo.size, facts["background"]), photo).convert("RGB")
side, size = math.floor(facts["size"] / facts["crop"]), facts["size"]
short = min(photo.size)
resized = (side, side) if facts["squash"] else tuple(side if n == short else int(side * n / short) for n in photo.size)
photo = photo.resize(resized, Image.Resampling[facts["interpolation"].upper()])
left, top = (round((n - size) / 2) for n in photo.size)
pixels = numpy.array(photo.crop((left, top, left + size, top + size))).transpose(2, 0, 1)[None]
(probabilities,) = $ask
print(facts["names"][probabilities.argmax()], float(probabilities.max()))
```""")
ONNX = {
    "library": "onnxruntime",
    "ask": 'onnxruntime.InferenceSession("model.onnx").run(None, {"pixels": pixels})[0]',
}
TORCHSCRIPT = {"library": "torch", "ask": 'torch.jit.load("model.pt")(torch.from_numpy(pixels))'}
HOW = {
    "onnx": "`model.onnx` takes pixels of shape [N, 3, S, S], uint8, and returns the calibrated probabilities of the"
    f" names in `preprocessing.json`:\n\n{IMAGE_CODE.substitute(ONNX)}",
    "torchscript": "`torch.jit.load('model.pt')` takes pixels of shape [N, 3, S, S], uint8, and returns the calibrated"
    f" probabilities of the names in `preprocessing.json`:\n\n{IMAGE_CODE.substitute(TORCHSCRIPT)}",
    "model": "`asking.json` has the question, the class names and the size of pictures. In transformers:\n\n{code}\n\n"
    'vLLM loads the folder, too, and takes the same conversation (`"type": "image_pil", "image_pil": photo`); give it'
    " `temperature=0`.{words}",
    "adapter": "PEFT's adapters: `PeftModel.from_pretrained(base, folder)`, or `model.path=<folder>` in "
    f"{PRODUCT}. Their base stands in `{ADAPTERS[0]}`.",
    "bank": "ALERT's category embeddings, for the model that they were trained with: `method.bank=<folder>` in"
    f" {PRODUCT}.",
}
QUESTION = (
    "Where a question of the test lists part of the names, or they stand in another order than in `asking.json`, which"
    " lists all of them, answers can differ."
)
WORDS = (
    " Every category is a word of the vocabulary that is read and never said: `asking.json` lists them under `words`,"
    " and its question shows two. Put the candidates of a picture there, the likeliest first."
)


def write_card(
    folder: Path, kind: str, result: Result, config: Config, asking: dict[str, Any], licence: str | None
) -> None:
    """Write README.md.

    Args:
        folder: Folder of the export.
        kind: Kind of the export, see `bundle.export`.
        result: Result of the run.
        config: Configuration of the run, with its base model.
        asking: The conversation and class names, see `bundle.how_to_ask`; empty for an adapter or a bank.
        licence: Licence of the weights; None: that of the run's base model.
    """
    path = config.model.path
    base = None if path is None or Path(path).expanduser().is_dir() else path  # an id of the hub
    weights = config.model.name
    if config.model.family == NO_FAMILY:  # a few-shot learner has the weights of its encoders
        weights = " and ".join(each.name for each in (config.clip, config.visual) if each and each.name != "none")
    licence = licence or config.model.licence or "unknown"
    tested = [
        EvalResult(
            task_type="image-classification",
            dataset_type=result.data,
            dataset_name=f"{result.data} ({split})",
            metric_type="accuracy",
            metric_value=round(summary.accuracy * 100, 2),
        )
        for split, summary in result.final.items()
        if split != "val"
    ]
    # YAML header that the hub reads
    facts = ModelCardData(
        license=licence,
        library_name={"adapter": "peft", "onnx": "onnx", "torchscript": "torch"}.get(kind, "transformers"),
        pipeline_tag="image-classification" if kind in ("onnx", "torchscript") else "image-text-to-text",
        base_model=base,
        tags=[PRODUCT, result.method, result.data],
        model_name=f"{result.method}-{result.data}",
        eval_results=tested,
    )
    code = CODE.substitute(resized=RESIZED[config.model.resize])
    how = HOW[kind].format(code=code, words=WORDS if "words" in asking else "") if kind == "model" else HOW[kind]
    # text for readers
    text = CARD.substitute(
        facts=facts.to_yaml(),
        title=f"{result.method} on {result.data}",
        method=result.method,
        data=result.data,
        base=base or weights,
        weights=result.weights["sha256"][:12],
        shots=result.shots,
        seed=result.seed,
        updates=result.train.get("updates", 0),
        how=how,
        numbers=_numbers(result),
        protocol=result.protocol,
        setting=result.setting,
        remarks="".join(f"\n- {remark}" for remark in result.remarks),
        manifest=result.manifest,
        signature=result.signature,
        commit=result.git_commit or "none",
        versions=", ".join(f"{name} {version}" for name, version in sorted(result.versions.items())),
        licence=licence,
        model=weights,
        question=QUESTION if "messages" in asking else "",
        pictures=config.data.licence or "unknown",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


CARD = Template(
    """---
$facts
---

# $title

Trained with $PRODUCT, method `$method`, from $base (weights $weights), on $shots images per class of `$data`,
seed $seed, $updates updates.

## How to ask it

$how

## What was measured

Setting `$setting`, protocol `$protocol`. Accuracies are the run's, on its test images; intervals are Wilson's.

$numbers
$remarks
$question

## Where it comes from

| | |
|---|---|
| questions and images | manifest $manifest |
| configuration | $signature |
| code | commit $commit |
| packages | $versions |

## Licences

- Weights: $licence (unless it was given, that of `$model`; `--licence` gives it).
- Pictures that it was trained on (`$data`): $pictures. None is in this folder.
""".replace("$PRODUCT", PRODUCT)
)


def _numbers(result: Result) -> str:
    rows = ["| split | images | accuracy before, % | after, % | 95 % interval |", "|---|---|---|---|---|"]
    for split, last in result.final.items():
        first = result.before.get(split)
        before = "" if first is None or not result.after else f"{100 * first.accuracy:.2f}"
        low, high = last.ci95
        rows.append(
            f"| {split} | {last.n} | {before} | {100 * last.accuracy:.2f} | {100 * low:.2f} – {100 * high:.2f} |"
        )
    return "\n".join(rows)


# Upload to the Hugging Face hub. Nothing is sent without --yes.


def check_name(name: str) -> None:
    """Check the id of a model on the hub.

    Raises:
        UserError: The name is not an id of the hub.
    """
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"--push {name}: give the id of a model on the hub, owner/name")


def check_card(folder: Path, run: Path) -> None:
    """Check that a folder holds an export of a run.

    Raises:
        UserError: It holds something else.
    """
    from common.predict.trained_model import TrainedModel  # here, because it imports torch
    from common.run.result import Result

    signature = Result.load(TrainedModel.of(run).records).signature
    if f"| configuration | {signature} |" not in (folder / "README.md").read_text(encoding="utf-8"):
        raise UserError(f"{folder} holds something else than an export of {run}; give a new folder")


def plan(folder: Path, name: str) -> str:
    """Return what would be sent, a line per file, for a dry run.

    Raises:
        UserError: A link leads out of the folder.
    """
    check_links(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"  {path.stat().st_size / 1e6:10.3f} MB  {path.relative_to(folder).as_posix()}" for path in files]
    total = sum(path.stat().st_size for path in files) / 1e6
    return "\n".join([f"to https://huggingface.co/{name}, {counted(len(files), 'file')}, {total:.1f} MB:", *lines])


def push(folder: Path, name: str, private: bool) -> str:
    """Send a folder with the account of `hf auth login`; return the commit's address.

    Raises:
        UserError: The hub cannot be reached or refuses.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        # an existing repository keeps its visibility, whatever `private` says
        if private and not api.repo_info(name).private:
            raise UserError(f"--push {name}: it is there already and public; give another name, or --public")
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported"))
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"--push {name}: {' '.join(str(error).split())}; hf auth login gives this machine an account"
        ) from error
