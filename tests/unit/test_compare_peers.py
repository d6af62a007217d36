"""compare_peers: its options, who takes part, the order of measurements, processes that stand still, and the table."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import compare_peers
import numpy as np
import peers.models as formats
import pytest
from gguf import GGMLQuantizationType as Q
from gguf import quants
from peers.processes import Candidate, Measure, Peer, PeerError, Worker, environment, start
from peers.report import markdown
from peers.worker import make_prompts

from fastserve.loaders import ModelError, open_model

TINY = {
    "vocab_size": 49152, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": 96, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "max_position_embeddings": 128, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


# --- options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "bfloat16,q5"], "must be of bfloat16, q8_0, q4_0, got 'q5'"),
        (["--batch", "1,0"], "must be a whole number of at least 1, got '0'"),
        (["--rounds", "many"], "must be a whole number of at least 1, got 'many'"),
        (["--only", "tgi"], "got 'tgi'"),
        (["--option", "dtype=float32"], "must be ENGINE.NAME=VALUE"),
        (["--vllm-python", "/no/such/python"], "--vllm-python: there is no program '/no/such/python'"),
    ],
)
def test_a_bad_option_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compare_peers.parse(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_options_of_engines_are_json_or_text() -> None:
    options = compare_peers.parse(["--option", "fastserve.max_num_batched_tokens=2048", "--option", "vllm.dtype=half"])
    assert options.option == [("fastserve", "max_num_batched_tokens", 2048), ("vllm", "dtype", "half")]


def _installed(monkeypatch: pytest.MonkeyPatch, modules: set[str], binaries: set[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in modules else None)
    monkeypatch.setattr("shutil.which", lambda name: name if name in binaries or str(name).startswith("/") else None)


def test_engines_are_found_by_module_binary_or_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*arguments: str) -> dict[str, str]:
        return compare_peers.programs(compare_peers.parse(arguments))

    here = sys.executable
    _installed(monkeypatch, {"transformers"}, set())
    assert found() == {"fastserve": here}  # transformers computes with torch
    _installed(monkeypatch, {"transformers", "torch"}, {"llama-server"})
    assert found() == {"fastserve": here, "transformers": here, "llama-server": "llama-server"}
    _installed(monkeypatch, set(), {"llama-bench", "llama-server"})
    assert found() == {"fastserve": here, "llama-bench": "llama-bench"}  # the same engine once
    assert found("--llama-server", "/x/llama-server", "--vllm-python", "/v/python") == {
        "fastserve": here,
        "vllm": "/v/python",
        "llama-bench": "llama-bench",
        "llama-server": "/x/llama-server",
    }
    assert found("--only", "vllm", "--vllm-python", "/v/python") == {"fastserve": here, "vllm": "/v/python"}


def test_who_takes_part_with_which_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 1000}')
    monkeypatch.setattr(compare_peers, "gguf_of", lambda _, weights, work: work / f"{weights}.gguf")
    arguments = ["--model", str(tmp_path), "--work", str(tmp_path), "--weights", "bfloat16,q8_0,q4_0"]
    options = compare_peers.parse([*arguments, "--prefill", "300", "--option", "vllm.seed=1"])
    found = dict.fromkeys(("fastserve", "vllm", "ctranslate2", "llama-bench"), "program")
    made = compare_peers.candidates(options, found)
    whole, q8, q4 = str(tmp_path), str(tmp_path / "q8_0.gguf"), str(tmp_path / "q4_0.gguf")
    assert [(each.engine, each.weights, each.model) for each in made] == [
        ("fastserve", "bfloat16", whole),
        ("vllm", "bfloat16", whole),
        ("ctranslate2", "bfloat16", whole),
        ("llama-bench", "bfloat16", str(tmp_path / "bfloat16.gguf")),
        ("fastserve", "q8_0", q8),
        ("ctranslate2", "q8_0", whole),
        ("llama-bench", "q8_0", q8),
        ("fastserve", "q4_0", q4),
        ("llama-bench", "q4_0", q4),
    ]
    assert [each.options for each in made[:2]] == [{}, {"seed": 1}]
    assert made[0].settings["max_model_len"] == 512
    assert made[0].settings["max_num_seqs"] == 32


# --- measuring


class FakePeer:
    """Answers at the speed of its name; fails when it is told to."""

    version = "1"

    def __init__(self, candidate: Candidate, calls: list[tuple[str, str, int]], dies_in: int | None = None) -> None:
        self.candidate, self.calls, self.dies_in, self.closed = candidate, calls, dies_in, False

    def sample(self, measure: Measure, seed: int) -> float | None:
        if self.dies_in == seed // 1000:
            raise PeerError("out of memory")
        self.calls.append((self.candidate.engine, measure.name, seed))
        return 10.0 if self.candidate.engine == "fastserve" else None if measure.batch == 1 else 5.0

    def close(self) -> None:
        self.closed = True


def test_turns_go_round_and_who_fails_is_left_out(tmp_path: Path) -> None:
    calls: list[tuple[str, str, int]] = []
    started: dict[str, FakePeer] = {}

    def begin(candidate: Candidate, log: Path) -> Peer:
        if candidate.engine == "vllm":
            raise PeerError("ModuleNotFoundError: No module named 'vllm'")
        dies_in = 1 if candidate.engine == "transformers" else None
        started[candidate.engine] = FakePeer(candidate, calls, dies_in)
        return started[candidate.engine]

    names = ("fastserve", "vllm", "transformers", "ctranslate2")
    those = [Candidate(name, "bfloat16", "python", "model") for name in names]
    options = compare_peers.parse(
        ["--rounds", "2", "--prefill", "4", "--batch", "2", "--work", str(tmp_path), "--threads", "2"]
    )
    result = compare_peers.compare(options, those, lambda _: None, begin)
    assert calls[:6] == [
        (name, measure, seed)
        for measure, seed in (("prefill 4", 0), ("batch 2", 10))
        for name in ("fastserve", "transformers", "ctranslate2")
    ]
    assert calls[6:] == [
        (name, measure, seed)
        for measure, seed in (("prefill 4", 1000), ("batch 2", 1010))
        for name in ("fastserve", "ctranslate2")
    ]
    assert [each["engine"] for each in result["engines"]] == ["fastserve", "ctranslate2"]
    assert result["engines"][1]["samples"] == {"prefill 4": [None, None], "batch 2": [5.0, 5.0]}
    assert [(each["engine"], each["reason"]) for each in result["failed"]] == [
        ("vllm", "ModuleNotFoundError: No module named 'vllm'"),
        ("transformers", "out of memory"),
    ]
    assert all(peer.closed for peer in started.values())
    assert json.loads(json.dumps(result))["measures"][1] == {"name": "batch 2", "batch": 2, "length": 96, "tokens": 32}


ECHO = """#!{python}
import json, os, sys, time
print("warming up", file=sys.stderr)
print(json.dumps({{"version": "7"}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["length"] == 13:
        print("first\\n\\nRuntimeError: thirteen\\n", file=sys.stderr)
        sys.exit(3)
    print(json.dumps({{"seconds": request["batch"] * request["tokens"] / 100}}), flush=True)
"""


def _program(folder: Path, text: str) -> str:
    program = folder / "program"
    program.write_text(text.format(python=sys.executable))
    program.chmod(0o755)
    return str(program)


def _state(pid: int) -> str:
    """One letter, as ps has it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc")
def test_a_worker_stands_still_between_its_turns(tmp_path: Path) -> None:
    candidate = Candidate("vllm", "bfloat16", _program(tmp_path, ECHO), "model", {"threads": 1})
    peer = start(candidate, tmp_path / "log")
    assert isinstance(peer, Worker)
    try:
        process = peer._groups[0].process
        assert peer.version == "7"
        assert _settled(process.pid) == "T"
        # 4 · (1 + 5) hundredths of a second less 4: 20 tokens in a fifth of a second.
        assert peer.sample(Measure("", 4, 8, 5), seed=1) == pytest.approx(100)
        assert peer.sample(Measure("", 1, 8, 0), seed=1) == pytest.approx(800)  # 8 tokens in a hundredth
        assert _settled(process.pid) == "T"
        with pytest.raises(PeerError, match=r"^RuntimeError: thirteen$"):
            peer.sample(Measure("", 1, 13, 0), seed=1)
    finally:
        peer.close()
    assert process.returncode is not None


def _settled(pid: int) -> str:
    """A signal takes effect when the process is next scheduled."""
    deadline = time.monotonic() + 10
    while _state(pid) != "T" and time.monotonic() < deadline:
        time.sleep(0.001)
    return _state(pid)


def test_an_engine_that_does_not_start_says_why(tmp_path: Path) -> None:
    text = "#!{python}\nraise SystemExit('ImportError: no such engine')\n"
    with pytest.raises(PeerError, match=r"^ImportError: no such engine$"):
        start(Candidate("vllm", "bfloat16", _program(tmp_path, text), "model", {"threads": 1}), tmp_path / "log")
    with pytest.raises(PeerError, match="No such file"):
        start(Candidate("vllm", "bfloat16", str(tmp_path / "none"), "model", {"threads": 1}), tmp_path / "log")


BENCH = """#!{python}
import sys
arguments = sys.argv[1:]
of = lambda name: arguments[arguments.index(name) + 1]
assert of("-m") == "model.gguf" and of("-t") == "2", arguments
if "-npl" in arguments:
    print("main: a line for people")
    print('{{"pl": ' + of("-npl") + ', "speed_pp": 1.0, "speed_tg": ' + of("-ntg") + '.5}}')
elif of("-p") == "13":
    sys.exit("error: thirteen")
else:
    print('[{{"build_commit": "abc", "build_number": 12, "avg_ts": ' + of("-p") + '.25}}]')
"""


def test_llama_bench_is_read(tmp_path: Path) -> None:
    program = Path(_program(tmp_path, BENCH)).rename(tmp_path / "llama-bench")
    peer = start(Candidate("llama-bench", "q4_0", str(program), "model.gguf", {"threads": 2}), tmp_path / "log")
    assert peer.version == "12 (abc)"
    assert peer.sample(Measure("", 1, 512, 0), 0) == 512.25
    assert peer.sample(Measure("", 8, 96, 32), 0) is None  # llama-batched-bench is not beside it
    program.with_name("llama-batched-bench").write_text(program.read_text())
    program.with_name("llama-batched-bench").chmod(0o755)
    assert peer.sample(Measure("", 8, 96, 32), 0) == 32.5
    with pytest.raises(PeerError, match=r"^error: thirteen$"):
        peer.sample(Measure("", 1, 13, 0), 0)


SERVER = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({{"build_info": "b12"}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert not asked["cache_prompt"] and asked["ignore_eos"], asked
        self.answer({{"tokens_predicted": asked["n_predict"] - (len(asked["prompt"]) == 13)}})
    def answer(self, fields):
        body = json.dumps(fields).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
port = int(sys.argv[sys.argv.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_llama_server_is_asked_for_so_many_tokens(tmp_path: Path) -> None:
    settings = {"threads": 1, "max_num_seqs": 4, "max_model_len": 64, "vocab_size": 1000, "python": sys.executable}
    program = _program(tmp_path, SERVER)
    peer = start(Candidate("llama-server", "q8_0", program, "model.gguf", settings), tmp_path / "log")
    assert isinstance(peer, Worker)
    try:
        assert peer.version == "b12"
        speed = peer.sample(Measure("", 4, 8, 0), seed=1)
        assert speed is not None and speed > 0
        with pytest.raises(PeerError, match=r"RuntimeError: asked for 1 tokens each, got \[0\]"):
            peer.sample(Measure("", 1, 13, 0), seed=1)
    finally:
        peer.close()
    assert all(group.process.returncode is not None for group in peer._groups)


def test_vllm_finds_its_libraries_beside_its_python(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    given = environment(Candidate("vllm", "bfloat16", str(tmp_path / "bin" / "python"), "model", {"threads": 1}))
    assert given["LD_PRELOAD"].split(":")[-1] == str(tmp_path / "lib" / "libiomp5.so")
    assert given["VLLM_CPU_OMP_THREADS_BIND"].isdecimal()
    assert "LD_PRELOAD" not in environment(Candidate("fastserve", "bfloat16", "python", "model", {"threads": 1}))


def test_prompts_are_the_same_for_all() -> None:
    request = {"batch": 3, "length": 5, "tokens": 1, "seed": 4}
    prompts = make_prompts(request, 1000)
    assert prompts == make_prompts(request, 1000) != make_prompts({**request, "seed": 5}, 1000)
    assert [len(prompt) for prompt in prompts] == [5, 5, 5]
    assert all(300 <= token < 1000 for prompt in prompts for token in prompt)


# --- the table


def _engine(engine: str, weights: str, prefill: list[float | None], batch: list[float | None]) -> dict[str, Any]:
    return {"engine": engine, "weights": weights, "version": "2", "samples": {"prefill 512": prefill, "batch 8": batch}}


def test_the_table_of_a_recorded_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = {
        "model": "llama-1b",
        "threads": 2,
        "rounds": 3,
        "cores": 4,
        "load_average": [2.5, 1.0, 1.0],
        "measures": [{"name": "prefill 512"}, {"name": "batch 8"}],
        "engines": [
            _engine("fastserve", "bfloat16", [1000.0, 500.0, 1100.0], [60.0, 30.0, None]),
            # Ratios of rounds: 2, 2.5, 1.1 and 3, 2; those of the medians would be 2 and 2.25.
            _engine("vllm", "bfloat16", [500.0, 200.0, 1000.0], [20.0, 15.0, 25.0]),
            _engine("llama-bench", "q4_0", [100.0, 100.0, 100.0], [None, None, None]),
        ],
        "failed": [{"engine": "ctranslate2", "weights": "bfloat16", "reason": "no such model"}],
    }
    table = markdown(result)
    assert table.splitlines()[2:] == [
        "| engine | weights | prefill 512 | batch 8 |",
        "|---|---|---:|---:|",
        "| FastServe 2 | bfloat16 | 1000 | 45.0 |",
        "| vLLM 2 | bfloat16 | 500 (2.00×) | 20.0 (2.50×) |",
        "| llama.cpp 2 | q4_0 | 100 | – |",
        "",
        "Other work kept the machine busy (load 2.5 on 4 cores): figures waver.",
        "Left out: CTranslate2 bfloat16: no such model",
    ]
    recorded = tmp_path / "result.json"
    recorded.write_text(json.dumps(result))
    assert compare_peers.main(["--table", str(recorded)]) == 0
    assert capsys.readouterr().out == table


# --- models in other formats


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    config = formats._llama_config(TINY)
    formats.write_safetensors(directory / "model.safetensors", formats._random_tensors(formats._spec_of(config)))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("weights", formats.WEIGHTS)
def test_a_gguf_file_holds_what_the_directory_does(weights: formats.Weights, tiny: Path, tmp_path: Path) -> None:
    path = formats.gguf_of(tiny, weights, tmp_path)
    source, written = open_model(str(tiny)), open_model(str(path))
    assert written.spec.family == source.spec.family
    assert written.spec.rope_inv_freq == pytest.approx(source.spec.rope_inv_freq)
    for name in ("hidden_size", "num_kv_heads", "head_dim", "intermediate_size", "vocab_size", "max_position"):
        assert getattr(written.spec, name) == getattr(source.spec, name)
    expected = {each.name: formats._float32(each.dtype, each.data, each.shape) for each in source.tensors()}
    kind = {"bfloat16": Q.BF16, "q8_0": Q.Q8_0, "q4_0": Q.Q4_0}[weights]
    for tensor in written.tensors():
        values = expected.pop(tensor.name)
        if values.ndim > 1:
            values = quants.dequantize(quants.quantize(values, kind), kind)
        np.testing.assert_array_equal(formats._float32(tensor.dtype, tensor.data, tensor.shape), values)
    assert not expected
    before = path.stat().st_mtime_ns
    assert formats.gguf_of(tiny, weights, tmp_path).stat().st_mtime_ns == before  # made once


def test_bfloat16_rounds_to_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -2.5, 0.0], np.float32)  # two of them halfway
    assert formats.bfloat16_bits(values).tolist() == [0x3F80, 0x3F80, 0x3F82, 0xC020, 0]


def test_a_model_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a Hugging Face directory"):
        formats.directory_of(str(tmp_path), tmp_path)
