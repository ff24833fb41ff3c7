"""The planted tasks: what is stated of kinds, labels, rewards and features holds."""

import random
import re
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fastpo.lab.kinds import EASY_GAP, FLIPS, HARD_GAP, Kind, draw_pair, make_kinds, rater_agrees
from fastpo.lab.planted_items import FEATURES, GROUPS, NOISE, TASTE_WEIGHT, TASTES, PlantedItems
from fastpo.lab.planted_text import FIELDS, HELD_OUT_NAMES, TRAINING_NAMES, PlantedText

SMALL: dict[str, Any] = {"seed": 900, "train_pairs": 1000, "held_out_pairs": 200}
TASKS = {"text": (PlantedText, "base_responses"), "items": (PlantedItems, "logged_slates")}


def task(name: str, **fields: Any) -> Any:
    cls, logged = TASKS[name]
    return cls(**{**SMALL, logged: 300, **fields})


def plain(rows: Sequence[Any]) -> list[Any]:
    """Rows that compare equal where their tensors are the same."""
    return [[x.tolist() if isinstance(x, torch.Tensor) else x for x in row] for row in map(values, rows)]


def values(row: Any) -> Any:
    return row.values() if isinstance(row, dict) else row


def field(row: Any, name: str) -> Any:
    return row[name] if isinstance(row, dict) else getattr(row, name)


def gap(data: Any, row: Any) -> float:
    """True reward of chosen less that of rejected; of items, by the taste that the user's features show."""
    if isinstance(data, PlantedText):
        chosen, rejected = data.true_reward([""] * 2, [row["chosen"], row["rejected"]])
        return chosen - rejected
    taste = data.taste_of(row.user, row.kind)
    return data.true_reward(taste, row.chosen) - data.true_reward(taste, row.rejected)


def length(response: Any) -> int:
    return len(response.split()) if isinstance(response, str) else len(response)


def longer(row: Any) -> int:
    """By how much the chosen response is longer."""
    return length(field(row, "chosen")) - length(field(row, "rejected"))


# --- kinds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_each_combination_of_flip_and_difficulty_is_one_kind(name: str) -> None:
    kinds = task(name).kinds
    assert set(kinds) == set(FIELDS if name == "text" else GROUPS)
    dealt = sorted((kind.flip, kind.hard) for kind in kinds.values())
    assert dealt == [(flip, hard) for flip in FLIPS for hard in (False, True)]
    assert all(kind.name == key and kind.reliability == 1 - kind.flip for key, kind in kinds.items())
    assert task(name, seed=901).kinds != kinds


@pytest.mark.parametrize("name", TASKS)
def test_one_flip_alone_makes_all_kinds_equally_reliable(name: str) -> None:
    kinds = task(name, flips=[0.2]).kinds.values()
    assert {kind.flip for kind in kinds} == {0.2}
    assert sorted(kind.hard for kind in kinds) == [False] * 4 + [True] * 4


def test_a_pair_differs_by_what_its_kind_says() -> None:
    rng = random.Random(900)
    for hard, (low, high) in ((False, EASY_GAP), (True, HARD_GAP)):
        kind = Kind("kind", 0.0, hard)
        for _ in range(100):
            better, worse = draw_pair(kind, lambda: [rng.gauss(0, 1)], lambda response: response[0])
            assert low <= better[0] - worse[0] < high


def test_a_rater_looks_at_lengths_only_where_they_differ() -> None:
    sure, liar, rng = Kind("sure", 0.0, False), Kind("liar", 1.0, False), random.Random(900)
    assert rater_agrees(sure, "a", "bb", 0.0, rng)
    assert not rater_agrees(sure, "a", "bb", 1.0, rng)
    assert rater_agrees(sure, "aa", "b", 1.0, rng)
    assert rater_agrees(sure, "a", "b", 1.0, rng)
    assert not rater_agrees(liar, "aa", "b", 1.0, rng)
    assert rater_agrees(liar, "a", "bb", 1.0, rng)


@pytest.mark.parametrize("flips", [(), (0.6,), (-0.1,), (0.0, 0.1, 0.2, 0.3, 0.4), (float("nan"),)])
def test_flips_out_of_range(flips: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"^flips must be 1 to 4 probabilities"):
        make_kinds(GROUPS, flips, random.Random(0))
    for cls, _ in TASKS.values():
        with pytest.raises(ValueError, match=r"^flips must"):
            cls(flips=flips)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *((name, {"train_pairs": bad}) for name in TASKS for bad in (0, True, 2.0)),
        *((name, {"held_out_pairs": bad}) for name in TASKS for bad in (0, -1)),
        ("text", {"base_responses": 0}), ("text", {"words": 1}), ("text", {"words": 257}),
        ("items", {"logged_slates": -1}), ("items", {"items": 1}),
        *((name, {"length_bias": bad}) for name in TASKS for bad in (-0.1, 1.1, float("nan"))),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(fields))} must be .*, got "):
        task(name, **fields)


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_gives_the_same_data_and_another_another(name: str) -> None:
    sizes = {"train_pairs": 20, "held_out_pairs": 20}
    logged = "base_rows" if name == "text" else "logs"
    torch.manual_seed(0)
    before, first, again, other = torch.get_rng_state(), *(task(name, seed=seed, **sizes) for seed in (900, 900, 901))
    for method in ("train_rows", "held_out_rows", logged):
        rows = plain(getattr(first, method)())
        # In any order, and any number of times.
        assert rows == plain(getattr(again, method)()) == plain(getattr(first, method)())
        assert rows != plain(getattr(other, method)())
    assert len(first.train_rows()) == len(first.held_out_rows()) == 20
    assert plain(first.train_rows()) != plain(first.held_out_rows())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", TASKS)
