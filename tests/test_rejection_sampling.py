"""Statistical rejection sampling against the exact distributions, by chi-square with fixed seeds."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastpo.rejection_sampling import RANKINGS, accept, first_round, row_generator, tournament

REWARDS = (0.3, -0.5, 1.1, 0.2, 0.9)
BETAS = (0.25, 0.5, 2.0)
RUNS = 12_000
PASSES, FAILS = 0.01, 1e-6

Choose = Callable[[Sequence[float], float, random.Random], list[int]]


def p_value(seen: Iterable[Hashable], exact: Mapping[Any, float]) -> float:
    """Of Pearson's chi-square; outcomes that are expected less than ten times count as one."""
    counts = Counter(seen)
    assert counts.keys() <= exact.keys()
    number = counts.total()
    rare = [x for x in exact if number * exact[x] < 10]
    cells = [(counts[x], number * exact[x]) for x in exact if x not in rare]
    if rare:
        cells.append((sum(counts[x] for x in rare), number * sum(exact[x] for x in rare)))
    statistic = sum((observed - expected) ** 2 / expected for observed, expected in cells)
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def softmax(rewards: Sequence[float], beta: float) -> list[float]:
    return (torch.tensor(rewards, dtype=torch.float64) / beta).softmax(0).tolist()


def plackett_luce(rewards: Sequence[float], beta: float) -> dict[tuple[int, int], float]:
    """Probability of each ordered pair of the first two."""
    p = softmax(rewards, beta)
    return {(i, j): p[i] * p[j] / (1 - p[i]) for i, j in itertools.permutations(range(len(p)), 2)}


def ours(rewards: Sequence[float], beta: float, generator: random.Random) -> list[int]:
    return accept(rewards, beta, 2, generator).positions


def in_file_order(rewards: Sequence[float], beta: float, generator: random.Random) -> list[int]:
    """Passes over the candidates as they stand, each tried in turn: the earlier ones come out too often."""
    accepted: list[int] = []
    while len(accepted) < 2:
        best = max(r for i, r in enumerate(rewards) if i not in accepted)
        for i, reward in enumerate(rewards):
            if i not in accepted and generator.random() < math.exp((reward - best) / beta):
                accepted.append(i)
    return accepted[:2]


def orders(choose: Choose, beta: float) -> list[tuple[int, int]]:
    found = (choose(REWARDS, beta, row_generator(0, run)) for run in range(RUNS))
    return [(first, second) for first, second in found]


# --- a fixed set of candidates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_the_first_accepted_is_softmax_and_the_order_is_plackett_luce(beta: float) -> None:
    seen = orders(ours, beta)
    assert p_value((first for first, _ in seen), dict(enumerate(softmax(REWARDS, beta)))) > PASSES
    assert p_value(seen, plackett_luce(REWARDS, beta)) > PASSES


def test_the_same_tests_fail_for_another_beta_and_for_candidates_tried_in_file_order() -> None:
    seen, other = orders(ours, 0.5), 0.5 * 1.15
    assert p_value((first for first, _ in seen), dict(enumerate(softmax(REWARDS, other)))) < FAILS
    assert p_value(seen, plackett_luce(REWARDS, other)) < FAILS
    seen = orders(in_file_order, 0.5)
    assert p_value((first for first, _ in seen), dict(enumerate(softmax(REWARDS, 0.5)))) < FAILS


def expected_trials(rewards: Sequence[float], beta: float, *, best_of_all: bool) -> float:
    """Of the first two acceptances: a trial succeeds with the mean of exp((r - r_max) / beta) over what remains."""

    def trials(remaining: list[int]) -> float:
        best = max(rewards) if best_of_all else max(rewards[i] for i in remaining)
        return len(remaining) / sum(math.exp((rewards[i] - best) / beta) for i in remaining)

    everyone = list(range(len(rewards)))
    second = (p * trials([j for j in everyone if j != i]) for i, p in enumerate(softmax(rewards, beta)))
    return trials(everyone) + sum(second)


