"""`PreferenceConfig`: what is optimised, as one frozen dataclass that validates itself."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from fastpo.links import DIVERGENCES, FORMED_BY, LINKS
from fastpo.methods import METHODS
from fastpo.regularizers import REGULARIZERS
from fastpo.schedules import check_beta_schedule

PROMPT_FEATURES = ("hidden", "perplexity", "entropy")


def option(default: Any, text: str) -> Any:
    """A dataclass field whose help text the command line shows."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class BetaHeadConfig:
    """How the Beta head s(x) is built and trained.

    Raises:
        ValueError, TypeError: a field is out of its range or has the wrong type.
    """

    kind: str = option("linear", "linear, or mlp with one hidden layer.")
    hidden_size: int = option(64, "Width of the mlp's hidden layer.")
    features: tuple = option(("hidden",), "Of the prompt under the reference: hidden, perplexity, entropy.")
    s_max: float | None = option(4.0, "s(x) stays in (1/s_max, s_max); none: no bound.")
    lr_multiplier: float = option(0.1, "Learning rate of the head, in those of the policy.")
    direction: str = option("familiar", "Which prompts the entropy regulariser gives the larger beta: familiar or not.")

    def __post_init__(self) -> None:
        if isinstance(self.features, list):
            object.__setattr__(self, "features", tuple(self.features))  # as JSON and YAML write it
        for field in dataclasses.fields(self):
            _check_type(field, getattr(self, field.name))
        _check_choice("kind", self.kind, ("linear", "mlp"))
        _check_choice("direction", self.direction, ("familiar", "unfamiliar"))
        for name in self.features:
            _check_choice("features", name, PROMPT_FEATURES)
        if not self.features or len(set(self.features)) < len(self.features):
            raise ValueError(f"features must name one or more of {', '.join(PROMPT_FEATURES)}, got {self.features!r}")
        if self.hidden_size < 1:
            raise ValueError(f"hidden_size must be >= 1, got {self.hidden_size!r}")
        _check_range("lr_multiplier", self.lr_multiplier, above=0.0)
        if self.s_max is not None:
            _check_range("s_max", self.s_max, above=1.0)

    @classmethod
    def from_dict(cls, fields: dict[str, Any] | None) -> "BetaHeadConfig":
        """From `beta_head_config`; an error says so."""
        try:
            return cls(**(fields or {}))
        except (TypeError, ValueError) as error:
            raise type(error)(f"beta_head_config: {str(error).removeprefix('BetaHeadConfig.__init__() ')}") from None


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

    pref_loss_type: str | dict = option("sigmoid", "Which comparison is used; a dict of names and weights: their sum.")
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
    f_divergence_type: str = option("reverse_kl", "reverse_kl, forward_kl, js_divergence, alpha_divergence: f-DPO.")
    f_alpha_divergence_coef: float = option(0.5, "alpha of alpha_divergence.")
    ld_alpha: float | None = option(None, "Weight of the tokens beyond the shorter response (LD-DPO), in [0, 1].")
    use_weighting: bool = option(False, "Weigh each pair by its likelihood under the policy (WPO).")
    batch_beta_coef: float = option(0.0, "beta-DPO: how strongly a batch's reward gap moves its beta.")
    discopop_tau: float = option(0.05, "Temperature of discopop.")
    hinge_delta: float = option(1.0, "Offset of hinge and truncated_square.")
    variance_floor: float = option(1e-6, "Smallest summed variance of a Disco comparison.")
    disco_prior_weight: float = option(1e-3, "Weight of the Disco head's N(0, 1) prior.")
    regularizers: dict | None = option(None, "Weights of the Beta head's regularisers by name; none: defaults.")
    beta_schedule: dict | None = option(
        None, "Staged beta: points [[fraction, beta], ...], interpolation step | linear | cosine."
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field, getattr(self, field.name))
        self._check_losses()
        _check_choice("beta_mode", self.beta_mode, ("fixed", "dynamic_scaling"))
        _check_choice("margin_units", self.margin_units, ("reward", "logratio"))
        _check_choice("contextual_scaling", self.contextual_scaling, ("none", "mallows"))
        _check_choice("sft_reduction", self.sft_reduction, ("mean", "sum", "token"))
        _check_choice("f_divergence_type", self.f_divergence_type, tuple(DIVERGENCES))
        for name in ("beta", "hinge_delta", "contextual_scaling_coef", "variance_floor", "discopop_tau"):
            _check_range(name, getattr(self, name), above=0.0)
        for name in ("sft_weight", "disco_prior_weight", "batch_beta_coef"):
            _check_range(name, getattr(self, name), low=0.0)
        for name in ("home_advantage", "f_alpha_divergence_coef"):
            _check_range(name, getattr(self, name))
        _check_range("label_smoothing", self.label_smoothing, low=0.0, high=0.5)
        for name in ("reference_mix", "ld_alpha"):
            if getattr(self, name) is not None:
                _check_range(name, getattr(self, name), low=0.0, high=1.0)
        for name, weight in (self.regularizers or {}).items():
            _check_choice("regularizers", name, tuple(REGULARIZERS))
            _check_weight("regularizers", name, weight)
        if self.beta_schedule is not None:
            check_beta_schedule(self.beta_schedule)
        self._check_use()
        self._check_pairings()

    def _check_losses(self) -> None:
        if isinstance(self.pref_loss_type, str):
            _check_choice("pref_loss_type", self.pref_loss_type, tuple(LINKS))
            return
        for name, weight in self.pref_loss_type.items():
            _check_choice("pref_loss_type", name, tuple(LINKS))
            _check_weight("pref_loss_type", name, weight)
        if not self.loss_weights:
            raise ValueError(f"pref_loss_type must give a weight > 0 to at least one loss, got {self.pref_loss_type!r}")

    def _check_use(self) -> None:
        """An option that a chosen loss would ignore is an error, never silently so."""
        changed = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        losses = self.comparisons or tuple(self.loss_weights)
        # What forms the score concerns every comparison of a sum; what one link alone knows, that one.
        for field in sorted(changed & frozenset().union(*FORMED_BY.values())):
            for name in losses:
                self._check_reads(name, field, field in FORMED_BY[LINKS[name].of])
        for field in sorted(changed & {field for link in LINKS.values() for field in link.options}):
            self._check_reads(" + ".join(losses), field, any(field in LINKS[name].options for name in losses))
        if "f_alpha_divergence_coef" in changed and self.f_divergence_type not in ("alpha", "alpha_divergence"):
            raise ValueError(
                f"f_alpha_divergence_coef is not used by f_divergence_type={self.f_divergence_type!r}, "
                f"got {self.f_alpha_divergence_coef!r}"
            )

    def _check_reads(self, losses: str, field: str, reads: bool) -> None:
        if not reads:
            raise ValueError(
                f"{field} is not used by pref_loss_type {losses!r}: leave it at its default, "
                f"got {getattr(self, field)!r}"
            )

    def _check_pairings(self) -> None:
        comparisons = self.comparisons
        if self.reference_free and self.reference_mix is not None:
            raise ValueError(
                f"reference_mix must be None with reference_free=True (there is no reference to mix), "
                f"got {self.reference_mix}"
            )
        if self.f_divergence_type != "reverse_kl" and (self.reference_free or self.reference_mix is not None):
            raise ValueError(
                f"f_divergence_type={self.f_divergence_type!r} measures the distance from the whole reference: it "
                f"goes with reference_free=False and reference_mix=None, "
                f"got {self.reference_free} and {self.reference_mix}"
            )
        if "exo_pair" in comparisons and self.label_smoothing == 0:
            raise ValueError("pref_loss_type='exo_pair' needs label_smoothing > 0 (1e-3 in the paper), got 0")
        if "robust" in comparisons and self.label_smoothing == 0.5:
            raise ValueError("pref_loss_type='robust' needs label_smoothing < 0.5, got 0.5")
        torn = [name for name in comparisons if LINKS[name].of == "sorted batch"]
        if torn and self.use_weighting:
            raise ValueError(f"use_weighting weighs pairs, which pref_loss_type={torn[0]!r} sorts apart, got True")
        if "disco" in comparisons and not self.add_disco_head:
            raise ValueError("pref_loss_type='disco' needs a Disco head: set add_disco_head=True, got False")
        if self.beta_head_config is not None and not self.add_beta_head:
            raise ValueError(f"beta_head_config must be None without add_beta_head, got {self.beta_head_config!r}")
        BetaHeadConfig.from_dict(self.beta_head_config)
        if self.beta_mode == "dynamic_scaling":
            self._check_dynamic_scaling()

    def _check_dynamic_scaling(self) -> None:
        if not self.add_beta_head:
            raise ValueError("beta_mode='dynamic_scaling' needs a Beta head: set add_beta_head=True, got False")
        for name in self.loss_weights:
            if LINKS[name].fixed_beta:
                raise ValueError(
                    f"pref_loss_type={name!r} cannot be paired with beta_mode='dynamic_scaling' "
                    f"({LINKS[name].fixed_beta})"
                )
        if not self.comparisons:
            raise ValueError("beta_mode='dynamic_scaling' needs a comparison that reads beta, got pref_loss_type='sft'")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "PreferenceConfig":
        """The configuration of a published method, e.g. ``preset("rainbowpo", beta=5.0)``."""
        _check_choice("preset", name, tuple(METHODS))
        return cls(**{**METHODS[name].settings, **overrides})

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss in the sum; one of weight 0 is not in it."""
        if isinstance(self.pref_loss_type, str):
            return {self.pref_loss_type: 1.0}
        return {name: weight for name, weight in self.pref_loss_type.items() if weight != 0}

    @property
    def comparisons(self) -> tuple[str, ...]:
        """The losses that compare chosen with rejected: all but sft."""
        return tuple(name for name in self.loss_weights if LINKS[name].of != "chosen")

    @property
    def reads_log_ratios(self) -> bool:
        """Whether a loss of the sum measures the policy against a reference: any but orpo and sft."""
        return any(LINKS[name].of not in ("policy", "chosen") for name in self.loss_weights)

    @property
    def per_token(self) -> bool:
        """Whether implicit rewards are per token."""
        compared = [LINKS[name].normalized for name in self.comparisons]
        return self.length_normalization or (bool(compared) and all(compared))

    @property
    def beta_head(self) -> BetaHeadConfig:
        """`beta_head_config` as an object."""
        return BetaHeadConfig.from_dict(self.beta_head_config)

    @property
    def regularizer_weights(self) -> dict[str, float]:
        """Weights of the Beta head's regularisers: those given, else the defaults under dynamic_scaling, else none."""
        if self.regularizers is not None:
            return {name: weight for name, weight in self.regularizers.items() if weight != 0}
        if self.beta_mode != "dynamic_scaling":
            return {}
        return {name: regularizer.weight for name, regularizer in REGULARIZERS.items() if regularizer.weight != 0}

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
        read = self.reference_weight != 0 or self.contextual_scaling == "mallows"
        return self.reads_log_ratios and not self.reference_free and read


# Annotation -> what may be passed.
_KINDS: dict[Any, tuple[type, ...]] = {
    str: (str,),
    bool: (bool,),
    float: (float, int),
    float | None: (float, int, type(None)),
    dict | None: (dict, type(None)),
    str | dict: (str, dict),
    int: (int,),
    tuple: (tuple,),
}


def _check_type(field: dataclasses.Field, value: Any) -> None:
    allowed = _KINDS[field.type]
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
        raise TypeError(f"{field.name} must be {names}, got {value!r} ({type(value).__name__})")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_weight(name: str, key: str, weight: Any) -> None:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ValueError(f"{name}[{key!r}] must be a finite number >= 0, got {weight!r}")


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
