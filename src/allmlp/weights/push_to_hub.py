"""Uploads a model to the Hugging Face hub, with a model card."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from allmlp.errors import RunError, UserError, brief, printable
from allmlp.factory import Model, as_model, build_meta, describe_model, is_zoo, name_of
from allmlp.flops import cost
from allmlp.weights.hub import first_line, import_huggingface_hub
from allmlp.weights.native import save

NOT_RECORDED = "not recorded"


def push_to_hub(
    model: Model,
    repo: str,
    *,
    license: str,
    private: bool = False,
    token: str | None = None,
    message: str = "Upload an MLP-Mixer",
) -> str:
    """Uploads weights, everything needed to predict with them, and a model card; returns the commit's URL.

    Args:
        model: its ``metadata``, as training or ``load`` left it, gives the card's data, recipe and results.
        repo: "OWNER/NAME"; created if it does not exist.
        license: license of the weights, by the hub's identifier ("apache-2.0", "cc-by-4.0", "other").
        private: whether a new repository is private.
        token: access token of the hub; by default that of ``hf auth login``.
        message: commit message.

    Raises:
        UserError: an unknown owner, or no permission to write to the repository.
        RunError: the hub cannot be reached.
    """
    model = as_model(model)
    if not isinstance(repo, str):
        raise UserError(f"repo = {brief(repo)}: give OWNER/NAME")
    hub = import_huggingface_hub()
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "model.safetensors")
        (Path(folder) / "README.md").write_text(model_card(model, repo, license), encoding="utf-8")
        api = hub.HfApi(token=token, library_name="allmlp")
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
        except (hub.errors.HFValidationError, hub.errors.LocalTokenNotFoundError) as error:
            raise UserError(f"{repo}: {first_line(error)}: give OWNER/NAME, and log in with `hf auth login`") from None
        except hub.errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            if status in (401, 403, 404):
                raise UserError(
                    f"no permission to write to {repo} ({first_line(error)}): log in with `hf auth login`"
                ) from None
            raise RunError(f"{repo} could not be uploaded ({first_line(error)}): try again later") from None
        except (hub.errors.HTTPError, OSError) as error:
            raise RunError(f"the hub cannot be reached ({first_line(error)}): try again later") from None
    return str(commit.commit_url)


def score_row(provenance: Mapping[str, Any], split: str, top1: float) -> str:
    """An accuracy, beside that of always answering the commonest class where it is recorded."""
    majority = provenance.get(f"{split}_majority")
    beside = f" (always answering the commonest class: {majority:.4f})" if isinstance(majority, int | float) else ""
    return f"{split} top-1: {top1:.4f}{beside}"


def model_card(model: Model, repo: str, license: str) -> str:
    """The repository's README.md: YAML metadata for the hub, then the same in words."""
    hub = import_huggingface_hub()
    provenance, num_classes = model.metadata.provenance, model.num_classes
    mixer = not is_zoo(model.config)
    name = name_of(model.config) or ("MLP-Mixer" if mixer else describe_model(model.config).partition(":")[0])
    data = provenance.get("data") or section(section(provenance, "recipe"), "data").get("data")
    scores = {split: provenance.get(f"{split}_top1") for split in ("val", "test")}
    scores = {split: float(score) for split, score in scores.items() if isinstance(score, int | float)}
    results = data and [
        hub.EvalResult(
            task_type="image-classification",
            dataset_type=str(data),
            dataset_name=str(data),
            dataset_split={"val": "validation"}.get(split, split),
            metric_type="accuracy",
            metric_name="top-1",
            metric_value=score,
        )
        for split, score in scores.items()
    ]
    metadata = hub.ModelCardData(
        license=license,
        library_name="allmlp",
        pipeline_tag="image-classification" if num_classes else "image-feature-extraction",
        tags=["mlp-mixer" if mixer else model.config["system"], *(["image-classification"] if num_classes else [])],
        model_name=repo.rpartition("/")[2],
        eval_results=results or None,
    )
    sections = {
        "Model": model_rows(model, name),
        "Data": [
            f"Trained on: {escaped(data or NOT_RECORDED)}",
            f"Split: {escaped(provenance.get('split') or NOT_RECORDED)}",
            *origin_rows(provenance),
        ],
        "Results": [score_row(provenance, split, score) for split, score in scores.items()]
        or [f"Accuracy: {NOT_RECORDED}"],
        "Recipe": recipe_rows(provenance),
    }
    body = "\n\n".join(f"## {title}\n\n" + "\n".join(f"- {row}" for row in rows) for title, rows in sections.items())
    about = "An MLP-Mixer ([arXiv:2105.01601](https://arxiv.org/abs/2105.01601))" if mixer else f"A {name}"
    about += f". License of the weights: {license}."
    usage = usage_example(repo, has_head=num_classes > 0)
    return f"---\n{metadata.to_yaml()}\n---\n\n# {name}\n\n{about}\n\n## How to load\n\n{usage}\n\n{body}\n"


