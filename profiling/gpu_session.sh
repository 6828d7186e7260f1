#!/usr/bin/env bash
# What is worth measuring on a GPU that is there for minutes, in parts of at most 400 s each. profiling/README.md says how a session
# is prepared.
#
#     bash profiling/gpu_session.sh kernels step            # these parts, in this order; without any: checks kernels step chain
#     bash profiling/gpu_session.sh --dry-run kernels       # prints the commands and runs none; needs no GPU
#     bash profiling/gpu_session.sh --small chain           # tries the script itself on a CPU, with the smallest sizes
#     OUT=/tmp/out PYTHON=/opt/venv/bin/python PYTHONPATH=/tmp/site PART_SECONDS=250 bash profiling/gpu_session.sh checks
#
# A part compiles in parallel processes first, into the caches on disk, and then measures one thing after the other, the most
# important first. Each step has its own time, or what its part has left, and writes at once, so what is done by then is kept; a step
# that fails does not stop the others, and the exit status is the number of steps that failed (255 at most). Peers are measured where
# they can be imported, from PYTHONPATH too.
#
# In OUT (profiling/results/<gpu>/ unless it is set):
#     summary.md      each bar of bars.py: figure, bar, met, not met or not measured; written anew after each part from all *.jsonl
#     checks.txt      wrong nearest codes against float64 (exactness.jsonl); failing tests as they fail (tests.jsonl)
#     kernels.txt     operations beside their peers (bench.jsonl, and bench.md made of it); host time (host.jsonl)
#     step.txt        a training step beside diffusers' blocks (step.jsonl); where its time and memory go (profile/)
#     chain.txt       train_dae, encode, train_prior, sample under accelerate (chain.jsonl)
#     versions.txt, failed.txt
set -u
cd "$(dirname "$0")/.." || exit 1

usage() {
    echo "usage: bash profiling/gpu_session.sh [--dry-run] [--small] [checks] [kernels] [step] [chain]${1:+; $1}" >&2
    exit 2
}

DRY='' SMALL='' PARTS=()
for word in "$@"; do
    case $word in
        --dry-run) DRY=1 ;;
        --small) SMALL=1 ;;
        checks | kernels | step | chain) PARTS+=("$word") ;;
        *) usage "got '$word'" ;;
    esac
done
[ "${#PARTS[@]}" -gt 0 ] || PARTS=(checks kernels step chain)
PART_SECONDS=${PART_SECONDS:-400} # of a part; a step gets its own time or what is left
[[ $PART_SECONDS =~ ^[1-9][0-9]*$ ]] || usage "PART_SECONDS: expected whole seconds, got '$PART_SECONDS'"
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

DEVICE=cuda GPU='the GPU' JOBS=$(nproc) LAUNCHED=recipes/accelerate/one_gpu_bf16.yaml
if [ -n "$SMALL" ]; then
    DEVICE=cpu GPU=small LAUNCHED=recipes/accelerate/one_process.yaml
elif [ -z "$DRY" ]; then
    GPU=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null) || {
        echo "$PYTHON sees no CUDA device; --dry-run and --small need none" >&2
        exit 1
    }
fi
OUT=${OUT:-profiling/results/$(echo "$GPU" | tr '[:upper:]' '[:lower:]' | tr -cs '[:alnum:]\n' '-')}
BEGUN=$SECONDS # of the part
[ -n "$DRY" ] || mkdir -p "$OUT"

has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null; }

# fresh FILE...: what an earlier session left of this part is no result of this one
fresh() {
    local file
    [ -n "$DRY" ] && return
    for file in "$@"; do : >"$OUT/$file"; done
}

# step NAME SECONDS FILE COMMAND...: runs the command, and writes what it prints to the screen and to FILE
step() {
    local name=$1 seconds=$2 file=$OUT/$3 left=$((PART_SECONDS - SECONDS + BEGUN)) begun=$SECONDS status
    shift 3
    if [ -n "$DRY" ]; then
        printf '# %s (%s s at most) -> %s\n' "$name" "$seconds" "$file"
        printf '%q ' "$@"
        echo
        return
    fi
    if [ "$left" -lt 5 ]; then
        echo "== $name: left out, the part's $PART_SECONDS s are used up" | tee -a "$file" "$OUT/failed.txt"
        return
    fi
    [ "$seconds" -le "$left" ] || seconds=$left
    echo "== $name ($seconds s at most)" | tee -a "$file"
    timeout -k 15 -s "${SIGNAL:-TERM}" "$seconds" "$@" 2>&1 | tee -a "$file"
    status=${PIPESTATUS[0]}
    echo "== $name: status $status after $((SECONDS - begun)) s" | tee -a "$file"
    [ "$status" -eq 0 ] || echo "$name: status $status" >>"$OUT/failed.txt"
}

