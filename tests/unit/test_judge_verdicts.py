"""Ratings and verdicts in the last line of a judge's answer: read in any dress, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgf_cli.evolve.reviewer import read_verdict as read_review
from rlgf_cli.scorers.judge import read_verdict
from rlgf_cli.scorers.judge_verdicts import last_line, read_rating


@pytest.mark.parametrize(
    "line",
    [
        "Rating: 7", "**Rating: 7**", "**Rating:** 7", "Rating: **7**", "_7_", "**7**", "`7`", "7", "7.", "7.0", "7/10",
        "7 / 10", "Rating: 7/10", "**Rating: 7/10**", "7 out of 10", "Rating: 7 out of 10.", "Score: 7.", "Rating = 7",
        "Rating - 7", "Rating 7", "My rating is 7", "My final rating: 7!", "Overall score: 7 points", "### Rating: 7",
        "> Rating: 7", "- Rating: 7", "[[7]]", "(7)", "Rating (1-10): 7", "I would give 7", "I'd give it a 7.",
        "I rate this answer 7/10", "I would rate the answer as 7 out of 10.", "Overall, I give this a score of 7.",
        "On a scale of 1 to 10, I would give it a 7.", "$\\boxed{7}$", '{"rating": 7}', "Rating: 7 stars",
        "RATING: 7", "Rating: 7\n\n---\n", "Rating: 7\n```", "Rating: 7 (out of 10)", "Rating: [[7]]",
    ],
)  # fmt: skip
def test_a_rating_in_any_dress(line):
    assert read_rating(f"It is fine, for 3 reasons.\n{line}") == 7


@pytest.mark.parametrize(
    "line",
    [
        "", "seven", "0", "11", "77", "-7", "Rating: -7", "7.5", "Rating: 7.5", "7,5", "7/5", "70/100", "7 out of 5",
        "70%",
        "7-8", "7 or 8", "Rating: 7 or 8", "between 7 and 8", "Rating: 1-10", "1*0", "Rating: 1 0",
        "It has 7 mistakes.", "I would give it more if it had 7", "7 words are missing", "Rule 7", "Step 7:",
        "I gave the last answer 7, and this one less", "Rating: 7, because it is short", "I cannot rate this text.",
        "Rating: 7 of 8 words", "Rating: 107", "Rating: ٧٧", "10 10",
    ],
)  # fmt: skip
def test_what_is_no_rating_is_not_read(line):
    assert read_rating(f"Rating: 7\n{line}" if line else "") is None


def test_the_bounds():
    assert [read_rating(f"Rating: {n}") for n in range(12)] == [None, *range(1, 11), None]


@pytest.mark.parametrize("dress", ["{}", "**{}**", "_{}_", "`{}`", "> {}", "[[{}]]", "{}.", "**{}**."])
@pytest.mark.parametrize(("said", "winner"), [("A", "A"), ("B", "B"), ("tie", "tie")])
def test_a_verdict_in_any_dress(dress, said, winner):
    assert read_verdict(f"So.\n{dress.format(f'Verdict: {said}')}") == winner
    if not dress.startswith(">"):
        assert read_verdict(f"So.\nVerdict: {dress.format(said)}") == winner


def test_other_forms_of_a_verdict():
    assert read_verdict("Final verdict: Answer B") == "B" and read_verdict("Verdict: a tie") == "tie"
    assert read_review("**Verdict: Different**") is True and read_review("Verdict: equal.") is False
    assert read_review("Verdict: not equal") is None


@pytest.mark.parametrize("line", ["A", "tie", "Verdict: C", "Verdict: A or B", "Verdict: B is better", "Verdict:", ""])
def test_what_is_no_verdict_is_not_read(line):
    assert read_verdict(line) is None


@given(st.text(alphabet="Rating: 0123456789/.*_-()[]of1 \n", max_size=40))
def test_a_rating_is_a_number_of_its_line(answer):
    rating = read_rating(answer)
    assert rating is None or (1 <= rating <= 10 and str(rating) in last_line(answer))
