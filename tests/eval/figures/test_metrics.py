"""Counts of both forms of records, and what they say of questions that were not asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from evaluations import question_record
from fledge.eval.figures.metrics import (
    acceptance_interval,
    count,
    macro_acceptance_length,
    paired_difference,
    question_lengths,
    speedup_interval,
)

NAME = "trained head"


def record(*rounds: list[int], drafted: int = 3) -> dict[str, Any]:
    return question_record(*rounds, drafted=drafted)


def summed(*rounds: list[int]) -> dict[str, Any]:
    """The same question as a server counts it."""
    return question_record(*rounds, server=True)


def drawn_questions(generator: np.random.Generator, number: int) -> list[dict[str, Any]]:
    """Questions of unequal length and difficulty; a round accepts until the first of three drafts that fails."""
    questions = []
    for _ in range(number):
        chance, rounds = generator.beta(6, 4), int(generator.integers(20, 120))
        questions.append(record(np.minimum(generator.geometric(1 - chance, rounds) - 1, 3).tolist()))
    return questions


def test_rounds_and_a_servers_sums_give_the_same_counts():
    questions = [([2, 0, 3], [1]), ([3, 3],), ([],)]
    by_round = count([record(*rounds) for rounds in questions], NAME, 3)
    assert by_round.as_dict() == count([summed(*rounds) for rounds in questions], NAME, 3).as_dict()
    told = by_round.as_dict()
    assert (told["num_drafts"], told["num_draft_tokens"], told["num_accepted_tokens"]) == (6, 18, 12)
    assert told["num_accepted_tokens_per_pos"] == [5, 4, 3]
    assert told["acceptance_length"] == 1 + 12 / 6
    assert told["acceptance_rate_per_pos"] == [5 / 6, 4 / 6, 3 / 6]
    assert told["conditional_acceptance_rate_per_pos"] == [5 / 6, 4 / 5, 3 / 4]


def test_a_tree_is_counted_by_depth_and_its_nodes_are_draft_tokens():
    told = count([record([4, 0, 5], drafted=60)], NAME, 5).as_dict()
    assert told["num_draft_tokens"] == 180
    assert told["num_accepted_tokens_per_pos"] == [2, 2, 2, 2, 1]


@pytest.mark.parametrize("form", [summed, record])
def test_a_record_of_more_draft_tokens_than_are_evaluated_is_refused(form):
    with pytest.raises(ValueError, match=r"evaluate\.num_draft_tokens must be what is drafted .* position 3, got 2"):
        count([form([3])], NAME, 2)


def test_micro_weighs_rounds_and_macro_questions_that_had_any():
    questions = [record([3, 3, 3, 3]), record([0]), record([])]
    assert count(questions, NAME, 3).acceptance_length == 1 + 12 / 5
    assert question_lengths(questions, NAME, 3) == [4.0, 1.0]
    assert macro_acceptance_length(questions, NAME, 3) == 2.5
    assert macro_acceptance_length([record([])], NAME, 3) == 1.0


@pytest.mark.parametrize("number", [80, 10])
def test_95_of_100_intervals_hold_the_acceptance_length_of_all_questions(number):
    generator = np.random.default_rng(3)
    true = count(drawn_questions(generator, 20_000), NAME, 3).acceptance_length
    intervals = [acceptance_interval(drawn_questions(generator, number), NAME, 3) for _ in range(200)]
    assert 0.90 <= sum(low <= true <= high for low, high in intervals) / 200 <= 0.99


def test_rounds_drawn_one_by_one_would_give_intervals_that_are_too_narrow():
    generator = np.random.default_rng(3)
    true = count(drawn_questions(generator, 20_000), NAME, 3).acceptance_length
    held = 0
    for _ in range(200):
        questions = drawn_questions(generator, 40)
        single = np.array([taken for q in questions for taken in q["answers"][0]["drafters"][NAME]["accepted"]])
        reach = 1.96 * single.std() / len(single) ** 0.5
        held += abs(1 + single.mean() - true) <= reach
    assert held / 200 < 0.8


@pytest.mark.parametrize("number", [pytest.param(80, marks=pytest.mark.slow), 10])
def test_95_of_100_paired_intervals_hold_the_difference_and_are_narrower_than_two_single_ones(number):
    generator = np.random.default_rng(4)

    def pairs(number):
        worse = drawn_questions(generator, number)
        better = []
        for question in worse:
            accepted = np.array(question["answers"][0]["drafters"][NAME]["accepted"])
            better.append(record(np.minimum(accepted + (generator.random(len(accepted)) < 0.2), 3).tolist()))
        return better, worse

    true, _ = paired_difference(*pairs(20_000), NAME, (3, 3))
    held = narrower = 0
    for _ in range(200):
        better, worse = pairs(number)
        difference, interval = paired_difference(better, worse, NAME, (3, 3))
        assert difference == pytest.approx(
            count(better, NAME, 3).acceptance_length - count(worse, NAME, 3).acceptance_length
        )
        held += interval[0] <= true <= interval[1]
        single = acceptance_interval(better, NAME, 3)
        narrower += interval[1] - interval[0] < single[1] - single[0]
    assert 0.90 <= held / 200 <= 0.99
    assert narrower == 200


def timed_questions(generator: np.random.Generator, number: int, drawn: bool) -> list[dict[str, Any]]:
    """Questions timed once each, on a machine that is slower at one than at the next, and now and then far slower.

    Args:
        drawn: drafts are drawn, so that the answer is not the verifier's own, nor as long.
    """
    questions = []
    for _ in range(number):
        alone, drafted = generator.integers(20, 200, 2)
        drafted = drafted if drawn else alone
        slow = np.exp(generator.normal(0, 0.3)) * (1 + 3 * (generator.random() < 0.05))
        noise, gain = np.exp(generator.normal(0, 0.1, 2)), generator.normal(1.6, 0.25)
        told = {"output_tokens": int(drafted), "seconds": drafted / 100 / gain * slow * noise[0]}
        answer = {"output_tokens": int(alone), "seconds_alone": alone / 100 * slow * noise[1], "drafters": {NAME: told}}
        questions.append({"id": "q", "category": "math", "answers": [answer]})
    return questions


def speedup(questions: list[dict[str, Any]]) -> float:
    answers = [answer for question in questions for answer in question["answers"]]
    with_drafts = [answer["drafters"][NAME] for answer in answers]
    rates = [
        sum(told["output_tokens"] for told in of) / sum(told[seconds] for told in of)
        for of, seconds in ((with_drafts, "seconds"), (answers, "seconds_alone"))
    ]
    return rates[0] / rates[1]


@pytest.mark.parametrize(("number", "drawn"), [(80, False), (10, False), (80, True), (10, True)])
def test_95_of_100_intervals_hold_the_speed_up_of_all_questions(number, drawn):
    generator = np.random.default_rng(5)
    true = speedup(timed_questions(generator, 50_000, drawn))
    intervals = [speedup_interval(timed_questions(generator, number, drawn), NAME) for _ in range(200)]
    assert 0.89 <= sum(low <= true <= high for low, high in intervals) / 200 <= 0.99


def test_a_speed_up_has_bounds_within_those_of_single_questions_and_none_of_five_or_untimed_ones():
    questions = timed_questions(np.random.default_rng(6), 6, False)
    low, high = speedup_interval(questions, NAME)
    single = [speedup([question]) for question in questions]
    assert min(single) <= low < speedup(questions) < high <= max(single)
    assert speedup_interval(questions[:5], NAME) is None
    assert speedup_interval([], NAME) is None
    alike = [record([2, 1])] * 6
    assert speedup_interval(alike, NAME) == pytest.approx([speedup(alike)] * 2)
    assert speedup_interval([summed([2, 1])] * 6, NAME) is None


def test_a_question_at_several_lengths_is_drawn_as_one():
    asked = drawn_questions(np.random.default_rng(3), 12)
    alone = [{**one, "id": f"q/{n}"} for n, one in enumerate(asked)]
    twice = [{**one, "id": f"{one['id']}@{size}", "category": f"context {size}"} for size in (8, 16) for one in alone]
    assert acceptance_interval(twice, NAME, 3) == pytest.approx(acceptance_interval(alone, NAME, 3))
    other = [{**one, "category": "context of law"} for one in alone]
    assert acceptance_interval(other, NAME, 3) == acceptance_interval(alone, NAME, 3)


def test_three_questions_have_no_interval_and_alike_ones_have_their_value():
    assert acceptance_interval([], NAME, 3) is None
    few = [record([2, 1]), record([3]), record([0, 1])]
    assert acceptance_interval([*few, record([])], NAME, 3) is None
    assert acceptance_interval([*few, record([2])], NAME, 3) is not None
    assert acceptance_interval([record([2, 1])] * 4, NAME, 3) == [2.5, 2.5]
    assert acceptance_interval([record([0, 0])] * 4, NAME, 3) == [1.0, 1.0]
    assert paired_difference([record([2])] * 3, [record([1])] * 3, NAME, (3, 3)) == (1.0, None)
    assert paired_difference([record([2])] * 4, [record([1])] * 4, NAME, (3, 3)) == (1.0, [1.0, 1.0])


def test_an_interval_is_the_same_at_every_call_and_possible():
    few = [record([3, 3]), record([0, 1]), record([2]), record([1, 1])]
    interval = acceptance_interval(few, NAME, 3)
    assert interval == acceptance_interval(few, NAME, 3)
    assert 1.0 <= interval[0] < count(few, NAME, 3).acceptance_length < interval[1] <= 4.0
