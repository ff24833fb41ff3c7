"""What an objective optimises, in words and as a formula, and which of its pairings are known to be bad."""

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

from fastpo.config import PreferenceConfig
from fastpo.links import LINKS
from fastpo.methods import METHODS

_IDLE_DISCO = "A Disco head exists, is saved and loaded, and is not used: pref_loss_type is not disco."


def explain(config: PreferenceConfig, stage: str = "dpo", preset: str | None = None, ppo: Any = None) -> str:
    """Formula, words and warnings, as text.

    Args:
        config: the objective.
        stage: the stage of training.
        preset: the name of the method that it starts from, if any.
        ppo: of stage ppo, its `PPOFields`.
    """
    if stage == "sft":
        return "stage sft: loss = -log pi(chosen), mean over the step's tokens; the objective's fields are not read."
    formula, words = (_reward_formula, _reward_words) if stage == "rm" else (_formula, _words)
    if stage == "ppo":
        formula, words = partial(_ppo_formula, ppo=ppo), partial(_ppo_words, ppo=ppo)
    parts = {
        f"stage {stage}" + (f", preset {preset} ({METHODS[preset].source})" if preset else ""): formula(config),
        "In words": (f"- {line}" for line in words(config)),
        "Warnings": (f"- {line}" for line in bad_pairings(config, preset)),
    }
    sections = [(title, list(lines)) for title, lines in parts.items()]
    return "\n\n".join("\n  ".join([title, *lines]) for title, lines in sections if lines)


def _formula(config: PreferenceConfig) -> Iterator[str]:
    bar = "_bar" if config.per_token else ""
    weight = config.reference_weight if config.needs_reference else 0.0
    if config.reads_log_ratios:
        if config.f_divergence_type == "reverse_kl":
            reference = f" - {'' if weight == 1 else f'{weight:g} '}D_reference{bar}" if weight else ""
            yield f"h     = D_policy{bar}{reference}"
        else:
            yield f"h     = g(h_w){bar} - g(h_l){bar}, g of {config.f_divergence_type}, h_w = log pi - log ref"
        phi = {"none": "", "mallows": "phi(x) * "}[config.contextual_scaling]
        margin = f" - {config.margin:g}" if config.margin else ""
        score = f"b * h{margin}" if config.margin_units == "reward" or not margin else f"b * (h{margin})"
        yield f"z     = {phi}{f'({score})' if phi and margin and config.margin_units == 'reward' else score}"
        if phi:
            yield f"phi   = -{config.contextual_scaling_coef:g} * log(mean entropy of the reference / log V)"
    yield f"b     = {_beta(config)}"
    terms = _losses(config)
    if config.sft_weight:
        terms.append(f"{config.sft_weight:g} * SFT ({config.sft_reduction})")
    if config.use_weighting:
        terms = [f"w * {terms[0]}" if len(terms) == 1 else f"w * ({' + '.join(terms)})"]
    for name, share in config.regularizer_weights.items():
        optional = config.regularizers is None and name == "confidence"
        terms.append(f"{share:g} * {name}(log s)" + " where the data has scores" * optional)
    terms += _prior(config)
    if "disco" in config.comparisons and config.beta_mode == "dynamic_scaling":
        terms.append("(mean log variance)^2")
    yield from _sum(terms, config)


def _reward_formula(config: PreferenceConfig) -> Iterator[str]:
    reward = "mu" if "disco" in config.comparisons else "r"
    yield f"z     = {reward}_w - {reward}_l - m"
    yield f"m     = the data's column margin, or {config.home_advantage:g} where there is none"
    if "disco" in config.comparisons:
        yield f"variance = var_w + var_l, at least {config.variance_floor:g}"
    yield from _sum(_losses(config) + _prior(config), config)


def _losses(config: PreferenceConfig) -> list[str]:
    """The comparisons, with their weights."""
    terms = []
    for name, share in config.loss_weights.items():
        smoothed = config.label_smoothing and LINKS[name].of == "score"
        flipped = f" [{1 - config.label_smoothing:g} f(z) + {config.label_smoothing:g} f(-z)]" if smoothed else ""
        terms.append(f"{'' if share == 1 else f'{share:g} * '}{name}{flipped}")
    return terms


