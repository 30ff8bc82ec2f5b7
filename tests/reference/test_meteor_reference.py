"""METEOR by its real program equals pycocoevalcap's own wrapper of it."""

from __future__ import annotations

import shutil

import pytest
from pycocoevalcap.meteor.meteor import Meteor

from rlgf_cli.protocols import Example
from rlgf_cli.scorers.meteor import MeteorMetric


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="there is no java")
def test_texts_with_many_references():
    groups = [
        ("the cat is on the mat", "a cat sits there, on a mat"),
        ("dogs were running to the naïve river",),
        ("a child finds the garden", "the kid found a yard", "children in gardens"),
        ("the queen calls it",),
    ]
    texts = ["the cat sat on the mat", "the dog ran to a naïve river", "a kid discovers the garden", ""]
    found = MeteorMetric().compute([Example(str(i), "p", group) for i, group in enumerate(groups)], texts)
    theirs = Meteor()
    corpus, values = theirs.compute_score(
        {i: list(group) for i, group in enumerate(groups)}, {i: [text] for i, text in enumerate(texts)}
    )
    assert found.values["score"] == values and found.whole == {"corpus": corpus}
    assert values[3] == 0 and len(set(values)) == 4 and 0.2 < corpus < 0.6
