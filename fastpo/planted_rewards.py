"""Generated responses whose true reward is known, so that a pipeline can be seen to raise it.

A response is an opening about a topic and a closing, each from the helpful or the evasive templates of
`fastpo.planted`. Its true reward is the sum of three parts, each -1, 0 or 1: the opening, the closing, and the topic,
whether it is the one that was asked about. What a model garbles counts 0. People's labels are drawn from Bradley and
Terry's model of that reward, so that they are sometimes wrong.
"""

import math
import random
import re
from collections.abc import Sequence
from typing import Any

from fastpo.planted import (
    EVASIVE_CLOSINGS,
    EVASIVE_OPENINGS,
    HELPFUL_CLOSINGS,
    HELPFUL_OPENINGS,
    QUESTIONS,
    TOPICS,
)

ON_TOPIC = 0.6  # share of the responses that are about what was asked


def graded_responses(rows: int, seed: int) -> list[dict[str, Any]]:
    """prompt and completion as messages, helpful and evasive parts mixed at random; the same for one seed."""
    rng = random.Random(seed)
    return [{"prompt": prompt, "completion": _response(rng, topic)} for prompt, topic in _prompts(rng, rows)]


def graded_preferences(rows: int, seed: int) -> list[dict[str, Any]]:
    """prompt, chosen, rejected as messages: which is chosen is drawn with probability sigma(r_1 - r_2)."""
    rng = random.Random(seed)
    pairs = []
    for prompt, topic in _prompts(rng, rows):
        first, second = _response(rng, topic), _response(rng, topic)
        gap = true_reward([prompt, prompt], [first, second])
        if rng.random() >= 1 / (1 + math.exp(gap[1] - gap[0])):
            first, second = second, first
        pairs.append({"prompt": prompt, "chosen": first, "rejected": second})
    return pairs


def true_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Rewards in [-3, 3] of completions; a reward function as TRL's, for `reward_funcs`.

    Args:
        prompts: N prompts of `graded_responses`, messages.
        completions: N responses, messages.
        columns: not read.
    """
    return [
        float(_reward(prompt[-1]["content"], said[0]["content"]))
        for prompt, said in zip(prompts, completions, strict=True)
    ]


def _reward(question: str, response: str) -> int:
    asked = next((topic for topic in TOPICS if topic in question), None)
    if asked is None:
        raise ValueError(f"prompts must be questions of graded_responses, got {question!r}")
    total = 0
    for sign, openings, closings in _SIDES:
        total += sign * any(closing in response for closing in closings)
        for pattern in openings:
            if found := pattern.match(response):
                total += sign + (found["topic"] == asked) - (found["topic"] in TOPICS and found["topic"] != asked)
    return total


def _patterns(openings: Sequence[str]) -> list[re.Pattern[str]]:
    return [re.compile(re.escape(text).replace(re.escape("{topic}"), "(?P<topic>[a-z ]+?)")) for text in openings]


_SIDES = (
    (1, _patterns(HELPFUL_OPENINGS), HELPFUL_CLOSINGS),
    (-1, _patterns(EVASIVE_OPENINGS), EVASIVE_CLOSINGS),
)


def _prompts(rng: random.Random, rows: int) -> list[tuple[list[dict[str, str]], str]]:
    topics = [rng.choice(TOPICS) for _ in range(rows)]
    return [([{"role": "user", "content": rng.choice(QUESTIONS).format(topic=topic)}], topic) for topic in topics]


def _response(rng: random.Random, asked: str) -> list[dict[str, str]]:
    topic = asked if rng.random() < ON_TOPIC else rng.choice([other for other in TOPICS if other != asked])
    opening = rng.choice(HELPFUL_OPENINGS if rng.random() < 0.5 else EVASIVE_OPENINGS)
    closing = rng.choice(HELPFUL_CLOSINGS if rng.random() < 0.5 else EVASIVE_CLOSINGS)
    return [{"role": "assistant", "content": f"{opening.format(topic=topic)} {closing}"}]
