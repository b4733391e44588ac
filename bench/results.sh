#!/usr/bin/env bash
# All tables and plots of RESULTS.md that compare samplers, from the weights that we ship, on one
# machine, one script after the other.
#
#     bash bench/results.sh                  sets of 5,000: hours on a CPU
#     SAMPLES=1000 bash bench/results.sh     sets of 1,000
#     DEVICE=cuda bash bench/results.sh      on a GPU (we expect five minutes on a large one)
#     bash bench/results.sh --dry-run DIR    in miniature, with networks trained for it
#
# A script that is done is not repeated: after a stop, call it again. Everything is in runs/results
# (or DIR): the tables in results.md, pictures in <script>/, plots in 05_compare_N/. On a CPU,
# samplers of more than 100 network calls make at most 1,000 images, so there is a second table, of
# 1,000 each. Pictures and plots replace those in assets/, tables those in RESULTS.md (with --dry-run
# in DIR/RESULTS.md alone).
# Needs MNIST in data/, or a way to download it. PYTHON=... names another interpreter.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python} device=${DEVICE:-cpu} samples=${SAMPLES:-5000} few=1000
out=runs/results how=--sample-only small=
if [ "${1-}" = --dry-run ]; then
    out=${2:?a folder for the results} samples=10 few=5 small="--fast-dev --epochs 1" how=$small
fi
mkdir -p "$out"
made="sets of $samples on $device" before=$(cat "$out/made.txt" 2>/dev/null || true)
if [ "${before:-$made}" != "$made" ]; then
    echo "$out has $before: move it away first"
    exit 1
fi
echo "$made" >"$out/made.txt"

stage() { # its name, then its command; what it prints goes to NAME.txt
    local name=$1
    shift
    [ -e "$out/$name.txt" ] && return
    echo "$name: $*"
    "$@" >"$out/$name.part"
    mv "$out/$name.part" "$out/$name.txt"
}

for script in 01_ddpm_ddim 02_latent_diffusion 03_cfg 04_rectified_flow 04b_latent_rflow \
    06_meanflow 07_drifting; do
    stage $script "$python" $script.py $how --device "$device" --eval-samples "$samples" \
        --out-dir "$out/$script"
done
for n in "$samples" "$few"; do
    stage "05_compare_$n" "$python" 05_compare.py --device "$device" --runs "$out" --eval-samples "$n" \
        --out-dir "$out/05_compare_$n" $small
done
cat "$out/05_compare_$samples/comparison.md" "$out/05_compare_$few/comparison.md" >"$out/results.md"
cp RESULTS.md "$out/RESULTS.md"
"$python" bench/write_tables.py "$out/results.md" "$out/RESULTS.md"
if [ "${1-}" != --dry-run ]; then
    cp "$out/RESULTS.md" RESULTS.md
fi
for old in assets/0*; do # assets/01_path.gif is runs/results/01_ddpm_ddim/path.gif
    name=$(basename "$old")
    for new in "$out/${name%%_*}_"*/"${name#*_}"; do
        if [ -e "$new" ] && [ "${1-}" != --dry-run ]; then
            cp "$new" "$old"
            break # the plots of 1,000 are those of the second table
        fi
    done
done
if [ "${1-}" = --dry-run ]; then
    "$python" bench/pictures.py "$out" "$out"
else
    "$python" bench/pictures.py "$out" assets # those with many samplers: fewer rows, and distances
fi
echo "all is done: $out/results.md"
