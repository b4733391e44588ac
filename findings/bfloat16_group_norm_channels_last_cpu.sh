#!/usr/bin/env bash
# torch 2.14.1 on a CPU: a GroupNorm of channels-last bfloat16 images, with few channels in a group,
# takes several times as long as the same in float32.
#
# Channels-last and autocast to bfloat16 are both what PyTorch advises for convolutions on a CPU, and
# CPU autocast lets GroupNorm compute in bfloat16. One expects at most the time of float32, for half
# as many bytes are read and written. So it is with 32 channels in a group, and in the contiguous
# layout. But with 4 or 8 channels in a group (a U-Net with 8 groups and 32 or 64 channels) forward
# and backward pass take 4.8 and 3.7 times as long together (one core of an Intel Xeon; similar
# with ATEN_CPU_CAPABILITY=avx2). A GroupNorm of x.float() avoids it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import time

import torch


def seconds(dtype, layout, channels, size):
    norm = torch.nn.GroupNorm(8, channels)
    x = torch.randn(64, channels, size, size).to(dtype).to(memory_format=layout).requires_grad_()
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        y = norm(x)
        y.backward(torch.ones_like(y))
        best = min(best, time.perf_counter() - start)
    return best


ratios = {}
for name in ("channels_last", "contiguous_format"):
    for channels, size in ((32, 28), (64, 14), (256, 7)):
        slow, fast = (seconds(dtype, getattr(torch, name), channels, size)
                      for dtype in (torch.bfloat16, torch.float32))
        ratios[name, channels // 8] = slow / fast
        print(f"torch {torch.__version__}, {name}, {channels // 8} channels in a group: bfloat16 "
              f"takes {slow / fast:.2f} times as long as float32", flush=True)
few = [ratios["channels_last", n] for n in (4, 8)]
rest = [ratio for key, ratio in ratios.items() if key not in {("channels_last", 4),
                                                               ("channels_last", 8)}]
assert min(few) > 2, "torch has changed: bfloat16 is no longer much slower"
assert max(rest) < min(few) / 1.5, "torch has changed: the other forms are slow, too"
PYTHON
