"""A recommender under the same objectives: users for prompts, items for tokens, slates for responses.

All that an objective asks of a model is `SequenceStats`. Here they come from a user tower and two matrices, with no
text and no transformer.
"""

import copy
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from fastpo.calibration import log_preference
from fastpo.config import PreferenceConfig
from fastpo.heads import BetaHead, DiscoHead
from fastpo.lab.kinds import check_sizes
from fastpo.lab.measures import kind_measures, preference_measures, scale_measures, two_head_kl, win_rate
from fastpo.lab.planted_items import FEATURES, PlantedItems, SlatePair
from fastpo.loss_inputs import summed_variance
from fastpo.losses import preference_loss
from fastpo.ops import linear_logps, linear_sequence_stats
from fastpo.schedules import RunningMeans, scheduled_beta
from fastpo.stages import dpo_stage, sft_stage
from fastpo.types import LossOutput, SequenceStats

WIDTH = 32  # D
IGNORED = -100  # after a slate's last item
BASE_RATE, BASE_EPOCHS, BASE_BATCH = 1e-2, 4, 128
LOGS = 20  # of a training run
LOGGED = ("beta/", "log_s/", "regularizers/", "variance/", "rewards/")
COURSE = ("accuracy", "margin", "kl", "reward", "win_rate")


@dataclass(frozen=True)
class ItemTraining:
    """How a policy is trained on pairs, by Adam.

    Args:
        learning_rate: of the policy and the Disco head; the Beta head's is its `lr_multiplier` times that.
        epochs: over the pairs, each in a new order.
        batch_size: pairs.
        evaluations: on held-out pairs, evenly spaced; the last is at the end, and one more comes before training.

    Raises:
        ValueError: a field is out of its range.
    """

    learning_rate: float = 3e-3
    epochs: int = 4
    batch_size: int = 32
    evaluations: int = 5

    def __post_init__(self) -> None:
        rate = self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise ValueError(f"learning_rate must be a finite number > 0, got {rate!r}")
        check_sizes(epochs=self.epochs, batch_size=self.batch_size, evaluations=self.evaluations)


class Slates(NamedTuple):
    """R slates of T items or fewer.

    Attributes:
        users: (R, FEATURES) fp32, whom they are shown to.
        items: (R, T) int64, -100 after the last.
    """

    users: Tensor
    items: Tensor

    @classmethod
    def of(cls, users: Sequence[Tensor], slates: Sequence[Sequence[int]]) -> "Slates":
        items = [torch.tensor(slate, dtype=torch.int64) for slate in slates]
        return cls(torch.stack(list(users)), pad_sequence(items, batch_first=True, padding_value=IGNORED))

    @property
    def lengths(self) -> Tensor:
        """(R,) int64."""
        return (self.items != IGNORED).sum(dim=1)

    def take(self, rows: Tensor) -> "Slates":
        return Slates(self.users[rows], self.items[rows])


class ItemModel(nn.Module):
    """The next item from the user and the item before it.

    Args:
        items: V, in the catalogue.
    """

    def __init__(self, items: int) -> None:
        super().__init__()
        self.user = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.previous = nn.Embedding(items + 1, WIDTH)  # the last one stands before the first item
        self.items = nn.Linear(WIDTH, items)  # the LM head
        # An item that few slates hold shall not shift what comes after it by chance.
        nn.init.normal_(self.previous.weight, std=0.02)

    def forward(self, slates: Slates) -> Tensor:
        """(R, T + 1, D): state t is before item t, that at a slate's length after all; those beyond say nothing."""
        read = pad(slates.items.clamp(min=0), (1, 0), value=self.items.out_features)
        return self.user(slates.users)[:, None] + self.previous(read)

    def stats(self, states: Tensor, slates: Slates) -> SequenceStats:
        """Statistics (R,) of slates whose states (R, T + 1, D) `forward` gave."""
        return linear_sequence_stats(states[:, :-1], self.items.weight, slates.items, self.items.bias)

    @torch.no_grad()
    def sample(self, users: Tensor, lengths: Tensor, generator: torch.Generator) -> Slates:
        """Slates of these lengths (R,) for users (R, FEATURES); an item may come again."""
        user, drawn = self.user(users), torch.full_like(lengths, self.items.out_features)
        items = []
        for _ in range(int(lengths.max())):
            logits = self.items(user + self.previous(drawn))
            drawn = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
            items.append(drawn)
        over = torch.arange(len(items)) >= lengths[:, None]
        return Slates(users, torch.stack(items, dim=1).masked_fill(over, IGNORED))


