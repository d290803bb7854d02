"""A model onto the Hugging Face hub, with a card that says what it is."""

import re
import tempfile
from pathlib import Path
from typing import Any

from allmlp.errors import RunError, UserError, printable
from allmlp.factory import build_meta
from allmlp.flops import cost
from allmlp.model import Mixer
from allmlp.weights.hub import first_line, huggingface_hub
from allmlp.weights.native import save
from allmlp.weights.published import variant_of

UNKNOWN = "not recorded"


def push_to_hub(
    model: Mixer,
    repo: str,
    *,
    license: str,
    private: bool = False,
    token: str | None = None,
    message: str = "Upload an MLP-Mixer",
) -> str:
    """Uploads the weights, with all that is needed to predict, and a filled model card; returns the commit's address.

    Args:
        model: data, recipe and results are taken from its card, as a run or ``load`` left them.
        repo: "OWNER/NAME"; made if it is not there.
        license: of the weights, by the hub's identifier ("apache-2.0", "cc-by-4.0", "other").
        private: of a repository that is made.
        token: of the hub; by default that of ``hf auth login``.
        message: of the commit.

    Raises:
        UserError: no such owner, or no right to write there.
        RunError: the hub cannot be reached.
    """
    hub = huggingface_hub()
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
                raise UserError(f"{repo} may not be written ({first_line(error)}): `hf auth login` again") from None
            raise RunError(f"{repo} could not be uploaded ({first_line(error)}): try again later") from None
        except (hub.errors.HTTPError, OSError) as error:
            raise RunError(f"the hub cannot be reached ({first_line(error)}): try again later") from None
    return str(commit.commit_url)


def model_card(model: Mixer, repo: str, license: str) -> str:
    """README.md of a repository on the hub: metadata that the hub reads, and the same for people."""
    hub = huggingface_hub()
    told, config = model.metadata.provenance, model.config
    recipe = section(told, "recipe")
    variant = variant_of(config)
    name = f"Mixer-{variant}" if variant else "MLP-Mixer"
    data = told.get("data") or section(recipe, "data").get("data")
    scores = {part: told.get(f"{part}_top1") for part in ("val", "test")}
    scores = {part: float(score) for part, score in scores.items() if isinstance(score, int | float)}
    results = data and [
        hub.EvalResult(
            task_type="image-classification",
            dataset_type=str(data),
            dataset_name=str(data),
            dataset_split={"val": "validation"}.get(part, part),
            metric_type="accuracy",
            metric_name="top-1",
            metric_value=score,
        )
        for part, score in scores.items()
    ]
    metadata = hub.ModelCardData(
        license=license,
        library_name="allmlp",
        pipeline_tag="image-classification" if config["num_classes"] else "image-feature-extraction",
        tags=["allmlp", *(["image-classification"] if config["num_classes"] else [])],
        model_name=repo.rpartition("/")[2],
        eval_results=results or None,
    )
    sections = {
        "Model": model_rows(model, name),
        "Data": [
            f"Trained on: {plain(data or UNKNOWN)}",
            f"Split: {plain(told.get('split') or UNKNOWN)}",
            *origin_rows(told),
        ],
        "Results": [f"{part} top-1: {score:.4f}" for part, score in scores.items()] or [f"Accuracy: {UNKNOWN}"],
        "Recipe": recipe_rows(told),
    }
    body = "\n\n".join(f"## {title}\n\n" + "\n".join(f"- {row}" for row in rows) for title, rows in sections.items())
    lines = ["import allmlp", "", f'model = allmlp.load("hf-hub:{repo}")']
    if config["num_classes"]:
        lines += ['for row in allmlp.predict(model, ["photo.jpg"]):', "    print(row.classes)"]
        command = f"`mixer predict hf-hub:{repo} photo.jpg`"
    else:
        lines += ["features = model.features(images)"]
        command = f"`mixer finetune hf-hub:{repo} --data photos/`"
    use = "\n".join(["```python", *lines, "```", "", f"or {command}."])
    about = f"An MLP-Mixer ([arXiv:2105.01601](https://arxiv.org/abs/2105.01601)). Licence of the weights: {license}."
    return f"---\n{metadata.to_yaml()}\n---\n\n# {name}\n\n{about}\n\n## How to load\n\n{use}\n\n{body}\n"


def model_rows(model: Mixer, name: str) -> list[str]:
    config, view, counted = model.config, model.metadata.preprocessing, cost(build_meta(model.config))
    keys = ("num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim")
    sizes = ", ".join(f"{key} {config[key]}" for key in keys)
    return [
        f"{name}, {counted.parameters:,} parameters, {counted.macs / 1e9:.3g} GMAC an image",
        f"Resolution: {model.image_size[0]} × {model.image_size[1]} px, patches of "
        f"{model.patch_size[0]} × {model.patch_size[1]} px; {sizes}; {config['gelu']} GELU",
        f"Classes: {config['num_classes'] or 'none, features only'}",
        f"Input: {view.crop} crop, ratio {view.crop_ratio:g}, {view.interpolation}; mean {view.mean}, std {view.std}",
    ]


def origin_rows(told: dict[str, Any]) -> list[str]:
    started = section(told, "started_from")
    source = section(started, "source") or section(told, "source")
    origin = ", ".join(f"{key} {value}" for key, value in source.items()) or started.get("weights")
    rows = [f"Weights from: {plain(origin)}"] if origin else []
    if sizes := told.get("resized_from"):
        rows.append(f"Resized from {plain(sizes)} px, and not evaluated since")
    return rows


def section(told: dict[str, Any], key: str) -> dict[str, Any]:
    """An object of the provenance; empty where there is none, or something else, as anybody may have saved."""
    found = told.get(key)
    return found if isinstance(found, dict) else {}


def plain(value: Any) -> str:
    """Text from elsewhere as it may stand in a line of Markdown: what would be markup is escaped."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", printable(str(value)))


def recipe_rows(told: dict[str, Any]) -> list[str]:
    recipe = section(told, "recipe")
    rows = [
        f"{key}: {plain(told[key])}"
        for key in ("command", "commit", "seed", "epochs")
        if told.get(key) not in (None, "")
    ]
    if settings := section(recipe, "optimization"):
        rows.append(f"{plain(recipe.get('name'))}: " + ", ".join(f"{k} {plain(v)}" for k, v in settings.items()))
    return rows or [UNKNOWN.capitalize()]
