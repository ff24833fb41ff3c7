"""The planted recommender task: users of eight groups, slates of items, no text.

A user has a taste and belongs to a group; both are seen through a vector of features. Items are chosen one after the
other into slates, in logs by taste and by what the group is used to. The true reward of a slate is the mean over its
items of a quality, the same for all users and in no log, and of the match with the user's taste. Groups differ in how
reliably they say which of two slates is better.
"""

import random
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.lab.kinds import FLIPS, Kind, as_flips, check_probability, check_sizes, draw_pair, make_kinds, rater_agrees

GROUPS = ("readers", "gamers", "cooks", "runners", "travellers", "parents", "students", "collectors")
FEATURES, TASTES = 32, 8
SHORTEST, LONGEST = 3, 6  # items of a slate
TASTE_WEIGHT = 0.5  # of the match with the taste, in deviations of the quality
HABIT, NOISE = 1.0, 0.1  # how much logs follow the group, and how blurred features are


class SlatePair(NamedTuple):
    """One comparison.

    Attributes:
        user: (FEATURES,) fp32.
        chosen, rejected: items.
        kind: name of the user's group.
        rater_agrees: whether a rater chooses the better slate.
    """

    user: Tensor
    chosen: list[int]
    rejected: list[int]
    kind: str
    rater_agrees: bool


class _World(NamedTuple):
    """What the seed decides once.

    Attributes:
        quality: (items,) mean 0 and deviation 1.
        vectors: (items, TASTES) of the items.
        habits: group -> (items,) logits of what it is used to.
        seen_taste: (TASTES, FEATURES), and seen_group: group -> (FEATURES,): how features show them.
    """

    quality: Tensor
    vectors: Tensor
    habits: dict[str, Tensor]
    seen_taste: Tensor
    seen_group: dict[str, Tensor]


@dataclass(frozen=True)
class PlantedItems:
    """The task's data, the same for the same fields.

    Args:
        seed: of everything.
        train_pairs: labelled pairs of slates, each of another user.
        held_out_pairs: pairs with clean labels, of further users.
        logged_slates: from which the base model learns what users are used to.
        items: in the catalogue.
        flips, length_bias: as in `PlantedText`.

    Raises:
        ValueError: a field is out of its range.
    """

    seed: int = 0
    train_pairs: int = 2048
    held_out_pairs: int = 1024
    logged_slates: int = 4096
    items: int = 128
    flips: tuple[float, ...] = FLIPS
    length_bias: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "flips", as_flips(self.flips))
        check_sizes(
            train_pairs=self.train_pairs, held_out_pairs=self.held_out_pairs, logged_slates=self.logged_slates,
            items=self.items,
        )  # fmt: skip
        if self.items <= 2 * LONGEST:  # slates would be much the same
            raise ValueError(f"items must be > {2 * LONGEST}, got {self.items!r}")
        check_probability("length_bias", self.length_bias)
        _ = self.kinds

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """By name: one of each group."""
        return {kind.name: kind for kind in make_kinds(GROUPS, self.flips, self._rng("kinds"))}

    @cached_property
    def world(self) -> _World:
        rng = self._generator("world")
        quality = torch.randn(self.items, generator=rng)
        return _World(
            quality=(quality - quality.mean()) / quality.std(correction=0),
            vectors=torch.randn(self.items, TASTES, generator=rng) / TASTES**0.5,
            habits={name: HABIT * torch.randn(self.items, generator=rng) for name in GROUPS},
            seen_taste=torch.randn(TASTES, FEATURES, generator=rng) / TASTES**0.5,
            seen_group={name: torch.randn(FEATURES, generator=rng) for name in GROUPS},
        )

    def logs(self) -> list[tuple[Tensor, list[int]]]:
        """Users' features and slates that they looked at."""
        rng, generator = self._rng("logs"), self._generator("logs")
        found = []
        for _ in range(self.logged_slates):
            kind, taste, user = self._user(rng, generator)
            found.append((user, self._slate(kind, taste, rng, generator)))
        return found

    def train_rows(self) -> list[SlatePair]:
        """Pairs as the raters of each group label them."""
        pairs = self._pairs("train", self.train_pairs)
        return [
            pair if pair.rater_agrees else pair._replace(chosen=pair.rejected, rejected=pair.chosen) for pair in pairs
        ]

    def held_out_rows(self) -> list[SlatePair]:
        """Pairs whose chosen slate is the truly better one."""
        return self._pairs("held out", self.held_out_pairs)

    def true_reward(self, taste: Tensor, slate: list[int]) -> float:
        """Mean over the items of quality and taste's match, of a taste (TASTES,)."""
        match = self.world.vectors[slate] @ taste
        return float((self.world.quality[slate] + TASTE_WEIGHT * match).mean()) if slate else 0.0

    def taste_of(self, user: Tensor, kind: str) -> Tensor:
        """(TASTES,) that a user's features (FEATURES,) show, up to their noise."""
        seen = user - self.world.seen_group[kind]
        return torch.linalg.lstsq(self.world.seen_taste.T.double(), seen.double()[:, None]).solution[:, 0].float()

    def _pairs(self, part: str, count: int) -> list[SlatePair]:
        """Pairs with the better slate as chosen."""
        rng, generator = self._rng(part), self._generator(part)
        return [self._pair(*self._user(rng, generator), rng, generator) for _ in range(count)]

    def _pair(
        self, kind: Kind, taste: Tensor, user: Tensor, rng: random.Random, generator: torch.Generator
    ) -> SlatePair:
        better, worse = draw_pair(
            kind, lambda: self._slate(kind, taste, rng, generator), lambda slate: self.true_reward(taste, slate)
        )
        return SlatePair(user, better, worse, kind.name, rater_agrees(kind, better, worse, self.length_bias, rng))

    def _user(self, rng: random.Random, generator: torch.Generator) -> tuple[Kind, Tensor, Tensor]:
        """Group, taste (TASTES,), features (FEATURES,)."""
        name = rng.choice(GROUPS)
        taste = torch.randn(TASTES, generator=generator)
        noise = NOISE * torch.randn(FEATURES, generator=generator)
        return self.kinds[name], taste, taste @ self.world.seen_taste + self.world.seen_group[name] + noise

    def _slate(self, kind: Kind, taste: Tensor, rng: random.Random, generator: torch.Generator) -> list[int]:
        """Different items, as users of the group come across them."""
        logits = self.world.habits[kind.name] + self.world.vectors @ taste
        return torch.multinomial(logits.softmax(0), rng.randint(SHORTEST, LONGEST), generator=generator).tolist()

    def _rng(self, part: str) -> random.Random:
        return random.Random(f"planted items {self.seed} {part}")

    def _generator(self, part: str) -> torch.Generator:
        return torch.Generator().manual_seed(self._rng(f"{part} tensors").getrandbits(63))
