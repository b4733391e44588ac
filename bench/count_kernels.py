"""What would a network call of 01 cost on an H100? An estimate, on a machine without a GPU.

    python bench/count_kernels.py

Counts the kernels that a forward pass launches, on fake tensors. A kernel is taken to last as long
as its inputs and outputs need at 2.5 TB/s, but 1.8 µs at least. What that leaves out: arithmetic,
caches, and the copies between memory layouts that group norms and convolutions make.

Then it counts the kernels of a training step as in fit(); and those of Muon, as it is, and for one
matrix after the other.
"""

import importlib
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
common = importlib.import_module("common")
ddpm = importlib.import_module("01_ddpm_ddim")

FREE = {"view", "t", "transpose", "permute", "detach", "unsqueeze", "slice", "select", "expand",
        "_unsafe_view", "split", "alias", "squeeze", "empty", "empty_like", "unbind", "device",
        "_record_function_enter_new", "_record_function_exit"}
KERNELS = {"native_group_norm": 3, "native_group_norm_backward": 5, "mse_loss": 2,
           "convolution": 2, "convolution_backward": 3,  # one of them for the bias
           "select_backward": 2, "constant_pad_nd": 2}  # zeros, then a copy
LISTS = {"_fused_adamw_": 36, "_foreach_lerp_": 64}  # as many tensors in one kernel


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.kernels, self.microseconds = 0, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name not in FREE:
            kernels = KERNELS.get(name, 1)
            if name in LISTS:
                kernels = -(-len(args[0]) // LISTS[name])
            elif name == "constant_pad_nd" and not any(args[1]):
                kernels = 1  # a copy alone
            size = sum(x.nbytes for x in tree_leaves((args, out)) if isinstance(x, Tensor))
            self.kernels += kernels
            self.microseconds += max(1.8 * kernels, size / 2.5e6)
        return out


def autocast(on: bool):
    with mock.patch("torch.cuda.is_available", lambda: True), \
         mock.patch("torch.cuda.is_bf16_supported", lambda: True):
        return torch.autocast("cuda", torch.bfloat16, on, cache_enabled=False)


def matrix_after_matrix(weights: list, means: list, lr: Tensor, momentum: float, decay: float):
    """Muon's step as it would be without batches."""
    kept = 1 - lr * decay
    for w, mean in zip(weights, means):
        x = F.normalize(mean.lerp_(w.grad, 1 - momentum).flatten(1), dim=(0, 1))
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
        w.mul_(kept).sub_(lr * x.reshape(w.shape))


def count_step() -> dict[str, int]:
    """The kernels of the parts of a training step, and of matrix_after_matrix()."""
    parts = {}

    def part(name: str) -> None:
        parts[name], count.kernels = count.kernels, 0

    with torch.device("meta"), Count() as count, \
         mock.patch("torch.optim.adam._device_dtype_check_for_fused"):
        model = ddpm.make_models(32, 1000, "meta")["diffusion"]
        schedule = ddpm.make_schedule(1000, "meta")
        large = [w for w in model.parameters() if w.dim() == 4 and min(w.shape[:2]) >= 16]
        small = [w for w in model.parameters() if w.dim() < 4 or min(w.shape[:2]) < 16]
        rate = torch.empty(())
        muon = common.Muon(large, rate)
        adamw = torch.optim.AdamW(small, fused=True, capturable=True)
        slow, fast = ([x.detach().clone() for x in model.parameters()] for _ in range(2))
        means = [torch.empty_like(w) for w in large]
        x, t = torch.empty(128, 1, 28, 28), torch.empty(128, dtype=torch.long)
        for _ in range(2):  # the first step also makes what the optimizers remember
            count.kernels = 0
            loss = ddpm.diffusion_loss(model, schedule, x, t, torch.randn_like(x))
            part("forward")
            model.zero_grad()
            loss.backward()
            part("backward")
            muon.step()
            part("Muon")
            adamw.step()
            part("AdamW")
            get_ema_multi_avg_fn(0.99)(slow, fast, None)
            part("average")
        with torch.no_grad():
            matrix_after_matrix(large, means, rate, 0.95, 0.1)
        part(f"Muon, if its {len(large)} matrices came one after the other")
    return parts


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
    print("\n| a training step | kernels |\n|---|---:|")
    for name, kernels in count_step().items():
        print(f"| {name} | {kernels} |")


if __name__ == "__main__":
    main()
