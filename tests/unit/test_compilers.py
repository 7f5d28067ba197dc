"""What `make test-compilers` makes of the verifier's numbers, which it reads from what the loader prints."""

import pytest

from tests.compilers.verdicts import EVERY_PROGRAM, Verdict, counts, judge

PRINTED = """\
mcr_relay: processed 40624 insns (limit 1000000) max_states_per_insn 30 total_states 1702
mcr_egress: processed 5061 insns (limit 1000000) max_states_per_insn 12 total_states 133
a warning of the compiler
traced
mcr_egress: processed 6247 insns (limit 1000000) max_states_per_insn 10 total_states 181
"""


def test_a_program_and_its_traced_twin_are_two() -> None:
    assert counts(PRINTED) == {"mcr_relay": 40624, "mcr_egress": 5061, "traced mcr_egress": 6247}


def test_every_program_is_judged_whether_it_was_loaded_or_not() -> None:
    assert [verdict.program for verdict in judge({}, {})] == list(EVERY_PROGRAM)
    assert {verdict.fault for verdict in judge({}, {})} == {"was not loaded"}


@pytest.mark.parametrize(
    ("count", "recorded", "fault"),
    [
        (1500, 1000, ""),
        (10, 1000, ""),
        (1501, 1000, "costs the verifier more than 1.5 times what was recorded"),
        (1000, None, "has no recorded number"),
        (None, 1000, "was not loaded"),
    ],
)
def test_growth_by_half_is_the_limit(count: int | None, recorded: int | None, fault: str) -> None:
    assert Verdict("mcr_relay", count, recorded).fault == fault
