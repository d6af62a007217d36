"""One engine in a process of its own: runs what it is asked for and tells how long that took.

Started by processes.py with one argument, the settings as JSON, under whatever Python has the engine; it needs nothing
but that engine. Requests and answers are lines of JSON on stdin and on what was stdout; what libraries print goes to
stderr.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import random
import signal
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

Prompts = list[list[int]]
_FIRST_TOKEN = 300  # below are bytes and special tokens


class Engine(Protocol):
    version: str

    def generate(self, prompts: Prompts, tokens: int) -> None:
        """Greedily, exactly so many tokens for every prompt."""


class FastServe:
    def __init__(self, settings: dict[str, Any]) -> None:
        fastserve = importlib.import_module("fastserve")
        self.version = fastserve.__version__
        self._params = fastserve.SamplingParams
        options = {
            "policy": "fcfs",
            "threads": settings["threads"],
            "max_num_seqs": settings["max_num_seqs"],
            "max_model_len": settings["max_model_len"],
            "swap_space": 0,
            "skip_tokenizer": True,
            **settings["options"],
        }
        self._llm = fastserve.LLM(settings["model"], **options)

    def generate(self, prompts: Prompts, tokens: int) -> None:
        outputs = self._llm.generate(prompts, self._params(temperature=0, max_tokens=tokens, ignore_eos=True))
        _check([len(output.outputs[0].token_ids) for output in outputs], tokens)


class Vllm:
    def __init__(self, settings: dict[str, Any]) -> None:
        vllm = importlib.import_module("vllm")
        self.version = vllm.__version__
        self._params = vllm.SamplingParams
        options = {
            "dtype": "bfloat16",
            "max_model_len": settings["max_model_len"],
            "max_num_seqs": settings["max_num_seqs"],
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            **settings["options"],
        }
        self._llm = vllm.LLM(settings["model"], **options)

    def generate(self, prompts: Prompts, tokens: int) -> None:
        params = self._params(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        _check([len(output.outputs[0].token_ids) for output in outputs], tokens)


class Transformers:
    def __init__(self, settings: dict[str, Any]) -> None:
        self._torch: Any = importlib.import_module("torch")
        transformers = importlib.import_module("transformers")
        self.version = transformers.__version__
        self._torch.set_num_threads(settings["threads"])
        load = transformers.AutoModelForCausalLM.from_pretrained
        options = {"dtype": self._torch.bfloat16, "attn_implementation": "sdpa", **settings["options"]}
        self._model = load(settings["model"], **options).eval()

    def generate(self, prompts: Prompts, tokens: int) -> None:
        ids = self._torch.tensor(prompts)
        with self._torch.inference_mode():
            made = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        _check([made.shape[1] - len(prompts[0])], tokens)


class CTranslate2:
    def __init__(self, settings: dict[str, Any]) -> None:
        ctranslate2 = importlib.import_module("ctranslate2")
        self.version = ctranslate2.__version__
        kind = {"bfloat16": "bfloat16", "q8_0": "int8"}[settings["weights"]]
        converted = os.path.join(settings["work"], f"ctranslate2-{os.path.basename(settings['model'])}-{kind}")
        if not os.path.exists(os.path.join(converted, "model.bin")):
            converters = importlib.import_module("ctranslate2.converters")
            converters.TransformersConverter(settings["model"]).convert(converted, quantization=kind, force=True)
        with open(os.path.join(converted, "vocabulary.json"), encoding="utf-8") as file:
            self._tokens = json.load(file)
        self._generator = ctranslate2.Generator(
            converted, device="cpu", compute_type=kind, inter_threads=1, intra_threads=settings["threads"]
        )

    def generate(self, prompts: Prompts, tokens: int) -> None:
        outputs = self._generator.generate_batch(
            [[self._tokens[token] for token in prompt] for prompt in prompts],
            max_length=tokens,
            min_length=tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
            max_batch_size=0,
        )
        _check([len(output.sequences_ids[0]) for output in outputs], tokens)


class LlamaServer:
    """The client of a llama-server that processes.py has started."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._url = settings["url"]
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while True:  # processes.py gives up when it takes too long
            try:
                self._opener.open(self._url + "/health", timeout=5).read()
                break
            except OSError:
                time.sleep(0.1)
        with self._opener.open(self._url + "/props", timeout=60) as answer:
            self.version = str(json.load(answer).get("build_info", "unknown"))
        self._pool = ThreadPoolExecutor(settings["max_num_seqs"])

    def generate(self, prompts: Prompts, tokens: int) -> None:
        _check(list(self._pool.map(lambda prompt: self._complete(prompt, tokens), prompts)), tokens)

    def _complete(self, prompt: list[int], tokens: int) -> int:
        fields = {
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        request = urllib.request.Request(
            self._url + "/completion", json.dumps(fields).encode(), {"Content-Type": "application/json"}
        )
        with self._opener.open(request, timeout=600) as answer:
            return int(json.load(answer)["tokens_predicted"])


ENGINES: dict[str, Callable[[dict[str, Any]], Engine]] = {
    "fastserve": FastServe,
    "vllm": Vllm,
    "transformers": Transformers,
    "ctranslate2": CTranslate2,
    "llama-server": LlamaServer,
}


def make_prompts(request: dict[str, int], vocab_size: int) -> Prompts:
    """The same for every engine that is asked the same."""
    draw = random.Random(request["seed"])
    first = min(_FIRST_TOKEN, vocab_size // 2)
    return [[draw.randrange(first, vocab_size) for _ in range(request["length"])] for _ in range(request["batch"])]


def _check(made: list[int], tokens: int) -> None:
    if any(count != tokens for count in made):
        raise RuntimeError(f"asked for {tokens} tokens each, got {made}")


def end_with_parent() -> None:
    """A stopped process would outlive a parent that was killed. Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    end_with_parent()
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))  # its neighbours are no modules of an engine
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = ENGINES[settings["engine"]](settings)
    print(json.dumps({"version": engine.version}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        prompts = make_prompts(request, settings["vocab_size"])
        begin = time.perf_counter()
        engine.generate(prompts, request["tokens"])
        print(json.dumps({"seconds": time.perf_counter() - begin}), file=answers, flush=True)


if __name__ == "__main__":
    main()
