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


def main() -> None:
    args, folder = ddpm.parse_args(), Path("runs/loss_by_t")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    x = common.load_images(args)[1][0][:500]  # test digits
    diffusion = common.load("01_ddpm_ddim", "diffusion", device=args.device)
    schedule = ddpm.make_schedule(args.timesteps, args.device)
    points = []
    for low, high in pairwise(torch.linspace(0, args.timesteps, 11).int().tolist()):
        t = torch.randint(low, high, (len(x),), device=args.device)
        loss = ddpm.diffusion_loss(diffusion, schedule, x, t, torch.randn_like(x))
        points.append(((low + high) / 2, loss.item()))
    common.save_plot(folder / "01_loss_by_t.png", {"test digits": points},
                     title="Diffusion: which t is hard for v?", yscale="log",
                     xlabel="timestep t (0 is clean)", ylabel="squared error of v")

    flow, reflow = (common.load("04_rectified_flow", name, device=args.device)
                    for name in ("flow", "reflow"))
    lines = {"flow: test digits and fresh noise": (flow, torch.randn_like(x), x),
             "reflow: new pairs of the flow": (
                 reflow, *rflow.make_pairs(flow, len(x), 10, None, args.device))}
    for line, (model, x0, x1) in lines.items():
        losses = []
        for i in range(10):
            t = (i + torch.rand(len(x), device=args.device)) / 10
            t = t.clamp(max=0.95)  # after that, errors count less
            losses.append(rflow.flow_loss(model, x0, x1, t).item())
        print(line, [round(loss, 4) for loss in losses], sum(losses) / 10)
        lines[line] = [((i + 0.5) / 10, loss) for i, loss in enumerate(losses)]
    common.save_plot(folder / "04_loss_by_t.png", lines, yscale="log",
                     title="Rectified flow: the loss where lines cross, and after the reflow",
                     xlabel="t (0 is noise, 1 is data)", ylabel="squared error of the velocity")


if __name__ == "__main__":
    main()
