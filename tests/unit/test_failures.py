"""Failures made on purpose, the rules that find them, and the rules that mend them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example as with_case
from hypothesis import given
from hypothesis import strategies as st

from rlgf_cli import noise, registry
from rlgf_cli.config.make_negatives import RULE_MADE
from rlgf_cli.failures import rules, sentences
from rlgf_cli.failures.kinds import Case, Corpus, repetition, shuffled_sentences, swapped_facts
from rlgf_cli.failures.make import Tally, WeightedKind, make_failures
from rlgf_cli.failures.repair import REPAIRS, repair
from rlgf_cli.failures.rules import Response, flags
from rlgf_cli.protocols import Example
from rlgf_cli.scorers.rouge import AdjustedRouge, length_factor

PROMPT = (
    "#Person1#: Hello Mrs Parker, how are you today? #Person2#: Hello Dr Peters. Ricky is here for his 3 vaccines. "
    "#Person1#: He is 14 months old, so he is due for them. We check the record first, and then we go on."
)
EXAMPLES = [
    Example("a", PROMPT, ("Mrs Parker takes Ricky for 3 vaccines. Dr Peters checks the record and then goes on.",)),
    Example(
        "b",
        "What does the cat do at 5 in the garden of Lisa?",
        ("The cat sleeps until 6. Lisa calls it, and it runs.",),
    ),
    Example(
        "c",
        "Tell me of the river and the house of Tom.",
        ("Tom sells the house at the river to two old friends of his.",),
    ),
    Example("d", "One word?", ("Yes.",)),
]
CORPUS = Corpus(EXAMPLES)
KINDS = [WeightedKind(name, registry.load("failures", name)) for name in RULE_MADE]

texts = st.text(alphabet=st.sampled_from("abc .!?\n\"'éß漢。"), max_size=80)


class TestPieces:
    @given(texts)
    def test_sentences_joined_are_the_text(self, text):
        found = sentences.sentences(text)
        assert "".join(found) == (text if text.strip() else "")
        assert all(part.strip() for part in found)

    def test_an_abbreviation_ends_no_sentence(self):
        assert len(sentences.sentences("Dr. Peters met J. Smith at 5 p.m. today. He left.")) == 2
        assert len(sentences.sentences('She said "Go!" He went. 東京は大きい。京都も。')) == 4

    @pytest.mark.parametrize(
        ("text", "finished"),
        [
            ("It ends.", True),
            ('"It ends!"', True),
            ("It ends.)  ", True),
            ("It does not", False),
            ("", False),
            ("a,", False),
        ],
    )
    def test_what_is_finished(self, text, finished):
        assert sentences.is_finished(text) is finished

    def test_the_first_loop_is_found_with_its_length(self):
        assert sentences.loop_start(["we", "go", "we", "go", "we", "go"]) == (0, 2)
        assert sentences.loop_start(["so", "a", "b", "c", "a", "b", "c", "a", "b", "c"]) == (1, 3)
        assert sentences.loop_start(["very", "very", "very", "good"]) is None
        assert sentences.loop_start(["no", "no", "no", "no"]) == (0, 1)

    @given(st.lists(st.sampled_from("ab"), max_size=8), st.lists(st.sampled_from("abc"), max_size=8))
    def test_the_longest_copied_run_is_that_of_the_definition(self, prompt, text):
        runs = [
            size
            for size in range(1, len(text) + 1)
            for i in range(len(text) - size + 1)
            if any(prompt[k : k + size] == text[i : i + size] for k in range(len(prompt) - size + 1))
        ]
        assert sentences.copied_run(prompt, text) == max(runs, default=0)


class TestKinds:
    @pytest.mark.parametrize("spoiler", KINDS, ids=lambda s: s.name)
    def test_a_kind_is_the_same_for_a_seed_and_says_where_it_does_not_apply(self, spoiler):
        made = []
        for example in EXAMPLES:
            case = Case(example, example.references[0], CORPUS, 0.7)
            first, again = (spoiler.make(case, noise.generator(1, example.id)) for _ in range(2))
            assert first == again
            made.append(first)
        assert any(text is not None and text not in e.references for text, e in zip(made, EXAMPLES, strict=True))

    @pytest.mark.parametrize("seed", range(20))
    def test_shuffling_moves_and_loses_nothing(self, seed):
        case = Case(EXAMPLES[0], EXAMPLES[0].references[0], CORPUS)
        shuffled = registry.load("failures", "shuffled_words")(case, noise.generator(seed))
        strip = str.maketrans("", "", ".")
        assert sorted(shuffled.translate(strip).split()) == sorted(case.good.translate(strip).split())
        other = shuffled_sentences(case, noise.generator(seed))
        assert other != case.good and sorted(other.split()) == sorted(case.good.split())
        assert shuffled_sentences(Case(EXAMPLES[3], "Yes.", CORPUS), noise.generator(seed)) is None

    @pytest.mark.parametrize("seed", range(20))
    def test_facts_are_swapped_for_facts_of_their_type(self, seed):
        case = Case(EXAMPLES[0], EXAMPLES[0].references[0], CORPUS)
        swapped = swapped_facts(case, noise.generator(seed))
        pairs = [(a, b) for a, b in zip(case.good.split(), swapped.split(), strict=True) if a != b]
        assert pairs
        for old, new in pairs:
            assert new.strip(".").isdigit() == old.strip(".").isdigit()
            assert new.strip(".").isdigit() or new[0].isupper()
            assert new.strip(".") in PROMPT.replace(",", "").replace(".", "").replace("?", "").split(), (
                "the prompt has some"
            )

    @pytest.mark.parametrize(
        ("kind", "rule"), [("repetition", "loops"), ("run_on", "overlong"), ("cut_off", "unfinished")]
    )
    def test_the_rule_for_a_kind_finds_it_and_spares_the_good_text(self, kind, rule):
        example = EXAMPLES[0]
        count = len(example.references[0].split())
        assert flags(Response(example.prompt, example.references[0], count)) == []
        for seed in range(20):
            case = Case(example, example.references[0], Corpus(EXAMPLES[:3]))
            text = registry.load("failures", kind)(case, noise.generator(seed))
            assert rule in flags(Response(example.prompt, text, count)), text

    def test_copied_input_stands_in_the_prompt(self):
        example = EXAMPLES[0]
        case = Case(example, example.references[0], CORPUS)
        found = [registry.load("failures", "copied_input")(case, noise.generator(seed)) for seed in range(30)]
        assert all(text.rstrip(".!?,") in PROMPT for text in found)
        assert any("copied" in flags(Response(PROMPT, text, 16)) for text in found)

    def test_the_end_mark_does_not_give_a_kind_away(self):
        case = Case(EXAMPLES[0], EXAMPLES[0].references[0], CORPUS)
        for kind in ("random_words", "shuffled_words", "repetition", "copied_input"):
            made = [registry.load("failures", kind)(case, noise.generator(seed)) for seed in range(200)]
            share = np.mean([sentences.is_finished(text) for text in made])
            assert 0.4 < share < 0.8, kind

    def test_severity_says_how_much(self):
        case = {s: Case(EXAMPLES[2], EXAMPLES[2].references[0], CORPUS, s) for s in (0.2, 1.0)}
        make = registry.load("failures", "random_words")
        kept = {
            s: np.mean([len(set(make(c, noise.generator(i)).split()) & set(c.words)) for i in range(50)])
            for s, c in case.items()
        }
        assert kept[0.2] > kept[1.0] + 3

    @given(st.integers(4, 60), st.integers(0, 1000))
    @with_case(4, 91)  # "w0 w0 w0 w0.": the end mark does not hide the loop
    def test_a_loop_is_a_loop_at_any_length(self, count, seed):
        good = " ".join(f"w{i}" for i in range(count)) + "."
        text = repetition(Case(EXAMPLES[0], good, CORPUS), noise.generator(seed))
        assert rules.loops(Response("", text))


class TestSpoil:
    def rows(self, examples=EXAMPLES, **changed):
        tally = Tally()
        settings = {"per_reference": 2, "seed": 0, "tally": tally, **changed}
        return list(make_failures(examples, KINDS, **settings)), tally

    def test_never_a_reference_always_text_and_as_many_as_asked(self):
        rows, tally = self.rows(per_reference=4)
        for example, _, _, _, text in rows:
            assert " ".join(text.split()) not in {" ".join(r.split()) for r in example.references}
            assert text.strip() and text.encode("utf-8").decode("utf-8") == text
        long = [r for r in rows if r[0].id == "a"]
        assert len(long) == 4 and len({r[3] for r in long}) == 4
        assert sum(tally.made.values()) == len(rows)
        assert tally.not_applicable["shuffled_sentences"] >= 1, "one sentence cannot be shuffled"

    def test_what_an_example_gets_does_not_depend_on_its_place(self):
        def found(rows):
            return sorted((e.id, k, kind, text) for e, k, _, kind, text in rows)

        assert found(self.rows()[0]) == found(self.rows(list(reversed(EXAMPLES)))[0])
        assert found(self.rows()[0]) != found(self.rows(seed=1)[0])

    def test_a_kind_that_gives_the_reference_is_dropped_and_counted(self):
        tally = Tally()
        same = WeightedKind("same", lambda case, rng: f" {case.good} ")
        assert list(make_failures(EXAMPLES, [same], per_reference=1, seed=0, tally=tally)) == []
        assert tally.equal_to_reference["same"] == 4 and not tally.made

    def test_weights_are_proportions(self):
        many = [Example(str(i), PROMPT, EXAMPLES[0].references) for i in range(600)]
        heavy = [WeightedKind("x", lambda case, rng: "x y z", 3.0), WeightedKind("y", lambda case, rng: "u v w", 1.0)]
        tally = Tally()
        assert len(list(make_failures(many, heavy, per_reference=1, seed=0, tally=tally))) == 600
        assert 0.69 < tally.made["x"] / 600 < 0.81


class TestMend:
    @given(texts, st.integers(1, 10))
    def test_mending_only_takes_away_and_a_second_time_changes_nothing(self, text, limit):
        names = list(REPAIRS)
        once, changed = repair(text, names, limit)
        assert len(once) <= len(text)
        assert bool(changed) == (once != text)
        assert bool(once.strip()) == bool(text.strip())
        for name in names:
            mended = REPAIRS[name](text, limit)
            assert REPAIRS[name](mended, limit) == mended, name

    @pytest.mark.parametrize(
        ("rule", "text", "mended"),
        [
            ("end_mark", "It ends here.</s> And on", "It ends here."),
            ("end_mark", "</s> it begins", "</s> it begins"),
            ("repetition", "So we go home we go home we go home we", "So we go home"),
            ("repeats", "It is so. It is  SO. It ends.", "It is so. It ends."),
            ("unfinished", "It ends. And then it", "It ends."),
            ("unfinished", "And then it", "And then it"),
            ("trim", "One two. Three four. Five six.", "One two. Three four."),
            ("trim", "One two three four five six.", "One two three four five"),
        ],
    )
    def test_each_rule(self, rule, text, mended):
        assert repair(text, [rule], 5) == (mended, [rule] if mended != text else [])

    def test_the_order_is_the_one_given(self):
        text = "It ends. It ends. It ends. And then it"
        assert repair(text, ["repetition", "unfinished"])[1] == ["repetition"]
        assert repair(text, ["unfinished", "repetition"])[1] == ["unfinished", "repetition"]


class TestAdjustedRouge:
    def f1(self, references, text):
        example = Example("x", "p", tuple(references))
        result = AdjustedRouge().compute([example], [text])
        return {key: values[0] for key, values in result.values.items()}

    def test_its_limits(self):
        good = "the cat sat on the mat"
        assert self.f1([good], good) == pytest.approx({"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0})
        assert self.f1([good], "") == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
        doubled = self.f1([good], f"{good} {good}")
        assert doubled["rougeL"] == pytest.approx(2 * 0.5 / 1.5 * np.exp(-1))  # precision 1/2, recall 1
        assert self.f1(["x y", good], good)["rouge1"] == pytest.approx(1.0), "the best reference"

    @given(st.integers(1, 200), st.integers(1, 200))
    def test_too_long_and_too_short_are_charged_alike(self, n, m):
        assert length_factor(n, m) == pytest.approx(length_factor(m, n))
        assert 0 < length_factor(n, m) <= 1
        assert (length_factor(n, m) == 1) == (n == m)
