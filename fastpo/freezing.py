"""Training some layers of a model and leaving the rest as it is."""

import re
from collections.abc import Sequence

from torch import nn


def train_only(
    model: nn.Module, layers: int, modules: Sequence[str] = ("all",), extra_modules: Sequence[str] = ()
) -> None:
    """Freeze every parameter but those of some layers, and of some modules outside the layers.

    Args:
        model: a causal LM of transformers; changed.
        layers: the last so many of its layers, or the first so many where it is negative.
        modules: parts of a layer, such as ``self_attn`` or ``mlp``; ``all``: the whole layer.
        extra_modules: modules outside the layers, such as ``embed_tokens``, ``norm``, ``lm_head``.

    Raises:
        ValueError: layers is 0 or the model has no layers, or no module has such a name (a head that is tied to the
            embeddings goes by their name).
    """
    names = {name: _parts(name) for name, _ in model.named_parameters()}
    numbers = [number for number, _ in names.values() if number is not None]
    if layers == 0 or not numbers:
        raise ValueError(f"freeze_trainable_layers must not be 0, of a model with numbered layers, got {layers}")
    count = max(numbers) + 1
    trained = range(max(count - layers, 0), count) if layers > 0 else range(min(-layers, count))
    inside = {part for number, parts in names.values() if number is not None for part in parts[:1]}
    outside = {part for number, parts in names.values() if number is None for part in parts}
    _check("freeze_trainable_modules", modules, inside | {"all"})
    _check("freeze_extra_modules", extra_modules, outside)
    for name, parameter in model.named_parameters():
        number, parts = names[name]
        if number is None:
            parameter.requires_grad_(bool(set(parts) & set(extra_modules)))
        else:
            parameter.requires_grad_(number in trained and ("all" in modules or parts[0] in modules))


def _parts(name: str) -> tuple[int | None, list[str]]:
    """The layer of a parameter, if it is in one, and the modules that it is in: below the layer, or all of them."""
    in_layer = re.search(r"\.(\d+)\.", name)
    path = name[in_layer.end() :] if in_layer else name
    return (int(in_layer[1]) if in_layer else None), path.split(".")[:-1] or [path]


def _check(argument: str, names: Sequence[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{argument} must be of {', '.join(sorted(known))}, got {name!r}")
