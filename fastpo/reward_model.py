"""A sequence classification model that answers with rewards: of its score, or Gaussian ones of a Disco head.

The head works inside the model's own forward, so that wrappers (DDP, FSDP, PEFT, autocast) run their hooks as for any
forward.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import ModelOutput

from fastpo.backbone import causal_lm

# What a model is called with and its backbone does not know, or is told here.
_NOT_PASSED_ON = ("labels", "margin", "return_dict", "use_cache")


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
    check_reward_model(model)
    if not hasattr(causal_lm(model), "disco_head"):
        raise ValueError("model must have a Disco head (add_disco_head=True, or load_heads), got one without")
    _install(causal_lm(model), _gaussian_reward)


def install_score_forward(model: Any) -> None:
    """Have a sequence classification model answer with the logits (R, 1) of its `score`, in at least fp32.

    They are those of its own forward, but need no pad_token_id in its config, and no autocast rounds them. Calling it
    twice changes nothing.

    Args:
        model: as in `install_reward_forward`, but for the head.

    Raises:
        ValueError: the model is of another kind.
    """
    check_reward_model(model)
    _install(causal_lm(model), _scalar_reward)


def _install(lm: Any, answer: Callable[..., ModelOutput]) -> None:
    if lm.__dict__.get("_reward_answer") is answer:
        return

    def forward(self: Any, *args: Any, **kwargs: Any) -> ModelOutput:
        return answer(self, *args, **kwargs)

    # PEFT and the Trainer read the signature.
    forward.__signature__ = inspect.signature(lm.forward)  # type: ignore[attr-defined]
    # Bound methods, not closures, so that a deep copy calls itself and not the model it was copied from.
    lm._reward_answer = answer
    lm.forward = MethodType(forward, lm)


def answers_by_head(model: Any) -> bool:
    """Whether `install_reward_forward` has been called for a model."""
    return causal_lm(model).__dict__.get("_reward_answer") is _gaussian_reward


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
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    mean, variance = lm.disco_head(_hidden_at(last_attended(mask), lm, input_ids, attention_mask, kwargs))
    return GaussianReward(logits=mean[:, None], variance=variance)


def _scalar_reward(
    lm: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> SequenceClassifierOutput:
    read = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    pad = lm.config.get_text_config().pad_token_id
    if pad is not None:  # transformers looks for the last token that is not this one
        read = read * (input_ids != pad)
    hidden = _hidden_at(last_attended(read), lm, input_ids, attention_mask, kwargs)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = lm.score(hidden.to(next(lm.score.parameters()).dtype))
    return SequenceClassifierOutput(logits=logits.to(torch.promote_types(logits.dtype, torch.float32)))


def _hidden_at(
    last: Tensor, lm: Any, input_ids: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor:
    """(R, D) hidden states at one position of each row."""
    others = {name: value for name, value in kwargs.items() if value is not None and name not in _NOT_PASSED_ON}
    hidden = lm.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **others)[0]
    return hidden[torch.arange(len(hidden), device=hidden.device), last]
