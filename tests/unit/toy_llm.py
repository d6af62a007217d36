"""LLM and AsyncLLM on the toy executor: a vocabulary of single characters, time that is counted, not spent."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from toy import EOS, VOCAB, Clock, ToyExecutor, expected_output

from fastserve import assembly, async_llm, llm, placement, serving
from fastserve.config import RuntimeConfig, SchedulerConfig
from fastserve.cost import CostModel
from fastserve.loaders.spec import ModelSpec, TokenizerData
from fastserve.loaders.weights import tensor_shapes
from fastserve.native import block_bytes
from fastserve.types import SamplingParams, StepResult

CONTEXT = 256
COST = CostModel(per_iteration=1.0, per_token=0.01)
SMALL: dict[str, Any] = {"kv_cache_memory": "1M", "swap_space": 0, "cost": COST}
# Token 3 ends a sequence; every other one is a letter or a digit.
ALPHABET = "ab <cdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456"[:VOCAB]
TEMPLATE = "{% for message in messages %}{{ message.role[0] }}{{ message.content }}Z{% endfor %}a"

SPEC = ModelSpec(
    family="toy",
    vocab_size=VOCAB,
    hidden_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=8,
    max_position=CONTEXT,
    norm="rms",
    norm_eps=1e-5,
    activation="silu",
    gated_mlp=True,
    eos_token_ids=(EOS,),
)
BLOCK_BYTES = block_bytes(SPEC, "bfloat16", 16)


def ids(text: str) -> list[int]:
    return [ALPHABET.index(character) for character in text]


def as_text(tokens: list[int]) -> str:
    """The end of a sequence is no text."""
    return "".join(ALPHABET[token] for token in tokens if token != EOS)


def expected(prompt: list[int], params: SamplingParams, seed: int) -> list[int]:
    """What the toy puts out for it."""
    return expected_output(prompt, params, seed, CONTEXT)


def _tokenizer_json() -> str:
    vocab = {character: i for i, character in enumerate(ALPHABET) if character not in " <"}
    vocab |= {"Ġ": ALPHABET.index(" "), "</s>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return tokenizer.to_str()


class ToySource:
    name = "toy"
    spec = SPEC
    weights_dtype = "f32"
    num_parameters = 0
    dtypes = {name: "f32" for name, _ in tensor_shapes(SPEC)}  # noqa: RUF012

    def samples(self) -> Iterator[bytes]:
        return iter(())

    def tokenizer_data(self) -> TokenizerData | None:
        return TokenizerData(json=_tokenizer_json(), chat_template=TEMPLATE)


class ToyRuntime(ToyExecutor):
    """Fails at plan `fail_at`, and is interrupted while waiting for `interrupt_at`, if those are set."""

    instruction_set = "toy"
    threads = 1
    weight_bytes = 0
    fail_at: int | None = None
    interrupt_at: int | None = None
    no_token: Callable[[StepResult], dict[int, str]] | None = None  # which samples of a result fail, and why

    def poll(self, timeout: float | None) -> StepResult | None:
        result = super().poll(timeout)
        if result is not None and self.no_token is not None and len(result.tokens):
            result.errors = self.no_token(result)
            result.tokens[list(result.errors)] = -1
        if self.interrupt_at is not None and len(self.plans) >= self.interrupt_at:
            self.interrupt_at = None
            signal.raise_signal(signal.SIGINT)
        return result

    def free_bytes(self, rows: int, positions: int) -> int | None:
        return None

    def set_pools(self, num_blocks: int, num_host_blocks: int) -> None:
        super().__init__(
            replace(self._config, num_blocks=num_blocks, num_host_blocks=num_host_blocks), self._cost, self.clock
        )

    def submit(self, plan: Any) -> None:
        if self.fail_at is not None and len(self.plans) >= self.fail_at:
            raise RuntimeError("the device is gone")
        super().submit(plan)


class ToyWorld:
    """The runtimes that were made, and the clock they share with the engine."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.runtimes: list[ToyRuntime] = []
        self.fail_at: int | None = None
        self.no_token: Callable[[StepResult], dict[int, str]] | None = None

    def runtime(self, source: ToySource, config: RuntimeConfig, *parts: None) -> ToyRuntime:
        limits = SchedulerConfig(
            max_num_seqs=config.max_num_batched_tokens,
            max_num_batched_tokens=config.max_num_batched_tokens,
            block_size=config.block_size,
            num_blocks=config.num_blocks,
            num_host_blocks=config.num_host_blocks,
            max_in_flight=2,
        )
        runtime = ToyRuntime(limits, COST, self.clock)
        runtime.fail_at = self.fail_at
        runtime.no_token = self.no_token
        self.runtimes.append(runtime)
        return runtime

    def llm(self, **options: Any) -> llm.LLM:
        return llm.LLM("toy", **{**SMALL, **options})

    def async_llm(self, **options: Any) -> async_llm.AsyncLLM:
        return async_llm.AsyncLLM("toy", **{**SMALL, **options})

    def sleep(self, seconds: float) -> None:
        self.clock.now += seconds

    @property
    def plans(self) -> list[Any]:
        return self.runtimes[-1].plans


def enter(monkeypatch: pytest.MonkeyPatch) -> ToyWorld:
    """From here on, every model is the toy."""
    world = ToyWorld()
    monkeypatch.setattr(assembly, "open_model", lambda model: ToySource())
    monkeypatch.setattr(placement, "NativeRuntime", world.runtime)
    monkeypatch.setattr(serving, "time", SimpleNamespace(monotonic=world.clock))
    monkeypatch.setattr(llm, "time", SimpleNamespace(sleep=world.sleep))
    return world