def test_labels_are_flipped_as_often_as_the_kind_says(name: str) -> None:
    data = task(name, train_pairs=3000)
    rows = data.train_rows()
    for kind in data.kinds.values():
        agrees = [field(row, "rater_agrees") for row in rows if field(row, "kind") == kind.name]
        count = len(agrees)
        assert abs(count / len(rows) - 1 / 8) < 4 * (1 / 8 * 7 / 8 / len(rows)) ** 0.5
        deviation = (kind.flip * (1 - kind.flip) / count) ** 0.5
        assert abs(agrees.count(False) / count - kind.flip) <= 4 * deviation


@pytest.mark.parametrize("name", TASKS)
def test_gaps_are_those_of_easy_and_hard_kinds(name: str) -> None:
    data = task(name)
    # Features are blurred, and tastes with them.
    slack = 1e-9 if name == "text" else 0.1
    for part, rows in (("train", data.train_rows()), ("held out", data.held_out_rows())):
        for row in rows:
            low, high = HARD_GAP if data.kinds[field(row, "kind")].hard else EASY_GAP
            # Held-out labels are clean; a training label is right where a rater agrees.
            right = part == "held out" or field(row, "rater_agrees")
            assert low - slack <= (gap(data, row) if right else -gap(data, row)) < high + slack


@pytest.mark.parametrize("name", TASKS)
def test_held_out_pairs_know_what_raters_say(name: str) -> None:
    agrees = [field(row, "rater_agrees") for row in task(name, held_out_pairs=1000).held_out_rows()]
    wrong = sum(FLIPS) / len(FLIPS)
    assert abs(agrees.count(False) / len(agrees) - wrong) < 4 * (wrong * (1 - wrong) / len(agrees)) ** 0.5


@pytest.mark.parametrize("name", TASKS)
def test_length_bias_makes_longer_responses_preferred(name: str) -> None:
    for bias in (0.0, 0.5, 1.0):
        data = task(name, flips=(0.0,), length_bias=bias)
        differ = [row for row in data.train_rows() if longer(row)]
        share = sum(longer(row) > 0 for row in differ) / len(differ)
        # Rewards are means, so that without the bias the longer one is the better in about half of the pairs.
        assert abs(share - (bias + (1 - bias) / 2)) < (0.08 if bias < 1 else 1e-9)
        assert all(gap(data, row) > 0 for row in data.train_rows() if not longer(row))
        assert all(gap(data, row) > 0 for row in data.held_out_rows())
        by_length = [row for row in data.held_out_rows() if longer(row)]
        agrees = sum(field(row, "rater_agrees") for row in by_length) / len(by_length)
        assert abs(agrees - (1 - bias / 2)) < 0.16


# --- text -------------------------------------------------------------------------------------------------------------


def names_in(rows: Sequence[dict[str, Any]]) -> set[str]:
    return {word for row in rows for word in re.findall(r"\w+", row["prompt"])} & {*TRAINING_NAMES, *HELD_OUT_NAMES}


def test_people_of_held_out_prompts_ask_nothing_in_training() -> None:
    data = task("text")
    assert names_in(data.train_rows()) == set(TRAINING_NAMES)
    assert names_in(data.held_out_rows()) == set(HELD_OUT_NAMES)
    assert not {row["prompt"] for row in data.train_rows()} & {row["prompt"] for row in data.held_out_rows()}
    assert names_in(data.base_rows()) == {*TRAINING_NAMES, *HELD_OUT_NAMES}


def test_base_rows_speak_of_their_field() -> None:
    data = task("text")
    rows = data.base_rows()
    assert len(rows) == 300 and all(row.keys() == {"prompt", "completion"} for row in rows)
    for row in rows:
        opening, _, said = row["completion"].partition(": ")
        kind = opening.removeprefix(" ").removesuffix(" notes").lower()
        assert any(topic in row["prompt"] for topic in FIELDS[kind])
        assert 3 <= len(said.split()) <= 8 and set(said.removesuffix(".").split()) <= set(data.values)


