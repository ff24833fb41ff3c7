"""What exists in a model beside its language model: heads attached, saved beside it, found again.

A head is a submodule of the causal LM (or of the sequence classification model that a reward model is), so that
wrappers (DDP, FSDP) see its parameters and its work happens inside the model's forward. The saved model does not hold
it: `save_pretrained` writes it into files of its own.
"""

import contextlib
import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

from torch import Tensor, nn

from fastpo.adapters import add_adapter
from fastpo.backbone import causal_lm
from fastpo.config import PreferenceConfig
from fastpo.heads import BetaHead, DiscoHead, Head, ValueHead
from fastpo.lm_head import head_shape

logger = logging.getLogger(__name__)

HEADS: dict[str, type[Head]] = {kind.name: kind for kind in (BetaHead, DiscoHead, ValueHead)}


def heads_of(model: Any) -> dict[str, Any]:
    """The heads attached to a model, by name."""
    lm = causal_lm(model)
    return {name: getattr(lm, name) for name in HEADS if isinstance(getattr(lm, name, None), nn.Module)}


def load_heads(model: Any, name_or_path: str | Path) -> dict[str, Any]:
    """Attach the heads that are saved beside a model or an adapter; into those attached already, load the weights.

    Args:
        model: a causal LM or a sequence classification model, possibly with PEFT adapters.
        name_or_path: the folder, or a repository on the Hugging Face hub.

    Returns:
        the heads found, by name.

    Raises:
        ValueError: a saved head does not fit the one that is attached.
    """
    found = {}
    for name, kind in HEADS.items():
        if kind.is_saved(name_or_path):
            attached = heads_of(model).get(name)
            if attached is None:
                attach_head(model, kind.from_pretrained(name_or_path))
            else:
                attached.load_pretrained(name_or_path)
            found[name] = heads_of(model)[name]
    return found


def attach_head(model: Any, head: Head) -> None:
    """Make a head part of a model, which from then on saves it beside itself."""
    lm = causal_lm(model)
    # Where the last hidden states are.
    last = lm.score if lm.get_output_embeddings() is None else lm.get_output_embeddings()
    setattr(lm, head.name, head.to(next(last.parameters()).device))
    _save_heads_with(model)


@contextlib.contextmanager
def without_heads(model: Any) -> Iterator[None]:
    """A model as if it had none, for what must not see them: copies, adapters on all linear layers."""
    lm = causal_lm(model)
    heads = heads_of(model)
    for name in heads:
        delattr(lm, name)
    try:
        yield
    finally:
        for name, head in heads.items():
            setattr(lm, name, head)


def with_new_adapter(model: Any, peft_config: Any, gradient_checkpointing: bool) -> Any:
    """A model in a new adapter, which leaves its heads alone; without a config the model as it is.

    Raises:
        ValueError: as `add_adapter`.
    """
    if peft_config is None:
        return model
    with without_heads(model):
        return add_adapter(model, peft_config, gradient_checkpointing)


def add_heads(model: Any, reference: Any, config: PreferenceConfig, source: str | None) -> PreferenceConfig:
    """Give a model the heads that the configuration says exist; those that it does not use stay untrained.

    Args:
        model: a causal LM, possibly with PEFT adapters, and with heads.
        reference: another reference model, of whose hidden states the Beta head makes s(x), or None.
        config: `add_beta_head`, `beta_head_config`, `add_disco_head`, and what is used of them.
        source: where the model came from and its heads may be saved.

    Returns:
        config, with the `beta_head_config` of the Beta head that is there.

    Raises:
        ValueError: the head that is there differs from `beta_head_config`, or takes other hidden states.
    """
    exist = {"beta_head": config.add_beta_head, "disco_head": config.add_disco_head}
    read = {"beta_head": model if reference is None else reference, "disco_head": model}
    for name, exists in exist.items():
        kind = HEADS[name]
        _, size = head_shape(causal_lm(read[name]))
        make = partial(BetaHead, size, config.beta_head) if kind is BetaHead else partial(DiscoHead, size)
        _settle_head(model, kind, make, size, exists, source)
    beta_head = heads_of(model).get("beta_head")
    if beta_head is not None and config.beta_head_config is not None and beta_head.config != config.beta_head:
        raise ValueError(
            f"beta_head_config must be None or that of the model's Beta head, {beta_head.config}, "
            f"got {config.beta_head_config!r}"
        )
    _train_used(model, config)
    if beta_head is None or not config.add_beta_head:
        return config
    return dataclasses.replace(config, beta_head_config=dataclasses.asdict(beta_head.config))


