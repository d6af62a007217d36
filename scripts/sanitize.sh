#!/usr/bin/env bash
# Runs the native tests under sanitizers: scripts/sanitize.sh [address,undefined] [thread]; without a name, both.
# Each has its build in build/sanitize-*, with the package copied beside it, so that the ordinary build stays as it is.
# Where CUDA's headers are, the CUDA backend is there as well, on the emulated device.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ $# -ne 1 ]; then
  [ $# -gt 0 ] || set -- address,undefined thread
  for kind in "$@"; do
    echo "-- $kind"
    scripts/sanitize.sh "$kind"
  done
  exit
fi

kind=$1
folder=$PWD/build/sanitize-${kind//,/-}
python=$PWD/.venv/bin/python
case $kind in
  *address*) runtimes=(libasan.so libubsan.so) ;;
  thread) runtimes=(libtsan.so) ;;
  *) echo "unknown sanitizer '$kind': address,undefined or thread" >&2; exit 2 ;;
esac

"$(dirname "$python")/cmake" -S . -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DFASTSERVE_SANITIZE="$kind" -DFASTSERVE_CUDA_TESTS=ON -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$folder/module" > "$folder.log" 2>&1 || { cat "$folder.log"; exit 1; }
"$(dirname "$python")/cmake" --build "$folder" --target _C cuda_emulation >> "$folder.log" 2>&1 || { cat "$folder.log"; exit 1; }

rm -rf "$folder/package" "$folder"/report.*
mkdir -p "$folder/package"
cp -r fastserve tests csrc pyproject.toml "$folder/package"
rm -f "$folder"/package/fastserve/_*.so
cp "$folder"/module/_C*.so "$folder/package/fastserve"
cd "$folder/package"

# Into files, where a sanitizer minds that, and past pytest, with which what it has captured would be lost. A test's own
# processes write theirs there as well.
report="log_path=$folder/report"
preload=$(for name in "${runtimes[@]}"; do "${CXX:-g++}" -print-file-name="$name"; done | paste -sd' ')
export ASAN_OPTIONS="$report detect_leaks=0"  # the interpreter itself leaks on purpose
export UBSAN_OPTIONS="$report halt_on_error=1 print_stacktrace=1"
export TSAN_OPTIONS="$report halt_on_error=1 report_signal_unsafe=0"
export OPENBLAS_NUM_THREADS=1  # its threads are not instrumented, and look like races
if [ -e "$folder/simt/_cuda.so" ]; then
  export FASTSERVE_KERNELS=$folder/simt FASTSERVE_CUDA_PLUGIN=$folder/simt/_cuda.so
fi

# A process that a sanitizer ends may hang on its way out.
tests() {
  local status=0
  LD_PRELOAD=$preload PYTHONPATH=$PWD timeout -k 10 3600 "$python" -m pytest -q --capture=sys -p no:cacheprovider "$@" || status=$?
  if compgen -G "$folder/report.*" > /dev/null; then
    cat "$folder"/report.* >&2
    [ $status -ne 0 ] || status=1
  fi
  return $status
}
tests tests/native/test_runtime.py tests/native/test_swap.py tests/native/test_preemption.py tests/native/test_device.py \
  tests/native/test_canonical.py tests/native/test_waiting.py tests/native/test_device_memory.py \
  tests/dist/test_collectives.py tests/dist/test_plan_wire.py tests/dist/test_ends.py tests/dist/test_group.py \
  tests/dist/test_layouts.py -k "not neox and not qwen3"

# Without the mistakes that are planted for the emulation to find: here the sanitizers are first.
if [ -n "${FASTSERVE_KERNELS:-}" ]; then
  tests tests/cuda -k "not mistakes"
fi
