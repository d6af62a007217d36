"""Skip-join MLFQ on schedules worked out by hand.

One row an iteration; a prefill of n tokens takes n seconds, a decode 1; so the quanta are 1, 2, 4, 8, … seconds.
"""

from __future__ import annotations

import pytest
from toy import Toy, bare_job

from fastserve.cost import CostModel
from fastserve.policies.mlfq import MultiLevelFeedbackQueue

SECOND_A_TOKEN = CostModel(per_iteration=0, per_token=1)


def solo(policy: str = "skip-join-mlfq", **options: object) -> Toy:
    options = {"max_num_seqs": 1, "max_num_batched_tokens": 64, "starvation_limit": None, **options}
    return Toy(SECOND_A_TOKEN, policy=policy, **options)


def mlfq(**options: object) -> MultiLevelFeedbackQueue:
    defaults = {"quantum": 1.0, "num_levels": 5, "starvation_limit": None, "skip_join": True}
    return MultiLevelFeedbackQueue(**{**defaults, **options})  # type: ignore[arg-type]


def order(policy: MultiLevelFeedbackQueue, now: float = 0.0) -> list[int]:
    return [entry.index for entry in policy.iter_best(now)]


@pytest.mark.parametrize(
    ("prompt", "level"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4), (16, 4), (17, 4), (60, 4)]
)
def test_a_job_joins_the_first_level_that_covers_its_prefill(prompt: int, level: int) -> None:
    toy = solo(num_levels=5)
    added = toy.add("a", prompt)
    assert toy.engine.scheduler.policy.level(added) == level


@pytest.mark.parametrize("prompt", [1, 5, 60])
def test_every_job_enters_level_0_of_the_plain_queue(prompt: int) -> None:
    toy = solo("mlfq")
    assert toy.engine.scheduler.policy.level(toy.add("a", prompt)) == 0


@pytest.mark.parametrize(
    ("policy", "ran", "jct"),
    [
        # Run to completion: the short ones sit behind the long one.
        ("fcfs", "long long medium medium medium short", (5, 8, 9)),
        # Plain: the long prefill still goes first, and is then demoted like a job that had a turn worth 1 s.
        ("mlfq", "long medium short long medium medium", (7, 9, 6)),
        # Skip-join: the long prefill (4 s) waits at level 2. Medium: its prefill spends level 0's 1 s; the two decodes
        # left are level 1's 2 s.
        ("skip-join-mlfq", "medium short medium medium long long", (9, 4, 2)),
    ],
)
def test_three_jobs_worked_by_hand(policy: str, ran: str, jct: tuple[float, ...]) -> None:
    """Mean JCT 7.33 s for FCFS and the plain queue, 5 s for skip-join."""
    toy = solo(policy)
    jobs = [toy.add("long", 4, 2), toy.add("medium", 1, 3), toy.add("short", 1, 1)]
    toy.run()
    assert toy.ran == ran
    assert tuple(entry.metrics.jct for entry in jobs) == jct


def test_demotion_looks_at_the_next_iteration() -> None:
    """2 of 9 prompt tokens spend level 0's second; 7 s of prefill are left, which level 3 covers.

    There 7 s of prefill and one decode spend 8 s. The next decode is covered by every level, so level 4 is the first.
    """
    toy = solo("mlfq", max_num_batched_tokens=2)
    toy.add("a", 9, 4)
    toy.run()
    assert [record.levels[0] for record in toy.records] == [0, 3, 3, 3, 3, 3, 4, 4]


def test_the_last_level_goes_round_robin_by_quanta() -> None:
    toy = solo(num_levels=3)
    toy.add("a", 9, 6)
    toy.add("b", 9, 6)
    toy.run()
    assert toy.ran == "a b a a a a b b b b a b"


def test_a_job_with_quantum_left_keeps_its_place() -> None:
    """Prefills of 3 s join level 2 (4 s): each job decodes once more before the next has its turn."""
    toy = solo()
    for name in "abc":
        toy.add(name, 3, 3)
    toy.run()
    assert toy.ran == "a a b b c c a b c"


def test_a_later_arrival_of_a_higher_level_preempts_between_two_tokens() -> None:
    toy = solo()
    long = toy.add("long", 8, 3)
    toy.engine.step()
    short = toy.add("short", 1, 2)
    toy.run()
    # The prefill spent level 3; "short" (level 0, then 1) goes before the two decodes left.
    assert toy.ran == "long short short long long"
    assert (long.metrics.preemptions, short.metrics.preemptions) == (1, 0)
    assert (short.metrics.jct, long.metrics.jct) == (2.0, 12.0)


def test_quantum_left_is_carried_through_a_preemption() -> None:
    toy = solo()
    toy.add("a", 3, 4)
    toy.engine.step()  # 1 s of level 2's 4 s left
    toy.add("b", 1, 1)
    toy.add("c", 3, 2)  # level 2, behind a
    toy.run()
    assert toy.ran == "a b a c c a a"


def test_a_starved_job_is_promoted_at_the_limit_and_not_before() -> None:
    """A short job arrives every second. The long one (level 3) is promoted at 5 s, behind the one just arrived."""
    toy = solo(starvation_limit=5.0)
    toy.add("long", 8, 1)
    for second in range(9):
        toy.add(f"short{second}", 1, 1)
        toy.engine.step()
    assert toy.ran == "short0 short1 short2 short3 short4 short5 long short6 short7"
    assert toy.records[6].levels == (0,)


