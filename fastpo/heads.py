"""Small networks beside the language model: the Beta head s(x), the Disco head (mean, variance), the value head.

All are made in fp32 whatever the model's dtype and answer in at least that; they are kept beside a model as
NAME.safetensors and NAME_config.json.
"""

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpo.config import BetaHeadConfig

LEAST_VARIANCE = 1e-3


class Head(nn.Module):
    """Saving and loading; a head is named by the attribute under which a model holds it."""

    name: ClassVar[str]
    input_size: int

    def settings(self) -> dict[str, Any]:
        """What the constructor needs to build it again, as JSON."""
        raise NotImplementedError

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | Path, *, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write NAME.safetensors and NAME_config.json.

        Args:
            save_directory: the folder, usually the model's.
            state_dict: the weights, where they are not the module's own (gathered from shards); None: its own.
        """
        from safetensors.torch import save_file

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {key: value.contiguous().cpu() for key, value in (state_dict or self.state_dict()).items()}
        save_file(weights, folder / f"{self.name}.safetensors")
        (folder / f"{self.name}_config.json").write_text(json.dumps(self.settings(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> Self:
        """A head from a folder, or from the repository of a model on the Hugging Face hub.

        Raises:
            ValueError: nothing is saved there, or it does not fit together.
        """
        file = cls._file(name_or_path, f"{cls.name}_config.json")
        try:
            head = cls.from_settings(json.loads(file.read_text()))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} must be what a {cls.name} saved: {type(error).__name__}: {error}") from None
        head.load_pretrained(name_or_path)
        return head

    def load_pretrained(self, name_or_path: str | Path) -> None:
        """Take over saved weights in place.

        Raises:
            ValueError: nothing is saved there, or its shapes are others.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self._file(name_or_path, f"{self.name}.safetensors")
        try:
            self.load_state_dict(_sharded_as(self.state_dict(), load_file(file)))
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"{file} does not fit this {self.name}: {error}") from None

    @classmethod
    def is_saved(cls, name_or_path: str | Path) -> bool:
        """Whether a folder, or a repository on the hub, holds this head."""
        try:
            cls._file(name_or_path, f"{cls.name}_config.json")
        except ValueError:
            return False
        return True

    @classmethod
    def _file(cls, name_or_path: str | Path, file: str) -> Path:
        path = Path(name_or_path) / file
        if path.is_file():
            return path
        # Only a string can name a repository, as OWNER/NAME.
        if isinstance(name_or_path, str) and not Path(name_or_path).is_dir() and name_or_path.count("/") == 1:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

            with contextlib.suppress(EntryNotFoundError, HFValidationError, RepositoryNotFoundError):
                return Path(hf_hub_download(name_or_path, file))
        raise ValueError(f"{str(name_or_path)!r} must hold a saved {cls.name}: no {file}")