def _prior(config: PreferenceConfig) -> list[str]:
    """That of Gaussian rewards, where it has a weight."""
    if "disco" not in config.comparisons or config.disco_prior_weight == 0:
        return []
    return [f"{config.disco_prior_weight:g} * KL(reward || N(0, 1))"]


def _sum(terms: list[str], config: PreferenceConfig) -> Iterator[str]:
    """The loss, and what its comparisons are."""
    yield f"loss  = {' + '.join(terms)}"
    for name in config.loss_weights:
        values = ", ".join(f"{option} = {getattr(config, option):g}" for option in LINKS[name].options)
        yield f"{name}: {str(inspect.getdoc(LINKS[name].f)).splitlines()[0]}{f' ({values})' if values else ''}"


def _beta(config: PreferenceConfig) -> str:
    if config.beta_schedule is None:
        base = f"{config.beta:g}"
    else:
        points = ", ".join(f"{beta:g} at {at:.0%}" for at, beta in config.beta_schedule["points"])
        base = f"{config.beta_schedule.get('interpolation', 'linear')} schedule ({points})"
    if config.beta_mode == "dynamic_scaling":
        base = f"{base} * s(x)"
    if config.batch_beta_coef:
        return f"max({base} * (1 + {config.batch_beta_coef:g} * (gap - its running mean)), 1e-3)"
    return base


def _words(config: PreferenceConfig) -> Iterator[str]:
    if config.comparisons:
        yield "Log-probs are means per token." if config.per_token else "Log-probs are sums over the response."
    if not config.needs_reference:
        yield "No reference model is read by the loss."
    elif config.reference_mix not in (None, 1):
        yield f"The reference counts {config.reference_mix:g}; home_advantage counts the rest."
    else:
        yield "The reference is the model before training, or without its adapter, or ref_model."
    if config.margin and config.comparisons:
        yield f"Chosen must win by a margin of {config.margin:g}, in {config.margin_units} units."
    if config.contextual_scaling == "mallows":
        yield "Pairs on which the reference is unsure (high dispersion) weigh LESS."
    if config.label_smoothing:
        yield f"A label is taken to be flipped with probability {config.label_smoothing:g}."
    if config.ld_alpha is not None:
        yield f"Tokens beyond the shorter response of a pair count {config.ld_alpha:g}."
    if config.use_weighting:
        yield "Pairs weigh w, the likelihood of both responses under the policy."
    yield from _head_words(config)


def _reward_words(config: PreferenceConfig) -> Iterator[str]:
    if "disco" in config.comparisons:
        yield "Rewards are Gaussian: the Disco head gives mean and variance at the last token of a response."
    else:
        yield "A reward is the model's score at the last token of a response."
    yield "No reference model is read, and no beta."
    if config.label_smoothing:
        yield f"A label is taken to be flipped with probability {config.label_smoothing:g}."
    if config.add_disco_head and "disco" not in config.comparisons:
        yield _IDLE_DISCO


def _head_words(config: PreferenceConfig) -> Iterator[str]:
    head = config.beta_head
    if config.beta_mode == "dynamic_scaling":
        bound = "without a bound" if head.s_max is None else f"between {1 / head.s_max:g} and {head.s_max:g}"
        yield (
            f"s(x) is learned by a {head.kind} Beta head from the prompt alone ({', '.join(head.features)} under the "
            f"reference), {bound}, at {head.lr_multiplier:g} of the learning rate; it starts at 1."
        )
        if "entropy" in config.regularizer_weights:
            larger = "familiar (low entropy)" if head.direction == "familiar" else "unfamiliar (high entropy)"
            yield f"Prompts that are {larger} to the reference are drawn to the LARGER beta."
    elif config.add_beta_head:
        yield "A Beta head exists, is saved and loaded, and is not used: beta_mode is fixed."
    if "disco" in config.comparisons:
        yield "Rewards are Gaussian: implicit rewards are the means, the Disco head gives the variances."
    elif config.add_disco_head:
        yield _IDLE_DISCO


