"""What the options of `fastserve simulate` mean together: the runs they ask for, and the deployment they run on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import MAX_BLOCKS, SchedulerConfig, check_integer, parse_size
from ..cost import Cost, CostModel, Link
from ..policies import POLICIES
from ..presets import DEVICES, Deployment, deployment
from ..types import InvalidRequest
from ..workloads import Recorded, SimJob, Synthetic, open_loop, parse_arrivals, parse_load, write_mooncake
from .simulation import Setting, Workload, capacity
from .sweep import Progress, SweepResult, rate_of, sweep

DEFAULT_POLICIES = ("fcfs", "mlfq", "skip-join-mlfq", "gittins", "srpt")
DEFAULT_MODEL, DEFAULT_HARDWARE = "opt-13b", "a100-40g"
DEFAULT_WORKLOAD, DEFAULT_JOBS, DEFAULT_LOAD = "sharegpt", 1000, 0.9
_CONTEXT = 2048
_BATCH, _BATCHED_TOKENS = 16, 2048  # the paper's

# Where nothing says how much memory there is, none runs short: of KV blocks there is one for every token that all jobs
# could ever hold, within what bookkeeping can bear.
_MOST_BLOCKS = 2**20

# Host memory for swapping, for each device: nodes of eight A100 have one or two TB.
_SWAP_SPACE = {"cpu": 0}
_GPU_SWAP_SPACE = 64 * 2**30

MAX_JOBS = 10**9
_CONSTANT = "constant:"
_CONSTANT_SECONDS = (1e-9, 1e9)  # less is lost in the rounding of a clock that has run for a while


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Options as they were given, None or empty where they were not. Raises InvalidRequest, naming the option."""

    policies: Sequence[str] = ()
    workload: str | None = None
    trace: Path | None = None
    arrivals: str | None = None
    jobs: int | None = None
    rates: Sequence[float] = ()
    loads: Sequence[float] = ()
    seeds: Sequence[int] = (0,)
    warmup_jobs: int = 0
    program_ids: bool = True  # whether the engine is told which calls are of one program
    model: str | None = None
    hardware: str | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    pipelining: bool = True  # every stage has a batch of its own; False: one batch goes through all stages
    cost: str | None = None
    kv_blocks: int | None = None
    swap_space: str | None = None
    swap_blocks: int | None = None
    swap_seconds: float | None = None
    scheduler: Mapping[str, Any]  # SchedulerConfig's other fields, where they were given

    def __post_init__(self) -> None:
        for policy in self.policies:
            if policy not in POLICIES:
                raise InvalidRequest("policy", f"must be one of {', '.join(POLICIES)}; got {policy!r}")
        if self.workload is not None and self.trace is not None:
            raise InvalidRequest("workload", "cannot be given with --trace, which says how long jobs are")
        if self.jobs is not None and not 1 <= self.jobs <= MAX_JOBS:
            raise InvalidRequest("jobs", f"must be an integer between 1 and {MAX_JOBS}, got {self.jobs}")
        for option, values, most in (("rate", self.rates, 1e9), ("load", self.loads, 100.0)):
            for value in values:
                if not 0 < value <= most:
                    raise InvalidRequest(option, f"must be a number above 0 and at most {most:g}, got {value!r}")
        if self.rates and self.loads:
            raise InvalidRequest("load", "cannot be given with --rate: a sweep is over one of them")
        if self.replays and len(set(self.seeds)) > 1:
            raise InvalidRequest(
                "seed", "changes nothing in a trace that is replayed; give one, or draw from the trace with --arrivals"
            )
        if self.swap_seconds is not None and not 0 <= self.swap_seconds < math.inf:
            raise InvalidRequest("swap_seconds", f"must be a number of at least 0, got {self.swap_seconds!r}")
        if self.hardware is not None and self.model is None and self.cost is not None:
            raise InvalidRequest("model", "is needed with --hardware, to tell how much memory its weights leave")

    @property
    def _block_size(self) -> int:
        return check_integer("block_size", self.scheduler.get("block_size", SchedulerConfig.block_size), 1, 2**16)

    @property
    def replays(self) -> bool:
        """Whether jobs come as a trace has them."""
        return self.trace is not None and self.arrivals is None

    def setting(self) -> Setting:
        """What all runs have in common. Reads the trace once."""
        workload, jobs = self._workload(), self._jobs()
        given = dict(self.scheduler)
        given.setdefault("max_model_len", max(_CONTEXT, workload.longest))
        given.setdefault("max_num_seqs", _BATCH)
        given.setdefault("max_num_batched_tokens", max(_BATCHED_TOKENS, given["max_num_seqs"]))
        longest = -(-given["max_model_len"] // self._block_size)
        blocks = self.kv_blocks
        if blocks is None:
            room = min(max(longest, min(jobs * longest, _MOST_BLOCKS)), MAX_BLOCKS)
            blocks = self._deployment.num_blocks if self._deployment else room
        host_blocks = self._host_blocks()
        return Setting(
            workload=workload,
            jobs=jobs,
            config=SchedulerConfig(**given, num_blocks=blocks, num_host_blocks=host_blocks),
            cost=self._cost(),
            link=self._link() if host_blocks else None,
            pipeline_stages=self.pipeline_parallel_size if self.pipelining else 1,
            block_bytes=self._deployment.block_bytes if self._deployment else None,
            warmup_jobs=self.warmup_jobs,
            program_ids=self.program_ids,
        )

    def run(self, setting: Setting, workers: int | None, timeline: bool, progress: Progress | None) -> SweepResult:
        """Every run, or what one of them raises."""
        rates: Sequence[float | None] = self.rates
        loads = self.loads
        if not rates and not loads:
            rates, loads = ((None,), ()) if self.replays else ((), (DEFAULT_LOAD,))
        policies = list(dict.fromkeys(self.policies or DEFAULT_POLICIES))
        seeds = list(dict.fromkeys(self.seeds))
        return sweep(
            setting,
            policies,
            seeds,
            rates=list(dict.fromkeys(rates)),
            loads=list(dict.fromkeys(loads)),
            workers=workers,
            timeline=timeline,
            progress=progress,
        )

    def write_trace(self, setting: Setting, path: Path) -> int:
        """Write the jobs of the one run asked for as Mooncake's traces are; returns how many.

        Calls that wait for others come as soon as they would on a device that does nothing else.
        """
        rates, loads = list(self.rates), list(self.loads)
        if not rates and not loads and not self.replays:
            loads = [DEFAULT_LOAD]
        if len(rates) + len(loads) > 1 or len(self.seeds) > 1:
            raise InvalidRequest("write_trace", "writes one workload: give one rate or load, and one seed")
        (seed,) = self.seeds
        rate = rate_of(loads[0], capacity(setting, seed)) if loads else rates[0] if rates else None
        cost = setting.cost

        def service(new: int, prompt: int, output: int) -> float:
            prefill = cost.prefill_charge(prompt - new, prompt)
            return prefill + (output - 1) * cost.decode_seconds(prompt + output // 2)

        jobs: Iterator[SimJob] = setting.workload.jobs(seed, setting.jobs, rate)
        try:
            return write_mooncake(path, open_loop(jobs, service))
        except OSError as error:
            raise InvalidRequest("write_trace", f"cannot write {path}: {error.strerror or error}") from None

    def title(self, setting: Setting) -> str:
        """The workload and what it runs on, in a line."""
        arrivals = "recorded arrivals" if self.replays else f"{self.arrivals or 'poisson'} arrivals"
        config = setting.config
        return " · ".join(
            (
                f"{setting.workload.name}, {arrivals}, {setting.jobs} jobs",
                self._machine(),
                f"batch {config.max_num_seqs}, {config.num_blocks} KV blocks"
                + (f" + {config.num_host_blocks} on the host" if config.num_host_blocks else ""),
                *(() if config.enable_prefix_caching else ("no prefix cache",)),
                *(() if self.program_ids else ("no program ids",)),
            )
        )

    def _machine(self) -> str:
        if self.cost is not None and self.cost.startswith(_CONSTANT):
            return f"{self.cost.removeprefix(_CONSTANT)} s an iteration"
        if self._deployment is None:
            return Path(self.cost or "").name
        parallel = f"TP {self.tensor_parallel_size} × PP {self.pipeline_parallel_size}"
        parallel += "" if self.pipelining else " without pipelining"
        name = f"{self.model or DEFAULT_MODEL} on {self.hardware or DEFAULT_HARDWARE}, {parallel}"
        return name if self.cost is None else f"{name}, timed by {Path(self.cost).name}"

    def _workload(self) -> Workload:
        if self.trace is None:
            return parse_load(self.workload or DEFAULT_WORKLOAD, self.arrivals or "poisson")
        if self.arrivals is not None:
            return Synthetic(self._recorded.lengths(), parse_arrivals(self.arrivals))
        return self._recorded

    def _jobs(self) -> int:
        return self._recorded.shape.jobs if self.replays else self.jobs or DEFAULT_JOBS

    @cached_property
    def _recorded(self) -> Recorded:
        if self.trace is None:
            raise RuntimeError("no trace was given")
        # Drawn from, it is drawn from as a whole.
        return Recorded(self.trace, self.jobs if self.replays else None)

    @cached_property
    def _deployment(self) -> Deployment | None:
        """None where only a cost was given."""
        if self.cost is not None and self.model is None:
            if self.tensor_parallel_size != 1:
                raise InvalidRequest("tensor_parallel_size", "needs --model; a --cost says how long iterations take")
            return None
        if self.hardware is not None and self.hardware not in DEVICES:
            raise InvalidRequest("hardware", f"must be one of {', '.join(DEVICES)}; got {self.hardware!r}")
        return deployment(
            self.model or DEFAULT_MODEL,
            self.hardware or DEFAULT_HARDWARE,
            self.tensor_parallel_size,
            self.pipeline_parallel_size,
            self._block_size,
        )

    def _cost(self) -> Cost:
        if self.cost is None:
            if self._deployment is None:
                raise RuntimeError("without a cost there is a deployment")
            return self._deployment.cost
        if not self.cost.startswith(_CONSTANT):
            return CostModel.load(self.cost)
        text = self.cost.removeprefix(_CONSTANT)
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        low, high = _CONSTANT_SECONDS
        if not low <= seconds <= high:
            limits = f"with seconds between {low:g} and {high:g}"
            raise InvalidRequest("cost", f"must be a file or constant:SECONDS, {limits}; got {self.cost!r}")
        return CostModel.constant(seconds)

    def _host_blocks(self) -> int:
        if self.swap_blocks is not None and self.swap_space is not None:
            raise InvalidRequest("swap_blocks", "cannot be given with --swap-space, which says the same in bytes")
        if self.swap_blocks is not None:
            return self.swap_blocks
        if self._deployment is None:
            if self.swap_space is not None:
                raise InvalidRequest("swap_space", "needs --model, to know how large a block is; or use --swap-blocks")
            return 0
        if self.swap_space is None:
            size = _SWAP_SPACE.get(self._deployment.device, _GPU_SWAP_SPACE)
            return min(self._deployment.host_blocks(size), MAX_BLOCKS)
        size, block = parse_size("swap_space", self.swap_space, zero=True), self._deployment.device_block_bytes
        if 0 < size < block:
            least = f"one KV block of {block} bytes on each device"
            raise InvalidRequest("swap_space", f"must be 0 or hold at least {least}, got {self.swap_space!r}")
        if size > MAX_BLOCKS * block:
            most = f"{MAX_BLOCKS * block} bytes, {MAX_BLOCKS} KV blocks of {block} on each device"
            raise InvalidRequest("swap_space", f"must be at most {most}, got {self.swap_space!r}")
        return self._deployment.host_blocks(size)

    def _link(self) -> Link:
        if self.swap_seconds is not None:
            return Link(offload_block=self.swap_seconds, upload_block=self.swap_seconds)
        if self._deployment is None:
            raise InvalidRequest("swap_seconds", "is needed to swap with --cost and no --model")
        return self._deployment.link


def limit_from(option: str, text: str | None) -> dict[str, float | None]:
    """The setting that an option's text means, if it was given. Raises InvalidRequest."""
    if text is None:
        return {}
    try:
        return {option: None if text.strip().lower() == "none" else float(text)}
    except ValueError:
        raise InvalidRequest(option, f"must be a number or none, got {text!r}") from None
