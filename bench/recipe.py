"""Which recipe draws the best digits after equally many images? One arm of the comparison.

    OMP_NUM_THREADS=1 python bench/recipe.py 01                     01 as it is, one core
    OMP_NUM_THREADS=1 python bench/recipe.py 04+muon+minus --seed 1

An arm is a script, 01 or 04, and what is changed: `muon` for the matrices and convolutions, as
matrices (AdamW for the rest); `v` or `minus` for what the network predicts: v of Salimans & Ho 2022
in 01, its output minus x in 04; `batch=32`, `lr=0.001`, `muonlr=0.05`. Appends a line to
runs/recipe/results.jsonl: the distance of 2,000 samples by DDIM-50, or by 2, 5 and 10 Euler steps,
the loss at the end, and images in a second of the processor. Needs MNIST in data/.
"""

import argparse
import copy
import importlib
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
common = importlib.import_module("common")
ddpm = importlib.import_module("01_ddpm_ddim")
rflow = importlib.import_module("04_rectified_flow")
compare = importlib.import_module("05_compare")


class Optimizer:
    """AdamW, and Muon for what is a matrix, or a convolution inside of the network."""

    def __init__(self, net: nn.Module, lr: float, muon_lr: float | None):
        self.weights, rest = [], []
        for name, weight in net.named_parameters():
            inside = weight.dim() > 1 and not name.startswith(("conv_in", "conv_out"))
            (self.weights if muon_lr and inside else rest).append(weight)
        self.optimizers = [torch.optim.AdamW(rest, lr, fused=True)]
        if muon_lr:  # it takes matrices alone: views of the same memory, a row a channel
            self.matrices = [nn.Parameter(self.as_matrix(w.data)) for w in self.weights]
            self.optimizers.append(torch.optim.Muon(self.matrices, muon_lr, weight_decay=0.0))
        self.peaks = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    def as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        channels_last = weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight
        return channels_last.flatten(1)

    def step(self, rate: float) -> None:
        for weight, matrix in zip(self.weights, self.matrices if self.weights else ()):
            assert matrix.data_ptr() == weight.data_ptr()
            matrix.grad = self.as_matrix(weight.grad)
        for optimizer, peak in zip(self.optimizers, self.peaks):
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arm")
    parser.add_argument("--images", type=int, default=96_000, help="in the training, with repeats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=2000)
    mine = parser.parse_args()
    script, *changes = mine.arm.split("+")
    values = dict(change.split("=") for change in changes if "=" in change)
    batch, muon_lr = int(values.get("batch", 64)), float(values.get("muonlr", 0.02))
    folder, module = Path("runs/recipe"), {"01": ddpm, "04": rflow}[script]
    args = module.parse_args(["--device", "cpu", "--out-dir", str(folder)])
    digits, _ = common.load_digits(args)
    schedule = ddpm.make_schedule(1000)
    torch.manual_seed(mine.seed)
    net = module.UNet(32, 1000 if script == "01" else 1).to(memory_format=torch.channels_last)
    model = (lambda x, t: net(x, t) - x) if "minus" in changes else net

    def noise_of(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What 01's samplers want, from a network that predicts v: ε = sin x_t + cos v."""
        cos, sin = (table[t].view(-1, 1, 1, 1) for table in schedule[3:])
        return sin * x_t + cos * net(x_t, t)

    def loss_of(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        if script == "04":
            x0 = torch.randn(x.shape, generator=rng)
            return rflow.flow_loss(model, x0, x, torch.rand(len(x), generator=rng))
        if "v" not in changes:
            return ddpm.diffusion_loss(net, schedule, x, rng=rng)
        t = torch.randint(1000, (len(x),), generator=rng)
        noise = torch.randn(x.shape, generator=rng)
        cos, sin = (table[t].view(-1, 1, 1, 1) for table in schedule[3:])
        return F.mse_loss(net(cos * x + sin * noise, t), cos * noise - sin * x)

    lr = float(values.get("lr", 2e-3))
    optimizer = Optimizer(net, lr, muon_lr if "muon" in changes else None)
    ema, rng = copy.deepcopy(net), torch.Generator().manual_seed(mine.seed)
    steps, losses, start = mine.images // batch, [], time.process_time()
    decay = min(0.999, 1 - 10 / steps)
    order = torch.cat([torch.randperm(len(digits), generator=rng)
                       for _ in range(-(-mine.images // len(digits)))])
    for i in tqdm(range(steps), mine.arm, mininterval=10):
        loss = loss_of(digits[order[i * batch : (i + 1) * batch]], rng)
        net.zero_grad()
        loss.backward()
        optimizer.step(min((i + 1) / 200, 1) * (1 - i / steps))
        with torch.no_grad():
            torch._foreach_lerp_([*ema.parameters()], [*net.parameters()], 1 - decay)
        losses.append(loss.item())
    seconds = time.process_time() - start
    net.load_state_dict(ema.state_dict())

    judge_args = compare.parse_args(["--device", "cpu", "--out-dir", str(folder)])
    judge = common.load_networks(judge_args.state, compare.make_models(judge_args))["judge"]
    test, _ = common.load_digits(judge_args, train=False)
    real, _ = compare.features(judge, common.to_uint8(test))
    noise = torch.randn(mine.samples, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    if script == "01":
        eps = torch.no_grad()(noise_of if "v" in changes else net)
        samplers = {"DDIM-50": lambda x: ddpm.ddim_sample(eps, schedule, x, 50)}
    else:
        samplers = {f"Euler-{n}": lambda x, n=n: rflow.euler_sample(model, x, n)
                    for n in (2, 5, 10)}
    result = {"arm": mine.arm, "seed": mine.seed, "images": steps * batch, "loss":
              sum(losses[-500:]) / len(losses[-500:]), "images_per_second": steps * batch / seconds}
    for name, sample in samplers.items():
        images = torch.cat([common.to_uint8(sample(x)) for x in tqdm(noise.split(50), name)])
        phi, _ = compare.features(judge, images)
        result[name] = compare.frechet_distance(real, phi)
        common.save_grid(images[:40] / 127.5 - 1, folder / f"{mine.arm}_{mine.seed}_{name}.png",
                         f"{mine.arm}: {name}, distance {result[name]:.3g}", 10)
    with open(folder / "results.jsonl", "a") as file:
        print(json.dumps(result), file=file)
    print(result)


if __name__ == "__main__":
    main()
