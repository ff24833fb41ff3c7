"""What keys of a LLaMA-Factory recipe stand for here.

A function takes a key's value, and the values of all keys with LLaMA-Factory's defaults for those that are left out; it
answers with the settings of ours, or with the reason why the key stands for none.
"""

from collections.abc import Callable, Mapping
from typing import Any

from fastpo.chat_templates import check_chat_template
from fastpo.stages import STAGES

Settings = dict[str, Any]
Meaning = Callable[[Any, Mapping[str, Any]], Settings | str]

# What `pref_loss` means; LLaMA-Factory's ipo, orpo and simpo are of log-probs per token.
LOSSES: dict[str, Settings] = {
    "sigmoid": {"pref_loss_type": "sigmoid"},
    "hinge": {"pref_loss_type": "hinge"},
    "ipo": {"pref_loss_type": "ipo", "length_normalization": True},
    "orpo": {"pref_loss_type": "orpo"},
    "simpo": {"pref_loss_type": "sigmoid", "length_normalization": True, "reference_free": True},
}


class RefusedError(ValueError):
    """A value that cannot be had here; the message says why."""


def stage(value: Any, values: Mapping[str, Any]) -> Settings:
    if value == "ppo":
        raise RefusedError("LLaMA-Factory's PPO is not translated; fastpo's own has other keys and another objective")
    if value in STAGES:
        return {"stage": value} | ({"disable_dropout": False} if value in ("sft", "rm") else {})
    raise RefusedError(f"fastpo has the stages {', '.join(STAGES)}")


def finetuning_type(value: Any, values: Mapping[str, Any]) -> Settings:
    if value not in ("lora", "full", "freeze"):
        raise RefusedError("fastpo trains lora, full or freeze")
    return {"use_peft": value == "lora"}


def with_lora(ours: str) -> Meaning:
    return lambda value, values: _with("lora", {ours: joined(value)}, values)


def with_freeze(ours: str) -> Meaning:
    return lambda value, values: _with("freeze", {ours: joined(value)}, values)


def _with(finetuning_type: str, settings: Settings, values: Mapping[str, Any]) -> Settings | str:
    if values["finetuning_type"] == finetuning_type:
        return settings
    return f"read with finetuning_type: {finetuning_type} alone"


def joined(names: Any) -> Any:
    """Names separated by commas, which may stand as a list."""
    return ",".join(map(str, names)) if isinstance(names, list) else names


def lora_target(value: Any, values: Mapping[str, Any]) -> Settings | str:
    names = joined(value)
    return _with("lora", {"lora_target_modules": "all-linear" if names == "all" else names}, values)


def lora_rank(value: Any, values: Mapping[str, Any]) -> Settings | str:
    alpha = {"lora_alpha": 2 * int(value)} if values["lora_alpha"] is None else {}
    return _with("lora", {"lora_r": int(value)} | alpha, values)


def lora_dropout(value: Any, values: Mapping[str, Any]) -> Settings | str:
    # LLaMA-Factory's DPO switches off every dropout of the model, the adapter's among them.
    return _with("lora", {"lora_dropout": 0.0 if values["stage"] == "dpo" else float(value)}, values)


def adapters(value: Any, values: Mapping[str, Any]) -> Settings:
    if values["finetuning_type"] != "lora":
        raise RefusedError("adapters go with finetuning_type: lora")
    if not values["create_new_adapter"]:
        raise RefusedError(
            "training does not go on in an adapter; with create_new_adapter: true it is merged into the model, which "
            "then is the reference of a new adapter"
        )
    return {"merge_adapters": joined(value)}


def pref_loss(value: Any, values: Mapping[str, Any]) -> Settings | str:
    if value == "kto_pair":
        raise RefusedError("LLaMA-Factory 0.9.5 names it and its trl no longer has it; bco_pair is the nearest here")
    if value not in LOSSES:
        raise RefusedError(f"the losses are {', '.join(LOSSES)}; further ones are named by pref_loss_type")
    return LOSSES[value] if values["stage"] == "dpo" else "read in stage dpo alone"