def test_pairs_of_text_speak_of_their_kind() -> None:
    for row in task("text").train_rows():
        assert any(topic in row["prompt"] for topic in FIELDS[row["kind"]])
        assert all(row[side].startswith(f" {row['kind'].capitalize()} notes: ") for side in ("chosen", "rejected"))


def test_words_have_values_of_mean_0_and_deviation_1() -> None:
    found = torch.tensor(list(task("text", words=40).values.values()), dtype=torch.float64)
    assert len(found) == 40
    assert found.mean().item() == pytest.approx(0, abs=1e-12)
    assert found.std(correction=0).item() == pytest.approx(1)


def test_true_reward_of_text_by_hand() -> None:
    data = task("text")
    one, two, *_ = data.values
    texts = [
        f" Kitchen notes: {one} {two} {two}.",  # the opening counts for nothing
        f"{one}",
        f" Road notes: {two} nonsense",  # a word without a value counts 0
        " Road notes:", "", "?!",
    ]  # fmt: skip
    a, b = data.values[one], data.values[two]
    assert data.true_reward(["x"] * 6, texts, kind=["road"] * 6) == pytest.approx([(a + 2 * b) / 3, a, b / 2, 0, 0, 0])


# --- items ------------------------------------------------------------------------------------------------------------


def test_true_reward_of_items_by_hand() -> None:
    data, taste = task("items"), torch.arange(TASTES) / 4 - 1
    quality, vectors = data.world.quality.tolist(), data.world.vectors.tolist()
    assert sum(quality) / len(quality) == pytest.approx(0, abs=1e-6)
    assert sum(q * q for q in quality) / len(quality) == pytest.approx(1, rel=1e-5)

    def worth(item: int) -> float:
        return quality[item] + TASTE_WEIGHT * sum(v * t for v, t in zip(vectors[item], taste.tolist(), strict=True))

    assert data.true_reward(taste, [3]) == pytest.approx(worth(3), rel=1e-5)
    assert data.true_reward(taste, [3, 7, 7]) == pytest.approx((worth(3) + 2 * worth(7)) / 3, rel=1e-5)
    assert data.true_reward(taste, []) == 0


def test_taste_of_recovers_the_taste() -> None:
    data, rng = task("items"), torch.Generator().manual_seed(900)
    for group in GROUPS:
        taste = torch.randn(TASTES, generator=rng)
        seen = taste @ data.world.seen_taste + data.world.seen_group[group]
        torch.testing.assert_close(data.taste_of(seen, group), taste, rtol=0, atol=1e-4)
        blurred = data.taste_of(seen + NOISE * torch.randn(FEATURES, generator=rng), group)
        # 32 features show 8 numbers: the noise is averaged, if unevenly.
        assert 0 < (blurred - taste).square().mean().sqrt().item() < 2 * NOISE


def test_slates_hold_different_items_by_the_habits_of_the_group() -> None:
    data = task("items", items=24, logged_slates=2000, flips=(0.0,))
    slates = [slate for _, slate in data.logs()]
    assert {len(slate) for slate in slates} == {3, 4, 5, 6}
    assert all(len(set(slate)) == len(slate) and set(slate) <= set(range(24)) for slate in slates)
    rows = data.held_out_rows() + data.train_rows()
    for group in GROUPS:
        counts = torch.zeros(24)
        for row in rows:
            if row.kind == group:
                counts[[*row.chosen, *row.rejected]] += 1
        assert torch.corrcoef(torch.stack((counts, data.world.habits[group])))[0, 1] > 0.5


def test_a_catalogue_that_is_too_small_for_slates_to_differ() -> None:
    with pytest.raises(ValueError, match="items must be > 12, got 12"):
        PlantedItems(items=12)
    with pytest.raises(ValueError, match=r"items must be an integer >= 1, got 40\.5"):
        PlantedItems(items=40.5)


def test_a_judge_scores_responses_whatever_their_labels() -> None:
    plain, exact, blurred = (PlantedText(seed=900, train_pairs=300, judge_noise=noise) for noise in (None, 0.0, 0.5))
    for rows, judged in ((plain.train_rows(), exact.train_rows()), (plain.held_out_rows(), exact.held_out_rows())):
        for row, scored in zip(rows, judged, strict=True):
            assert row == {name: x for name, x in scored.items() if not name.startswith("score_")}
            assert [scored["score_chosen"]] == exact.true_reward([], [row["chosen"]])
            assert [scored["score_rejected"]] == exact.true_reward([], [row["rejected"]])
    errors = [
        a[name] - b[name]
        for a, b in zip(blurred.train_rows(), exact.train_rows(), strict=True)
        for name in ("score_chosen", "score_rejected")
    ]
    assert statistics.stdev(errors) == pytest.approx(0.5, abs=0.08)
    with pytest.raises(ValueError, match="judge_noise must be >= 0"):
        PlantedText(judge_noise=-1.0)
