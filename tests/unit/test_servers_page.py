"""docs/servers.md has the answers of the servers as ``tests/e2e/test_real_servers.py`` holds them."""

from __future__ import annotations

from pathlib import Path

from real_servers import KINDS, PROBES, SEEN, table
from rlgf_cli.guides.openai.presets import provider

PAGE = Path(__file__).parents[2] / "docs" / "servers.md"


def test_the_page_has_the_table_that_was_seen() -> None:
    assert set(SEEN) == set(KINDS) and all(set(answers) == set(PROBES) for answers in SEEN.values())
    assert "\n".join(table(SEEN)) in PAGE.read_text(encoding="utf-8")


def test_a_provider_s_prefill_is_one_that_goes_on() -> None:
    for name, kind in KINDS.items():
        goes_on = {style for style in ("vllm", "plain", "prefix") if "goes on" in SEEN[name][f"prefill `{style}`"]}
        assert (kind.prefill in goes_on) if goes_on else kind.prefill is None
        if kind.prefill is not None:
            rules = provider(kind.guide)
            assert rules.prefill == kind.prefill
            assert rules.prefill_echo == ("repeats" in SEEN[name][f"prefill `{kind.prefill}`"])
