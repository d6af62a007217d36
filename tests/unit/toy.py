"""A model small enough to reason about: its next token is a hash of everything it should have looked at.

ToyExecutor is an honest paged executor. It writes token ids into a pool of blocks through the block tables it was told,
reads them back through the same tables, and hashes what it *read*, so a wrong table, a lost or doubled block, a wrong
start, a wrong token or a wrong parameter gives other tokens. `expected_output` computes the same by plain recursion on
a list, with no pool, plan or scheduler.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastserve.config import SchedulerConfig
from fastserve.cost import CostModel
from fastserve.engine import Engine, IterationRecord
from fastserve.types import OFFLOAD, UPLOAD, BatchPlan, Job, SamplingParams, StepResult

VOCAB = 61
POISON = -7
GONE = -1  # in a block table: the block is another slot's by now
EOS = 3


def toy_token(context: list[int], prompt_length: int, seed: int, params: tuple[object, ...], masked: set[int]) -> int:
    """The token after `context`. `masked` must not come out."""
    key = repr((context, prompt_length, seed, params)).encode()
    token = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") % VOCAB
    while token in masked:
        token = (token + 1) % VOCAB
    return token


def sampling_key(params: SamplingParams) -> tuple[object, ...]:
    """What a runtime is told of the parameters, rounded as it is told."""
    reals = (
        params.temperature, params.top_p, params.min_p,
        params.repetition_penalty, params.presence_penalty, params.frequency_penalty,
    )  # fmt: skip
    bias = [(token, float(np.float32(value))) for token, value in params.logit_bias.items()]
    return max(0, params.top_k), params.min_tokens, [float(np.float32(value)) for value in reals], bias


def piece(number: int, size: int) -> list[int]:
    """Tokens to make prompts of that begin alike; those of another number are others."""
    return [(11 * number + 5 * i + i * i) % VOCAB for i in range(size)]


def expected_output(prompt: list[int], params: SamplingParams, seed: int, max_model_len: int) -> list[int]:
    """The job's tokens, by the definition."""
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    output: list[int] = []
    room = max_model_len - len(prompt)
    while len(output) < min(room, math.inf if params.max_tokens is None else params.max_tokens):
        masked = stops if len(output) < params.min_tokens else set()
        token = toy_token(prompt + output, len(prompt), seed, sampling_key(params), masked)
        output.append(token)
        if token in stops:
            break
    return output


@dataclass
class _Slot:
    prompt_length: int
    seed: int
    key: tuple[object, ...]
    min_tokens: int
    stops: set[int]
    logprobs: int
    history: list[int] | None
    table: list[int] = field(default_factory=list)
    length: int = 0  # positions written
    last_sampled: int | None = None


def bare_job(index: int, next_seconds: float, arrival: float = 0.0) -> Job:
    """A job for a policy to look at, waiting since its arrival."""
    job = Job(str(index), [1], SamplingParams(), 0, arrival, 16, frozenset(), index)
    job.waiting_since = arrival
    job.next_seconds = next_seconds
    return job


