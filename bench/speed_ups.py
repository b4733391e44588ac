"""What is each way to speed up 01 worth, on this device? Those that it uses, and those it does not.

    python bench/speed_ups.py

Sampling: milliseconds a network call, for 16 images and for 1,000. Training: images/s in batches
of 128, after a warm-up. On CUDA the scripts train and sample by "graph", elsewhere by "eager".
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
common = importlib.import_module("common")
ddpm = importlib.import_module("01_ddpm_ddim")


def seconds(run, device: str, calls: int) -> tuple[float, float]:
    """Of the warm-up, four calls, of which the last records a graph; and of one call after it."""
    times = [time.perf_counter()]
    for n in (4, calls):
        for _ in range(n):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    return times[1] - times[0], (times[2] - times[1]) / calls


def training_step(model, schedule, precision):
    """As in fit(): what it does to a batch of images."""
    large = [w for w in model.parameters() if w.dim() == 4 and min(w.shape[:2]) >= 16]
    small = [w for w in model.parameters() if w.dim() < 4 or min(w.shape[:2]) < 16]
    rate = torch.full((), 1e-4, device=small[0].device)
    muon = common.Muon(large, 10 * rate)
    adamw = torch.optim.AdamW(small, rate, fused=True, capturable=True)
    average, fast = get_ema_multi_avg_fn(0.99), [*model.parameters()]
    slow = [w.detach().clone() for w in fast]

    def step(x):
        with precision:
            t = torch.randint(1000, (len(x),), device=x.device)
            loss = ddpm.diffusion_loss(model, schedule, x, t, torch.randn_like(x))
        model.zero_grad()
        loss.backward()
        muon.step()
        adamw.step()
        average(slow, fast, None)
        return loss.detach()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast-dev", action="store_true", help="small, and nothing is compiled")
    mine = parser.parse_args()
    device, width, calls = mine.device, 8 if mine.fast_dev else 32, 3 if mine.fast_dev else 200
    args = ddpm.parse_args(["--device", device])
    schedule = ddpm.make_schedule(1000, device)

    def network(batch: int, way: str):
        torch.compiler.reset()  # so that each way compiles anew
        layout = torch.contiguous_format if "channels first" in way else torch.channels_last
        model = ddpm.UNet(width, 1000).to(device, memory_format=layout)
        inputs = (torch.randn(batch, 1, 28, 28, device=device),
                  torch.randint(1000, (batch,), device=device))
        if "compiled" in way and not mine.fast_dev:
            model = torch.compile(model, dynamic=False)
        return model, inputs, torch.autocast(device, torch.bfloat16, "autocast" in way,
                                             cache_enabled=False)

    ways = ["eager", "autocast", "channels first"]
    if device == "cuda":
        ways += ["compiled", "compiled, autocast", "graph", "graph, autocast",
                 "graph, channels first", "graph, compiled", "graph, compiled, autocast"]
    print("| sampling | images | ms a call | warm-up, s |\n|---|---|---|---|")
    for way in ways:
        args.no_graphs = "graph" not in way
        for batch in (16, 32 if mine.fast_dev else 1000):
            model, inputs, precision = network(batch, way)
            net = common.recorded(model, args)
            with precision, torch.no_grad():
                warm_up, each = seconds(lambda n=net, i=inputs: n(*i), device, calls)
            print(f"| {way} | {batch:,} | {1000 * each:.3f} | {warm_up:.1f} |")

    print("\n| training | images/s | warm-up, s |\n|---|---|---|")
    for way in ways:
        args.no_graphs = "graph" not in way
        model, (x, _), precision = network(128, way)
        step = common.recorded(training_step(model, schedule, precision), args)
        warm_up, each = seconds(lambda step=step, x=x: step(x), device, calls)
        print(f"| {way} | {len(x) / each:,.0f} | {warm_up:.1f} |")


if __name__ == "__main__":
    main()
