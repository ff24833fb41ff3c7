"""Reward models from what is saved: a reward model, an adapter of one, or a causal LM whose backbone gets a score."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from fastpo.backbone import causal_lm

logger = logging.getLogger(__name__)


def load_reward_model(
    name_or_path: str | Path, *, trainable: bool = False, new_score: bool = True, **options: Any
) -> Any:
    """A sequence classification model with one label.

    A causal LM lends its backbone; the score on it is new, of zeros: the first loss is log 2 whatever the seed, and
    there are no rewards by chance to be unlearnt.

    Args:
        name_or_path: a folder, or a repository on the hub; of an adapter of a reward model too.
        trainable: whether an adapter that is loaded goes on being trained.
        new_score: False: it must be a reward model already.
        options: of `AutoModelForSequenceClassification.from_pretrained`.

    Raises:
        ValueError: there is nothing of that name, it has several labels or no such model exists for it, or without
            `new_score` it is a causal LM; an adapter is not of a reward model.
        OSError: as transformers.
    """
    adapter = _adapter_config(name_or_path)
    if adapter is not None:
        from peft import PeftModel

        if adapter.task_type != "SEQ_CLS":
            raise ValueError(
                f"an adapter for a reward model must have task_type SEQ_CLS, got {adapter.task_type} in "
                f"{str(name_or_path)!r}: merge it into its model first"
            )
        # transformers' own way from here (0 to 5.17) leaves the adapter's score behind.
        base = load_reward_model(adapter.base_model_name_or_path, **options)
        return PeftModel.from_pretrained(base, name_or_path, is_trainable=trainable)
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=options.get("trust_remote_code"))
    classifies = any("SequenceClassification" in name for name in config.architectures or ())
    if classifies and config.num_labels != 1:
        raise ValueError(f"a reward model must have num_labels=1, got {config.num_labels} in {str(name_or_path)!r}")
    if not classifies and not new_score:
        raise ValueError(f"{str(name_or_path)!r} must hold a reward model, got {', '.join(config.architectures or ())}")
    with contextlib.nullcontext() if classifies else _without_load_report():
        model, found = AutoModelForSequenceClassification.from_pretrained(
            name_or_path, num_labels=1, output_loading_info=True, **options
        )
    lacking = set(found["missing_keys"]) - (set() if classifies else {"score.weight"})
    if lacking:
        raise ValueError(f"{str(name_or_path)!r} must hold all weights of its model, got none for {sorted(lacking)}")
    if not classifies:
        with_new_score(model)
    return model


def new_reward_model(config: Any, **options: Any) -> Any:
    """A sequence classification model with one label and weights by chance, but for its score of zeros.

    Args:
        config: of a causal LM or of such a model.
        options: of `AutoModelForSequenceClassification.from_config`.
    """
    config.num_labels = 1
    return with_new_score(AutoModelForSequenceClassification.from_config(config, **options))


def with_new_score(model: Any) -> Any:
    """A sequence classification model, its score set to zero; its config forgets where rows were padded."""
    with torch.no_grad():
        for parameter in model.score.parameters():
            parameter.zero_()
    model.config.get_text_config().pad_token_id = None
    return model


def settle_pad_token(model: Any, tokenizer: Any) -> None:
    """Have a model whose config knows no padding token take the tokenizer's, if no response ends with it.

    transformers' forward finds the last token of a row as the last one that is no padding token, so a pad_token that is
    the eos_token would hide the end of every response. Without one, it takes one row at a time.
    """
    config = causal_lm(model).config.get_text_config()
    if config.pad_token_id is not None:
        return
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        logger.warning(
            "the tokenizer has no pad_token but its eos_token, and the model gets none: fastpo scores batches, "
            "transformers' own forward will take one row at a time"
        )
        return
    config.pad_token_id = tokenizer.pad_token_id


def _adapter_config(name_or_path: str | Path) -> Any:
    """The config of an adapter, or None of what is none."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if Path(name_or_path, "config.json").is_file() or find_adapter_config_file(name_or_path) is None:
        return None
    from peft import PeftConfig

    return PeftConfig.from_pretrained(name_or_path)


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """Without transformers' table of weights that a causal LM has and a reward model has not, or the other way."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