def test_trials_are_those_of_the_best_that_remains() -> None:
    """What r_max says changes no frequency: it says how many trials an acceptance takes."""
    rewards, beta = (0.0, 0.3, 1.0), 0.25
    trials = [accept(rewards, beta, 2, row_generator(1, run)).trials for run in range(RUNS)]
    found = torch.tensor(trials, dtype=torch.float64)
    error = float(found.std()) / math.sqrt(RUNS)
    assert abs(float(found.mean()) - expected_trials(rewards, beta, best_of_all=False)) < 3 * error
    assert abs(float(found.mean()) - expected_trials(rewards, beta, best_of_all=True)) > 20 * error


# --- candidates drawn from a reference --------------------------------------------------------------------------------

REFERENCE = (0.35, 0.3, 0.15, 0.1, 0.06, 0.04)
VALUES = (0.0, 0.4, 0.2, 0.9, 1.2, 1.5)
PROMPTS, CANDIDATES = 3_000, 400


def tilted(beta: float) -> dict[int, float]:
    weights = [p * math.exp(r / beta) for p, r in zip(REFERENCE, VALUES, strict=True)]
    return {outcome: weight / sum(weights) for outcome, weight in enumerate(weights)}


def drawn(prompt: int) -> list[int]:
    return random.Random(prompt).choices(range(len(REFERENCE)), REFERENCE, k=CANDIDATES)


@pytest.fixture(scope="module")
def accepted() -> dict[float, list[list[int]]]:
    """Four outcomes of each prompt; prompts take turns with their betas."""
    found: dict[float, list[list[int]]] = {0.3: [], 1.0: []}
    for prompt in range(PROMPTS):
        outcomes, beta = drawn(prompt), (0.3, 1.0)[prompt % 2]
        positions = accept([VALUES[x] for x in outcomes], beta, 4, row_generator(2, prompt)).positions
        found[beta].append([outcomes[position] for position in positions])
    return found


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_of_candidates_from_a_reference_come_those_of_the_tilted_one(
    accepted: dict[float, list[list[int]]], beta: float
) -> None:
    exact = tilted(beta)
    assert p_value((first for first, *_ in accepted[beta]), exact) > PASSES
    # The later ones are drawn from what is left, which of many candidates is nearly the same.
    counts = Counter(itertools.chain.from_iterable(accepted[beta]))
    assert sum(abs(counts[x] / counts.total() - exact[x]) for x in exact) / 2 < 0.02


def test_the_same_test_fails_for_one_beta_for_all_and_for_candidates_by_text(
    accepted: dict[float, list[list[int]]],
) -> None:
    for beta in (0.3, 1.0):
        assert p_value((first for first, *_ in accepted[beta]), tilted(0.65)) < FAILS
    # Each outcome once, however often it was drawn: the reference's own probabilities are lost.
    distinct = [sorted(set(drawn(prompt))) for prompt in range(PROMPTS)]
    firsts = [
        outcomes[accept([VALUES[x] for x in outcomes], 1.0, 1, row_generator(2, prompt)).positions[0]]
        for prompt, outcomes in enumerate(distinct)
    ]
    assert p_value(firsts, tilted(1.0)) < FAILS


# --- what always holds ------------------------------------------------------------------------------------------------

EIGHTHS = st.integers(-80, 80).map(lambda x: x / 8)


@given(
    rewards=st.lists(EIGHTHS, min_size=1, max_size=12), number=st.integers(1, 15), index=st.integers(0, 99),
    beta=st.sampled_from([2.0**k for k in range(-12, 4)]),
)  # fmt: skip
def test_invariants(rewards: list[float], number: int, index: int, beta: float) -> None:
    found = accept(rewards, beta, number, row_generator(0, index))
    assert len(found.positions) == len(set(found.positions)) == min(number, len(rewards)) <= found.trials
    assert set(found.positions) <= set(range(len(rewards)))
    assert found == accept(rewards, beta, number, row_generator(0, index))
    # Rewards have no origin, and beta is their unit; in eighths both are exact.
    assert found == accept([r + 3 for r in rewards], beta, number, row_generator(0, index))
    assert found == accept([r * 4 for r in rewards], beta * 4, number, row_generator(0, index))


def test_prompts_and_seeds_draw_differently() -> None:
    rewards = [0.0] * 50
    chosen = {tuple(accept(rewards, 1.0, 5, row_generator(s, i)).positions) for s in range(4) for i in range(4)}
    assert len(chosen) == 16


