"""PEFT adapters: added, switched off for the reference, and read where they sit on the LM head."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def add_adapter(model: Any, peft_config: Any, gradient_checkpointing: bool) -> Any:
    from peft import get_peft_model

    if gradient_checkpointing:
        # Checkpointed blocks of a frozen backbone have no gradient to follow unless their input asks for one.
        model.enable_input_require_grads()
    return get_peft_model(model, peft_config)


@contextlib.contextmanager
def adapters_disabled(lm: nn.Module) -> Iterator[None]:
    """Within it, a causal LM answers as it does without its adapter, in evaluation mode and without gradient."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [layer for layer in lm.modules() if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    training = lm.training
    lm.eval()
    try:
        for layer in layers:
            layer.enable_adapters(False)
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
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
