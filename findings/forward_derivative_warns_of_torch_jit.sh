#!/usr/bin/env bash
# torch 2.14.1: the first forward-mode derivative says that torch.jit.script is deprecated.
#
# MeanFlow needs a Jacobian-vector product of its network in each training step: torch.func.jvp. The
# code below uses nothing of TorchScript, so one expects no word about it. But the first call prints
# a FutureWarning that asks to switch from torch.jit.script to torch.compile: torch itself scripts its
# decompositions when forward-mode differentiation begins, also for a function that needs none of
# them. torch.func.grad says nothing. Where warnings are errors, as in many test suites, that first
# jvp raises. A filter for this message helps.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
cat >"$folder/example.py" <<'PYTHON'
import sys

import torch

one = torch.ones(1)
if sys.argv[1] == "jvp":
    print("d sin:", torch.func.jvp(torch.sin, (one,), (one,))[1].item())
else:
    print("d sin:", torch.func.grad(lambda x: x.sin().sum())(one).item())
PYTHON
python="$folder/venv/bin/python"
"$python" -c 'import torch; print("torch", torch.__version__)'
for how in grad jvp; do
    said=$("$python" "$folder/example.py" $how 2>&1)
    echo "$how: $(echo "$said" | grep -o 'd sin: .*\|[A-Za-z]*Warning: .torch.jit.script. is .*' | tr '\n' ' ')"
    case $how in
    grad) ! echo "$said" | grep -q 'torch.jit.script' || exit 1 ;;
    jvp) echo "$said" | grep -q 'Warning.*torch.jit.script' || { echo "torch has changed"; exit 1; } ;;
    esac
done
if "$python" -W error "$folder/example.py" jvp 2>"$folder/error"; then
    echo "torch has changed: no error where warnings are errors"
    exit 1
fi
echo "with -W error: $(tail -n 1 "$folder/error" | cut -c1-70)"
