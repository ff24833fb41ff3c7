"""Reward models from what is saved: a reward model, an adapter of one, or a causal LM whose backbone gets a score."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging
from transformers.utils.peft_utils import find_adapter_config_file

from fastpo.backbone import causal_lm

logger = logging.getLogger(__name__)

SCORE = "score"


def load_reward_model(
    name_or_path: str | Path, *, trainable: bool = False, new_score: bool = True, **options: Any
) -> Any:
    """A sequence classification model with one label, possibly with an adapter.

    A causal LM lends its backbone; the score on it is new, see `with_new_score`.

    Args:
        name_or_path: a folder, or a repository on the hub; of an adapter of a reward model too.
        trainable: whether an adapter that is loaded goes on being trained.
        new_score: False: it must be a reward model already.
        options: of `AutoModelForSequenceClassification.from_pretrained`.

    Raises:
        ValueError: a folder holds no model, a model has several labels, lacks weights, or has no such class; an adapter
            is none of a reward model; or without `new_score` it is a causal LM.
        OSError: transformers finds nothing of that name.
    """
    shown = repr(str(name_or_path))
    if Path(name_or_path).is_dir():
        if not any(Path(name_or_path, name).is_file() for name in ("config.json", "adapter_config.json")):
            raise ValueError(f"{shown} must hold a saved model, got a folder without a config.json")
    elif Path(name_or_path).is_absolute():
        raise ValueError(f"{shown} must hold a saved model, got no such folder")
    adapter = _adapter_config(name_or_path)
    if adapter is not None:
        return _load_adapter(name_or_path, adapter, trainable, options)
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=options.get("trust_remote_code"))
    classifies = _classifies(config)
    if classifies and config.num_labels != 1:
        raise ValueError(f"a reward model must have num_labels=1, got {config.num_labels} in {shown}")
    if not classifies and not new_score:
        raise ValueError(f"{shown} must hold a reward model, got {', '.join(config.architectures or ['another one'])}")
    with contextlib.nullcontext() if classifies else _without_load_report():
        model, found = AutoModelForSequenceClassification.from_pretrained(
            name_or_path, num_labels=1, output_loading_info=True, **options
        )
    expected = set() if classifies else {f"{SCORE}.weight"}
    if lacking := set(found["missing_keys"]) - expected:
        raise ValueError(f"{shown} must hold all weights of its model, got none for {', '.join(sorted(lacking))}")
    return model if classifies else with_new_score(model)


def new_reward_model(config: Any, **options: Any) -> Any:
    """A sequence classification model with one label and weights by chance, but for its score.

    Args:
        config: of a causal LM or of such a model.
        options: of `AutoModelForSequenceClassification.from_config`.
    """
    config.num_labels = 1
    return with_new_score(AutoModelForSequenceClassification.from_config(config, **options))


def with_new_score(model: Any) -> Any:
    """A sequence classification model with a score of zeros, which is to be trained.

    So the first loss is log 2 whatever the seed, and there are no chance rewards to be unlearnt. Its config forgets a
    padding token: `settle_pad_token` says which one it gets.
    """
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
            "the tokenizer has no pad_token but its eos_token, and so the reward model gets none: fastpo scores "
            "batches, transformers' own forward will take one row at a time"
        )
        return
    config.pad_token_id = tokenizer.pad_token_id


def _load_adapter(name_or_path: str | Path, adapter: Any, trainable: bool, options: dict[str, Any]) -> Any:
    from peft import PeftModel

    shown, base = repr(str(name_or_path)), adapter.base_model_name_or_path
    if adapter.task_type != "SEQ_CLS":
        raise ValueError(
            f"an adapter of a reward model must have task_type SEQ_CLS, got {adapter.task_type} in {shown}: merge it "
            "into its model, and name that"
        )
    config = AutoConfig.from_pretrained(base, trust_remote_code=options.get("trust_remote_code"))
    if not _classifies(config) and SCORE not in (adapter.modules_to_save or ()):
        raise ValueError(f"{shown} must hold a score among its modules_to_save, which {base!r} does not have")
    # transformers' own way of loading an adapter leaves its score behind.
    return PeftModel.from_pretrained(load_reward_model(base, **options), name_or_path, is_trainable=trainable)


def _adapter_config(name_or_path: str | Path) -> Any:
    """The config of an adapter, or None of what is none."""
    if Path(name_or_path, "config.json").is_file() or find_adapter_config_file(name_or_path) is None:
        return None
    from peft import PeftConfig

    return PeftConfig.from_pretrained(name_or_path)


def _classifies(config: Any) -> bool:
    return any("SequenceClassification" in name for name in config.architectures or ())


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """Without transformers' table of the weights that a causal LM has and a reward model has not, or the other way."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
