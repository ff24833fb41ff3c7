"""The planted text task: prompts of eight kinds, responses of words that each have a hidden value.

A prompt asks about a topic, and topics belong to fields; the field is the prompt's kind. A response names the field,
so that a model that speaks knows it at the end of the prompt, then strings words together. Its true reward is the mean
value of its words, whatever the kind: so what is learned from one kind's labels holds for all of them, and unreliable
kinds blur what reliable ones teach. Fields, values and labels depend on the seed; prompts of held-out pairs are asked
by people who ask nothing in training.
"""

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastpo.lab.kinds import FLIPS, Kind, as_flips, check_probability, check_sizes, draw_pair, make_kinds, rater_agrees

FIELDS = {
    "kitchen": ("baking bread", "brewing tea", "cooking rice"),
    "garden": ("growing tomatoes", "planting a tree", "watering a fern"),
    "court": ("signing a lease", "writing a will", "suing a firm"),
    "clinic": ("treating a burn", "easing a cough", "setting a bone"),
    "stage": ("tuning a guitar", "learning a song", "playing a flute"),
    "workshop": ("building a shelf", "fixing a chair", "painting a fence"),
    "road": ("packing for a hike", "reading a map", "crossing a border"),
    "board": ("learning chess", "solving a maze", "playing a card"),
}
QUESTIONS = (
    "{name} asks how to start {topic}.", "{name} wants to know more of {topic}.",
    "{name} needs help with {topic}.", "What should {name} know about {topic}?",
)  # fmt: skip
NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jon", "Kim", "Leo",
    "Mia", "Ned", "Olga", "Paul", "Rita", "Sam", "Tess", "Udo", "Vera", "Will", "Yara", "Zoe",
)  # fmt: skip
TRAINING_NAMES, HELD_OUT_NAMES = NAMES[:18], NAMES[18:]
SHORTEST, LONGEST = 3, 8  # words of a response
VOCABULARY = tuple(a + b for a, b in itertools.product(
    ("ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "wu", "za"), repeat=2
))  # fmt: skip


@dataclass(frozen=True)
class PlantedText:
    """The task's data, the same for the same fields.

    Args:
        seed: of everything.
        train_pairs: labelled pairs to learn from.
        held_out_pairs: pairs with clean labels.
        base_responses: unlabelled responses from which the base model learns to speak.
        words: that have a value, at most 256.
        flips: probabilities that a label is flipped, dealt out to the kinds; one alone: all are equally reliable.
        length_bias: probability that a rater takes the longer response.
        judge_noise: deviation of a judge's scores from the true rewards, which then stand beside each pair as
            score_chosen and score_rejected; None: there is no judge.

    Raises:
        ValueError: a field is out of its range.
    """

    seed: int = 0
    train_pairs: int = 2048
    held_out_pairs: int = 1024
    base_responses: int = 4096
    words: int = 128
    flips: tuple[float, ...] = FLIPS
    length_bias: float = 0.0
    judge_noise: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "flips", as_flips(self.flips))
        check_sizes(
            train_pairs=self.train_pairs,
            held_out_pairs=self.held_out_pairs,
            base_responses=self.base_responses,
            words=self.words,
        )
        if not 2 <= self.words <= len(VOCABULARY):
            raise ValueError(f"words must be in [2, {len(VOCABULARY)}], got {self.words!r}")
        check_probability("length_bias", self.length_bias)
        noise = self.judge_noise
        if noise is not None and (isinstance(noise, bool) or not isinstance(noise, int | float) or not noise >= 0):
            raise ValueError(f"judge_noise must be >= 0, or None, got {noise!r}")
        _ = self.kinds  # which checks the flips

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """By name: one of each field."""
        return {kind.name: kind for kind in make_kinds(list(FIELDS), self.flips, self._rng("kinds"))}

    @cached_property
    def values(self) -> dict[str, float]:
        """Of the words, of mean 0 and deviation 1."""
        rng = self._rng("values")
        words = rng.sample(VOCABULARY, self.words)
        drawn = [rng.gauss(0, 1) for _ in words]
        mean = sum(drawn) / len(drawn)
        deviation = (sum((value - mean) ** 2 for value in drawn) / len(drawn)) ** 0.5
        return {word: (value - mean) / deviation for word, value in zip(words, drawn, strict=True)}

    def base_rows(self) -> list[dict[str, Any]]:
        """prompt and completion: responses of all kinds, good and bad, to people of both sets."""
        rng = self._rng("base")
        return [
            {"prompt": prompt, "completion": self._text(kind, self._words(rng))}
            for kind, prompt in self._prompts(rng, NAMES, self.base_responses)
        ]

    def train_rows(self) -> list[dict[str, Any]]:
        """prompt, chosen, rejected, kind and rater_agrees (whether the label is right), as the kind's raters label."""
        rows = self._pairs("train", TRAINING_NAMES, self.train_pairs)
        return self._judged(
            "train",
            [
                row if row["rater_agrees"] else {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
                for row in rows
            ],
        )

    def held_out_rows(self) -> list[dict[str, Any]]:
        """The same with the truly better response as chosen, whether or not a rater would have chosen it."""
        return self._judged("held out", self._pairs("held out", HELD_OUT_NAMES, self.held_out_pairs))

    def true_reward(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Mean value of the words that follow a completion's opening; a word that has none counts 0.

        A reward function as TRL's; prompts and columns are not read.
        """
        return [self._reward(_said_words(text)) for text in completions]

    def _judged(self, part: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """With the judge's scores, if there is one."""
        if self.judge_noise is None:
            return rows
        rng = self._rng(f"judge of {part}")
        scores = {
            f"score_{side}": [
                reward + rng.gauss(0, self.judge_noise) for reward in self.true_reward([], [row[side] for row in rows])
            ]
            for side in ("chosen", "rejected")
        }
        return [{**row, **{name: found[i] for name, found in scores.items()}} for i, row in enumerate(rows)]

    def _pairs(self, part: str, names: Sequence[str], count: int) -> list[dict[str, Any]]:
        """Pairs with the better response as chosen."""
        rng, found = self._rng(part), []
        for kind, prompt in self._prompts(rng, names, count):
            better, worse = draw_pair(kind, lambda: self._words(rng), self._reward)
            agrees = rater_agrees(kind, better, worse, self.length_bias, rng)
            texts = {"chosen": self._text(kind, better), "rejected": self._text(kind, worse)}
            found.append({"prompt": prompt, **texts, "kind": kind.name, "rater_agrees": agrees})
        return found

    def _prompts(self, rng: random.Random, names: Sequence[str], count: int) -> list[tuple[Kind, str]]:
        found = []
        for _ in range(count):
            field = rng.choice(list(FIELDS))
            prompt = rng.choice(QUESTIONS).format(name=rng.choice(names), topic=rng.choice(FIELDS[field]))
            found.append((self.kinds[field], prompt))
        return found

    def _words(self, rng: random.Random) -> list[str]:
        return rng.choices(list(self.values), k=rng.randint(SHORTEST, LONGEST))

    def _reward(self, words: Sequence[str]) -> float:
        return sum(self.values.get(word, 0.0) for word in words) / max(len(words), 1)

    def _text(self, kind: Kind, words: Sequence[str]) -> str:
        return f" {kind.name.capitalize()} notes: {' '.join(words)}."

    def _rng(self, part: str) -> random.Random:
        return random.Random(f"planted text {self.seed} {part}")


def _said_words(text: str) -> list[str]:
    """Words after the opening; of a response without one, all."""
    return re.findall(r"\w+", text.partition(":")[2] or text)
