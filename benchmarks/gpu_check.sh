#!/usr/bin/env bash
# What a machine with a GPU is asked, in nine minutes: does it build, is it right, how fast is it.
#
#   bash benchmarks/gpu_check.sh OUTDIR [OP]         # from anywhere; --dry-run in front only prints
#
# OP is attention or contrastive and has all of the time; without it they share it. Needs python3
# with torch (a CUDA build), triton, numpy and pytest, and to build also nvcc, cmake and ninja;
# installs and fetches nothing. The commit stands in the file COMMIT where the tree travels without
# .git. Peers that are importable take part: put them on PYTHONPATH. OUTDIR gets a log a step,
# steps.jsonl, rows.jsonl (the benchmark's rows) and table.txt. Exit status 1 if a step failed.
set -uo pipefail

DRY=
if [[ ${1-} == --dry-run ]]; then DRY=1 && shift; fi
OP=${2-}
if [[ $# -lt 1 || $# -gt 2 || ! $OP =~ ^(|attention|contrastive)$ ]]; then
  echo "usage: bash benchmarks/gpu_check.sh [--dry-run] OUTDIR [attention | contrastive]" >&2
  exit 2
fi
OUT=$1
if [[ -z $DRY ]]; then mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd); fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
export VLM_CUDA_ARCHS="${VLM_CUDA_ARCHS:-90}"
unset TRITON_INTERPRET

SECONDS=0
FAILED=0
DEADLINE=0
PIDS=()

# within SECONDS...: the time of the steps that follow, besides what those before them left. All
# of them add up to 525; the table takes the rest of the nine minutes.
within() { DEADLINE=$((DEADLINE + $1)); }

# step NAME COMMAND...: runs it until DEADLINE at most.
step() {
  local name=$1 status=0
  shift
  if [[ -n $DRY ]]; then
    printf '%s\t' "$name" "$DEADLINE" "$@" && echo
    return 0
  fi
  local begun=$SECONDS left=$((DEADLINE - SECONDS))
  if ((left < 5)); then
    status=124
    echo "no time left" >"$OUT/$name.log"
  else
    timeout -k 5 "$left" "$@" >"$OUT/$name.log" 2>&1 || status=$?
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

# aside NAME COMMAND...: a step beside others, none of which measures a time; `joined` waits.
aside() {
  if [[ -n $DRY ]]; then
    step "$@"
  else
    step "$@" &
    PIDS+=($!)
  fi
}
joined() {
  local pid
  for pid in "${PIDS[@]}"; do wait "$pid" || FAILED=1; done
  PIDS=()
}

tests() {
  local name=$1
  shift
  aside "$name" python3 -m pytest -q -p no:cacheprovider -m gpu "$@"
}

# bench NAME OP [MORE...]: rows of our backends and the peers, appended. The last shape that is begun
# has a quarter of a minute to end; the rows of those before it are in the file even if it does not.
bench() {
  local name=$1 op=$2
  shift 2
  step "$name" python3 -m benchmarks run --device cuda --quick --backend "$BACKENDS" --op "$op" \
    --dtype bf16 --json "$OUT/rows.jsonl" --append --time-limit $((DEADLINE - SECONDS - 15)) "$@"
}

wanted() { [[ -z $OP || $OP == "$1" ]]; }
# SHARED ALONE: the one or the other, as OP has it.
seconds() { if [[ -z $OP ]]; then echo "$1"; else echo "$2"; fi; }

if [[ -z $DRY ]]; then rm -f "$OUT/rows.jsonl" "$OUT/steps.jsonl"; fi
within 40
step stream python3 -c 'import ctypes, pathlib, torch
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
within 150
if step build env VLM_CUDA=ON python3 setup.py build_ext --inplace; then BACKENDS=cuda,triton; fi
step env python3 -m vlm_kernels env

# At once: most of a test is its yardstick on the CPU, and Triton's compiler.
within 110
if wanted attention; then
  tests tests-attention tests/gpu/test_attention.py tests/gpu/test_attention_backends.py \
    -k 'not triton'
  tests tests-attention-triton tests/gpu/test_attention_backends.py -k 'triton and test_accuracy'
  tests tests-attention-triton-calls tests/gpu/test_attention_backends.py \
    -k 'triton and not test_accuracy'
fi
if wanted contrastive; then
  tests tests-contrastive tests/gpu/test_contrastive.py tests/gpu/test_contrastive_backends.py
fi
if [[ -n $DRY ]] || command -v compute-sanitizer >/dev/null; then
  aside sanitizer compute-sanitizer --tool memcheck --error-exitcode 9 \
    python3 -m pytest -q -p no:cacheprovider -m gpu "tests/gpu" -k "sanitized${OP:+ and $OP}"
fi
joined

# A process each, since a kernel that writes where it must not spoils all that come after it.
if wanted attention; then
  within "$(seconds 65 100)"
  bench attention-towers attention --group odd_dims,d64_short,bwd_short,bwd_long \
    --peers=-eager,-flex,-sdpa_math
  within "$(seconds 50 65)"
  bench attention-shapes attention --group windows,images,few_queries,latency,decode,long \
    --peers=-eager,-eager_per_image,-eager_batched,-flex,-sdpa_math,-sdpa_batched_math,-sdpa_mask
  within "$(seconds 45 60)"
  bench attention-fused attention --group rope_norm,masks_gpu \
    --peers=-ops_sdpa_math,-sdpa_mask_math,-sdpa_additive_mask
fi
if wanted contrastive; then
  within "$(seconds 65 225)"
  bench losses contrastive --shapes 65536x768,4096x768
  if [[ -n $OP ]]; then bench losses-16384 contrastive --shapes 16384x768; fi
  within 0
  bench losses-memory contrastive --shapes 1024x768 --peers none --memory \
    --memory-shape 65536x768 --workspace-mb 64
fi
if [[ $OP == attention ]] && [[ $BACKENDS == cuda* || -n $DRY ]]; then
  within 0
  BACKENDS=cuda:short,cuda:long
  bench attention-kernels attention --shapes 64x12x197x64,64x16x257x64,32x16x257x80 \
    --mode fwd,bwd --peers none
fi

if [[ -n $DRY ]]; then exit 0; fi
timeout 20 python3 -m benchmarks report "$OUT/rows.jsonl" --check | tee "$OUT/table.txt"
cat "$OUT/steps.jsonl"
exit "$FAILED"
