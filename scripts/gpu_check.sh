#!/usr/bin/env bash
# Everything that takes a GPU, in one command and under ten minutes: scripts/gpu_check.sh
#   Builds for the GPU that is there, runs the kernel tests on it, and again under compute-sanitizer, then the benchmarks:
#   kernels and runtime, the engine beside transformers, policies under memory pressure. The last thing printed is one
#   table of what was measured beside what issue 7 asks for; everything is left in $OUT (default: build/gpu_check).
# scripts/gpu_check.sh --emulated
#   The same script on a machine without a GPU, on the emulated device and at toy sizes: whether it works, not how fast.
#   Its figures mean nothing, and the table says so. Steps may take three times as long.
# scripts/gpu_check.sh --only STEP,...
#   Builds and takes these steps only (a step is what a line of the output begins with: "--- decode"); what they do not
#   measure is open in the table.
# A step that fails or runs out of time does not keep the others from running. $PYTHON (default: python3) is what runs it
# all; it needs numpy, pybind11, cmake, ninja, pytest, pytest-timeout, hypothesis, and torch and transformers for what
# compares with them. No network. $GPU_CHECK_SECONDS (default: 570; emulated: 1500) bounds the whole.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
emulated= only=
steps=(warpgroups decode prefill swap tests sanitizer jct transformers gemm attention compiled)
usage() {
  echo "usage: scripts/gpu_check.sh [--emulated] [--only STEP,...], of: ${steps[*]}" >&2
  exit 2
}
while [ $# -gt 0 ]; do
  case "$1" in
    --emulated) emulated=1 ;;
    --only)
      [ $# -ge 2 ] && [ -n "$2" ] || usage
      for name in ${2//,/ }; do
        [[ " ${steps[*]} " = *" $name "* ]] || usage
      done
      only=,${2// /,},
      shift ;;
    *) usage ;;
  esac
  shift
done
python=${PYTHON:-python3}
OUT=${OUT:-$PWD/build/gpu_check}
parts=$PWD/build/gpu_check_parts
jobs=$(nproc)
mkdir -p "$OUT" "$parts"
rm -f "$parts"/* "$OUT"/{log,tests,sanitizer,table}.txt "$OUT"/{bench,transformers,compiled,jct}.json
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD PYTHONDONTWRITEBYTECODE=1
total=${GPU_CHECK_SECONDS:-${emulated:+1500}}
total=${total:-570}
failed=0

say() { echo "$@" | tee -a "$OUT/log.txt"; }

# step NAME SECONDS COMMAND...: runs it in at most so many seconds, or what is left; output goes to the log.
step() {
  local name=$1 limit=$(($2${emulated:+ * 3})) begin=$SECONDS status
  shift 2
  [ -z "$only" ] || [ "$name" = build ] || [[ $only = *,$name,* ]] || return 0
  local left=$((total - SECONDS - 5))  # for the table
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -lt 5 ]; then
    say "--- $name: no time left"
    echo "$name out-of-time 0" >> "$parts/steps"
    failed=1
    return
  fi
  say "--- $name (at most $limit s)"
  timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$OUT/log.txt"
  status=${PIPESTATUS[0]}
  say "--- $name: exit status $status after $((SECONDS - begin)) s"
  echo "$name $status $((SECONDS - begin))" >> "$parts/steps"
  [ "$status" -eq 0 ] || failed=1
}

say "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)$(git diff --quiet HEAD 2>/dev/null || echo ' and changes'), $(date -u +%Y-%m-%dT%H:%MZ), $("$python" --version)"

if [ -n "$emulated" ]; then
  say "EMULATED: toy sizes on a CPU. No figure below says anything about a GPU."
  export FASTSERVE_CUDA_PLUGIN=$PWD/build/simt/_cuda.so FASTSERVE_KERNELS=$PWD/build/simt FASTSERVE_CUDA=OFF
  targets=(benchmarks _kernels _cuda_emulated)
  tests=(tests/cuda/test_elementwise.py -k "float64-1 or sums or refused")
  sizes=(--preset tiny --cold 1 --repeats 1 --limit-gemm 64)
  # Of all that the table looks for, so that it is seen to find it.
  gemm=(--weights bfloat16 --rows 2048) attention=(--rows 2 --context 40 --tokens 30)
  decode=(--rows 1,64 --context 20 --steps 3) prefill=(--tokens 20,2048 --chunk 2048)
  swap=(--blocks 3 --rows 1 --context 20 --steps 3 --beside 1)
  transformers=(--rivals-device cpu --preset tiny --batch 1,32 --idle 64 --prompt 8 --steps 4 --repeats 1 --rivals eager)
  library=(env "FASTSERVE_CUBLASLT=$FASTSERVE_CUDA_PLUGIN")  # which has a stand-in
  jct=(--preset tiny --context 48 --jobs 6 --search-jobs 6 --rows 2 --batched-tokens 32 --blocks 64 --seconds 2)
else
  say "$(nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv,noheader 2>&1)"
  unset FASTSERVE_CUDA_PLUGIN
  export PATH=$PATH:/usr/local/cuda/bin
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)
  export FASTSERVE_CUDA=ON FASTSERVE_CUDA_ARCHITECTURES=${capability:-90} FASTSERVE_KERNELS=$PWD/build/cuda
  # torch's own cuBLASLt bounds matrix products, and may do some.
  libraries=$("$python" - <<'PY'
import pathlib, sysconfig
site = pathlib.Path(sysconfig.get_paths()["purelib"])
print(":".join(sorted({str(path.parent) for path in site.glob("nvidia/**/libcublasLt.so.1[23]")})))
PY
)
  export LD_LIBRARY_PATH=${libraries:+$libraries:}${LD_LIBRARY_PATH:-}
  targets=(benchmarks _kernels_gpu)
  # Besides the kernels, all that runs on a CPU and a CUDA device alike. Files are named: some of the others need what
  # this machine may lack.
  mapfile -t alike < <(grep -l "^from machines" tests/native/test_*.py)
  # Ranks share the device, and exchange through the host.
  tests=(tests/cuda "${alike[@]}" tests/dist/test_cuda_ranks.py tests/dist/test_mpi.py -k "cuda and not nccl")
  sizes=(--preset llama-8b --repeats 3)
  gemm=(--weights bfloat16,q4_0 --rows 1,32,512,2048 --cold 256) attention=() decode=(--context 512) prefill=() swap=()
  transformers=(--rivals eager,graph) jct=(--jobs 80 --seconds 90) library=()
fi
export CUDA_MODULE_LOADING=EAGER  # nothing is loaded while something is timed

build() {
  FASTSERVE_CUDA_WERROR=OFF "$python" setup.py --quiet build_ext --inplace --parallel "$jobs" || return
  local cmake
  cmake=$("$python" -c 'import cmake, pathlib; print(pathlib.Path(cmake.CMAKE_BIN_DIR) / "cmake")') || return
  "$cmake" -S . -B build -DFASTSERVE_BENCHMARKS=ON -DFASTSERVE_CUDA_TESTS=ON -DFASTSERVE_CUDA_WERROR=OFF > build/configure.log || return
  "$cmake" --build build -j "$jobs" --target "${targets[@]}" | tail -n 3
}
run_tests() {
  local more=()
  [ -n "$emulated" ] || ! "$python" -c "import xdist" 2> /dev/null || more=(-n 4)
  "$python" -m pytest -q -p no:cacheprovider -m "not alone" "${more[@]}" "${tests[@]}" > "$OUT/tests.txt" 2>&1
  local status=$?
  tail -n 15 "$OUT/tests.txt"
  "$python" -m pytest -q -p no:cacheprovider -m alone "${tests[@]}" > "$parts/alone.txt" 2>&1
  local last=$?
  tail -n 5 "$parts/alone.txt"
  cat "$parts/alone.txt" >> "$OUT/tests.txt"
  [ "$last" -eq 0 ] || [ "$last" -eq 5 ] || status=$last  # 5: there are none
  return $status
}
# A few cases of each kernel: racecheck is a hundred times slower than the machine.
sanitize() {
  local tool status=0 last
  local short=(tests/cuda/test_attention_kernels.py tests/cuda/test_elementwise.py tests/cuda/test_gemm_kernels.py tests/cuda/test_sampling.py)
  local which="segments_merge or heads_are_rotated or accumulation or norms_of_chosen or greedy_is_the_first or fill_a_batch_up"
  for tool in memcheck racecheck; do
    last=()  # barriers in shared memory, which order warpgroups' products, racecheck does not know all of
    [ "$tool" = racecheck ] || [ "${FASTSERVE_WGMMA:-}" = 0 ] || last=(tests/cuda/test_warpgroups.py)
    timeout -k 5 40 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
      "$python" -m pytest -q -x -p no:cacheprovider -k "$which" --timeout 0 "${short[@]}" "${last[@]}" \
      > "$parts/$tool.log" 2>&1
    local code=$?
    # What it says of memory or races counts, and not how it ends: it refuses some devices.
    local found
    found=$(grep -oE "(ERROR|RACECHECK) SUMMARY: [0-9]+" "$parts/$tool.log" | tail -n 1 | grep -oE "[0-9]+$")
    echo "$tool ${found:--} $code" >> "$parts/sanitizer"
    { echo "== $tool: exit status $code (124: out of time)"; head -c 500000 "$parts/$tool.log"; } >> "$OUT/sanitizer.txt"
    grep -h "ERROR SUMMARY\|RACECHECK SUMMARY\|passed\|failed" "$parts/$tool.log" | tail -n 3
    if [ -z "$found" ]; then
      echo "$tool came to no summary: not measured"
      [ "$status" -ne 0 ] || status=124
    elif [ "$found" -ne 0 ]; then
      status=9
    fi
  done
  return $status
}
bench() {  # NAME OPTIONS...
  local name=$1
  shift
  build/bench/"$name" --device cuda "${sizes[@]}" --json "$parts/$name.json" "$@"
}
export -f build run_tests sanitize bench
# Functions under `timeout` are run by a shell of their own, which arrays do not reach by themselves.
in_shell() {
  local call=$1
  shift
  local words=""
  [ $# -eq 0 ] || words=$(printf '%q ' "$@")
  printf '%s\n' "$(declare -p python OUT parts jobs emulated targets tests sizes); $call $words"
}

step build 240 bash -c "$(in_shell build)"
# By themselves and first: what has never run on such a device may end the process, and the rest does without it.
step warpgroups 60 "$python" -m pytest -q -p no:cacheprovider tests/cuda/test_warpgroups.py ${emulated:+-k "accumulation or before"}
if grep -q "^warpgroups [^0]" "$parts/steps"; then
  say "products by warpgroups (wgmma) do not work here: everything below is without them"
  export FASTSERVE_WGMMA=0
  tests+=(--ignore tests/cuda/test_warpgroups.py)
fi
step decode 60 bash -c "$(in_shell bench decode "${decode[@]}")"
step prefill 40 bash -c "$(in_shell bench prefill "${prefill[@]}")"
step swap 60 bash -c "$(in_shell bench swap "${swap[@]}")"
step tests 150 bash -c "$(in_shell run_tests)"
# Before what takes its time, or there would be none left. It loads what the few cases need.
if [ -z "$emulated" ]; then
  step sanitizer 90 env CUDA_MODULE_LOADING=LAZY bash -c "$(in_shell sanitize)"
fi
step jct 160 "$python" benchmarks/gpu_jct.py --json "$OUT/jct.json" "${jct[@]}"
# torch's own kernels are thousands: loaded when they are used.
step transformers 75 env CUDA_MODULE_LOADING=LAZY "$python" benchmarks/gpu_transformers.py --json "$OUT/transformers.json" "${transformers[@]}"
step gemm 40 "${library[@]}" bash -c "$(in_shell bench gemm "${gemm[@]}")"
step attention 40 bash -c "$(in_shell bench attention "${attention[@]}")"
if [ -z "$emulated" ]; then
  # Compiling takes minutes: with the time that is left.
  step compiled 200 env CUDA_MODULE_LOADING=LAZY "$python" benchmarks/gpu_transformers.py --json "$OUT/compiled.json" --rivals compiled --idle ""
fi

"$python" benchmarks/gpu_table.py --parts "$parts" --out "$OUT" ${emulated:+--emulated} 2>&1 | tee "$OUT/table.txt"
[ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
exit $failed
