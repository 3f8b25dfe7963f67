#!/usr/bin/env bash
# What a machine with a GPU is asked, in nine minutes: does it build, is it right, how fast is it.
#
#   bash benchmarks/gpu_check.sh OUTDIR              # from anywhere; --dry-run in front only prints
#
# Needs python3 with torch (a CUDA build), triton, numpy and pytest, and to build also nvcc, cmake and
# ninja; installs and fetches nothing. The commit stands in the file COMMIT where the tree travels
# without .git. Peers that are importable take part: put them on PYTHONPATH. OUTDIR gets a log a step,
# steps.jsonl, rows.jsonl (the benchmark's rows) and table.txt. Exit status 1 if a step failed.
set -uo pipefail

DRY=
if [[ ${1-} == --dry-run ]]; then DRY=1 && shift; fi
if [[ $# -ne 1 ]]; then
  echo "usage: bash benchmarks/gpu_check.sh [--dry-run] OUTDIR" >&2
  exit 2
fi
OUT=$1
if [[ -z $DRY ]]; then mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd); fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
export VLM_CUDA_ARCHS="${VLM_CUDA_ARCHS:-90}"
unset TRITON_INTERPRET

LIMIT=535  # seconds for everything; the table takes the rest of the nine minutes
SECONDS=0
FAILED=0

# step NAME AT_MOST COMMAND...: runs it for AT_MOST seconds at most, and never past LIMIT.
step() {
  local name=$1 most=$2 status=0
  shift 2
  if [[ -n $DRY ]]; then
    printf '%s\t' "$name" "$@" && echo
    return 0
  fi
  local begun=$SECONDS left=$((LIMIT - SECONDS))
  if ((left < 5)); then
    status=124
    echo "no time left" >"$OUT/$name.log"
  else
    timeout -k 5 "$((left < most ? left : most))" "$@" >"$OUT/$name.log" 2>&1 || status=$?
  fi
  printf '{"step": "%s", "status": %d, "seconds": %d}\n' "$name" "$status" \
    "$((SECONDS - begun))" >>"$OUT/steps.jsonl"
  if ((status != 0)); then
    FAILED=1
    echo "== $name: failed with $status (124: out of time)" && tail -n 15 "$OUT/$name.log"
  else
    echo "== $name: ok, $((SECONDS - begun)) s"
  fi
  return "$status"
}

# bench OP SHAPES AT_MOST [MORE...]: rows of our backends and the peers, appended.
bench() {
  local op=$1 shapes=$2 most=$3
  shift 3
  step "bench-$op-$shapes" "$most" python3 -m benchmarks run --device cuda --quick \
    --backend "$BACKENDS" --op "$op" --dtype bf16 --shapes "$shapes" --json "$OUT/rows.jsonl" \
    --append "$@"
}

if [[ -z $DRY ]]; then rm -f "$OUT/rows.jsonl" "$OUT/steps.jsonl"; fi
step stream 60 python3 -c 'import ctypes, pathlib, torch
assert torch.cuda.is_available(), "torch sees no GPU"
library = pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
stream = ctypes.c_void_p()
side = torch.cuda.Stream()
with torch.cuda.stream(side):
    get = ctypes.CDLL(str(library)).aoti_torch_get_current_cuda_stream
    assert get(ctypes.c_int32(0), ctypes.byref(stream)) == 0
assert stream.value == side.cuda_stream, (stream.value, side.cuda_stream)
print(torch.__version__, torch.cuda.get_device_name(0))' || exit 1

BACKENDS=triton
if step build 200 env VLM_CUDA=ON python3 setup.py build_ext --inplace; then BACKENDS=cuda,triton; fi
step env 60 python3 -m vlm_kernels env
step tests 150 python3 -m pytest -q -p no:cacheprovider -m gpu tests/gpu
if [[ -n $DRY ]] || command -v compute-sanitizer >/dev/null; then
  step sanitizer 60 compute-sanitizer --tool memcheck --error-exitcode 9 \
    python3 -m pytest -q -p no:cacheprovider -m gpu tests/gpu -k sanitized
fi
for shapes in 4096x768 65536x768 16384x768; do
  for op in clip_loss siglip_loss; do bench "$op" "$shapes" 75; done
done
bench contrastive 1024x768 40 --peers none --memory --memory-shape 65536x768 --workspace-mb 64

if [[ -n $DRY ]]; then exit 0; fi
timeout 20 python3 -m benchmarks report "$OUT/rows.jsonl" | tee "$OUT/table.txt"
cat "$OUT/steps.jsonl"
exit "$FAILED"
