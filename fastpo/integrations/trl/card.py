"""The model card that a trainer with TRL's interface leaves beside its model."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from fastpo.backbone import causal_lm


def card_text(trainer: Any, model_name: str | None, dataset_name: str | None, tags: str | list[str] | None) -> str:
    """Markdown with the hub's metadata: base model, data, and the trainer's tags with those given."""
    base = causal_lm(trainer.model).config._name_or_path or None
    if base is not None and Path(base).is_dir():
        base = None  # a folder of this machine says nothing on the hub
    data = ModelCardData(
        base_model=base, datasets=dataset_name, library_name="transformers",
        tags=sorted({*trainer._tag_names, *([tags] if isinstance(tags, str) else tags or ())}),
    )  # fmt: skip
    origin = "a language model" if base is None else f"[{base}](https://huggingface.co/{base})"
    title = model_name or "Model"
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\nTrained with fastpo on preferences, from {origin}.\n"