@torch.no_grad()
def slate_kl(policy: ItemModel, reference: ItemModel, slates: Slates) -> Tensor:
    """(R,) KL(policy || reference) of the next item, summed over each slate, in nats."""
    own, other = (
        [(states, model.items.weight), (torch.ones_like(states[..., :1]), model.items.bias[:, None])]
        for model in (policy, reference)
        for states in [model(slates)[:, :-1]]
    )
    return two_head_kl(own, other, slates.items)


class Pairs(NamedTuple):
    """N pairs, with what the reference says of them once and for all.

    Attributes:
        slates: 2N, the chosen ones first.
        reference: statistics of these.
        hidden: (N, D) the reference's state before a user's first item.
        entropy: (N,) of the reference's distribution of that item, divided by log V.
    """

    slates: Slates
    reference: SequenceStats
    hidden: Tensor
    entropy: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, rows: Sequence[SlatePair], reference: ItemModel) -> "Pairs":
        users = [row.user for row in rows]
        slates = Slates.of(users * 2, [row.chosen for row in rows] + [row.rejected for row in rows])
        states = reference(slates)
        hidden, first, head = states[: len(rows), 0], slates.items[: len(rows), 0], reference.items
        entropy = linear_logps(hidden, head.weight, first, head.bias).entropy / math.log(head.out_features)
        return cls(slates, reference.stats(states, slates), hidden, entropy)

    def take(self, index: Tensor) -> "Pairs":
        """The pairs (B,) of these numbers."""
        rows = torch.cat((index, index + len(self.hidden)))
        reference = SequenceStats(*(x[rows] for x in self.reference))
        return Pairs(self.slates.take(rows), reference, self.hidden[index], self.entropy[index])


class Answer(NamedTuple):
    """What a learner makes of N pairs.

    Attributes:
        stats: of the 2N slates.
        log_s: (N,) of the Beta head, or None.
        features: (N, F) that it reads, or None.
        variance: (2N,) of the Disco head, or None.
    """

    stats: SequenceStats
    log_s: Tensor | None
    features: Tensor | None
    variance: Tensor | None


class Learner(nn.Module):
    """What is trained: a policy that starts as the base model, and the heads that the objective uses."""

    def __init__(self, base: ItemModel, config: PreferenceConfig) -> None:
        super().__init__()
        self.config = config
        self.policy = copy.deepcopy(base).requires_grad_(True)
        self.beta_head = BetaHead(WIDTH, config.beta_head) if config.beta_mode == "dynamic_scaling" else None
        self.disco_head = DiscoHead(WIDTH) if "disco" in config.comparisons else None

    def forward(self, pairs: Pairs) -> Answer:
        states = self.policy(pairs.slates)
        log_s = features = variance = None
        if self.beta_head is not None:
            known = {"hidden": pairs.hidden, "entropy": pairs.entropy}
            known = {name: known[name] for name in self.beta_head.config.features}
            log_s, features = self.beta_head.log_s(**known), self.beta_head.features(**known)
        if self.disco_head is not None:
            last = states[torch.arange(len(states)), pairs.slates.lengths]
            variance = self.disco_head(last)[1]
        return Answer(self.policy.stats(states, pairs.slates), log_s, features, variance)

    def loss(self, pairs: Pairs, beta: float, state: RunningMeans) -> LossOutput:
        """Of stage dpo, at this base value of beta."""
        answer = self(pairs)
        return dpo_stage(
            answer.stats, pairs.reference if self.config.needs_reference else None, self.config,
            vocab_size=self.policy.items.out_features, beta=beta, log_s=answer.log_s, variance=answer.variance,
            prompt_entropy=pairs.entropy, features=answer.features, state=state,
        )  # fmt: skip

    def optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        """Adam with a parameter group of its own for the Beta head, as `PreferenceTrainer` has it."""
        own = list(self.beta_head.parameters()) if self.beta_head is not None else []
        others = [p for name, p in self.named_parameters() if not name.startswith("beta_head.")]
        groups: list[dict[str, Any]] = [{"params": others}]
        if own:
            rate = learning_rate * self.config.beta_head.lr_multiplier
            groups.append({"params": own, "lr": rate, "weight_decay": 0.0})
        return torch.optim.Adam(groups, lr=learning_rate)


