"""What is each way to speed up 01 worth, on this device? Those that it uses, and those it does not.

    python bench/speed_ups.py

Sampling: milliseconds a network call, for 16 images and for 1,000. Training: images/s in batches
of 128, after a warm-up. "eager" is plain PyTorch; "graph" is what our samplers do on CUDA.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
common = importlib.import_module("common")
ddpm = importlib.import_module("01_ddpm_ddim")


def seconds(run, device: str, calls: int) -> tuple[float, float]:
    """Of the warm-up, three calls; and of one call after it."""
    times = [time.perf_counter()]
    for n in (3, calls):
        for _ in range(n):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    return times[1] - times[0], (times[2] - times[1]) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast-dev", action="store_true", help="small, and nothing is compiled")
    mine = parser.parse_args()
    device, width, calls = mine.device, 8 if mine.fast_dev else 32, 3 if mine.fast_dev else 200
    args = ddpm.parse_args(["--device", device, "--out-dir", "runs/speed_ups", "--off", "graph"])
    schedule = ddpm.make_schedule(1000, device)

    def network(batch: int, compiled: bool):
        model = ddpm.UNet(width, 1000).to(device, memory_format=torch.channels_last)
        inputs = (torch.randn(batch, 1, 28, 28, device=device),
                  torch.randint(1000, (batch,), device=device))
        return (torch.compile(model, dynamic=False) if compiled else model), inputs

    ways = [("eager", False, False, False), ("bfloat16 autocast", True, False, False)]
    if device == "cuda":
        ways += [("graph", False, False, True), ("graph, autocast", True, False, True),
                 ("compiled, autocast", True, True, False),
                 ("graph, compiled, autocast", True, True, True)]
    print("| sampling | images | ms a call | warm-up, s |\n|---|---|---|---|")
    for name, bf16, compiled, graph in ways:
        args.speed = ["graph"] if graph else []
        for batch in (16, 32 if mine.fast_dev else 1000):
            model, inputs = network(batch, compiled and not mine.fast_dev)
            with torch.autocast(device, torch.bfloat16, bf16, cache_enabled=False):
                net = common.as_function(model, args)
                warm_up, each = seconds(lambda n=net, i=inputs: n(*i), device, calls)
            print(f"| {name} | {batch:,} | {1000 * each:.3f} | {warm_up:.1f} |")

    print("\n| training | images/s | warm-up, s |\n|---|---|---|")
    for name, bf16, compiled, graph in ways:
        if graph:
            continue
        model, (x, _) = network(128, compiled and not mine.fast_dev)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

        def step(model=model, x=x, optimizer=optimizer, bf16=bf16):
            with torch.autocast(device, torch.bfloat16, bf16, cache_enabled=False):
                loss = ddpm.diffusion_loss(model, schedule, x)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        warm_up, each = seconds(step, device, calls)
        print(f"| {name} | {len(x) / each:,.0f} | {warm_up:.1f} |")


if __name__ == "__main__":
    main()
