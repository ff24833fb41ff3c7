"""Models as the trainer wants them: loaded, and without dropout."""

from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpo.backbone import causal_lm


def load_models(model: Any, ref_model: Any, tokenizer: Any, full: bool) -> tuple[Any, Any, Any]:
    """Names become models, and a missing tokenizer the one saved beside the model.

    A model trained in full is loaded in fp32: AdamW's steps at preference learning rates are below the resolution of
    16-bit weights and would be lost.
    """
    dtype = "float32" if full else "auto"
    model, ref_model = (
        AutoModelForCausalLM.from_pretrained(x, dtype=dtype) if isinstance(x, str) else x for x in (model, ref_model)
    )
    if ref_model is not None and ref_model is model:
        raise ValueError("ref_model must be another object than model, got the same one")
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(causal_lm(model).config._name_or_path)
    return model, ref_model, tokenizer


def disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
