#!/usr/bin/env bash
# torchvision 0.29.1, torch 2.14.1: "from torchvision import datasets" imports torch's compiler.
#
# Who only wants MNIST or make_grid expects a module that reads files. But torchvision's __init__
# imports all models, one of their operators imports torch._dynamo, and that imports sympy and
# torch.distributed: some 1,000 modules that torch itself had left for the first torch.compile.
# So it takes about as long again as the import of torch, in every process that a test starts (on
# two cores of an AMD EPYC 2.2 s for torch, 2.0 s more for datasets).
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

start = time.perf_counter()
import torch

alone, seconds = {*sys.modules}, time.perf_counter() - start
start = time.perf_counter()
from torchvision import datasets

more, later = {*sys.modules} - alone, time.perf_counter() - start
print(f"torch {torch.__version__}: {len(alone):,} modules, {seconds:.1f} s")
print(f"datasets: {len(more):,} more modules, {later:.1f} s")
compiler = ["torch._dynamo", "sympy", "torch.distributed.fsdp"]
for name in compiler:
    print(f"  {name}: with torch {name in alone}, with datasets {name in sys.modules}")
assert datasets.MNIST
assert not {*compiler} & alone, "torch imports its compiler itself now"
assert {*compiler} <= more, "torchvision has changed"
assert len(more) > 500, "torchvision has changed"
PYTHON