def check_objective(config: PreferenceConfig) -> None:
    """
    Raises:
        ValueError: the objective reads what slates do not have; the message names the field.
    """
    learned, features = config.beta_mode == "dynamic_scaling", config.beta_head.features
    confidence = (config.regularizers or {}).get("confidence", 0)
    for reads, wanted, value in (
        (config.ld_alpha is not None, "ld_alpha must be None", config.ld_alpha),
        (config.use_weighting, "use_weighting must be False", True),
        (learned and "perplexity" in features, "beta_head_config's features must not name perplexity", features),
        (learned and confidence != 0, "regularizers must not name confidence", config.regularizers),
    ):
        if reads:
            raise ValueError(f"{wanted} for a recommender, which has nothing for it to read, got {value!r}")


def base_model(data: PlantedItems, seed: int) -> ItemModel:
    """What users look at by themselves, by likelihood of the logged slates: policies' start and their reference."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ItemModel(data.items)
    slates = Slates.of(*zip(*data.logs(), strict=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=BASE_RATE)
    for index in _batches(len(slates.items), BASE_EPOCHS, BASE_BATCH, _generator(seed, "base order")):
        batch = slates.take(index)
        optimizer.zero_grad()
        sft_stage(model.stats(model(batch), batch)).loss.backward()
        optimizer.step()
    return model


def train_items(data: PlantedItems, config: PreferenceConfig, training: ItemTraining, seed: int) -> dict[str, Any]:
    """One policy trained and measured; the same for the same arguments, whatever torch drew before.

    Args:
        data: the task.
        config: the objective, a learned beta and Gaussian rewards included.
        training: how long, and how often it is measured.
        seed: of the base model, the heads, the order of pairs and the samples.

    Returns:
        As JSON: ``measures`` of held-out users at the end (`preference_measures`; kl, reward and win_rate of one slate
        each, sampled at the length of the better one; `scale_measures` where beta is learned), ``kinds``
        (`kind_measures`), ``course`` (some of the measures before training and at each evaluation) and ``training``
        (means over the steps since the last of about 20 logs).

    Raises:
        ValueError: as `check_objective`.
    """
    check_objective(config)
    reference = base_model(data, seed).requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        learner = Learner(reference, config)
    pairs, held_out = Pairs.of(data.train_rows(), reference), HeldOut(data, reference, seed)
    optimizer, state = learner.optimizer(training.learning_rate), RunningMeans()
    batches = list(_batches(data.train_pairs, training.epochs, training.batch_size, _generator(seed, "order")))
    steps = len(batches)
    measured_at, logged_at = _spaced(steps, training.evaluations), _spaced(steps, LOGS)

    measures, kinds = held_out.measure(learner, _beta(config, 0.0))
    course = [_point(0, 0.0, measures)]
    logs, sums, since = [], Counter[str](), 0
    for step, index in enumerate(batches, start=1):
        output = learner.loss(pairs.take(index), _beta(config, (step - 1) / steps), state)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        logged = {name: value for name, value in output.metrics.items() if name.startswith(LOGGED)}
        sums.update({name: value.item() for name, value in {"loss": output.loss, **logged}.items()})
        since, done = since + 1, step / steps
        if step in logged_at:
            logs.append({"step": step, "fraction": done, **{name: total / since for name, total in sums.items()}})
            sums.clear()
            since = 0
        if step in measured_at:
            measures, kinds = held_out.measure(learner, _beta(config, done))
            course.append(_point(step, done, measures))
    return {"measures": measures, "kinds": kinds, "course": course, "training": logs}


class HeldOut:
    """Held-out users, and what the reference offers them.

    Samples come of the same random numbers each time, so that policies differ by what they learned.

    Args:
        data: whose held-out pairs they are.
        reference: against which policies are measured.
        seed: of the samples.
    """

    def __init__(self, data: PlantedItems, reference: ItemModel, seed: int) -> None:
        self.data, self.reference, self.seed = data, reference, seed
        self.rows = data.held_out_rows()
        self.pairs = Pairs.of(self.rows, reference)
        self.tastes = [data.taste_of(row.user, row.kind) for row in self.rows]
        self.reference_rewards = self._rewards(self._samples(reference, "reference samples"))

    @torch.no_grad()
    def measure(self, learner: Learner, beta: float) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
        """measures and kinds of `train_items`, at this base value of beta."""
        answer, config, names = learner(self.pairs), learner.config, [row.kind for row in self.rows]
        s = None if answer.log_s is None else answer.log_s.exp()
        margins, log_p, log_q = self._preferences(answer, config, beta if s is None else beta * s)
        samples = self._samples(learner.policy, "policy samples")
        rewards = self._rewards(samples)
        measures = {
            **preference_measures(margins, log_p, log_q, torch.tensor([row.rater_agrees for row in self.rows])),
            "kl": slate_kl(learner.policy, self.reference, samples).double().mean().item(),
            "reward": sum(rewards) / len(rewards),
            "win_rate": win_rate(rewards, self.reference_rewards),
            **({} if s is None else scale_measures(s, [self.data.kinds[name] for name in names])),
        }
        return measures, kind_measures(self.data.kinds, names, margins, s)

    def _preferences(
        self, answer: Answer, config: PreferenceConfig, beta: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Margins (N,), and log-probabilities (N,) that the better and that the other slate is preferred."""
        sides = self.pairs.reference.split() if config.needs_reference else (None, None)
        variances = (None, None) if answer.variance is None else answer.variance.chunk(2)
        # Without a state, so that batch_beta_coef leaves beta alone: it is no property of a pair.
        margins = preference_loss(
            *answer.stats.split(), config, ref_chosen=sides[0], ref_rejected=sides[1], beta=beta,
            chosen_variance=variances[0], rejected_variance=variances[1], vocab_size=self.data.items,
        ).margins  # fmt: skip
        variance = summed_variance(config, variances[0], variances[1], margins)
        return margins, log_preference(margins, variance), log_preference(-margins, variance)

    def _samples(self, model: ItemModel, part: str) -> Slates:
        """A slate for each user, as long as the better one of the pair."""
        count = len(self.rows)
        users, lengths = self.pairs.slates.users[:count], self.pairs.slates.lengths[:count]
        return model.sample(users, lengths, _generator(self.seed, part))

    def _rewards(self, slates: Slates) -> list[float]:
        rows = zip(self.tastes, slates.items.tolist(), slates.lengths.tolist(), strict=True)
        return [self.data.true_reward(taste, items[:length]) for taste, items, length in rows]


def _beta(config: PreferenceConfig, done: float) -> float:
    return config.beta if config.beta_schedule is None else scheduled_beta(config.beta_schedule, done)


def _point(step: int, done: float, measures: dict[str, float]) -> dict[str, float]:
    return {"step": step, "fraction": done, **{name: measures[name] for name in COURSE}}


def _spaced(steps: int, count: int) -> set[int]:
    """Steps, the last among them, count of them if there are as many."""
    return {math.ceil(steps * k / count) for k in range(1, count + 1)}


def _batches(count: int, epochs: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers (size,) or, at the end of an epoch, fewer."""
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).split(size)


def _generator(seed: int, part: str) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random(f"recommender {seed} {part}").getrandbits(63))