def _sharded_as(own: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights that every process has read, those of parameters that FSDP2 shards as such shards."""
    return {
        key: value if not hasattr(own.get(key), "device_mesh") else _shard(value, own[key])
        for key, value in weights.items()
    }


def _shard(value: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class BetaHead(Head):
    """s(x) > 0 of each prompt, from features of it under the reference; exactly 1 at the start.

    s = exp(K tanh(u/K)) with K = log s_max, or exp(u) without a bound; u is a linear map or an mlp of the features, its
    last layer initialised to 0. Features are constants to it.

    Args:
        input_size: D of the reference's hidden states; used where ``hidden`` is among the features.
        config: kind, features, bound and training; a `BetaHeadConfig` or its fields.
    """

    name = "beta_head"

    def __init__(self, input_size: int, config: BetaHeadConfig | dict[str, Any] | None = None) -> None:
        super().__init__()
        self.input_size = input_size
        self.config = config if isinstance(config, BetaHeadConfig) else BetaHeadConfig.from_dict(config)
        width = sum(input_size if name == "hidden" else 1 for name in self.config.features)
        layers: list[nn.Module] = []
        if self.config.kind == "mlp":
            layers = [nn.Linear(width, self.config.hidden_size), nn.SiLU()]
            width = self.config.hidden_size
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1)).float()
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def log_s(
        self, hidden: Tensor | None = None, *, perplexity: Tensor | None = None, entropy: Tensor | None = None
    ) -> Tensor:
        """log s(x) (B,), fp32; arguments as in `forward`."""
        features = self.features(hidden, perplexity=perplexity, entropy=entropy)
        with torch.autocast(features.device.type, enabled=False):
            u = _at_least_fp32(self.layers(features)[:, 0])
        if self.config.s_max is None:
            return u
        bound = math.log(self.config.s_max)
        return bound * torch.tanh(u / bound)

    def forward(
        self, hidden: Tensor | None = None, *, perplexity: Tensor | None = None, entropy: Tensor | None = None
    ) -> Tensor:
        """s(x) (B,), fp32.

        Args:
            hidden: (B, D) the reference's hidden state at the last token of the prompt.
            perplexity: (B,) the reference's perplexity of the prompt.
            entropy: (B,) its mean entropy over the prompt divided by log V.
        """
        return self.log_s(hidden, perplexity=perplexity, entropy=entropy).exp()

    def features(
        self, hidden: Tensor | None = None, *, perplexity: Tensor | None = None, entropy: Tensor | None = None
    ) -> Tensor:
        """(B, F) input of the network, detached: hidden states of mean 0 and variance 1, log-perplexity, entropy.

        Raises:
            ValueError: a feature that the head reads is missing or misshapen.
        """
        columns: list[Tensor] = []
        own_dtype = next(self.parameters()).dtype
        for name, value in (("hidden", hidden), ("perplexity", perplexity), ("entropy", entropy)):
            if name not in self.config.features:
                continue
            wanted = (self.input_size,) if name == "hidden" else ()
            if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[1:] != wanted:
                shape = f"(B, {self.input_size})" if name == "hidden" else "(B,)"
                raise ValueError(f"{name} must be a tensor of shape {shape}, got {_shape(value)}")
            if columns and len(value) != len(columns[0]):
                raise ValueError(f"{name} must have {len(columns[0])} rows, as the other features, got {len(value)}")
            column = value.detach().to(torch.promote_types(own_dtype, torch.float32))
            if name == "hidden":
                columns.append(F.layer_norm(column, wanted))  # the scale of hidden states differs by model
            else:
                columns.append((column.clamp(min=1).log() if name == "perplexity" else column)[:, None])
        return torch.cat(columns, dim=1).to(own_dtype)

    def settings(self) -> dict[str, Any]:
        return {"input_size": self.input_size, **dataclasses.asdict(self.config)}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        fields = dict(settings)
        return cls(fields.pop("input_size"), BetaHeadConfig.from_dict(fields))


class DiscoHead(Head):
    """Mean and variance of a response's reward, from the trained model's hidden state at its last token.

    variance = softplus + 1e-3; the linear map is initialised to 0.

    Args:
        input_size: D of the model's hidden states.
    """

    name = "disco_head"

    def __init__(self, input_size: int) -> None:
        super().__init__()
        self.input_size = input_size
        self.linear = nn.Linear(input_size, 2).float()
        for parameter in self.linear.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (R,) and variance (R,), fp32, of hidden (R, D); differentiable in hidden.

        Raises:
            ValueError: hidden has another shape.
        """
        mean, spread = _linear(self.linear, hidden, self.input_size).unbind(dim=1)
        return mean, F.softplus(spread) + LEAST_VARIANCE

    def settings(self) -> dict[str, Any]:
        return {"input_size": self.input_size}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        return cls(**settings)


class ValueHead(Head):
    """Expected return from a state on, from the trained model's hidden state there; 0 at the start.

    Its loss reaches the backbone too, as in PPO with one network for policy and value: a detached linear map could
    only read what the policy happens to keep. `vf_coef` says how much of that gradient the backbone sees.

    Args:
        input_size: D of the model's hidden states.
    """

    name = "value_head"

    def __init__(self, input_size: int) -> None:
        super().__init__()
        self.input_size = input_size
        self.linear = nn.Linear(input_size, 1).float()
        for parameter in self.linear.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor) -> Tensor:
        """Value (R,), fp32, of hidden (R, D); differentiable in hidden.

        Raises:
            ValueError: hidden has another shape.
        """
        return _linear(self.linear, hidden, self.input_size)[:, 0]

    def settings(self) -> dict[str, Any]:
        return {"input_size": self.input_size}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        return cls(**settings)


def _linear(linear: nn.Linear, hidden: Tensor, size: int) -> Tensor:
    """(R, outputs), at least fp32, of hidden (R, size) in any dtype."""
    if not isinstance(hidden, Tensor) or hidden.dim() != 2 or hidden.shape[1] != size:
        raise ValueError(f"hidden must be a tensor of shape (R, {size}), got {_shape(hidden)}")
    with torch.autocast(hidden.device.type, enabled=False):
        return _at_least_fp32(linear(hidden.to(linear.weight.dtype)))


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else value
