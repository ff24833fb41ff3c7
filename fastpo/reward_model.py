"""A sequence classification model whose reward is Gaussian: the Disco head's answer in place of the score's.

The head works inside the model's own forward, so that wrappers (DDP, FSDP, PEFT, autocast) run their hooks as for any
forward.
"""

import inspect
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from fastpo.backbone import causal_lm

# What a model is called with and its backbone does not know.
_OF_THE_LOSS = ("labels", "margin", "return_dict")


@dataclass
class GaussianReward(ModelOutput):
    """The reward of R sequences.

    Attributes:
        logits: (R, 1) mean, where a sequence classification model has its score.
        variance: (R,).
    """

    logits: Tensor | None = None
    variance: Tensor | None = None


def install_reward_forward(model: Any) -> None:
    """Have a sequence classification model with a Disco head answer with `GaussianReward`.

    Calling it twice changes nothing.

    Args:
        model: a model with one label, `score` on top of a backbone, and the head attached; possibly with PEFT adapters.

    Raises:
        ValueError: the model is of another kind, or has no Disco head.
    """
    lm = causal_lm(model)
    check_reward_model(model)
    if not hasattr(lm, "disco_head"):
        raise ValueError("model must have a Disco head (add_disco_head=True, or load_heads), got one without")
    if answers_by_head(model):
        return
    plain = lm.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> GaussianReward:
        return _gaussian_reward(self, *args, **kwargs)

    # PEFT and the Trainer read the signature.
    forward.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    # Bound methods, not closures, so that a deep copy calls itself and not the model it was copied from.
    lm._score_forward = plain
    lm.forward = MethodType(forward, lm)


def answers_by_head(model: Any) -> bool:
    """Whether `install_reward_forward` has been called for a model."""
    return "_score_forward" in causal_lm(model).__dict__


def check_reward_model(model: Any) -> None:
    """Raise ValueError for a model that is no sequence classification model with one label, a score and a backbone."""
    lm = causal_lm(model)
    labels = getattr(lm.config, "num_labels", None)
    if getattr(lm, "base_model", lm) is lm or not hasattr(lm, "score") or labels != 1:
        raise ValueError(
            "model must be a sequence classification model with num_labels=1 and a score layer on its backbone, got "
            f"{type(lm).__name__} with num_labels={labels}"
        )


def last_attended(attention_mask: Tensor) -> Tensor:
    """(R,) position of the last token of each row (R, T) that is attended to, on whichever side the padding is."""
    return (attention_mask * torch.arange(attention_mask.shape[1], device=attention_mask.device)).argmax(dim=1)


def _gaussian_reward(lm: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> GaussianReward:
    others = {name: value for name, value in kwargs.items() if value is not None and name not in _OF_THE_LOSS}
    hidden = lm.base_model(input_ids=input_ids, attention_mask=attention_mask, **others)[0]
    last = last_attended(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
    mean, variance = lm.disco_head(hidden[torch.arange(len(hidden), device=hidden.device), last])
    return GaussianReward(logits=mean[:, None], variance=variance)
