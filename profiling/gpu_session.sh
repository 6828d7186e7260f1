#!/usr/bin/env bash
# Everything worth measuring on a GPU, in under nine minutes, on a machine with torch, triton, PyYAML and pytest alone.
#
#     bash profiling/gpu_session.sh                  # writes profiling/results/<gpu>/
#     OUT=/tmp/out bash profiling/gpu_session.sh     # writes there
#     PYTHON=/opt/venv/bin/python PYTHONPATH=/tmp/site bash profiling/gpu_session.sh
#
# Every step has its own time and writes at once, so what is done by a kill is kept. A step that fails does not stop the others;
# the exit status is the number of steps that failed. Peers (geomloss, POT, vector-quantize-pytorch, flash-kmeans, pykeops,
# diffusers) are measured where they can be imported, from PYTHONPATH too, and listed as not installed elsewhere; test files that import an
# absent one are reported as errors, and the other files run.
#
#     versions.txt      nvidia-smi, packages, commit
#     checks.txt        tests of the kernels on this GPU, then wrong nearest codes against float64; exactness.jsonl
#     step.txt          the training step beside diffusers' blocks, step.jsonl; where its time and memory go, profile/
#     bench.txt         tables as they come; bench.jsonl the same as JSON lines, bench.md and plots.tgz made from it at the end
set -u
cd "$(dirname "$0")/.." || exit 1

LIMIT=525  # seconds for all steps; a step gets its own time or what is left
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

GPU=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null) || { echo "$PYTHON sees no CUDA device" >&2; exit 1; }
OUT=${OUT:-profiling/results/$(echo "$GPU" | tr '[:upper:]' '[:lower:]' | tr -cs '[:alnum:]\n' '-')}
mkdir -p "$OUT"
FAILED=0

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

# step NAME SECONDS FILE COMMAND...: runs the command, and writes what it prints to the screen and to FILE
step() {
    local name=$1 seconds=$2 file=$OUT/$3 left=$((LIMIT - SECONDS)) begun=$SECONDS status
    shift 3
    if [ "$left" -lt 5 ]; then
        echo "== $name: left out, the session's $LIMIT s are used up" | tee -a "$file"
        FAILED=$((FAILED + 1))
        return
    fi
    [ "$seconds" -le "$left" ] || seconds=$left
    echo "== $name ($seconds s at most)" | tee -a "$file"
    timeout -k 5 "$seconds" "$@" 2>&1 | tee -a "$file"
    status=${PIPESTATUS[0]}
    echo "== $name: status $status after $((SECONDS - begun)) s" | tee -a "$file"
    [ "$status" -eq 0 ] || FAILED=$((FAILED + 1))
}

versions() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit --format=csv
    "$PYTHON" -c 'import platform, torch, triton; print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__, "cuda", torch.version.cuda)'
    git rev-parse HEAD 2>/dev/null
}
export PYTHON
export -f versions

WORKERS=()
if has xdist; then WORKERS=(-n 6 --dist loadfile); fi  # most of the time is compilation

: > "$OUT/versions.txt"; : > "$OUT/checks.txt"; : > "$OUT/bench.txt"; : > "$OUT/bench.jsonl"; : > "$OUT/step.txt"; : > "$OUT/step.jsonl"; : > "$OUT/exactness.jsonl"

step versions 20 versions.txt bash -c versions
step "tests on the GPU" 110 checks.txt "$PYTHON" -m pytest tests/kernels -m "not slow" -q -rf --tb=short \
    --continue-on-collection-errors -p no:cacheprovider --ignore=tests/kernels/test_aot.py "${WORKERS[@]}"
step "exact nearest codes" 50 checks.txt "$PYTHON" profiling/exactness.py --impl triton --queries 1000000 \
    --precision exact --precision fast --json "$OUT/exactness.jsonl"
step "the same by torch in float32" 20 checks.txt "$PYTHON" profiling/exactness.py --impl float32 --queries 1000000 \
    --json "$OUT/exactness.jsonl"

# The figures the project promises first; the others with what is left.
bench() {
    step "bench $1" "$2" bench.txt "$PYTHON" profiling/bench_kernels.py --op "$1" --seconds 3 --json "$OUT/bench.jsonl" "${@:3}"
}
bench nearest_code 45 --shape N=32768,K=16384,D=256 --dtype bfloat16
step "training step beside diffusers" 60 step.txt "$PYTHON" profiling/bench_step.py --config recipes/configs/imagenet256.yaml \
    mixed_precision=bf16 --seconds 20 --json "$OUT/step.jsonl"
step "profile of a training step" 45 step.txt "$PYTHON" profiling/profile_step.py --config recipes/configs/imagenet256.yaml --synthetic \
    mixed_precision=bf16 --stage stage1 --stage prior \
    --steps 10 --output "$OUT/profile" --json "$OUT/step.jsonl"
bench group_norm_silu 60
bench sinkhorn_divergence 60
bench mmd 45
bench energy_distance 45
bench nearest_code 60 --shape N=32768,K=16384,D=8 --shape N=8192,K=1024,D=64 --dtype float32
bench vector_quantize 30
bench codebook_statistics 30
bench sliced_wasserstein 30
bench attention 30
bench lpips 30
bench linear_cross_entropy 30
bench frechet_distance 30
bench precision_recall_density_coverage 30
bench transformer_layers 40
bench sample_tokens 60

LIMIT=535  # the tables need a second
step tables 10 bench.md "$PYTHON" profiling/bench_report.py "$OUT/bench.jsonl"
if has matplotlib; then
    plots=$(mktemp -d)
    step plots 10 versions.txt bash -c "'$PYTHON' profiling/bench_report.py '$OUT/bench.jsonl' --plot '$plots' >/dev/null && tar -czf '$OUT/plots.tgz' -C '$plots' ."
    rm -rf "$plots"
fi
echo "$FAILED steps failed, $SECONDS s, results in $OUT"
exit "$FAILED"
