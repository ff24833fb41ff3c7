"""Measures a language model while it trains and when it has: held-out pairs, samples, KL, s(x)."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from fastpo.adapters import as_reference
from fastpo.architecture import heads_of
from fastpo.backbone import Wanted, causal_lm, model_stats
from fastpo.calibration import log_preference
from fastpo.data import Text, find_form
from fastpo.generation import Sampling, seed_of
from fastpo.lab.divergence import response_kl
from fastpo.lab.kinds import Kind
from fastpo.lab.measures import kind_measures, preference_measures, scale_measures, text_quality, win_rate
from fastpo.lab.study import Evaluation
from fastpo.prompt_beta import prompt_scales
from fastpo.rollouts import Drawn, batch_of, draw
from fastpo.trainer import PreferenceTrainer

# Implicit rewards below this are 0 but for rounding, as at the start of training: no accuracy is to be had of them.
ROUNDING = 1e-4

Reward = Callable[[Sequence[Text], Sequence[Text]], Sequence[float]]


class HeldOut(NamedTuple):
    """What a model is measured on.

    Attributes:
        rows: of the data, in any form of pairs, with kind and rater_agrees where labels are planted.
        tokens: the same tokenised, in that order.
        kinds: by name; None where none are planted.
        reward: of completions of prompts; None: samples have no reward.
        language: of the text measures.
    """

    rows: list[dict[str, Any]]
    tokens: Dataset
    kinds: dict[str, Kind] | None
    reward: Reward | None
    language: str


class Preferences(NamedTuple):
    """Of N held-out pairs (N,): margins, and log-probability that the first or the second response is preferred."""

    margins: Tensor
    log_p: Tensor
    log_q: Tensor


class Probe(TrainerCallback, ExportableState):
    """Measures at the start of training and at evenly spaced steps; checkpoints keep what was found.

    Args:
        trainer: that it is a callback of.
        reference: what the policy started from; None: the policy without its adapter.
        held_out: what is measured on.
        evaluation: how often and on how much.
        seed: of samples, the same at every measurement.
    """

    def __init__(
        self, trainer: PreferenceTrainer, reference: Any, held_out: HeldOut, evaluation: Evaluation, seed: int
    ) -> None:
        self.trainer, self.reference, self.held_out = trainer, reference, held_out
        self.evaluation, self.seed = evaluation, seed
        self.course: list[dict[str, float]] = []
        form = find_form(list(held_out.rows[0]), "dpo", "held-out pairs")
        self.pairs = [form(row) for row in held_out.rows]
        self._of_reference: dict[int, list[float]] = {}  # rewards of its samples, which do not change

    # --- during training --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"course": self.course}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.course = list(saved["attributes"]["course"])
        if not self.course:
            self._note(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        points = self.evaluation.points
        for i in range(1, points + 1):
            if state.global_step == round(state.max_steps * i / points):
                self._note(state, i / points)

    def _note(self, state: Any, fraction: float = 0.0) -> None:
        rows = range(min(self.evaluation.pairs, len(self.held_out.tokens)))
        with self._measuring():
            margins = self.preferences(self.held_out.tokens.select(rows)).margins
            found = {"margin": margins.double().mean().item(), **self.sample_measures(self.evaluation.prompts)}
        if margins.abs().max() > ROUNDING:
            found["accuracy"] = (margins > 0).double().mean().item()
        # The fraction is the point's, the same for seeds whose steps differ by one.
        self.course.append({"step": state.global_step, "fraction": fraction, **found})

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[None]:
        """Evaluation mode, whose randomness training does not see, and a beta that no batch moves."""
        trainer, model = self.trainer, self.trainer.model
        modes = [(module, module.training) for module in model.modules()]
        device = causal_lm(model).device
        objective, trainer.objective = trainer.objective, dataclasses.replace(trainer.objective, batch_beta_coef=0.0)
        model.eval()
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                yield
        finally:
            trainer.objective = objective
            for module, training in modes:
                module.training = training

    # --- measures ---------------------------------------------------------------------------------------------------

    def final(self) -> dict[str, Any]:
        """measures, and of each planted kind its own, on all held-out pairs."""
        held_out = self.held_out
        with self._measuring():
            found, s = self.preferences(held_out.tokens), self.scales()
            samples = self.sample_measures(self.evaluation.final_prompts, texts=True)
        agrees = torch.tensor([row.get("rater_agrees", True) for row in held_out.rows])
        measures = {**preference_measures(*found, agrees), **samples}
        names, kinds = [row["kind"] for row in held_out.rows] if held_out.kinds else None, held_out.kinds
        if s is not None:
            measures |= scale_measures(s, [kinds[name] for name in names] if kinds and names else None)
        by_kind = kind_measures(kinds, names, found.margins, s) if kinds and names else {}
        return {"measures": measures, "kinds": by_kind}

    @torch.no_grad()
    def preferences(self, rows: Dataset) -> Preferences:
        """Of tokenised pairs, under the objective's own rewards.

        A pair's probability is sigma of its margin, whatever the loss, but Phi where rewards are Gaussian.
        """
        trainer, margins, variances = self.trainer, [], []
        gaussian = "disco" in trainer.objective.comparisons
        model = trainer.model
        for batch in trainer.get_eval_dataloader(rows):
            inputs = trainer._prepare_inputs(batch)
            with trainer.compute_loss_context_manager():
                margins.append(trainer.preference_output(model, inputs).margins.float().cpu())
                if gaussian:
                    both = model_stats(model, inputs, Wanted(variance=True))["variance"].chunk(2)
                    variances.append(sum(both).clamp(min=trainer.objective.variance_floor).float().cpu())
        margin = torch.cat(margins)
        variance = torch.cat(variances) if gaussian else None
        return Preferences(margin, log_preference(margin, variance), log_preference(-margin, variance))

    def sample_measures(self, count: int, texts: bool = False) -> dict[str, float]:
        """kl, length and finished of samples for the first so many held-out prompts; with a reward also reward and
        win_rate, with texts also bleu, chrf and rouge_l."""
        rows = self._prompts(count)
        drawn = self._draw(rows)
        found = {
            "kl": self._kl(drawn).double().mean().item(),
            "length": sum(len(one.ids) for one in drawn.completions) / len(rows),
            "finished": sum(one.finished for one in drawn.completions) / len(rows),
        }
        if self.held_out.reward is not None:
            rewards = self._rewards(drawn)
            found["reward"] = sum(rewards) / len(rewards)
            found["win_rate"] = win_rate(rewards, self._rewards_of_reference(rows))
        if texts:
            wanted = [_plain(self.pairs[i].chosen) for i in range(len(rows))]
            found |= text_quality([_plain(text) for text in drawn.texts], wanted, self.held_out.language)
        return found

    def _kl(self, drawn: Drawn) -> Tensor:
        size, device = self.evaluation.batch_size, causal_lm(self.trainer.model).device
        found = []
        for first in range(0, len(drawn.rows), size):
            part = slice(first, first + size)
            batch = batch_of(Drawn(drawn.rows[part], drawn.completions[part], drawn.texts[part]), device)
            found.append(response_kl(self.trainer.model, self.reference, batch).cpu())
        return torch.cat(found)

    def scales(self) -> Tensor | None:
        """s(x) (N,) of the held-out prompts; None where beta is not learned."""
        if self.trainer.objective.beta_mode != "dynamic_scaling":
            return None
        head = heads_of(self.trainer.model)["beta_head"]
        reference = self.trainer.model if self.reference is None else self.reference
        return prompt_scales(
            reference, head, self.held_out.tokens["prompt_ids"], batch_size=self.evaluation.batch_size, pad_token_id=0
        )

    def _prompts(self, count: int) -> list[dict[str, Any]]:
        tokens = self.held_out.tokens.select(range(min(count, len(self.pairs))))
        return [
            {"prompt": pair.prompt, "prompt_ids": row["prompt_ids"], "index": row["index"]}
            for pair, row in zip(self.pairs, tokens, strict=False)
        ]

    def _draw(self, rows: list[dict[str, Any]], of_reference: bool = False) -> Drawn:
        """A completion of each, the policy's or the reference's; those are independent of each other."""
        sampling = Sampling(max_completion_length=self.evaluation.max_completion_length)
        model = self.reference if of_reference and self.reference is not None else self.trainer.model
        size, parts = self.evaluation.batch_size, []
        with as_reference(causal_lm(model)) if of_reference else contextlib.nullcontext():
            for first in range(0, len(rows), size):
                seed = seed_of(self.seed, first, int(of_reference))
                some, tokenizer = rows[first : first + size], self.trainer.processing_class
                parts.append(draw(model, some, tokenizer, sampling, generations=1, seed=seed))
        return Drawn(*(list(itertools.chain(*column)) for column in zip(*parts, strict=True)))

    def _rewards(self, drawn: Drawn) -> list[float]:
        assert self.held_out.reward is not None
        return [float(x) for x in self.held_out.reward([row["prompt"] for row in drawn.rows], drawn.texts)]

    def _rewards_of_reference(self, rows: list[dict[str, Any]]) -> list[float]:
        if len(rows) not in self._of_reference:
            self._of_reference[len(rows)] = self._rewards(self._draw(rows, of_reference=True))
        return self._of_reference[len(rows)]


def _plain(text: Text) -> str:
    """Text as it is, messages by their content."""
    return text.strip() if isinstance(text, str) else "\n".join(message["content"] for message in text)
