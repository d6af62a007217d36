"""Whether a request is taken in: a bounded queue that users share fairly, and deadlines that can be met."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..cost import CostModel
from ..origin import key_of
from ..types import SamplingParams
from .engine_api import EngineClient
from .errors import ApiError, refused
from .load import rows_of

_MAX_RETRY = 3600  # seconds
_RECLAIM_EVERY = 0.05  # seconds: a look at all jobs, while requests are being refused


class Admission:
    """Counts open jobs by user. Jobs beyond the `max_num_seqs` of one iteration wait, and `max_queue` of them may.

    Of several engines, each that is up counts with an iteration. When that is full, a user with less than an equal
    share of all places may still enter, until the queue is twice as long as it may be; one with more is refused first.
    API keys share first, then the users that a key names, so a key gets no more by naming many.
    """

    def __init__(self, engine: EngineClient, max_queue: int, reclaim: Callable[[], None] = lambda: None) -> None:
        """`reclaim` has the places of jobs that have ended given back, of those whose answers are still being read."""
        self._engine = engine
        self._reclaim = reclaim
        self._reclaimed = float("-inf")
        self._max_queue = max_queue
        self._open: Counter[str] = Counter()
        self.open_jobs = 0
        self._cost: CostModel | None = None
        self.draining = False
        self.refused = Counter[str]()  # by reason, for metrics

    @property
    def users(self) -> Mapping[str, int]:
        """Open jobs by user."""
        return self._open

    @property
    def capacity(self) -> int:
        """Jobs that may be open when all are one user's."""
        return rows_of(self._engine.info) + self._max_queue

    @property
    def most(self) -> int:
        """The same when all engines are up."""
        return rows_of(self._engine.info, "max_num_seqs_of_all") + self._max_queue

    def enter(self, user: str, jobs: int) -> None:
        """Take `jobs` places for a user, to be given back with `leave`. Raises ApiError: 400, 429 or 503."""
        self.check_open()
        capacity = self.capacity
        if jobs > self.most:
            self.refused["too_many"] += 1
            raise refused(
                "n", f"the request makes {jobs} jobs, and this server never has room for more than {self.most}"
            )
        if self.open_jobs + jobs > capacity and time.monotonic() - self._reclaimed > _RECLAIM_EVERY:
            self._reclaimed = time.monotonic()
            self._reclaim()
        count = self.open_jobs
        if count + jobs > capacity and not self._may_exceed(user, jobs):
            self.refused["queue_full"] += 1
            raise ApiError(
                429,
                f"the queue is full: {count} jobs are open, of which {self._open[user]} yours; "
                f"--max-queue allows {self._max_queue} to wait",
                code="queue_full",
                headers={"Retry-After": str(self.retry_after(count + jobs - capacity))},
            )
        self._open[user] += jobs
        self.open_jobs += jobs

    def leave(self, user: str, jobs: int) -> None:
        self.open_jobs -= jobs
        self._open[user] -= jobs
        if self._open[user] <= 0:
            del self._open[user]

    def check_open(self) -> None:
        """Raises ApiError, 503, while the server is shutting down."""
        if self.draining:
            self.refused["draining"] += 1
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})

    def check_deadline(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, timeout: float, spent: float
    ) -> None:
        """Raises ApiError, 408, for a `timeout` that the job would miss on an engine of its own; `spent` is over.

        Of its prompt the engine is taken to have in its cache what it can: what it does have may change until then.

        Under fcfs, which lets nobody overtake, it would miss it with the wait for a place, too.
        """
        needs = spent + max(self.solo_seconds(prompt, params) for prompt in prompts)
        waits = self.queue_seconds() if self._engine.info.get("policy") == "fcfs" else 0.0
        if needs + waits <= timeout:
            return
        self.refused["deadline"] += 1
        queue = f" after {waits:.3g} s in the queue" if waits else ""
        raise ApiError(
            408,
            f"timeout: {timeout:.3g} s are not enough: the job needs at least {needs:.3g} s{queue}",
            param="timeout",
            code="deadline_unreachable",
            headers={"x-should-retry": "false"},  # OpenAI's clients would try again at once
        )

    def solo_seconds(self, prompt: Sequence[int], params: SamplingParams) -> float:
        """The least a job takes, by the engine's cost model: of its prefill what no cache saves, and those tokens it
        cannot do without."""
        cost = self._cost_model()
        if cost is None:
            return 0.0
        tokens = params.min_tokens
        if params.ignore_eos and not params.stop and not params.stop_token_ids and params.max_tokens is not None:
            tokens = params.max_tokens
        tokens = min(tokens, self._engine.max_model_len - len(prompt))
        prefill = self.prefill_seconds(prompt, self.cachable(prompt))
        return prefill + max(0, tokens - 1) * cost.decode_seconds(len(prompt))

    def prefill_seconds(self, prompt: Sequence[int], cached: int) -> float:
        """What a prompt takes of which the engine has the first `cached` tokens; 0 where it tells no cost model."""
        cost = self._cost_model()
        return 0.0 if cost is None else cost.prefill_seconds(cached, len(prompt) - cached)

    def cachable(self, prompt: Sequence[int]) -> int:
        """Tokens at the beginning of a prompt that an engine may have in its cache: whole blocks, and not the last."""
        info = self._engine.info
        size = int(info.get("block_size", 0)) if info.get("enable_prefix_caching") else 0
        return (len(prompt) - 1) // size * size if size else 0

    def queue_seconds(self) -> float:
        """Until the last job to enter has a place, where nobody overtakes."""
        return self._seconds_for(self.open_jobs - rows_of(self._engine.info))

    def retry_after(self, places: int) -> int:
        """Whole seconds after which so many jobs will have ended."""
        return min(_MAX_RETRY, max(1, math.ceil(self._seconds_for(places))))

    def _seconds_for(self, jobs: int) -> float:
        """Until so many jobs have ended, as often as each engine's own estimate for all that it has says they do."""
        statuses = [engine.status for engine in self._engine.engines if engine.status is not None]
        rate = sum(status.live / status.backlog for status in statuses if status.backlog > 0.0)
        return max(0, min(jobs, sum(status.live for status in statuses))) / rate if rate > 0.0 else 0.0

    def _may_exceed(self, user: str, jobs: int) -> bool:
        key, capacity = key_of(user), self.capacity
        users = self._open.keys() | {user}
        keys = len({key_of(each) for each in users})
        of_key = [each for each in users if key_of(each) == key]
        return (
            self._open[user] + jobs <= capacity / keys / len(of_key)
            and sum(self._open[each] for each in of_key) + jobs <= capacity + self._max_queue / keys
            and self.open_jobs + jobs <= capacity + self._max_queue
        )

    def _cost_model(self) -> CostModel | None:
        given: Any = self._engine.info.get("cost")
        if self._cost is None and isinstance(given, Mapping):
            self._cost = CostModel(**given)
        return self._cost
