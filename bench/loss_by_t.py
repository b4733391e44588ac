"""Where is the task hard? The loss of 01 and of 04 in each tenth of t, with the shipped weights.

    python bench/loss_by_t.py

Needs MNIST in data/. Writes runs/loss_by_t/01_loss_by_t.png and 04_loss_by_t.png. Everything is
held out: test digits with fresh noise for 01 and for the flow of 04, and for its reflow pairs that
the flow makes of fresh noise, on which the reflow has not been trained.
"""

import importlib
import sys
from itertools import pairwise
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
common = importlib.import_module("common")
ddpm = importlib.import_module("01_ddpm_ddim")
rflow = importlib.import_module("04_rectified_flow")


def networks(script):
    args = script.parse_args(["--sample-only", "--out-dir", "runs/loss_by_t"])
    models = common.load_networks(args.state, script.make_models(args))
    return args, {name: common.as_function(model, args) for name, model in models.items()}


def main() -> None:
    rng = torch.Generator().manual_seed(0)
    args, models = networks(ddpm)
    x = common.load_images(args, train=False)[0][:500]
    schedule = ddpm.make_schedule(args.timesteps, args.device)
    points = []
    for low, high in pairwise(torch.linspace(0, args.timesteps, 11).int().tolist()):
        t = torch.randint(low, high, (len(x),), generator=rng).to(args.device)
        loss = ddpm.diffusion_loss(models["diffusion"], schedule, x, t, torch.randn_like(x))
        points.append(((low + high) / 2, loss.item()))
    common.save_plot(Path("runs/loss_by_t/01_loss_by_t.png"), {"test digits": points},
                     title="Diffusion: which t is hard for v?", yscale="log",
                     xlabel="timestep t (0 is clean)", ylabel="squared error of v")

    args, models = networks(rflow)
    pairs = rflow.make_pairs(models["flow"], len(x), 10, rng, args.device)
    lines = {"flow: test digits and fresh noise": ("flow", torch.randn(x.shape), x),
             "reflow: new pairs of the flow": ("reflow", *pairs)}
    for line, (name, x0, x1) in lines.items():
        losses = []
        for i in range(10):
            t = ((i + torch.rand(len(x), generator=rng)) / 10).to(args.device)
            t = t.clamp(max=1 - rflow.TIME_LEFT)  # in training, velocities shrink after that
            x0, x1 = x0.to(args.device), x1.to(args.device)
            losses.append(rflow.flow_loss(models[name], x0, x1, t).item())
        print(line, [round(loss, 4) for loss in losses], sum(losses) / 10)
        lines[line] = [((i + 0.5) / 10, loss) for i, loss in enumerate(losses)]
    common.save_plot(Path("runs/loss_by_t/04_loss_by_t.png"), lines, yscale="log",
                     title="Rectified flow: the loss where lines cross, and after the reflow",
                     xlabel="t (0 is noise, 1 is data)", ylabel="squared error of the velocity")


if __name__ == "__main__":
    main()