def simpo_gamma(value: Any, values: Mapping[str, Any]) -> Settings | str:
    if values["pref_loss"] != "simpo" or values["stage"] != "dpo":
        return "read in stage dpo with pref_loss: simpo alone"
    return {"home_advantage": float(value)}


def in_dpo(ours: str) -> Meaning:
    def of(value: Any, values: Mapping[str, Any]) -> Settings | str:
        return {ours: value} if values["stage"] == "dpo" else "read in stage dpo alone"

    return of


def label_smoothing(value: Any, values: Mapping[str, Any]) -> Settings | str:
    if float(value) and values["stage"] == "dpo" and values["pref_loss"] != "sigmoid":
        raise RefusedError(f"goes with pref_loss: sigmoid, got pref_loss: {values['pref_loss']}")
    return in_dpo("label_smoothing")(value, values)


def pref_ftx(value: Any, values: Mapping[str, Any]) -> Settings | str:
    if float(value) and values["ld_alpha"] is not None:
        raise RefusedError("with ld_alpha LLaMA-Factory weighs the tokens of this term too, and fastpo does not")
    return in_dpo("sft_weight")(value, values)


def mask_history(value: Any, values: Mapping[str, Any]) -> Settings | str:
    if value and values["stage"] != "sft":
        raise RefusedError("goes with stage: sft")
    return {"last_answer_only": value}


def val_size(value: Any, values: Mapping[str, Any]) -> Settings:
    if float(value) and values["eval_dataset"] is not None:
        raise RefusedError("eval_dataset names the held-out rows already")
    return {"eval_rows": int(value)} if float(value) > 1 else {"eval_fraction": float(value)}


def template(value: Any, values: Mapping[str, Any]) -> Settings:
    try:
        check_chat_template(value)
    except ValueError as error:
        raise RefusedError(str(error)) from None
    return {"chat_template": value}


def with_template(ours: str) -> Meaning:
    def of(value: Any, values: Mapping[str, Any]) -> Settings | str:
        return {ours: value} if values["template"] is not None else "read with a template alone"

    return of


def dataset_dir(value: Any, values: Mapping[str, Any]) -> Settings:
    if not isinstance(value, str) or value.startswith("REMOTE:"):
        raise RefusedError("it must be a folder with a dataset_info.json, or ONLINE")
    return {"dataset_info": value}


def flash_attn(value: Any, values: Mapping[str, Any]) -> Settings | str:
    kinds = {"disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}
    if value == "auto":
        return "transformers chooses, as there"
    if value not in kinds:
        raise RefusedError(f"it must be auto, {', '.join(kinds)}")
    return {"attn_implementation": kinds[value]}


def quantization_bit(value: Any, values: Mapping[str, Any]) -> Settings:
    if int(value) != 4:
        raise RefusedError("weights are held in 4 bits or not quantised")
    return {"load_in_4bit": True}


def dtype(dtype: str, own: str | None) -> Meaning:
    """bf16 and fp16 are transformers' own, and also say how frozen weights are held; what is trained stays fp32."""

    def of(value: Any, values: Mapping[str, Any]) -> Settings | str:
        if not value:
            return {own: False} if own else "off"
        held = {"dtype": dtype} if values["finetuning_type"] == "lora" or own is None else {}
        return ({own: True} if own else {}) | held

    return of


def disable_shuffling(value: Any, values: Mapping[str, Any]) -> Settings | str:
    return {"train_sampling_strategy": "sequential"} if value else "rows are shuffled"


def no_checkpointing(value: Any, values: Mapping[str, Any]) -> Settings:
    # Gradients are the same either way; the one that is not reentrant asks for none of a frozen layer's input.
    return {"gradient_checkpointing": not value} | (
        {} if value else {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    )
