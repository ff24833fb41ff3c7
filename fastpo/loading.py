"""Models as the trainer wants them: loaded, and without dropout."""

import copy
import dataclasses
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
        if isinstance(getattr(module, "attention_dropout", None), float):  # which most attention has as a number
            module.attention_dropout = 0.0  # type: ignore[assignment]


def keep_statistics_exact(accelerator: Any) -> None:
    """Have FSDP2 leave alone what the model answers: its policy rounds outputs to 16 bits, here sums of log-probs."""
    plugin = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)


def copied_reference(model: Any) -> Any:
    """A copy of a model as it is now, to be its reference.

    Raises:
        ValueError: the model is in parts.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "ref_model must be given, or a peft_config, with DeepSpeed ZeRO-3: a model in parts has no copy"
        )
    return copy.deepcopy(model)


def prepare_reference(model: nn.Module, accelerator: Any) -> nn.Module:
    """A reference model on the accelerator's device, sharded where the trained one is: FSDP2, DeepSpeed ZeRO-3."""
    if accelerator.is_fsdp2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        return accelerator.prepare_model(model, evaluation_mode=True)
    import deepspeed

    # What the policy's engine fills in later ("auto") the reference's leaves to DeepSpeed.
    zero = {name: value for name, value in plugin.deepspeed_config["zero_optimization"].items() if value != "auto"}
    precision = {name: plugin.deepspeed_config[name] for name in ("bf16", "fp16") if name in plugin.deepspeed_config}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **precision}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine
