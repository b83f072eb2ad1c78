"""Fairness in numbers: who is served when."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.serving.fair_queue import FairQueue


@dataclass(eq=False)
class Job:
    """cost: of each of its passes."""

    client: str
    number: int
    cost: int = 1
    passes: int = 1


def under_way() -> FairQueue[Job]:
    return FairQueue(lambda job: job.cost)


def serve(queue: FairQueue[Job]) -> Job:
    """One pass of whoever is next."""
    job = queue.order()[0]
    queue.charge([job])
    job.passes -= 1
    if job.passes == 0:
        queue.leave(job)
    return job


def cost_until_done(queue: FairQueue[Job], wanted: Job) -> int:
    """What all passes cost up to the last one of `wanted`."""
    cost = 0
    while wanted.passes:
        cost += serve(queue).cost
    return cost


def test_fair_queue_alternates_requests_of_one_client() -> None:
    queue = under_way()
    for number in range(3):
        queue.join(Job("a", number, passes=2))
    assert [serve(queue).number for _ in range(6)] == [0, 1, 2, 0, 1, 2]
    assert len(queue) == 0 and "a" not in queue


def test_fair_queue_gives_a_client_with_many_requests_no_larger_share() -> None:
    queue = under_way()
    for number in range(8):
        queue.join(Job("greedy", number, passes=100))
    queue.join(Job("modest", 8, passes=100))
    served = [serve(queue).client for _ in range(100)]
    assert served.count("modest") == 50


def test_fair_queue_starts_a_new_client_at_the_minimum_virtual_time() -> None:
    queue = under_way()
    queue.join(Job("early", 0, passes=1000))
    for _ in range(100):
        serve(queue)
    queue.join(Job("late", 1, passes=1000))
    assert [serve(queue).client for _ in range(100)].count("late") == 50


def test_fair_queue_charges_a_long_canvas_more_than_a_short_one() -> None:
    queue = under_way()
    queue.join(Job("a", 0, cost=256, passes=100))
    queue.join(Job("b", 1, cost=64, passes=100))
    served = [serve(queue).client for _ in range(100)]
    assert (served.count("a"), served.count("b")) == (20, 80)


passes_and_costs = st.tuples(st.integers(1, 40), st.sampled_from([64, 128, 256]))


@pytest.mark.parametrize("of_one_client", [True, False])
@given(short=passes_and_costs, others=st.lists(passes_and_costs, max_size=15), head_start=st.integers(0, 50))
def test_fair_queue_beside_n_others_a_request_takes_n_plus_1_times_as_long(
    of_one_client: bool, short: tuple[int, int], others: list[tuple[int, int]], head_start: int
) -> None:
    queue = under_way()
    for number, (passes, cost) in enumerate(others):
        queue.join(Job("a" if of_one_client else f"client {number}", number, cost, passes))
    for _ in range(head_start):
        if len(queue):
            serve(queue)
    n = len(queue)
    passes, cost = short
    wanted = Job("a" if of_one_client else "short", 99, cost, passes)
    queue.join(wanted)
    assert cost_until_done(queue, wanted) <= (n + 1) * passes * cost
