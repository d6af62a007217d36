#!/usr/bin/env bash
# Runs the native tests against a build with sanitizers: scripts/sanitize.sh [address,undefined|thread]
# The build lies in build/sanitize-*; the package is copied beside it, so that the ordinary build stays as it is.
# Where CUDA's headers are, address,undefined has the CUDA backend as well, on the emulated device.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kind=${1:-address,undefined}
folder=$PWD/build/sanitize-${kind//,/-}
python=$PWD/.venv/bin/python
case $kind in
  *address*) runtimes=(libasan.so libubsan.so) targets=(_C cuda_emulation) cuda=ON ;;
  thread) runtimes=(libtsan.so) targets=(_C) cuda=OFF ;;  # which does not know of fibers
  *) echo "unknown sanitizer '$kind': address,undefined or thread" >&2; exit 2 ;;
esac

"$(dirname "$python")/cmake" -S . -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DFASTSERVE_SANITIZE="$kind" -DFASTSERVE_CUDA_TESTS=$cuda -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$folder/module" > "$folder.log" 2>&1 || { cat "$folder.log"; exit 1; }
"$(dirname "$python")/cmake" --build "$folder" --target "${targets[@]}" >> "$folder.log" 2>&1 || { cat "$folder.log"; exit 1; }

rm -rf "$folder/package"
mkdir -p "$folder/package"
cp -r fastserve tests pyproject.toml "$folder/package"
rm -f "$folder"/package/fastserve/_C*.so
cp "$folder"/module/_C*.so "$folder/package/fastserve"
cd "$folder/package"

preload=$(for name in "${runtimes[@]}"; do "${CXX:-g++}" -print-file-name="$name"; done | paste -sd' ')
export ASAN_OPTIONS=detect_leaks=0  # the interpreter itself leaks on purpose
export UBSAN_OPTIONS="halt_on_error=1 print_stacktrace=1"
export OPENBLAS_NUM_THREADS=1  # its threads are not instrumented, and look like races
export TSAN_OPTIONS="halt_on_error=1 report_signal_unsafe=0"

tests() {
  LD_PRELOAD=$preload PYTHONPATH=$PWD "$python" -m pytest -q -p no:cacheprovider "$@"
}
tests tests/native/test_runtime.py tests/native/test_swap.py tests/native/test_preemption.py \
  tests/native/test_canonical.py tests/dist/test_collectives.py tests/dist/test_plan_wire.py tests/dist/test_ends.py \
  tests/dist/test_group.py tests/dist/test_layouts.py -k "not neox and not qwen3"

# Without the mistakes that are planted for the emulation to find: here the sanitizers are first.
if [ -e "$folder/simt/_cuda.so" ]; then
  FASTSERVE_KERNELS=$folder/simt tests tests/cuda -k "not mistakes"
fi
