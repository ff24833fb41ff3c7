"""PEFT adapters: added, exchanged for the reference's, and read where they sit on the LM head."""

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# Ways to start LoRA (`init_lora_weights`) that take what the adapter starts with out of the weights.
MOVES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# An adapter of this name is the reference's; TRL calls it so too.
REFERENCE_ADAPTER = "ref"


def add_adapter(model: Any, peft_config: Any, gradient_checkpointing: bool) -> Any:
    """The model in a new adapter.

    Raises:
        ValueError: it has one already, possibly in its layers alone, as a model loaded from the folder of an adapter
            has, which the new one would overwrite.
    """
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    if hasattr(model, "disable_adapter") or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "peft_config must be None for a model that already has an adapter, whose place the new one would take: "
            "merge it into the model first (a recipe: its model, and the adapter under merge_adapters)"
        )
    if gradient_checkpointing:
        # Checkpointed blocks of a frozen backbone have no gradient to follow unless their input asks for one.
        model.enable_input_require_grads()
    return get_peft_model(model, peft_config)


def has_reference_adapter(model: Any) -> bool:
    return REFERENCE_ADAPTER in getattr(model, "peft_config", {})


def add_reference_adapter(model: Any) -> None:
    """Give a PEFT model a frozen copy of its adapter as it is now, which `as_reference` uses from then on.

    Raises:
        ValueError: several adapters are active, or none.
    """
    if len(model.active_adapters) != 1:
        raise ValueError(f"model must have one active adapter to train, got {model.active_adapters}")
    [active] = model.active_adapters
    config = copy.copy(model.peft_config[active])
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # others may move weights, and what it starts with is overwritten
    model.add_adapter(REFERENCE_ADAPTER, config)
    parameters = {tuple(name.split(".")): parameter for name, parameter in model.named_parameters()}
    for name, parameter in parameters.items():
        if active in name:
            copied = parameters[tuple(REFERENCE_ADAPTER if part == active else part for part in name)]
            copied.data.copy_(parameter.data)
            copied.requires_grad_(False)


@contextlib.contextmanager
def without_reference_adapter(model: Any) -> Iterator[None]:
    """A model as if it had none, for saving: transformers resumes from a folder that holds a second adapter wrongly."""
    configs = getattr(model, "peft_config", {})
    hidden = configs.pop(REFERENCE_ADAPTER, None)
    try:
        yield
    finally:
        if hidden is not None:
            configs[REFERENCE_ADAPTER] = hidden


def check_adapter(model: Any, *, is_reference: bool, always: bool) -> None:
    """Refuse adapters that are no part of the layers, or that change a model which is to be the reference without them.

    Args:
        is_reference: the model without its adapter is the reference.
        always: and not only before training.

    Raises:
        ValueError: prompt learning; an initialisation that moves a part of the weights into the adapter.
    """
    below = is_reference and not has_reference_adapter(model)
    for config in getattr(model, "peft_config", {}).values():
        start = getattr(config, "init_lora_weights", None)
        if config.is_prompt_learning:
            raise ValueError(f"peft_config must adapt layers, got {config.peft_type.value}, which adds virtual tokens")
        if below and isinstance(start, str) and start.startswith(MOVES_WEIGHTS):
            raise ValueError(
                f"ref_model must be given with init_lora_weights={start!r}: without its adapter the model is not what "
                "it was"
            )
    if is_reference and always:
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        inside = _adapter_names(model)
        outside = [name for name in names if not inside & set(name.split("."))]
        if outside:
            logger.warning(
                "%d trained parameters are in no adapter (%s, ...): the reference, which is the model without its "
                "adapter, would move with them. Give a ref_model, or precompute_ref_log_probs=True.",
                len(outside), outside[0],
            )  # fmt: skip


def _adapter_names(model: Any) -> set[str]:
    """Parts of parameters' names that only an adapter, or a head beside the LM head, has."""
    names = {"modules_to_save", "beta_head", "disco_head", "value_head"}
    return names.union(*(getattr(module, "adapter_layer_names", ()) for module in model.modules()))


@contextlib.contextmanager
def as_reference(lm: nn.Module) -> Iterator[None]:
    """Within it, a causal LM answers as the reference, in evaluation mode and without gradient.

    That is with its reference adapter, where it has one, else without adapters.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers = [layer for layer in lm.modules() if isinstance(layer, kinds) and not layer.disable_adapters]
    active = [layer.active_adapters for layer in layers]
    training, wants = lm.training, {parameter: parameter.requires_grad for parameter in lm.parameters()}

    def restore() -> None:  # PEFT freezes an adapter that it disables, and FSDP2 sees at the first forward what trains
        for parameter, wanted in wants.items():
            parameter.requires_grad_(wanted)

    lm.eval()
    try:
        for layer in layers:
            if getattr(layer, "merged", False):
                layer.unmerge()
            if any(REFERENCE_ADAPTER in getattr(layer, part) for part in layer.adapter_layer_names):
                layer.set_adapter([REFERENCE_ADAPTER])
            else:
                layer.enable_adapters(False)
        restore()
        with torch.no_grad():
            yield
    finally:
        for layer, names in zip(layers, active, strict=True):
            layer.set_adapter(names)
            layer.enable_adapters(True)
        restore()
        lm.train(training)


def check_head_lora(head: Any) -> None:
    """Raise ValueError for an adapter on the LM head that `head_lora` cannot read."""
    for name in getattr(head, "lora_A", ()):
        if name in head.lora_variant or head.lora_bias[name]:
            raise ValueError(
                f"peft_config must put plain LoRA without lora_bias, or modules_to_save, on the LM head; "
                f"its adapter {name!r} is another variant"
            )


def head_lora(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
    """What LoRA on an LM head adds to its logits: projected (..., r) and lora_B (V, r), their product; or None.

    Args:
        head: the output embedding, a PEFT layer or not.
        hidden: (..., D), what the head is applied to.
    """
    if not hasattr(head, "lora_A") or head.disable_adapters or head.merged:
        return None
    active = [name for name in head.active_adapters if name in head.lora_A]
    if not active:
        return None
    projected = [
        head.lora_A[name](head.lora_dropout[name](hidden.to(head.lora_A[name].weight.dtype))) * head.scaling[name]
        for name in active
    ]
    lora_b = torch.cat([head.lora_B[name].weight for name in active], dim=1)
    return torch.cat(projected, dim=-1).to(hidden.dtype), lora_b.to(hidden.dtype)
