"""A rank is killed, wherever it and the others are: all others end with an error that names it."""

from __future__ import annotations

import pytest
from deaths import check_others_name


@pytest.mark.parametrize(
    ("layout", "killed", "doing"),
    [
        ((2, 1), 1, ["waits for it", "comes"]),  # rank 0 makes its runtime, for which it needs the other
        ((1, 2), 0, ["leads once", "follows"]),  # followers are idle
        ((2, 2), 0, ["leads once", "follows", "follows", "follows"]),
        ((2, 1), 0, ["tells a plan", "follows"]),  # in the middle of a plan
        ((2, 1), 1, ["leads", "loads"]),  # rank 0 polls: its own runtime waits,
        ((1, 2), 1, ["leads", "loads"]),  # only the word of the other is missing,
        ((1, 2), 1, ["wide leads", "wide loads"]),  # there is more to send to it,
        ((1, 3), 1, ["leads", "loads", "follows"]),  # or what the last stage would say
        ((2, 2), 3, ["leads", "follows", "follows", "loads"]),
    ],
    ids=str,
)
def test_all_others_name_a_killed_rank(layout: tuple[int, int], killed: int, doing: list[str]) -> None:
    check_others_name(killed, layout, doing)