def usage_example(repo: str, has_head: bool) -> str:
    lines = ["import allmlp", "", f'model = allmlp.load("hf-hub:{repo}")']
    if has_head:
        lines += ['for row in allmlp.predict(model, ["photo.jpg"]):', "    print(row.classes)"]
        command = f"`mixer predict hf-hub:{repo} photo.jpg`"
    else:
        lines += ["features = model.features(images)"]
        command = f"`mixer finetune hf-hub:{repo} --data photos/`"
    return "\n".join(["```python", *lines, "```", "", f"or {command}."])


def model_rows(model: Model, name: str) -> list[str]:
    config, view, counted = model.config, model.metadata.preprocessing, cost(build_meta(model.config))
    if is_zoo(config):
        sizes = describe_model(config).partition(": ")[2]
    else:
        keys = ("num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim")
        patch = " × ".join(map(str, config["patch_size"]))
        sizes = f"patches of {patch} px; {', '.join(f'{key} {config[key]}' for key in keys)}; {config['gelu']} GELU"
    return [
        f"{name}, {counted.parameters:,} parameters, {counted.macs / 1e9:.3g} GMAC per image",
        f"Resolution: {model.image_size[0]} × {model.image_size[1]} px, {sizes}",
        f"Classes: {model.num_classes or 'none, features only'}",
        f"Input: {view.crop} crop, ratio {view.crop_ratio:g}, {view.interpolation}; mean {view.mean}, std {view.std}",
    ]


def origin_rows(provenance: dict[str, Any]) -> list[str]:
    """Where the weights come from, and the sizes that they were resized from."""
    started_from = section(provenance, "started_from")
    source = section(started_from, "source") or section(provenance, "source")
    origin = ", ".join(f"{key} {value}" for key, value in source.items()) or started_from.get("weights")
    rows = [f"Weights from: {escaped(origin)}"] if origin else []
    if sizes := provenance.get("resized_from"):
        rows.append(f"Resized from {escaped(sizes)} px, and not evaluated since")
    return rows


def recipe_rows(provenance: dict[str, Any]) -> list[str]:
    recipe = section(provenance, "recipe")
    rows = [
        f"{key}: {escaped(provenance[key])}"
        for key in ("command", "commit", "seed", "epochs")
        if provenance.get(key) not in (None, "")
    ]
    if settings := section(recipe, "optimization"):
        rows.append(f"{escaped(recipe.get('name'))}: " + ", ".join(f"{k} {escaped(v)}" for k, v in settings.items()))
    return rows or [NOT_RECORDED.capitalize()]


def section(provenance: dict[str, Any], key: str) -> dict[str, Any]:
    """An object in the provenance; empty if it is missing or, since ``save`` accepts any JSON, another type."""
    value = provenance.get(key)
    return value if isinstance(value, dict) else {}


def escaped(value: Any) -> str:
    """Outside text for one line of Markdown, without markup."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", printable(str(value)))
