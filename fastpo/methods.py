"""Published methods as settings of `PreferenceConfig`, with their formula and source. A leaf: data only.

b is beta, h the difference of log-ratios of chosen and rejected, h_w and h_l those of each, bars are means per token.
"""

from typing import Any, NamedTuple


class Method(NamedTuple):
    """One line of `fastpo methods`.

    Attributes:
        settings: fields of `PreferenceConfig` that differ from its defaults.
        formula: the loss of a pair, as the settings make it.
        source: where it comes from.
    """

    settings: dict[str, Any]
    formula: str
    source: str


_PER_TOKEN = {"length_normalization": True}
_MALLOWS = {"contextual_scaling": "mallows", "contextual_scaling_coef": 0.29}
_LEARNED = {"add_beta_head": True, "beta_mode": "dynamic_scaling"}
_RAINBOW = {
    **_PER_TOKEN,
    **_MALLOWS,
    "beta": 10.0,
    "reference_mix": 0.25,
    "home_advantage": 0.1,
    "margin_units": "logratio",
}

METHODS: dict[str, Method] = {
    "dpo": Method({}, "-log sigmoid(b h)", "DPO, arXiv:2305.18290"),
    "ln_dpo": Method({**_PER_TOKEN, "beta": 2.0}, "-log sigmoid(b h_bar)", "length-normalised DPO, arXiv:2411.15124"),
    "ipo": Method({**_PER_TOKEN, "pref_loss_type": "ipo"}, "(h_bar - 1/(2b))^2", "IPO, arXiv:2310.12036"),
    "slic": Method({"pref_loss_type": "hinge"}, "max(0, 1 - b h)", "SLiC-HF, arXiv:2305.10425"),
    "rso": Method({"pref_loss_type": "hinge"}, "max(0, 1 - b h) on rejection-sampled pairs", "RSO, arXiv:2309.06657"),
    "simpo": Method(
        {**_PER_TOKEN, "reference_free": True, "beta": 2.0, "home_advantage": 1.0},
        "-log sigmoid(b (logp_w_bar - logp_l_bar) - 1)", "SimPO, arXiv:2405.14734",
    ),
    "cpo": Method(
        {"reference_free": True, "sft_weight": 1.0, "sft_reduction": "token"},
        "-log sigmoid(b (logp_w - logp_l)) - mean over tokens of logp_w", "CPO, arXiv:2401.08417",
    ),
    "orpo": Method(
        {"pref_loss_type": "orpo"}, "-logp_w_bar + b softplus(logodds_l - logodds_w)", "ORPO, arXiv:2403.07691"
    ),
    "robust_dpo": Method(
        {"pref_loss_type": "robust", "label_smoothing": 0.1},
        "[-0.9 log sigmoid(b h) + 0.1 log sigmoid(-b h)] / 0.8", "robust DPO, arXiv:2403.00409",
    ),
    "cdpo": Method(
        {"label_smoothing": 0.1}, "-0.9 log sigmoid(b h) - 0.1 log sigmoid(-b h)", "conservative DPO, E. Mitchell 2023"
    ),
    "exo": Method(
        {"pref_loss_type": "exo_pair", "label_smoothing": 1e-3},
        "KL((sigmoid(b h), sigmoid(-b h)) || (0.999, 0.001))", "EXO, arXiv:2402.00856",
    ),
    "nca": Method(
        {"pref_loss_type": "nca_pair"},
        "-log sigmoid(b h_w) - log sigmoid(-b h_w)/2 - log sigmoid(-b h_l)/2", "NCA, arXiv:2402.05369",
    ),
    "bco": Method(
        {"pref_loss_type": "bco_pair"}, "-log sigmoid(b h_w) - log sigmoid(-b h_l)", "BCO, arXiv:2404.04656"
    ),
    "sppo": Method(
        {"pref_loss_type": "sppo_hard"}, "(h_w - 1/(2b))^2 + (h_l + 1/(2b))^2", "SPPO, arXiv:2405.00675"
    ),
    "aot": Method(
        {"pref_loss_type": "aot"}, "-log sigmoid(b (sorted D_policy - sorted D_reference))", "AOT, arXiv:2406.05882"
    ),
    "apo_zero": Method(
        {"pref_loss_type": "apo_zero"}, "1 - sigmoid(b h_w) + sigmoid(b h_l)", "APO-zero, arXiv:2408.06266"
    ),
    "apo_down": Method(
        {"pref_loss_type": "apo_down"}, "sigmoid(b h_w) + 1 - sigmoid(b (h_w - h_l))", "APO-down, arXiv:2408.06266"
    ),
    "discopop": Method(
        {"pref_loss_type": "discopop"},
        "(1 - q) softplus(-z) + q exp(-z), z = b h, q = sigmoid(z/0.05)", "DiscoPOP, arXiv:2406.08414",
    ),
    "wpo": Method(
        {"use_weighting": True}, "-w_w w_l log sigmoid(b h), w the likelihood on policy", "WPO, arXiv:2406.11827"
    ),
    "ld_dpo": Method(
        {"ld_alpha": 0.5}, "-log sigmoid(b h), tokens beyond the shorter response count half",
        "LD-DPO, arXiv:2409.06411",
    ),
    "f_dpo": Method(
        {"f_divergence_type": "js_divergence"}, "-log sigmoid(b (g(h_w) - g(h_l))), g(h) = log 2 + log sigmoid(h)",
        "f-DPO, arXiv:2309.16240",
    ),
    "beta_dpo": Method(
        {"batch_beta_coef": 0.6}, "-log sigmoid(b' h), b' = max(b (1 + 0.6 (gap - its running mean)), 1e-3)",
        "beta-DPO, arXiv:2407.08639",
    ),
    "mallows_dpo": Method(_MALLOWS, "-log sigmoid(phi(x) b h)", "Mallows-DPO, arXiv:2405.14953"),
    "rainbowpo": Method(
        _RAINBOW, "-log sigmoid(phi(x) b (D_policy_bar - 0.25 D_reference_bar - 0.075))",
        "RainbowPO, arXiv:2410.04203",
    ),
    "ledpo": Method(_LEARNED, "-log sigmoid(b s(x) h)", "learned beta, fastpo"),
    "disco_dpo": Method(
        {"add_disco_head": True, "pref_loss_type": "disco"},
        "-log Phi(b h / sqrt(var_w + var_l))", "Gaussian rewards, fastpo",
    ),
    "ledpo_rainbowpo": Method(
        {**_RAINBOW, **_LEARNED, "contextual_scaling": "none", "contextual_scaling_coef": 1.0},
        "-log sigmoid(b s(x) (D_policy_bar - 0.25 D_reference_bar - 0.075))", "RainbowPO with a learned beta, fastpo",
    ),
}  # fmt: skip
