"""What would a network call of 01 cost on an H100? An estimate, on a machine without a GPU.

    python bench/count_kernels.py

Counts the kernels that a forward pass launches, on fake tensors. A kernel is taken to last as long
as its inputs and outputs need at 2.5 TB/s, but 1.8 µs at least. What that leaves out: arithmetic,
caches, and the copies between memory layouts that group norms and convolutions make.
"""

import importlib
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
ddpm = importlib.import_module("01_ddpm_ddim")

FREE = {"view", "t", "transpose", "permute", "detach", "unsqueeze", "slice", "select", "expand",
        "_unsafe_view", "split", "alias", "squeeze", "empty", "empty_like", "unbind", "device"}
KERNELS = {"native_group_norm": 3, "convolution": 2}  # a convolution adds its bias afterwards


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.kernels, self.microseconds = 0, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name not in FREE:
            kernels = KERNELS.get(name, 1)
            size = sum(x.nbytes for x in tree_leaves((args, out)) if isinstance(x, Tensor))
            self.kernels += kernels
            self.microseconds += max(1.8 * kernels, size / 2.5e6)
        return out


def autocast(on: bool):
    with mock.patch("torch.cuda.is_available", lambda: True), \
         mock.patch("torch.cuda.is_bf16_supported", lambda: True):
        return torch.autocast("cuda", torch.bfloat16, on, cache_enabled=False)


def main() -> None:
    print("| images | precision | kernels | estimate |\n|---:|---|---:|---:|")
    for n in (16, 128, 1000):
        for precision in ("float32", "bfloat16 autocast"):
            with FakeTensorMode(), torch.device("cuda"), torch.no_grad(), Count() as count:
                model = ddpm.UNet(32, 1000)
                x, t = torch.empty(n, 1, 28, 28), torch.empty(n)
                count.kernels, count.microseconds = 0, 0.0  # without those that made these
                with autocast(precision != "float32"):
                    model(x, t)
            print(f"| {n:,} | {precision} | {count.kernels} | {count.microseconds / 1000:.2f} ms |")


if __name__ == "__main__":
    main()
