"""An executor that computes nothing and knows how long everything takes.

submit ──▶ queue ──▶ stage 0 ──▶ stage 1 ──▶ …  ──▶ poll: the clock moves to the end of the oldest plan
   └─copies──▶ offload stream, upload stream ─────▶ acknowledged with the first result that ends no earlier
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ..config import check_integer
from ..cost import Cost, Link
from ..types import OFFLOAD, BatchPlan, Float32Array, Int32Array, InvalidRequest, StepResult

EOS: Final = 1  # what a job samples where it ends by itself; everything else it samples is 0
_NEVER: Final = 2**31 - 1

_NO_INTS: Final[Int32Array] = np.zeros(0, np.int32)
_NO_FLOATS: Final[Float32Array] = np.zeros(0, np.float32)


class VirtualClock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance_to(self, when: float) -> None:
        """Never backwards."""
        if when > self.now:
            self.now = when


class _Copy(NamedTuple):
    finish: float
    copy_id: int
    seconds: float


@dataclass(slots=True)
class CopyTotals:
    """What one direction has moved."""

    copies: int = 0
    blocks: int = 0
    seconds: float = 0.0  # on the stream


class CopyStreams:
    """A stream a direction. Copies of one stream follow one another; the streams do not slow each other."""

    def __init__(self, link: Link | None) -> None:
        self.totals = (CopyTotals(), CopyTotals())  # by direction
        self._link = link
        self._free = [0.0, 0.0]
        self._under_way: tuple[deque[_Copy], deque[_Copy]] = (deque(), deque())

    def submit(self, copies: Int32Array, now: float) -> None:
        """Put the copies of a plan, [C, 4] as in BatchPlan, behind those under way."""
        if self._link is None:
            raise InvalidRequest("link", "is needed to move KV blocks between device and host")
        first = np.concatenate(([0], np.flatnonzero(np.diff(copies[:, 0])) + 1, [len(copies)]))
        heads = copies[first[:-1], :2].tolist()
        for (copy_id, direction), blocks in zip(heads, np.diff(first).tolist(), strict=True):
            offload = direction == OFFLOAD
            seconds = self._link.offload_seconds(blocks) if offload else self._link.upload_seconds(blocks)
            finish = self._free[direction] = max(now, self._free[direction]) + seconds
            self._under_way[direction].append(_Copy(finish, copy_id, seconds))
            totals = self.totals[direction]
            totals.copies += 1
            totals.blocks += blocks
            totals.seconds += seconds

    def next_finish(self) -> float:
        """When the next copy to be acknowledged finishes; infinity when there is none."""
        return min((stream[0].finish for stream in self._under_way if stream), default=math.inf)

    def finished(self, until: float) -> tuple[Int32Array, Float32Array]:
        """Take the copies finished by `until`, in the order in which they did: their ids and seconds."""
        done: list[_Copy] = []
        for stream in self._under_way:
            while stream and stream[0].finish <= until:
                done.append(stream.popleft())
        if not done:
            return _NO_INTS, _NO_FLOATS
        done.sort()
        return np.array([c.copy_id for c in done], np.int32), np.array([c.seconds for c in done], np.float32)

    def __bool__(self) -> bool:
        return any(self._under_way)


class _Queued(NamedTuple):
    """A plan submitted and not yet polled."""

    plan_id: int
    submitted: float
    seconds: float  # 0 without rows
    tokens: Int32Array  # what it samples
    rows: int
    prefill_tokens: int
    decode_tokens: int
    # In a pipeline only: slots whose token, sampled by an earlier plan, this one reads; and slots it samples for.
    reads: Int32Array
    samples: Int32Array


class SimExecutor:
    """Satisfies types.Executor on a virtual clock, and keeps count of what the device and the link do.

    Plans run back to back in the order of submission, each as long as `cost` says. In a pipeline of several stages a
    plan spends an equal part of that in each, a stage holds one plan, and a row that reads a token still being sampled
    enters when the plan that samples it has left the last stage. `poll` moves the clock to the end of the oldest plan,
    or by the timeout where that comes first.

    The executor alone knows how long outputs are: `expect` tells it, by the seed it will find in plan.opened_seeds.
    """

    def __init__(self, cost: Cost, clock: VirtualClock, *, link: Link | None = None, stages: int = 1) -> None:
        """Raises InvalidRequest for a number of stages outside 1 … 64."""
        self.iterations = 0  # plans with rows that have ended, and what was in them
        self.rows = 0
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.busy_seconds = 0.0  # with such a plan on the device
        self.idle_seconds = 0.0  # between them, but for those of `skip_to`
        self._cost = cost
        self._clock = clock
        self._streams = CopyStreams(link)
        self._stages = check_integer("pipeline_parallel_size", stages, 1, 64)
        self._free = [0.0] * stages  # when each stage can take its next plan
        self._busy_until = 0.0
        self._queue: deque[_Queued] = deque()
        self._outputs: dict[int, int] = {}  # seed → output tokens, EOS included
        # By slot: prompt length, and the position behind the row that samples EOS.
        self._prompts: Int32Array = np.zeros(64, np.int32)
        self._ends: Int32Array = np.zeros(64, np.int32)
        self._sampled_at: npt.NDArray[np.float64] = np.zeros(64)
        # Slices of these are what a result says of logprobs that nobody asked for.
        self._no_logprobs: Float32Array = np.full(64, np.nan, np.float32)
        self._no_top: tuple[Int32Array, Float32Array] = (np.zeros((64, 0), np.int32), np.zeros((64, 0), np.float32))

    def expect(self, seed: int, output_tokens: int | None) -> None:
        """The job with this seed samples EOS as its last of `output_tokens` tokens; None: never."""
        self._outputs[seed] = _NEVER if output_tokens is None else output_tokens

    def forget(self, seed: int) -> None:
        """The job has ended."""
        self._outputs.pop(seed, None)

    def skip_to(self, when: float) -> None:
        """Nobody has work until then, so the device is not to be blamed for standing idle."""
        self._clock.advance_to(when)
        self._busy_until = max(self._busy_until, when)

    @property
    def copies(self) -> tuple[CopyTotals, CopyTotals]:
        """What was submitted, by direction."""
        return self._streams.totals

    # --- types.Executor ----------------------------------------------------------------------------------------------

    def submit(self, plan: BatchPlan) -> None:
        now = self._clock.now
        if len(plan.copies):
            self._streams.submit(plan.copies, now)
        if len(plan.opened):
            self._open(plan)
        rows = len(plan.rows)
        if not rows:
            self._queue.append(_Queued(plan.plan_id, now, 0.0, _NO_INTS, 0, 0, 0, _NO_INTS, _NO_INTS))
            return
        columns = plan.rows.T
        _, starts, counts, logits = columns
        slots = columns[0].astype(np.intp)  # as NumPy wants an index: it would convert at every use
        ends = starts + counts
        tokens = (ends >= self._ends[slots]).astype(np.int32)  # 1 is EOS
        prefilling = starts < self._prompts[slots]
        prefill = int(counts[prefilling].sum()) if np.count_nonzero(prefilling) else 0
        reads = samples = _NO_INTS
        if np.count_nonzero(logits) != rows:
            tokens = tokens[logits > 0]
        if self._stages > 1:
            reads = slots[plan.tokens[np.cumsum(counts) - 1] < 0]
            samples = slots[logits > 0]
        seconds = self._cost.plan_seconds(starts, counts)
        decode = len(plan.tokens) - prefill
        self._queue.append(_Queued(plan.plan_id, now, seconds, tokens, rows, prefill, decode, reads, samples))

    def poll(self, timeout: float | None) -> StepResult | None:
        if not self._queue:
            raise RuntimeError("nothing was submitted whose result could be waited for")
        clock, queued = self._clock, self._queue[0]
        start, end = self._times(queued)
        if timeout is not None and end > clock.now + timeout:
            clock.advance_to(clock.now + timeout)
            return None
        self._queue.popleft()
        clock.advance_to(end)
        if queued.rows:
            self._count(queued, start, end)
        self._leave(queued, start, end)
        copies, copy_seconds = self._streams.finished(end) if self._streams else (_NO_INTS, _NO_FLOATS)
        sampled = len(queued.tokens)
        if sampled > len(self._no_logprobs):
            self._no_logprobs = np.full(2 * sampled, np.nan, np.float32)
            self._no_top = np.zeros((2 * sampled, 0), np.int32), np.zeros((2 * sampled, 0), np.float32)
        return StepResult(
            plan_id=queued.plan_id,
            tokens=queued.tokens,
            logprobs=self._no_logprobs[:sampled],
            top_tokens=self._no_top[0][:sampled],
            top_logprobs=self._no_top[1][:sampled],
            seconds=queued.seconds,
            copies=copies,
            copy_seconds=copy_seconds,
        )

    # --- when things happen ------------------------------------------------------------------------------------------

    def _times(self, queued: _Queued) -> tuple[float, float]:
        """When the oldest plan starts and ends, as far as what was submitted until now decides it."""
        if not queued.rows:
            start = max(queued.submitted, self._free[-1])
            return start, max(start, self._streams.next_finish()) if self._streams else start
        start = max(queued.submitted, self._free[0])
        if self._stages == 1:
            return start, start + queued.seconds
        if len(queued.reads):
            start = max(start, float(self._sampled_at[queued.reads].max()))
        part = queued.seconds / self._stages
        end = start + part
        for free in self._free[1:]:
            end = max(end, free) + part
        return start, end

    def _leave(self, queued: _Queued, start: float, end: float) -> None:
        """The plan has ended: say when each stage was done with it."""
        if self._stages == 1 or not queued.rows:
            self._free = [end] * self._stages
            return
        part, done = queued.seconds / self._stages, start
        for stage, free in enumerate(self._free):
            done = self._free[stage] = max(done, free) + part
        self._sampled_at[queued.samples] = end

    def _count(self, queued: _Queued, start: float, end: float) -> None:
        self.iterations += 1
        self.rows += queued.rows
        self.prefill_tokens += queued.prefill_tokens
        self.decode_tokens += queued.decode_tokens
        if start > self._busy_until:
            self.idle_seconds += start - self._busy_until
        self.busy_seconds += end - max(start, self._busy_until)
        self._busy_until = end

    def _open(self, plan: BatchPlan) -> None:
        if (highest := int(plan.opened[:, 0].max())) >= len(self._ends):
            more = 2 * highest - len(self._ends)
            self._prompts = np.concatenate((self._prompts, np.zeros(more, np.int32)))
            self._ends = np.concatenate((self._ends, np.zeros(more, np.int32)))
            self._sampled_at = np.concatenate((self._sampled_at, np.zeros(more)))
        for (slot, prompt), seed in zip(plan.opened[:, :2].tolist(), plan.opened_seeds.tolist(), strict=True):
            self._prompts[slot] = prompt
            # The row that ends with the prompt samples the first token, so the last one's row ends here.
            self._ends[slot] = min(prompt - 1 + self._outputs[seed], _NEVER) if seed in self._outputs else _NEVER
