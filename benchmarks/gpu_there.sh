#!/usr/bin/env bash
# On a GPU machine without a network, in the repository's root: bash benchmarks/gpu_there.sh OUT COMMIT SECONDS GROUP...
# Packages that the machine lacks are taken from .gpu/wheels; the compiled modules from .gpu/native where they load there,
# else built on the spot (CMake, Ninja and nanobind). GROUP none: only keeps the parts of the real models that came along.
set -euo pipefail
out=$1 commit=$2 seconds=$3
shift 3
export PYTHONUNBUFFERED=1 PYTHONPATH=/tmp/gpu/site
if [ ! -d /tmp/gpu/site ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/gpu/site .gpu/wheels/*.whl
fi
cp .gpu/native/_reader*.so cache/ && cp .gpu/native/_cpu*.so runtime/kernels/ || true
if ! python3 -c 'import cache._reader, runtime.kernels._cpu'; then
  cmake -S . -B /tmp/gpu/native -G Ninja -DPython_EXECUTABLE="$(command -v python3)" -DCMAKE_BUILD_TYPE=Release
  cmake --build /tmp/gpu/native
  cp /tmp/gpu/native/_reader*.so cache/
  cp /tmp/gpu/native/_cpu*.so runtime/kernels/
fi
if [ "$1" = none ]; then
  exec python3 -m benchmarks.gpu_parts join --parts .gpu --work /tmp/gpu/models
fi
python3 -m benchmarks.gpu --out "$out" --previous .gpu/gpu.json --commit "$commit" --seconds "$seconds" --only "$@" \
  2>&1 | tee "$out/log"