def test_starvation_counts_from_arrival_then_from_the_last_service() -> None:
    policy = mlfq(starvation_limit=5.0)
    waiting = bare_job(0, 3.0, arrival=100.0)
    policy.add(waiting, 101.0)
    assert policy.next_deadline() == 105.0
    waiting.waiting_since = None  # it runs from 103 to 104
    policy.on_service(waiting, 1.0, 104.0)
    assert (policy.next_deadline() or 0) <= 109.0  # nobody knows when it will be left out
    waiting.waiting_since = 104.0
    assert policy.next_deadline() == 109.0 == policy.deadline(waiting)
    assert order(policy, 108.9) == [0] and policy.level(waiting) == 2
    assert order(policy, 109.0) == [0] and policy.level(waiting) == 0
    assert policy.next_deadline() is None


def test_a_promoted_job_can_finish_one_iteration_in_level_0() -> None:
    policy = mlfq(starvation_limit=5.0)
    long, short = bare_job(0, 8.0), bare_job(1, 1.0, arrival=5.0)
    policy.add(long, 0.0)
    assert order(policy, 5.0) == [0]
    policy.add(short, 5.0)
    long.waiting_since, long.waited = None, 5.0
    policy.on_service(long, 4.0, 9.0)  # half of its prefill: still in front
    assert order(policy, 9.0) == [0, 1] and policy.level(long) == 0
    long.next_seconds = 1.0
    policy.on_service(long, 4.0, 13.0)
    assert order(policy, 13.0) == [1, 0] and policy.level(long) == 1


def test_service_may_be_reported_in_lumps() -> None:
    """Level 2: a prefill of 3 s and, at the horizon, a decode; past it by less than an iteration all the same."""
    policy = mlfq()
    a, b = bare_job(0, 3.0), bare_job(1, 3.0)
    for entry in (a, b):
        policy.add(entry, 0.0)
        assert policy.horizon(entry) == pytest.approx(4.0)
        entry.next_seconds = 1.0
    policy.on_service(a, 3.0, 3.0)
    assert policy.horizon(a) == pytest.approx(1.0) and policy.work_ahead(b, 3.0) == pytest.approx(1.0)
    policy.on_service(a, 1.0, 4.0)
    policy.on_service(b, 4.9, 8.9)
    assert [policy.level(a), policy.level(b)] == [3, 3] and order(policy) == [0, 1]
    assert policy.horizon(a) == policy.horizon(b) == pytest.approx(8.0)


def test_a_job_served_elsewhere_joins_as_if_here() -> None:
    """6 s of service spend levels 0 (1 s) and 1 (2 s) and 3 of level 2's 4 s; 1000 s reach the last level, 16 s."""
    policy = mlfq()
    served, old = bare_job(0, 1.0), bare_job(1, 1.0)
    served.charged, old.charged = 6.0, 1000.0
    policy.add(served, 0.0)
    policy.add(old, 0.0)
    assert (policy.level(served), policy.level(old)) == (2, 4)
    assert policy.horizon(served) == pytest.approx(1.0)
    assert policy.horizon(old) == pytest.approx(16 - (1000 - 15) % 16)


def test_a_slow_job_is_promoted() -> None:
    """It may wait 3 times its prefill of 4 s; after 8 s of service, 3 times 9 s, of which it has waited 12."""
    policy = mlfq(slowdown_limit=3.0)
    slow = bare_job(0, 4.0)
    policy.add(slow, 0.0)
    assert policy.deadline(slow) == policy.next_deadline() == 12.0
    assert order(policy, 11.9) == [0] and policy.level(slow) == 2
    assert order(policy, 12.0) == [0] and policy.level(slow) == 0
    assert policy.horizon(slow) == pytest.approx(8.0)  # fewer tokens are not worth a turn
    slow.waiting_since, slow.waited = None, 12.0
    slow.attained, slow.next_seconds = 8.0, 1.0
    policy.on_service(slow, 8.0, 20.0)
    slow.waiting_since = 20.0
    assert policy.level(slow) == 1 and policy.deadline(slow) == 20 + 3 * (8 + 1) - 12


def test_a_job_of_level_0_is_not_requeued_by_starvation() -> None:
    policy = mlfq(starvation_limit=5.0)
    for index in range(3):
        policy.add(bare_job(index, 1.0), 0.0)
    assert order(policy, 100.0) == [0, 1, 2]
    assert policy.next_deadline() is None


def test_a_starved_burst_is_promoted_in_its_order() -> None:
    policy = mlfq(starvation_limit=5.0)
    burst = [bare_job(index, 3.0, arrival=index / 1000) for index in range(700)]
    for entry in burst:
        policy.add(entry, entry.arrival)
    for _ in range(3):  # a bounded number each decision
        assert order(policy, 6.0) == list(range(700))
    assert {policy.level(entry) for entry in burst} == {0}


def test_removed_jobs_leave_no_deadline() -> None:
    policy = mlfq(starvation_limit=5.0)
    gone, stays = bare_job(0, 3.0), bare_job(1, 3.0, arrival=1.0)
    policy.add(gone, 0.0)
    policy.add(stays, 1.0)
    policy.remove(gone)
    assert policy.next_deadline() == 6.0
    assert order(policy, 10.0) == [1] and len(policy) == 1