class Clock:
    """Time that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class _Copy:
    number: int
    direction: int
    source: int
    destination: int
    pool: Any
    target: Any
    content: Any
    submitted: int


class ToyExecutor:
    """Runs plans on the toy model, checks every rule of a plan, and moves the clock by the cost model's time."""

    def __init__(self, config: SchedulerConfig, cost: CostModel, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.plans: list[BatchPlan] = []
        self.failing: dict[int, str] = {}  # seed → why the next samples of slots with that seed fail
        self._config = config
        self._cost = cost
        self._pool = np.full((config.num_blocks, config.block_size), POISON)
        self._host = np.full((config.num_host_blocks, config.block_size), POISON)
        self.slowness = 1  # plans that a copy takes
        self.copied = {OFFLOAD: 0, UPLOAD: 0}  # blocks
        self._moving: deque[_Copy] = deque()
        self._slots: dict[int, _Slot] = {}
        self._results: deque[StepResult] = deque()

    def submit(self, plan: BatchPlan) -> None:
        self.plans.append(plan)
        assert len(plan.rows) <= self._config.max_num_seqs
        assert len(plan.tokens) <= self._config.max_num_batched_tokens
        for slot in plan.closed.tolist():
            table = self._slots.pop(slot).table
            if not self._config.enable_prefix_caching:  # else others may find there what they have in common
                self._pool[[block for block in table if block != GONE and block not in self._busy]] = POISON
        self._open(plan)
        for slot, index, block in plan.table.tolist():
            if not self._config.enable_prefix_caching:
                self._take_from_others(slot, block)
            table = self._slots[slot].table
            assert index <= len(table)
            table[index:] = [block, *table[index + 1 :]]
        self._begin_copies(plan)
        result = self._run(plan)
        result.copies, result.copy_seconds = self._end_copies(len(plan.rows) == 0)
        self._results.append(result)
        assert len(self._results) <= self._config.max_in_flight

    def poll(self, timeout: float | None) -> StepResult | None:
        assert self._results, "nothing to wait for"
        result = self._results.popleft()
        self.clock.now += result.seconds
        return result

    @property
    def _busy(self) -> set[int]:
        """Blocks of the device that are being copied."""
        return {copy.source if copy.direction == OFFLOAD else copy.destination for copy in self._moving}

    def _begin_copies(self, plan: BatchPlan) -> None:
        """Nobody may count on source or destination before the copy is done, so make the worst of it."""
        for row in plan.copies.tolist():
            copy, direction, source, destination = row
            pools = (self._pool, self._host) if direction == OFFLOAD else (self._host, self._pool)
            assert not any(
                (source, destination) == (other.source, other.destination) and direction == other.direction
                for other in self._moving
            )
            self._moving.append(
                _Copy(copy, direction, source, destination, *pools, pools[0][source].copy(), len(self.plans))
            )
            pools[1][destination] = POISON
            self.copied[direction] += 1

    def _end_copies(self, rowless: bool) -> tuple[Any, Any]:
        done: dict[int, float] = {}
        while self._moving:
            copy = self._moving[0]
            if copy.number not in done and len(self.plans) - copy.submitted < self.slowness and (done or not rowless):
                break
            assert (copy.pool[copy.source] == copy.content).all(), "the source changed while it was copied"
            assert (copy.target[copy.destination] == POISON).all(), "the destination was used while it was copied to"
            copy.target[copy.destination] = copy.content
            done[copy.number] = done.get(copy.number, 0.0) + 0.125
            self._moving.popleft()
        return np.array(list(done), np.int32), np.array(list(done.values()), np.float32)

    def _open(self, plan: BatchPlan) -> None:
        history, bias, stops = (iter(a.tolist()) for a in (plan.history, plan.bias_tokens, plan.stop_tokens))
        values = iter(plan.bias_values.tolist())
        for row, reals, seed in zip(
            plan.opened.tolist(), plan.opened_params.tolist(), plan.opened_seeds.tolist(), strict=True
        ):
            slot, prompt_length, past, top_k, logprobs, min_tokens, biases, masked = row
            assert slot not in self._slots
            biased = [(next(bias), next(values)) for _ in range(biases)]
            self._slots[slot] = _Slot(
                prompt_length=prompt_length,
                seed=seed,
                key=(top_k, min_tokens, reals, biased),
                min_tokens=min_tokens,
                stops={next(stops) for _ in range(masked)},
                logprobs=logprobs,
                history=[next(history) for _ in range(past)] if past else None,
            )
        assert all(next(rest, None) is None for rest in (history, bias, values, stops))

    def _run(self, plan: BatchPlan) -> StepResult:
        tokens = iter(plan.tokens.tolist())
        sampled: list[tuple[int, int]] = []
        seeds: list[int] = []
        assert len(set(plan.rows[:, 0].tolist())) == len(plan.rows), "one row a slot"
        for slot, start, count, logits in plan.rows.tolist():
            state = self._slots[slot]
            assert count > 0
            # Where the job stands, or its last row once more: the profiler measures twice. Or behind what it shares.
            shares = self._config.enable_prefix_caching and start % self._config.block_size == 0
            assert start == state.length or start + count == state.length or shares
            for position in range(start, start + count):
                token = next(tokens)
                if token == -1:
                    # A row that failed may have had a successor planned; its token is never read.
                    assert state.last_sampled is not None or state.seed in self.failing
                    token = -1 if state.last_sampled is None else state.last_sampled
                self._write(slot, position, token)
            state.length = start + count
            if logits:
                seeds.append(state.seed)
                sampled.append((-1 if state.seed in self.failing else self._sample(state), state.logprobs))
        assert next(tokens, None) is None
        rows = [(start, count) for _, start, count, _ in plan.rows.tolist()]
        width = max([0, *(logprobs for _, logprobs in sampled)])
        top = np.full((len(sampled), width), -1, np.int32)
        for i, (token, logprobs) in enumerate(sampled):
            top[i, : max(0, logprobs)] = [(token + k) % VOCAB for k in range(max(0, logprobs))]
        return StepResult(
            plan_id=plan.plan_id,
            tokens=np.array([token for token, _ in sampled], np.int32),
            logprobs=np.array([-float(token) if k >= 0 else np.nan for token, k in sampled], np.float32),
            top_tokens=top,
            top_logprobs=-top.astype(np.float32),
            seconds=self._cost.iteration_seconds(rows),
            errors={i: self.failing[seed] for i, seed in enumerate(seeds) if seed in self.failing},
        )

    def _take_from_others(self, slot: int, block: int) -> None:
        """A block that is written to is nobody else's: a job that lost its own to the host is told of another in time.

        Without a prefix cache that is so from the start.
        """
        for number, other in self._slots.items():
            if number != slot and block in other.table:
                other.table = [GONE if held == block else held for held in other.table]

    def _write(self, slot: int, position: int, token: int) -> None:
        state = self._slots[slot]
        block = state.table[position // self._config.block_size]
        assert block != GONE, "the block belongs to another job"
        self._take_from_others(slot, block)
        self._pool[block, position % self._config.block_size] = token

    def _sample(self, state: _Slot) -> int:
        table = state.table[: -(-state.length // self._config.block_size)]
        assert GONE not in table, "a block belongs to another job"
        context = self._pool[table].reshape(-1)[: state.length].tolist()
        masked = state.stops if state.length - state.prompt_length < state.min_tokens else set()
        if state.history is not None:
            assert state.history == context, "penalties would look at other tokens"
        token = toy_token(context, state.prompt_length, state.seed, state.key, masked)
        state.last_sampled = token
        if state.history is not None:
            state.history.append(token)
        return token


class Toy:
    """An engine on the toy executor, with its clock and its record of iterations."""

    def __init__(self, cost: CostModel | None = None, **options: object) -> None:
        # Prompts of one length are alike, and most tests are of jobs that have nothing in common.
        self.config = SchedulerConfig(**{"enable_prefix_caching": False, **options})  # type: ignore[arg-type]
        self.cost = cost or CostModel.constant(1.0)
        self.clock = Clock()
        self.records: list[IterationRecord] = []
        self.executor = ToyExecutor(self.config, self.cost, self.clock)
        self.engine = Engine(self.config, self.executor, self.cost, clock=self.clock, on_iteration=self.records.append)

    def add(
        self, name: str, prompt: int | list[int], max_tokens: int | None = 4, *, seed: int = 0, **params: object
    ) -> Job:
        """A job with the given prompt, or one of that many tokens; it ignores EOS unless told otherwise."""
        tokens = [(7 * i + len(name)) % VOCAB for i in range(prompt)] if isinstance(prompt, int) else prompt
        params.setdefault("ignore_eos", True)
        sampling = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
        return self.engine.add_job(name, tokens, sampling, seed=seed, vocab_size=VOCAB, eos_token_ids=(EOS,))

    def run(self, steps: int = 10_000) -> None:
        """Step until there is nothing to do, checking the books after every step."""
        for _ in range(steps):
            if not self.engine.has_work:
                self.check_nothing_is_held()
                return
            self.engine.step()
            self.engine.check_integrity()
        raise AssertionError(f"not done after {steps} steps")

    def check_nothing_is_held(self) -> None:
        blocks = self.engine.scheduler.blocks
        assert (blocks.free_blocks, blocks.free_host_blocks) == (blocks.num_blocks, blocks.num_host_blocks)

    def expected(self, job: Job) -> list[int]:
        return expected_output(job.prompt, job.params, job.seed, self.config.max_model_len)

    @property
    def ran(self) -> str:
        """Who ran in each iteration: `a+b c` is a and b in the first, c in the second."""
        return " ".join("+".join(record.job_ids) for record in self.records)
