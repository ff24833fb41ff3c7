"""Models and tokenizers as TRL's trainers take them: by name, with the config's keyword arguments, or as they are."""

import logging
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from fastpo.backbone import causal_lm

logger = logging.getLogger(__name__)


def load_model(model: Any, args: Any, quantization_config: Any) -> Any:
    """A causal LM; one that is named is loaded in float32, unless `model_init_kwargs` say another dtype.

    Raises:
        ValueError: a quantization_config twice, or for a model that is loaded already; a model that also sees; a
            mixture of experts whose load is to be balanced.
    """
    if isinstance(model, str):
        options = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
        if quantization_config is not None:
            if "quantization_config" in options:
                raise ValueError("quantization_config must be given once, got it in model_init_kwargs too")
            options["quantization_config"] = quantization_config
        model = AutoModelForCausalLM.from_pretrained(model, **options)
    elif quantization_config is not None:
        raise ValueError("quantization_config must be None for a model that is loaded already")
    elif args.model_init_kwargs is not None:
        logger.warning("model_init_kwargs are for a model given by its name: this one is loaded already")
    config = causal_lm(model).config
    if hasattr(config, "vision_config"):
        raise ValueError(f"model must be a language model, got {type(model).__name__}, which also sees")
    _check_router(config.get_text_config(), args.router_aux_loss_coef)
    return model


def _check_router(config: Any, given: float | None) -> None:
    routes = hasattr(config, "output_router_logits")
    coef = getattr(config, "router_aux_loss_coef", 0.0) if given is None else given
    if coef and not routes:
        raise ValueError(f"router_aux_loss_coef is for a mixture of experts, got {coef!r} for a {config.model_type}")
    if coef and routes:
        raise ValueError(
            f"router_aux_loss_coef must be 0.0 for a mixture of experts, whose load is not balanced here; got {coef!r}"
            f"{' from the model' if given is None else ''}"
        )


def load_tokenizer(tokenizer: Any, model: Any, args: Any) -> Any:
    """The tokenizer, by default the one saved beside the model, with a padding token that the model knows too.

    Raises:
        TypeError: it is no tokenizer.
        ValueError: `pad_token` is none of its tokens.
    """
    lm = causal_lm(model)
    if tokenizer is None:
        revision = (args.model_init_kwargs or {}).get("revision")
        tokenizer = AutoTokenizer.from_pretrained(
            lm.config._name_or_path, revision=revision, trust_remote_code=args.trust_remote_code
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"processing_class must be a tokenizer, got {type(tokenizer).__name__}")
    pad = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
    if pad is not None:
        if pad not in tokenizer.get_vocab():
            raise ValueError(f"pad_token must be one of the tokenizer's tokens, got {pad!r}")
        tokenizer.pad_token = pad
        lm.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if getattr(lm, "generation_config", None) is not None:
            lm.generation_config.pad_token_id = tokenizer.pad_token_id
    return tokenizer