# aside NAME SECONDS FILE COMMAND...: a step beside the others, until `wait`; a dry run prints it like any other
aside() { if [ -n "$DRY" ]; then step "$@"; else step "$@" & fi; }

versions() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit --format=csv 2>/dev/null
    "$PYTHON" -c 'import platform, torch, triton; print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__, "cuda", torch.version.cuda)'
    echo "commit ${COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}"
}

checks() {
    local queries=1000000 impl=triton family workers=() tests=(tests/kernels --ignore=tests/kernels/test_aot.py)
    [ -z "$SMALL" ] || queries=300 impl=reference tests=(tests/kernels/test_powers.py)
    if has xdist && [ -z "$SMALL" ]; then workers=(-n 12 --dist worksteal); fi # most of the time is compilation
    fresh checks.txt exactness.jsonl tests.jsonl
    local exact=("$PYTHON" profiling/exactness.py --device "$DEVICE" --impl "$impl" --precision exact --precision fast)
    for family in random uniform normalized pairs; do
        aside "compiling for $family" 60 checks.txt "${exact[@]}" --family "$family" --queries 256
    done
    wait
    step "exact nearest codes" 80 checks.txt "${exact[@]}" --queries "$queries" --json "$OUT/exactness.jsonl"
    # SIGINT: pytest then still says what passed and failed.
    SIGNAL=INT step "tests on the device" 320 checks.txt env PYTHONPATH="$PYTHONPATH:$PWD/profiling" \
        "$PYTHON" -m pytest "${tests[@]}" -m "not slow" -q --tb=line -p failing_tests --failures "$OUT/tests.jsonl" \
        --continue-on-collection-errors -p no:cacheprovider "${workers[@]}"
    step "the same queries by torch in float32" 20 checks.txt "$PYTHON" profiling/exactness.py --device "$DEVICE" --impl float32 \
        --queries "$queries" --json "$OUT/exactness.jsonl"
}

bench() {
    step "$1" "$2" kernels.txt "$PYTHON" profiling/bench_kernels.py --device "$DEVICE" --op "$1" --json "$OUT/bench.jsonl" "${@:3}"
}

kernels() {
    local few
    fresh kernels.txt bench.jsonl host.jsonl
    if [ -n "$SMALL" ]; then
        few=(--shape "N=32,M=32,D=4,L=4" --no-compile --impl reference --seconds 0.1)
        step "compiling" 100 kernels.txt "$PYTHON" profiling/bench_kernels.py --device cpu --op sliced_wasserstein "${few[@]}" --prepare
        bench sliced_wasserstein 100 "${few[@]}"
    else
        step "compiling what the bars need" 140 kernels.txt "$PYTHON" profiling/bench_kernels.py --bars --prepare --jobs "$JOBS"
        step "host time" 30 kernels.txt "$PYTHON" profiling/host_overhead.py --seconds 0.3 --json "$OUT/host.jsonl"
        bench nearest_code 80 --bars --seconds 3
        bench group_norm_silu 40 --bars --seconds 3
        bench linear_cross_entropy 45 --bars --seconds 3
        bench sinkhorn_divergence 45 --bars --seconds 3
        bench sample_tokens 70 --bars --seconds 3
        # No bars: with what is left, and without what compiles for long.
        bench mmd 30 --no-compile --seconds 2
        bench energy_distance 30 --no-compile --seconds 2
        bench lpips 30 --no-compile --seconds 2
        bench attention 30 --no-compile --seconds 2
        bench vector_quantize 30 --no-compile --seconds 2
        bench transformer_layers 30 --seconds 1
        bench codebook_statistics 20 --no-compile --seconds 1
        bench sliced_wasserstein 20 --no-compile --seconds 1
        bench frechet_distance 20 --no-compile --seconds 1
        bench precision_recall_density_coverage 20 --no-compile --seconds 1
    fi
    step "tables" 10 bench.md "$PYTHON" profiling/bench_report.py "$OUT/bench.jsonl"
}

