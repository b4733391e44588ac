#!/usr/bin/env bash
# All that we want to know of a GPU, in stages of at most nine minutes.
#
#     bash bench/gpu.sh                 we expect half an hour on a large GPU
#     MINUTES=9 bash bench/gpu.sh       the same in pieces: call it until it says that all is done
#     SAMPLES=1000 bash bench/gpu.sh    smaller sets for 05, for a small GPU (default 10000)
#     SCRIPTS="04_rectified_flow 01_ddpm_ddim" bash bench/gpu.sh      train these, in this order
#     bash bench/gpu.sh --dry-run DIR   in miniature, on a CPU
#
# What is done is not repeated, and a training that was cut off goes on after its last epoch. All
# results are in runs/gpu (or DIR): results.md, with tables for RESULTS.md, what it comes from, and
# SCRIPT.tgz with weights, pictures and figures of each script that has ended, to be carried away.
# Needs MNIST in data/, or a way to download it; pip install pytest for the tests on the device.
# PYTHON=... names another interpreter; it and DIR are relative to the repository.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python} device=cuda samples=${SAMPLES:-10000} out=runs/gpu
small=() short=(--epochs 3 --ddim-sweep 10)
if [ "${1-}" = --dry-run ]; then
    device=cpu samples=20 short=(--timesteps 4 --ddim-steps 2 --ddim-sweep 1)
    small=(--fast-dev --epochs 1) out=${2:?a folder for the results}
fi
mkdir -p "$out"
exec 9>"$out/lock"
flock -n 9 || { echo "this is already running, in $out"; exit 1; }
trap 'exit 130' INT TERM
end=$((60 * ${MINUTES:-1000000}))
unfinished=()

stage() { # its name, then its command
    local name=$1 begin=$SECONDS status=0 limit=$((end - SECONDS))
    shift
    [ -e "$out/$name.seconds" ] && return
    if [ "$limit" -lt 10 ]; then
        unfinished+=("$name")
        return
    fi
    echo "$name: $*"
    timeout --foreground $((limit < 540 ? limit : 540)) "$@" \
        >"$out/$name.log" 2>"$out/$name.errors" || status=$?
    local before
    before=$(cat "$out/$name.before" 2>/dev/null)
    local seconds=$((SECONDS - begin + ${before:-0}))
    if [ "$status" = 0 ]; then
        echo "$seconds" >"$out/$name.seconds"
        echo "    done in $seconds s"
    else
        echo "$seconds" >"$out/$name.before"
        unfinished+=("$name")
        [ "$status" = 124 ] && echo "    cut off after $seconds s" ||
            tail -qn 3 "$out/$name.log" "$out/$name.errors"
    fi
}

run() { # a script, with further options: from its checkpoint, if there is one
    local script=$1 resume=()
    shift
    [ -e "$out/$script/checkpoint.pt" ] && resume=(--resume)
    if [ "$device" = cpu ]; then # smaller still
        case $script in
            01*) set -- "${short[@]}" "$@" ;;
            0[23]*) set -- --timesteps 4 --ddim-steps 2 "$@" ;;
            04* | 06*) set -- --steps 1 "$@" ;;
            07*) set -- --toy-steps 16 "$@" ;;
        esac
    fi
    stage "$script" "$python" "$script.py" --device "$device" --out-dir "$out/$script" \
        --eval-samples "$samples" "${small[@]}" "${resume[@]}" "$@"
}

stage machine "$python" bench/gpu_table.py --describe "$device"
[ -e "$out/machine.seconds" ] || [ "$end" = 0 ] || exit 1 # no such device, or no such interpreter
for script in ${SCRIPTS:-04_rectified_flow 02_latent_diffusion 04b_latent_rflow 06_meanflow \
    07_drifting 01_ddpm_ddim 03_cfg}; do
    more=() vae=$out/02_latent_diffusion/checkpoint.pt
    case $script in 04b* | 06* | 07*) # a checkpoint of these holds the VAE
        [ -e "$vae" ] && [ ! -e "$out/$script/checkpoint.pt" ] && more=(--vae "$vae") ;;
    esac
    run "$script" "${more[@]}"
    if [ -e "$out/$script.seconds" ] && [ ! -e "$out/$script.tgz" ]; then
        "$python" bench/export_weights.py "$out/$script/checkpoint.pt" --to "$out/weights" &&
            tar -czf "$out/$script.tgz" -C "$out" --exclude "$script/checkpoint.pt" \
                --exclude "$script/pairs" --exclude "eval_*" "$script" "weights/$script.pt"
    fi
done
if [ ${#unfinished[@]} = 0 ]; then
    stage 05_compare "$python" 05_compare.py --device "$device" --runs "$out" \
        --out-dir "$out/05_compare" --eval-samples "$samples" "${small[@]}"
fi
for name in graphs no_graphs; do
    options=()
    [ "$name" = graphs ] || options=(--no-graphs)
    stage "$name" "$python" 01_ddpm_ddim.py --device "$device" --eval-samples 0 \
        --out-dir "$out/$name" "${small[@]}" "${short[@]}" "${options[@]}"
done
if [ "$device" = cuda ]; then
    stage tests "$python" -m pytest -q tests/test_device.py tests/test_bench.py -k GPU
fi
stage speed_ups "$python" bench/speed_ups.py --device "$device" "${small[@]:0:1}"
if "$python" -c "import diffusers, accelerate, denoising_diffusion_pytorch" 2>"$out/libraries.txt"; then
    stage libraries "$python" bench/libraries.py --device "$device"
else
    echo "libraries: skipped, they are not installed (see bench/libraries.py)"
fi
"$python" bench/gpu_table.py "$out" >"$out/results.md" || exit 1
if [ ${#unfinished[@]} = 0 ]; then
    echo "all is done: $out/results.md"
else
    echo "not done: ${unfinished[*]}; call this again to go on"
    exit 1
fi