@pytest.mark.parametrize("beta", [1e-3, 5e-324])
def test_a_huge_spread_and_a_tiny_beta_take_the_best_in_turn(beta: float) -> None:
    rewards = [float(r) for r in random.Random(0).sample(range(-5_000, 5_000), 64)]
    found = accept([*rewards, 1e308, -1e308], beta, 99, row_generator(0, 0))
    values = [[*rewards, 1e308, -1e308][position] for position in found.positions]
    assert values == sorted(values, reverse=True) and len(values) == 66
    assert found.trials < 3 * 66 * 67 / 2  # of 66, 65, ... candidates the one best


def test_equal_rewards_are_accepted_at_once_and_one_candidate_is_too() -> None:
    assert accept([7.0] * 9, 1e-3, 9, row_generator(0, 0)).trials == 9
    assert accept([-1e9], 0.5, 8, row_generator(0, 0)) == ([0], 1)
    assert accept([], 0.5, 8, row_generator(0, 0)) == ([], 0)


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_no_numbers_are_refused(reward: float) -> None:
    with pytest.raises(ValueError, match=f"rewards must be finite, got {reward}"):
        accept([0.0, reward], 0.5, 2, row_generator(0, 0))


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf, True, "0.5"])
def test_beta_is_a_number_above_zero(beta: Any) -> None:
    with pytest.raises(ValueError, match="beta must be a finite number > 0"):
        accept([0.0, 1.0], beta, 2, row_generator(0, 0))
    with pytest.raises(ValueError, match="num_samples must be >= 1, got 0"):
        accept([0.0, 1.0], 1.0, 0, row_generator(0, 0))


# --- pairs ------------------------------------------------------------------------------------------------------------


@given(number=st.integers(0, 17), index=st.integers(0, 99), data=st.data())
def test_counts_and_labels_of_distinct_candidates(number: int, index: int, data: st.DataObject) -> None:
    positions = data.draw(st.permutations(range(20)))[:number]
    rewards = data.draw(st.permutations([float(x) for x in range(20)]))
    texts = [str(x) for x in range(20)]
    for rank, count in ((first_round, number // 2), (tournament, max(number - 1, 0))):
        pairs = rank(positions, rewards, texts, row_generator(0, index))
        assert len(pairs) == count
        assert all(rewards[pair.chosen] > rewards[pair.rejected] for pair in pairs)
        losers = [pair.rejected for pair in pairs]
        assert len(set(losers)) == len(losers)  # who lost meets nobody again
        if rank is first_round:
            assert len({x for pair in pairs for x in pair}) == 2 * count
        elif pairs:
            assert set(losers) == set(positions) - {max(positions, key=lambda x: rewards[x])}


@pytest.mark.parametrize("rank", RANKINGS.values())
def test_equal_rewards_and_equal_texts_are_no_pair(rank: Any) -> None:
    assert rank([0, 1, 2, 3], [1.0] * 4, list("abcd"), row_generator(0, 0)) == []
    assert rank([0, 1], [1.0, 2.0], ["same", "same"], row_generator(0, 0)) == []
    assert rank([0, 1], [1.0, 2.0], [[{"content": "a"}], [{"content": "a"}]], row_generator(0, 0)) == []
    assert rank([0, 1], [1.0, 2.0], ["a", "b"], row_generator(0, 0)) == [(1, 0)]


def test_a_tournament_goes_on_after_a_tie() -> None:
    """Two that are alike do not spoil what the others say."""
    for index in range(50):
        pairs = tournament([0, 1, 2, 3], [1.0, 1.0, 1.0, 2.0], list("abcd"), row_generator(0, index))
        assert {pair.chosen for pair in pairs} == {3} and len(pairs) == 2


def test_every_pairing_is_as_likely() -> None:
    seen = []
    for index in range(RUNS):
        pairs = first_round([0, 1, 2, 3], [0.0, 1.0, 2.0, 3.0], list("abcd"), row_generator(3, index))
        seen.append(next(min(pair) for pair in pairs if max(pair) == 3))
    assert p_value(seen, dict.fromkeys(range(3), 1 / 3)) > PASSES
