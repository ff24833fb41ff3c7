"""Short names of what a result depends on: a model's function, rows of a dataset."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_128

# What differs between configs of the same function.
NOT_OF_THE_FUNCTION = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")


def model_fingerprint(model: Any) -> str:
    """Of a model's config, weights, heads and adapters."""
    digest = xxh3_128()
    digest.update(json.dumps([config_of(model), adapter_state(model)], sort_keys=True, default=str).encode())
    add_weights(digest, sorted((name, x) for name, x in model.state_dict().items() if isinstance(x, Tensor)))
    return digest.hexdigest()


def rows_fingerprint(rows: Iterable[Mapping[str, Any]]) -> str:
    """Of rows in their order.

    Raises:
        ValueError: a row holds something that JSON does not know, such as a date (its column is named).
    """
    digest = xxh3_128()
    for row in rows:
        for name, value in row.items():
            try:
                digest.update(json.dumps([name, value], sort_keys=True).encode())
            except TypeError as error:
                raise ValueError(f"dataset column {name!r} must hold what JSON can: {error}") from None
        digest.update(b"\n")
    return digest.hexdigest()


def config_of(model: Any) -> dict[str, Any]:
    """What of a model's config its function depends on."""
    return {name: x for name, x in model.config.to_dict().items() if name not in NOT_OF_THE_FUNCTION}


def adapter_state(model: Any) -> list[Any]:
    """What of a model's adapters is in use, and how, beside their weights."""
    layers = [module for module in model.modules() if hasattr(module, "adapter_layer_names")]
    names = ("active_adapters", "merged_adapters", "disable_adapters", "scaling", "lora_variant")
    return [[str(getattr(layer, name, None)) for name in names] for layer in layers]


def add_weights(digest: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Have a digest depend on named tensors: their names, dtypes, shapes and values."""
    for name, tensor in weights:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