training_step() {
    local layout config=recipes/configs/imagenet256.yaml tiny=() graphs=()
    if [ -n "$SMALL" ]; then
        config=recipes/configs/photos.yaml
        tiny=(data.resolution=16 autoencoder.base_channels=8 stage1.train_batch_size=4 stage2.train_batch_size=4)
    fi
    [ -n "$SMALL" ] || graphs=(--ours cuda_graphs=true)
    fresh step.txt step.jsonl
    local run=("$PYTHON" profiling/bench_step.py --device "$DEVICE" --config "$config" mixed_precision=bf16 "${tiny[@]}" "${graphs[@]}")
    if [ -z "$SMALL" ]; then
        for layout in contiguous channels_last; do
            aside "compiling, $layout" 150 step.txt "${run[@]}" --compile --layout "$layout" --seconds 0
        done
        wait
    fi
    step "beside diffusers, eager" 70 step.txt "${run[@]}" --seconds 20 --json "$OUT/step.jsonl"
    [ -n "$SMALL" ] || step "beside diffusers, compiled" 150 step.txt "${run[@]}" --compile --seconds 25 --json "$OUT/step.jsonl"
    step "profile" 60 step.txt "$PYTHON" profiling/profile_step.py --device "$DEVICE" --config "$config" --synthetic \
        mixed_precision=bf16 "${tiny[@]}" --stage stage1 --steps 10 --output "$OUT/profile" --json "$OUT/profile.jsonl"
}

# chain_of NAME CONFIG OVERRIDE...: the recipes of one chain, each as a user starts it; the first that fails ends it
chain_of() {
    local name=$1 config=$2 recipe begun status
    shift 2
    for recipe in train_dae encode train_prior sample; do
        begun=$SECONDS
        "$PYTHON" -m accelerate.commands.launch --config_file "$LAUNCHED" "recipes/$recipe.py" --config "$config" "$@"
        status=$?
        printf '{"chain": "%s", "recipe": "%s", "status": %d, "seconds": %d}\n' "$name" "$recipe" "$status" "$((SECONDS - begun))" \
            >>"$OUT/chain.jsonl"
        [ "$status" -eq 0 ] || return "$status"
    done
}

# chain_aside TITLE NAME OVERRIDE...: that beside the others
chain_aside() {
    local title=$1 name=$2 recipe
    shift 2
    set -- "$name" "recipes/configs/$name.yaml" stage1.max_train_steps="$FEW" stage2.max_train_steps="$FEW" \
        prior.max_train_steps="$FEW" validation_steps="$FEW" checkpointing_steps="$FEW" sampling.num_samples=64 \
        sampling.batch_size=64 output_dir="$OUT/runs/$name" "$@"
    if [ -n "$DRY" ]; then
        printf '# %s (380 s at most) -> %s\n' "$title" "$OUT/chain.txt"
        for recipe in train_dae encode train_prior sample; do
            printf '%q ' "$PYTHON" -m accelerate.commands.launch --config_file "$LAUNCHED" "recipes/$recipe.py" --config "${@:2}"
            echo
        done
        return
    fi
    step "$title" 380 chain.txt bash -c 'chain_of "$@"' chain "$@" &
}

chain() {
    FEW=30
    local compile=true
    if [ -n "$SMALL" ]; then FEW=4 compile=false; fi
    fresh chain.txt chain.jsonl
    [ -n "$DRY" ] || rm -rf "${OUT:?}/runs"
    # Beside each other: nothing is measured but that they run.
    chain_aside digits digits prior.num_augmentations=2
    chain_aside "photos-kl, compile=$compile" photos-kl stage2.loss.adversarial_start=$((FEW / 2)) compile="$compile"
    wait
    [ -n "$DRY" ] || rm -rf "${OUT:?}/runs" # checkpoints are no result
}

export PYTHON LAUNCHED OUT
export -f versions chain_of
fresh failed.txt versions.txt
step "versions" 30 versions.txt bash -c versions
for part in "${PARTS[@]}"; do
    BEGUN=$SECONDS
    echo "==== $part: $PART_SECONDS s at most"
    case $part in
        step) training_step ;;
        *) "$part" ;;
    esac
    if [ -n "$DRY" ]; then continue; fi
    "$PYTHON" profiling/bars.py ${SMALL:+--small} "$OUT"/{exactness,tests,bench,host,step,chain}.jsonl >"$OUT/summary.md" ||
        echo "summary: failed" >>"$OUT/failed.txt"
    echo "==== $part: done after $((SECONDS - BEGUN)) s"
done
if [ -n "$DRY" ]; then exit 0; fi
cat "$OUT/summary.md"
FAILED=$(wc -l <"$OUT/failed.txt")
echo "$FAILED steps failed, $SECONDS s, results in $OUT"
cat "$OUT/failed.txt"
exit "$((FAILED > 255 ? 255 : FAILED))"