def add_reward_head(model: Any, config: PreferenceConfig, source: str | None) -> None:
    """Give a reward model the Disco head that the configuration says exists; one that it does not use stays untrained.

    Args:
        model: a sequence classification model, possibly with PEFT adapters, and with the head.
        config: `add_disco_head`, and whether it is used.
        source: where the model came from and its head may be saved.

    Raises:
        ValueError: the head that is there takes other hidden states.
    """
    size = causal_lm(model).config.get_text_config().hidden_size
    _settle_head(model, DiscoHead, partial(DiscoHead, size), size, config.add_disco_head, source)
    _train_used(model, config)


def add_value_head(model: Any, source: str | None) -> None:
    """Give a model the value head of PPO, to be trained. After `add_heads`, which leaves it untrained.

    Args:
        model: a causal LM, possibly with PEFT adapters, and with the head.
        source: where the model came from and its head may be saved.

    Raises:
        ValueError: the head that is there takes other hidden states.
    """
    _, size = head_shape(causal_lm(model))
    _settle_head(model, ValueHead, partial(ValueHead, size), size, True, source)
    heads_of(model)[ValueHead.name].requires_grad_(True)


def check_optimizer(optimizer: Any, model: Any) -> None:
    """An optimiser of the caller's own, or None, knows the heads that train."""
    given = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer is not None else None
    for name, head in heads_of(model).items():
        if given is not None and any(p.requires_grad and id(p) not in given for p in head.parameters()):
            raise ValueError(f"optimizers must hold the {name}'s parameters (attach it first), or be (None, None)")


def _settle_head(
    model: Any, kind: type[Head], make: Callable[[], Head], size: int, exists: bool, source: str | None
) -> None:
    """The head that a model has, was saved with, or, if one is to exist, gets; it must take hidden states of a size."""
    name, attached = kind.name, heads_of(model).get(kind.name)
    # A hub is asked only for a head that shall exist.
    asked = attached is None and bool(source) and (exists or Path(str(source)).is_dir())
    saved = asked and kind.is_saved(str(source))
    if saved and exists:
        attach_head(model, kind.from_pretrained(str(source)))
    elif saved:
        logger.warning("%s holds a %s; with add_%s=False it is left behind", source, name, name)
    elif attached is None and exists:
        attach_head(model, make())
    attached = heads_of(model).get(name)
    if attached is None:
        return
    if attached.input_size != size:
        raise ValueError(f"{name} must take hidden states of size {size}, got one for size {attached.input_size}")
    if any(hasattr(module, "base_layer") for module in attached.modules()):
        raise ValueError(f"{name} must not have LoRA on it: make the PEFT model first, then load_heads")
    _save_heads_with(model)  # an adapter may have come since it was attached


def _train_used(model: Any, config: PreferenceConfig) -> None:
    used = {"beta_head": config.beta_mode == "dynamic_scaling", "disco_head": "disco" in config.comparisons}
    for name, head in heads_of(model).items():
        head.requires_grad_(used.get(name, False))


def _save_heads_with(model: Any) -> None:
    """Have `save_pretrained` of a model, and of the causal LM in it, write the heads beside it and not in it."""
    for saving in {id(x): x for x in (model, causal_lm(model))}.values():
        if "_plain_save_pretrained" not in saving.__dict__:
            # Bound methods, not closures, so that a deep copy saves itself and not the model it was copied from.
            saving._plain_save_pretrained = saving.save_pretrained
            saving.save_pretrained = MethodType(_save_pretrained, saving)


def _save_pretrained(model: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
    plain = model._plain_save_pretrained
    whole: dict[str, Tensor] = kwargs.pop("state_dict", None) or model.state_dict()
    apart = {name: {key for key in whole if name in key.split(".")} for name in HEADS}
    rest = {key: value for key, value in whole.items() if not any(key in keys for keys in apart.values())}
    given = inspect.signature(plain).bind(save_directory, *args, **kwargs).arguments
    saved = plain(save_directory, *args, state_dict=rest, **kwargs)
    if given.get("is_main_process", True):
        for name, head in heads_of(model).items():
            weights = {key.split(f"{name}.", 1)[1]: whole[key] for key in apart[name]}
            head.save_pretrained(save_directory, state_dict=weights)
    return saved
