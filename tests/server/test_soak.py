"""benchmarks/soak.py for some seconds: hundreds of clients that leave and dawdle, and nothing of them is left."""

from __future__ import annotations

import pytest
import soak


@pytest.mark.timeout(280)
def test_nothing_is_left_of_clients(capsys: pytest.CaptureFixture[str]) -> None:
    """Memory is told and not judged: that is too short for it."""
    code = soak.main(["--clients", "500", "--minutes", "0.1", "--round", "6", "--tolerance", "1e9"])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err


def test_what_has_become_more_is_a_leak() -> None:
    before = soak.Census(0, 0, 5, 20, 12, 6, 9)
    assert before.leaks(before) == []
    assert soak.Census(0, 0, 5, 19, 12, 7, 9).leaks(before) == []  # asyncio's pool of threads has grown
    leaking = soak.Census(1, 2, 6, 21, 13, 99, 10).leaks(before)
    assert [leak.partition(":")[0] for leak in leaking] == [field for field in vars(before)]


def test_growth_is_by_least_squares() -> None:
    samples = [soak.Sample(float(at), 100 + 7 * at, 50) for at in range(10)]
    assert soak.growth(samples, "server") == pytest.approx(7.0)
    assert soak.growth(samples, "engine") == pytest.approx(0.0, abs=1e-9)
