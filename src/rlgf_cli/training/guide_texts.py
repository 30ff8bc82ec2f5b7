"""What a step requests of the guide once the policy's own texts are scored: whole texts for the guide-token term, in
the groups or beside them, and restarts of groups that failed. One text a group, and only where it will be used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from rlgf_cli.algorithms.guide_term import GuideTerm
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.training.episodes import Episode, Role, by_group
from rlgf_cli.training.rollout import RolloutGenerator

Score = Callable[[list[Episode]], None]


def add_guide_texts(
    generator: RolloutGenerator, regime: Regime, episodes: Sequence[Episode], first: int, score: Score
) -> list[Episode]:
    """The guide's texts for these episodes' groups. With ``alone`` the own episodes of these groups learn nothing.

    ``first``: the index of the first group's text; ``score`` scores episodes in place.
    """
    term = regime.guide_term
    if term is None or not term.adds_texts:
        return []
    groups = {g: members for g, members in by_group(episodes).items() if generator.covers(members[0])}
    wanted = {g: members for g, members in groups.items() if term.gate != "failed" or failed(members, term.failed_at)}
    texts = generator.guide_texts([_guide_episode(members[0], term, first) for members in wanted.values()])
    if term.scored:
        score(texts)
        unscored = [e for e in texts if e.score is None]  # a judge may give none; a text without one has no credit
        generator.counts["skipped"] += len(unscored)
        texts = [e for e in texts if e.score is not None]
    if term.gate == "ahead":
        texts = [e for e in texts if e.value > fmean(own.value for own in wanted[e.group])]
    if term.alone:
        for e in (e for text in texts for e in wanted[text.group]):
            e.learns = False
    return texts


def restart_failed(
    generator: RolloutGenerator, regime: Regime, episodes: Sequence[Episode], key: str, count: int, score: Score
) -> list[Episode]:
    """The episodes, some of the failed groups' replaced by ones that begin behind a part of the guide's text.

    ``key``: of their draws; ``count``: the step's prompts; ``score`` scores episodes in place. The episodes that were
    replaced are counted (``rewritten``), and so are the groups that had failed (``failed_groups``).
    """
    rule = regime.on_failure
    if rule is None or rule.known_from != "step":
        return list(episodes)
    failing = [members for members in by_group(episodes).values() if failed(members, rule.failed_at)]
    new = generator.write_again(regime, [e for members in failing for e in members], key, count)
    score(new)
    generator.counts["failed_groups"] += len(failing)
    generator.counts["rewritten"] += len(new)
    replaced = {e.index: e for e in new}
    return [replaced.get(e.index, e) for e in episodes]


def failed(group: Sequence[Episode], failed_at: float) -> bool:
    """Whether no text of the group scored above ``failed_at``."""
    return all(e.value <= failed_at for e in group)


def _guide_episode(head: Episode, term: GuideTerm, first: int) -> Episode:
    """An episode of the head's group and prompt that the guide will write all of."""
    role: Role = "member" if term.tokens == "member" else "beside"
    return Episode(first + head.group, head.example, head.prompt_ids, head.group, "guide", drawn=head.drawn, role=role)
