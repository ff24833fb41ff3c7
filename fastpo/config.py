"""`PreferenceConfig`: what is optimised, as one frozen dataclass that validates itself."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from fastpo.links import LINKS

REGULARIZER_NAMES = ("pointwise", "range", "entropy", "confidence", "global", "smooth")

PRESETS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "ln_dpo": {"length_normalization": True, "beta": 2.0},
    "ipo": {"pref_loss_type": "ipo", "length_normalization": True},
    "slic": {"pref_loss_type": "hinge"},
    "simpo": {"length_normalization": True, "reference_free": True, "beta": 2.0, "home_advantage": 1.0},
    "mallows_dpo": {"contextual_scaling": "mallows", "contextual_scaling_coef": 0.29},
    "rainbowpo": {
        "beta": 10.0,
        "length_normalization": True,
        "reference_mix": 0.25,
        "home_advantage": 0.1,
        "margin_units": "logratio",
        "contextual_scaling": "mallows",
        "contextual_scaling_coef": 0.29,
    },
    "ledpo": {"add_beta_head": True, "beta_mode": "dynamic_scaling"},
    "disco_dpo": {"add_disco_head": True, "pref_loss_type": "disco"},
}


def option(default: Any, text: str) -> Any:
    """A dataclass field whose help text the command line shows."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class PreferenceConfig:
    """The one formula's parameters; names and defaults are fixed (V7.1).

    With h the (length-normalised, reference-corrected) score difference, b = beta_eff(x), m the home advantage and
    phi(x) the contextual scale: z = phi (b h - m) in reward units or phi b (h - m) in log-ratio units, and
    loss = (1 - eps) f(z) + eps f(-z) + sft_weight SFT.

    Raises:
        ValueError: a field is out of its range, or two fields contradict each other.
        TypeError: a field has the wrong type.
    """

    pref_loss_type: str = option("sigmoid", "Which comparison is used: a link of fastpo.links, or disco.")
    beta: float = option(0.1, "The base value of beta; how strongly the reference holds.")
    beta_mode: str = option("fixed", "Where beta comes from: fixed, or dynamic_scaling (the Beta head's beta*s(x)).")
    add_beta_head: bool = option(False, "The Beta head exists, on the reference model.")
    beta_head_config: dict | None = option(None, "How the Beta head is built (fields of BetaHeadConfig).")
    add_disco_head: bool = option(False, "The Disco head exists, on the trained model.")
    length_normalization: bool = option(False, "Divide log-prob sums by the response length in tokens.")
    home_advantage: float = option(0.0, "The margin m.")
    margin_units: str = option("reward", "reward: z = phi*(b*h - m); logratio: z = phi*b*(h - m).")
    reference_mix: float | None = option(None, "alpha of the mixed reference policy, in [0, 1]; none: no mixing.")
    reference_free: bool = option(False, "Leave the reference out of the score.")
    contextual_scaling: str = option("none", "phi(x): none, or mallows (from the reference's entropy).")
    contextual_scaling_coef: float = option(1.0, "kappa of the Mallows scale.")
    sft_weight: float = option(0.0, "Weight of the SFT term on the chosen response.")
    sft_reduction: str = option("mean", "SFT term per sequence: mean | sum over its tokens; token: batch token mean.")
    label_smoothing: float = option(0.0, "Probability that a label is flipped, in [0, 0.5].")
    hinge_delta: float = option(1.0, "Offset of hinge and truncated_square.")
    variance_floor: float = option(1e-6, "Smallest summed variance of a Disco comparison.")
    disco_prior_weight: float = option(1e-3, "Weight of the Disco head's N(0, 1) prior.")
    regularizers: dict | None = option(None, "Weights of the Beta head's regularisers by name; none: defaults.")
    beta_schedule: dict | None = option(None, "Staged beta over training.")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field, getattr(self, field.name))
        _check_choice("pref_loss_type", self.pref_loss_type, (*LINKS, "disco"))
        _check_choice("beta_mode", self.beta_mode, ("fixed", "dynamic_scaling"))
        _check_choice("margin_units", self.margin_units, ("reward", "logratio"))
        _check_choice("contextual_scaling", self.contextual_scaling, ("none", "mallows"))
        _check_choice("sft_reduction", self.sft_reduction, ("mean", "sum", "token"))
        for name in ("beta", "hinge_delta", "contextual_scaling_coef", "variance_floor"):
            _check_range(name, getattr(self, name), above=0.0)
        for name in ("sft_weight", "disco_prior_weight"):
            _check_range(name, getattr(self, name), low=0.0)
        _check_range("home_advantage", self.home_advantage)
        _check_range("label_smoothing", self.label_smoothing, low=0.0, high=0.5)
        if self.reference_mix is not None:
            _check_range("reference_mix", self.reference_mix, low=0.0, high=1.0)
        for name in self.regularizers or ():
            _check_choice("regularizers", name, REGULARIZER_NAMES)
        self._check_pairings()

    def _check_pairings(self) -> None:
        if self.reference_free and self.reference_mix is not None:
            raise ValueError(
                f"reference_mix must be None with reference_free=True (there is no reference to mix), "
                f"got {self.reference_mix}"
            )
        if self.beta_mode == "dynamic_scaling" and not self.add_beta_head:
            raise ValueError("beta_mode='dynamic_scaling' needs a Beta head: set add_beta_head=True, got False")
        if self.beta_mode == "dynamic_scaling" and self.pref_loss_type == "ipo":
            raise ValueError(
                "pref_loss_type='ipo' cannot be paired with beta_mode='dynamic_scaling' (it drives s(x) to infinity "
                "where h < 0): use pref_loss_type='ipo_scaled'"
            )
        if self.pref_loss_type == "disco" and not self.add_disco_head:
            raise ValueError("pref_loss_type='disco' needs a Disco head: set add_disco_head=True, got False")
        if self.beta_head_config is not None and not self.add_beta_head:
            raise ValueError(f"beta_head_config must be None without add_beta_head, got {self.beta_head_config!r}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "PreferenceConfig":
        """The configuration of a published method, e.g. ``preset("rainbowpo", beta=5.0)``."""
        _check_choice("preset", name, tuple(PRESETS))
        return cls(**{**PRESETS[name], **overrides})

    @property
    def reference_weight(self) -> float:
        """A of the one formula: how much of the reference's score difference is subtracted."""
        if self.reference_free:
            return 0.0
        return 1.0 if self.reference_mix is None else self.reference_mix

    @property
    def margin(self) -> float:
        """m of the one formula."""
        return self.home_advantage if self.reference_mix is None else (1 - self.reference_mix) * self.home_advantage

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the reference's statistics (a caller's own context_scale aside)."""
        return not self.reference_free and (self.reference_weight != 0 or self.contextual_scaling == "mallows")


# Annotation -> what may be passed.
_KINDS: dict[Any, tuple[type, ...]] = {
    str: (str,),
    bool: (bool,),
    float: (float, int),
    float | None: (float, int, type(None)),
    dict | None: (dict, type(None)),
}


def _check_type(field: dataclasses.Field, value: Any) -> None:
    allowed = _KINDS[field.type]
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
        raise TypeError(f"{field.name} must be {names}, got {value!r} ({type(value).__name__})")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_range(
    name: str, value: float, *, above: float | None = None, low: float = -math.inf, high: float = math.inf
) -> None:
    if not math.isfinite(value) or not low <= value <= high or (above is not None and value <= above):
        if above is not None:
            wanted = f"a finite number > {above:g}"
        elif math.isinf(high):
            wanted = "a finite number" if math.isinf(low) else f"a finite number >= {low:g}"
        else:
            wanted = f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
