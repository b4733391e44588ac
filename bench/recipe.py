"""Which recipe draws the best digits after equally many images? One arm of the comparison.

    OMP_NUM_THREADS=1 python bench/recipe.py 01                     01 as it is, one core
    OMP_NUM_THREADS=1 python bench/recipe.py 04+adamw+minus --seed 1

An arm is a script, 01 or 04, and what is changed in it:
    adamw                 for all weights
    lr=0.002 batch=32     the rate (else that of the script) is ten times as high for Muon
    eps, x, minsnr        01 predicts the noise; the image; the noise, weighted by SNR
    minus, x, skip        04 predicts its output minus x; the image; c_skip x + c_out F as in EDM
    t=uniform             the density of t, which is logit-normal in 04, uniform in 01
    net=16/64/128         channels at 28x28, 14x14, 7x7
    net=16/64/64/0        without attention at 14x14
    net=0/64/128          patches of 2x2 pixels as 4 channels at 14x14
    net=32/64/128/1/1     a second residual block before and after the attention at 7x7
    float32               as with --no-bf16
Appends a line to results.jsonl: the distance of 2,000 samples by DDIM-50, or by 2, 5 and 10 Euler
steps, the share of faint pixels (1 to 15 of 255), the loss at the end, and images in a second of
the processor. The weights stay there, too, averaged over a fifth, a tenth (which is scored) and a
thirtieth of the run. Needs MNIST in data/.
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
torch.set_flush_denormal(True)  # as open_run() does


class Net(nn.Module):
    """The U-Net of the scripts with any numbers of channels, or on patches of 2x2 pixels."""

    def __init__(self, t_max: float, c1: int, c2: int, c3: int, attention: int = 1, more: int = 0):
        super().__init__()
        self.time_scale, self.c1, outer = 1000 / t_max, c1, c1 or c2
        self.time = nn.Sequential(nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        self.conv_in = nn.Conv2d(1 if c1 else 4, outer, 3, padding=1)
        if c1:
            self.down0 = common.ResBlock(c1, c1, 128)
            self.down0_to_1 = nn.Conv2d(c1, c2, 3, stride=2, padding=1)
            self.up0_to_1 = nn.Conv2d(c2, c1, 3, padding=1)
            self.up1 = common.ResBlock(2 * c1, c1, 128)
        self.down1 = common.ResBlock(c2, c2, 128)
        self.down1_attention = common.Attention(c2) if attention else nn.Identity()
        self.down1_to_mid = nn.Conv2d(c2, c3, 3, stride=2, padding=1)
        self.mid1, self.mid2 = (nn.ModuleList(common.ResBlock(c3, c3, 128)
                                              for _ in range(1 + more)) for _ in range(2))
        self.mid_attention = common.Attention(c3)
        self.mid_to_up0 = nn.Conv2d(c3, c2, 3, padding=1)
        self.up0 = common.ResBlock(2 * c2, c2, 128)
        self.up0_attention = common.Attention(c2) if attention else nn.Identity()
        self.norm_out = common.GroupNorm(8, outer)
        self.conv_out = nn.Conv2d(outer, 1 if c1 else 4, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    @common.in_bfloat16
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        emb = self.time(common.timestep_embedding(t * self.time_scale, 128))
        if self.c1:
            h0 = self.down0(self.conv_in(x), emb)
            h = self.down0_to_1(h0)
        else:
            h = self.conv_in(F.pixel_unshuffle(x, 2))
        h1 = self.down1_attention(self.down1(h, emb))
        h = self.down1_to_mid(h1)
        for block in self.mid1:
            h = block(h, emb)
        h = self.mid_attention(h)
        for block in self.mid2:
            h = block(h, emb)
        h = self.mid_to_up0(F.interpolate(h, scale_factor=2.0))
        h = self.up0_attention(self.up0(torch.cat([h, h1], dim=1), emb))
        if self.c1:
            h = self.up0_to_1(F.interpolate(h, scale_factor=2.0))
            h = self.up1(torch.cat([h, h0], dim=1), emb)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return h if self.c1 else F.pixel_shuffle(h, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arm")
    parser.add_argument("--images", type=int, default=96_000, help="in the training, with repeats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--out-dir", type=Path, default=Path("runs/recipe"))
    mine = parser.parse_args()
    script, *changes = mine.arm.split("+")
    values = dict(change.split("=") for change in changes if "=" in change)
    batch, lr = int(values.get("batch", 64)), {"01": 7e-4, "04": 2e-3}[script]
    lr = float(values.get("lr", lr))
    common.in_bfloat16.allowed = "float32" not in changes
    mine.out_dir.mkdir(parents=True, exist_ok=True)
    (digits, _), (test, _), _ = common.load_images(ddpm.parse_args(["--device", "cpu"]))
    schedule = ddpm.make_schedule(1000)
    torch.manual_seed(mine.seed)
    t_max = {"01": 1000, "04": 1}[script]
    channels = [int(c) for c in values["net"].split("/")] if "net" in values else []
    net = Net(t_max, *channels) if channels else ddpm.UNet(32, t_max)  # 04 has the same layers
    net = net.to(memory_format=torch.channels_last)
    density = rflow.T_DENSITIES[values.get("t", "uniform" if script == "01" else "logit-normal")]

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The velocity, which is the output of the network, or made from it."""
        out, t = net(x, t), t.view(-1, 1, 1, 1)
        if "x" in changes:  # so that the last Euler step returns `out`
            return (out - x) / (1 - t).clamp(min=0.01)
        if "skip" in changes:  # Karras et al. 2022, Table 1, for x_t = (1-t) x_0 + t x_1
            sigma = 0.96  # root mean square of the digits
            power = (1 - t) ** 2 + (sigma * t) ** 2  # of x_t
            return (t * sigma**2 - (1 - t)) / power * x + sigma / power.sqrt() * out
        return out - x if "minus" in changes else out

    def v_of(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What 01's samplers want: v, also where the network predicts the noise or the image."""
        cos, sin = (table[t].view(-1, 1, 1, 1) for table in schedule[3:])
        out = net(x_t, t)
        if "x" in changes:
            return (cos * x_t - out) / sin
        if "eps" in changes or "minsnr" in changes:
            x0_hat = ((x_t - sin * out) / cos).clamp(-1, 1)  # as 01 did while it predicted ε
            return (cos * x_t - x0_hat) / sin
        return out

    def loss_of(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        if script == "04":
            x0 = torch.randn(x.shape, generator=rng)
            t = density(torch.rand(len(x), generator=rng))
            t_ = t.view(-1, 1, 1, 1)
            return F.mse_loss(model((1 - t_) * x0 + t_ * x, t), x - x0)
        t = (density(torch.rand(len(x), generator=rng)) * 1000).long()
        noise = torch.randn(x.shape, generator=rng)
        cos, sin = (table[t].view(-1, 1, 1, 1) for table in schedule[3:])
        target = cos * noise - sin * x
        if "x" in changes:
            target = x
        elif "eps" in changes or "minsnr" in changes:
            target = noise
        error = (net(cos * x + sin * noise, t) - target).square()
        if "minsnr" in changes:  # Hang et al. 2023, γ = 5
            error = error * (5 * (sin / cos) ** 2).clamp(max=1)
        return error.mean()

    kinds = {True: [], False: []}  # by Muon? With at least 16 channels on both sides
    for w in net.parameters():
        kinds["adamw" not in changes and w.dim() == 4 and min(w.shape[:2]) >= 16].append(w)
    muon, adamw = common.Muon(kinds[True], lr), torch.optim.AdamW(kinds[False], lr, fused=True)
    emas, rng = [copy.deepcopy(net) for _ in range(3)], torch.Generator().manual_seed(mine.seed)
    steps, losses, start = mine.images // batch, [], time.process_time()
    decays = [1 - 5 / steps, 1 - 10 / steps, 1 - 30 / steps]
    order = torch.cat([torch.randperm(len(digits), generator=rng)
                       for _ in range(-(-mine.images // len(digits)))])
    for i in tqdm(range(steps), mine.arm, mininterval=10):
        loss = loss_of(digits[order[i * batch : (i + 1) * batch]], rng)
        net.zero_grad()
        loss.backward()
        for optimizer, times in ((muon, 10), (adamw, 1)):
            optimizer.param_groups[0]["lr"] = times * lr * min((i + 1) / 200, 1) * (1 - i / steps)
            optimizer.step()
        with torch.no_grad():
            for ema, decay in zip(emas, decays):
                torch._foreach_lerp_([*ema.parameters()], [*net.parameters()], 1 - decay)
        losses.append(loss.item())
    rate = steps * batch / (time.process_time() - start)
    file = f"{mine.arm}_{mine.images}_{mine.seed}".replace("/", "-")
    torch.save([ema.state_dict() for ema in emas], mine.out_dir / f"{file}.pt")
    net.load_state_dict(emas[1].state_dict())

    result = {"arm": mine.arm, "seed": mine.seed, "images": steps * batch, "loss":
              sum(losses[-500:]) / len(losses[-500:]), "images_per_second": rate}
    if script == "01":
        samplers = {"DDIM-50": lambda x: ddpm.ddim_sample(v_of, schedule, x, 50)}
    else:
        samplers = {f"Euler-{n}": lambda x, n=n: rflow.euler_sample(model, x, n)
                    for n in (2, 5, 10)}
    score(result, samplers, test, mine.samples, mine.out_dir, file)


def score(result: dict, samplers: dict, test, samples: int, folder: Path, file: str) -> None:
    """Add the distance of each sampler to `result`, keep it in results.jsonl, and draw pictures."""
    judge = common.load("05_compare", "judge")
    real, _ = compare.features(judge, common.to_uint8(test))
    noise = torch.randn(samples, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    for name, sample in samplers.items():
        images = torch.cat([common.to_uint8(sample(x)) for x in tqdm(noise.split(50), name)])
        phi, _ = compare.features(judge, images)
        result[name] = compare.frechet_distance(real, phi)
        result[f"{name} faint"] = ((images > 0) & (images < 16)).double().mean().item()
        common.save_grid(images[:40] / 127.5 - 1, folder / f"{file}_{name}.png",
                         f"{result['arm']}: {name}, distance {result[name]:.3g}", 10)
    with open(folder / "results.jsonl", "a") as lines:
        print(json.dumps(result), file=lines)
    print(result)


if __name__ == "__main__":
    main()
