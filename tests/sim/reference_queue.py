"""What a server does with a list of jobs, by definition: plain lists, a loop a tick, nothing of FastServe.

Every iteration takes the same time, a prompt takes one iteration and emits the first token, and memory has no end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass
class Customer:
    number: int
    arrival: float
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    produced: int = 0
    finish: float = -1.0
    first_token: float = -1.0

    @property
    def remaining(self) -> int:
        return self.output_tokens - self.produced


def fcfs(customer: Customer) -> tuple[int, float, int]:
    return customer.priority, customer.arrival, customer.number


def srpt(customer: Customer) -> tuple[int, float, int]:
    """Prompt and first token are one iteration, so what remains is counted in tokens of output."""
    return customer.priority, customer.remaining, customer.number


def serve(
    jobs: Sequence[tuple[float, int, int, int]],
    order: Callable[[Customer], tuple[int, float, int]],
    *,
    batch: int,
    seconds: float,
) -> list[Customer]:
    """(arrival, prompt tokens, output tokens, priority) of each job, in order of arrival → when each got what.

    A job that arrives during an iteration can be in the next.
    """
    customers = [Customer(number, *job) for number, job in enumerate(jobs)]
    waiting = list(customers)
    now = 0.0
    while waiting:
        here = [customer for customer in waiting if customer.arrival <= now]
        if not here:
            now = min(customer.arrival for customer in waiting)
            continue
        now = now + seconds
        for customer in sorted(here, key=order)[:batch]:
            customer.produced += 1
            if customer.produced == 1:
                customer.first_token = now
            if customer.remaining == 0:
                customer.finish = now
                waiting.remove(customer)
    return customers