def _ppo_formula(config: PreferenceConfig, *, ppo: Any) -> Iterator[str]:
    estimate = {"k1": "log pi - log ref", "k3": "ref/pi - 1 - log(ref/pi)"}[ppo.kl_estimator]
    yield f"r_t   = -b * KL_t + [t is last] * r(x, y), KL_t = {estimate} ({ppo.kl_estimator})"
    if ppo.risk_aversion:
        yield f"r     = mean - {ppo.risk_aversion:g} * deviation, of Gaussian rewards"
    yield f"b     = {_beta(config)}"
    yield {
        "rloo": "A     = G - mean of the other completions' G, G = sum of r_t",
        "grpo": "A     = (G - mean of the prompt's G) / (their deviation + 1e-4), G = sum of r_t",
        "gae": f"A     = sum of ({ppo.gamma:g} * {ppo.lam:g})^k (r_t+k + {ppo.gamma:g} V_t+k+1 - V_t+k), whitened",
    }[ppo.advantage]
    high = ppo.epsilon if ppo.epsilon_high is None else ppo.epsilon_high
    terms = [f"-min(ratio A, clip(ratio, {1 - ppo.epsilon:g}, {1 + high:g}) A)"]
    if ppo.advantage == "gae":
        terms.append(f"{ppo.vf_coef:g} * (V - return)^2 / 2")
    yield f"loss  = {' + '.join(terms)}, mean over the step's tokens"
    if ppo.kl_target is not None:
        yield f"        + -b * (KL - {ppo.kl_target:g}), mean over completions, KL = sum of KL_t: moves s(x) alone"


def _ppo_words(config: PreferenceConfig, *, ppo: Any) -> Iterator[str]:
    several = ppo.num_iterations > 1
    cut = f", top_p {ppo.top_p:g}" * (ppo.top_p < 1) + f", top_k {ppo.top_k}" * (ppo.top_k > 0)
    yield (
        f"{ppo.num_generations} completions are drawn of each prompt, of at most {ppo.max_completion_length} "
        f"tokens, at temperature {ppo.temperature:g}{cut}, for {ppo.num_iterations} optimiser step{'s' * several}."
    )
    yield "The reference is the model before training, or without its adapter, or ref_model."
    yield "A column beta_scale of the dataset multiplies b for its prompt."
    if config.beta_mode == "dynamic_scaling":
        how = "is frozen" if ppo.kl_target is None else f"rises where a prompt's KL is above {ppo.kl_target:g} nats"
        yield f"s(x), of a Beta head on features of the prompt under the reference, {how}."
    elif config.add_beta_head:
        yield "A Beta head exists, is saved and loaded, and is not used: beta_mode is fixed."
    if ppo.kl_estimator == "k3":
        yield "As a reward k3 holds the policy far less than k1: near the reference its gradient is next to nothing."
    if ppo.mask_truncated_completions:
        yield "Completions that do not come to their end are left out of the loss."


def bad_pairings(config: PreferenceConfig, preset: str | None = None) -> list[str]:
    """Pairings that are legal and known to be bad. (`ipo` with a learned s(x) is refused by `PreferenceConfig`.)"""
    dynamic, found = config.beta_mode == "dynamic_scaling", []
    if dynamic and not config.regularizer_weights:
        found.append(
            "beta_mode=dynamic_scaling without a regulariser: s(x) runs to its bounds, and loses accuracy against a "
            "fixed beta; leave regularizers at none for the defaults."
        )
    if dynamic and config.contextual_scaling != "none":
        found.append(
            "contextual_scaling with a learned s(x): phi(x) and s(x) multiply the same score from the same entropy; "
            "s(x) learns to undo phi(x). Use one of them."
        )
    if preset == "rso" and config.length_normalization:
        found.append(
            "RSO with length_normalization: pairs are sampled for rewards of whole responses, and the loss then "
            "compares means per token."
        )
    return found
