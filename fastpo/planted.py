"""Generated preference pairs with a known rule, so that a demonstration needs no download.

`planted_preferences`: every prompt asks for help with a topic. Both responses are fluent and on topic, drawn from as
many templates and of like length; the chosen one does what was asked, the rejected one talks around it.

`noisy_preferences`: responses are three words, each of which has its value. The prompt names a rater, and raters take
the worse response for the better one as often as `RATERS` says.
"""

import random
from typing import Any

TOPICS = (
    "baking bread", "watering a fern", "tuning a guitar", "packing for a hike", "fixing a flat tyre", "brewing tea",
    "growing tomatoes", "folding a paper crane", "learning chess", "painting a fence", "training a puppy",
    "sewing a button", "cleaning a window", "planning a picnic", "reading a map", "swimming a mile", "writing a poem",
    "keeping bees", "sharpening a knife", "building a shelf", "planting a tree", "cooking rice", "riding a horse",
    "drawing a cat",
)  # fmt: skip
QUESTIONS = (
    "How do I start {topic}?", "Can you help me with {topic}?", "What should I know about {topic}?",
    "Give me a tip for {topic}.", "I am new to {topic}. Where do I begin?", "What goes wrong when {topic}?",
    "Explain {topic} to a beginner.", "Is {topic} hard to learn?",
)  # fmt: skip
HELPFUL_OPENINGS = (
    "Start small: for {topic} the first step is to", "Gladly. When {topic}, always", "Yes. The trick of {topic} is to",
    "Here is what works for {topic}:", "Begin with the basics of {topic} and", "For {topic} my advice is to",
)  # fmt: skip
HELPFUL_CLOSINGS = (
    "take your time and check each part twice.", "gather what you need before you begin.",
    "practise a little every day and note what changes.", "ask someone who has done it to watch you once.",
)  # fmt: skip
EVASIVE_OPENINGS = (
    "Many people wonder about {topic}, and", "It depends. About {topic} one could say that",
    "Who can tell? With {topic} it seems that", "There is a lot of talk about {topic} and",
    "Some like {topic}, others do not, and", "On {topic} opinions differ, so",
)  # fmt: skip
EVASIVE_CLOSINGS = (
    "things are the way they have always been.", "in the end it is hard to say anything for sure.",
    "everyone has a view and none is wrong.", "perhaps another day would be better for that.",
)  # fmt: skip

RATERS = {"An expert": 0.0, "A student": 0.15, "A visitor": 0.3, "A passer-by": 0.45}
# From the best to the worst.
WORDS = (
    "clear", "bright", "sound", "neat", "calm", "warm", "fine", "fair", "plain", "mild",
    "slow", "stiff", "loose", "odd", "dull", "vague", "rough", "harsh", "grim", "wrong",
)  # fmt: skip


def planted_preferences(rows: int, seed: int) -> list[dict[str, Any]]:
    """Pairs in the conversational form: prompt, chosen and rejected as lists of messages; the same for one seed."""
    rng = random.Random(seed)

    def response(openings: tuple[str, ...], closings: tuple[str, ...], topic: str) -> list[dict[str, str]]:
        text = f"{rng.choice(openings).format(topic=topic)} {rng.choice(closings)}"
        return [{"role": "assistant", "content": text}]

    pairs = []
    for _ in range(rows):
        topic = rng.choice(TOPICS)
        pairs.append(
            {
                "prompt": [{"role": "user", "content": rng.choice(QUESTIONS).format(topic=topic)}],
                "chosen": response(HELPFUL_OPENINGS, HELPFUL_CLOSINGS, topic),
                "rejected": response(EVASIVE_OPENINGS, EVASIVE_CLOSINGS, topic),
            }
        )
    return pairs


def noisy_preferences(rows: int, seed: int) -> list[dict[str, Any]]:
    """Pairs of text with planted label noise; the same for one seed.

    Returns:
        rows with prompt, chosen, rejected, flip_probability of the prompt's rater, and the true rewards score_chosen
        and score_rejected: the mean value of the words, from 1 for the best to -1. Where the former is the lower one,
        the label is flipped.
    """
    rng = random.Random(seed)
    worst = len(WORDS) - 1
    ranks = {word: worst - 2 * i for i, word in enumerate(WORDS)}  # whole numbers, so that ties are seen
    found: list[dict[str, Any]] = []
    while len(found) < rows:
        rater = rng.choice(list(RATERS))
        said = [rng.choices(WORDS, k=3) for _ in range(2)]
        rewards = [sum(ranks[word] for word in words) / (3 * worst) for words in said]
        better = int(rewards[1] > rewards[0])
        chosen = 1 - better if rng.random() < RATERS[rater] else better
        if rewards[0] != rewards[1]:
            found.append(
                {
                    "prompt": f"{rater} says:",
                    "chosen": f" {' '.join(said[chosen])}",
                    "rejected": f" {' '.join(said[1 - chosen])}",
                    "flip_probability": RATERS[rater],
                    "score_chosen": rewards[chosen],
                    "score_rejected": rewards[1 - chosen],
                }
            )
    return found
