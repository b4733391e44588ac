"""Which order of the latent's 64 numbers does a U-Net learn best? One arm of the comparison.

    OMP_NUM_THREADS=1 python bench/latent_order.py blobs     one core
    OMP_NUM_THREADS=1 python bench/latent_order.py blobs+sigma=3.5+grid=3-25

The VAE is the shipped one, U-Net, loss and options are those of 02. An arm is an order, and what
is changed in it:
    none, random          as the VAE made them; a random orthogonal matrix
    blobs                 R brings the best linear decoder nearest to blobs on an 8x8 grid
    permute               only a permutation of the 64 numbers, by the same measure
    sigma=2.5 grid=5-22   width of a blob and the middles of the outer ones, in pixels
    jacobian              the decoder's derivative at the mean in place of the least squares
    white                 z is whitened before R is found
    shape=4x4x4           4 channels at 4x4: a blob, its two slopes, and their product; 16x2x2,
                          where the U-Net has no smaller levels
    width=32 epochs=6     of the U-Net
    lr=0.002              the rate, if not that of 02, 0.0007
    vae=PATH              a checkpoint or weights of 02
Appends a line to results.jsonl: the loss of each epoch, and of 2,000 samples by DDIM-50 the
distance, precision and recall. Needs MNIST in data/.
"""

import argparse
import copy
import importlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
common = importlib.import_module("common")
latent = importlib.import_module("02_latent_diffusion")
compare = importlib.import_module("05_compare")
torch.set_flush_denormal(True)


def blobs(sigma: float, low: float, high: float, shape: tuple[int, int, int]) -> Tensor:
    """(64, 784): for each number the picture that it should draw, of norm 1."""
    channels, side, _ = shape
    pixels, middles = torch.arange(28.0), torch.linspace(low, high, side)
    d = (pixels - middles[:, None]) / sigma  # (side, 28)
    forms = [torch.exp(-d**2 / 2), d * torch.exp(-d**2 / 2),  # Hermite functions
             (d**2 - 1) * torch.exp(-d**2 / 2), (d**3 - 3 * d) * torch.exp(-d**2 / 2)]
    n = {1: 1, 4: 2, 16: 4}[channels]
    kinds = [(a, b) for a in range(n) for b in range(n)]
    targets = torch.stack([forms[a][:, None, :, None] * forms[b][None, :, None, :]
                           for a, b in kinds])  # (channels, side, side, 28, 28)
    targets = targets.reshape(64, 784)
    return targets / targets.norm(dim=1, keepdim=True)


def rotation(b: Tensor, t: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(b @ t.T)
    return u @ vh


def permutation(b: Tensor, t: Tensor) -> Tensor:
    """The one that brings RᵀB nearest to T but for signs, by swaps until none helps."""
    gain = (b @ t.T).abs()  # (number, place)
    place = torch.randperm(64)
    better = True
    while better:
        better = False
        for i in range(64):
            for j in range(i):
                now = gain[i, place[i]] + gain[j, place[j]]
                if gain[i, place[j]] + gain[j, place[i]] > now + 1e-9:
                    place[i], place[j] = place[j].item(), place[i].item()
                    better = True
    r = torch.zeros(64, 64)
    r[torch.arange(64), place] = (b @ t.T)[torch.arange(64), place].sign()
    return r


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--out-dir", type=Path, default=Path("runs/latent_order"))
    mine = parser.parse_args()
    order, *changes = mine.arm.split("+")
    values = dict(change.split("=") for change in changes if "=" in change)
    shape = tuple(int(n) for n in values.get("shape", "1x8x8").split("x"))
    lr = float(values.get("lr", 7e-4))
    width, epochs = int(values.get("width", 64)), int(values.get("epochs", 3))
    mine.out_dir.mkdir(parents=True, exist_ok=True)
    args = latent.parse_args(["--device", "cpu"])
    (digits, _), (test, _), _ = common.load_images(args)
    vae = common.load("02_latent_diffusion", "vae", values.get("vae"))
    with torch.no_grad():
        mu, logvar = latent.encode_all(vae, digits)
    torch.manual_seed(mine.seed)

    mean, spread = mu.mean(0), torch.eye(64)
    covariance = (mu - mean).T @ (mu - mean) / len(mu) + logvar.exp().mean(0).diag()
    if "white" in changes:
        values_, vectors = torch.linalg.eigh(covariance)
        spread = vectors @ (values_**-0.5).diag() @ vectors.T
    if "jacobian" in changes:
        b = torch.autograd.functional.jacobian(lambda z: vae.decode(z[None]).flatten(), mean)
        b = torch.linalg.inv(spread) @ b.T
    else:
        b = torch.linalg.lstsq((mu - mean) @ spread, (digits - digits.mean(0)).flatten(1)).solution
    low, high = (float(x) for x in values.get("grid", "5-22").split("-"))
    t = blobs(float(values.get("sigma", 2.5)), low, high, shape)
    r = {"none": lambda: torch.eye(64), "random": lambda: torch.linalg.qr(torch.randn(64, 64))[0],
         "blobs": lambda: rotation(b, t), "permute": lambda: permutation(b, t)}[order]()
    a = spread @ r  # latents are (z - mean) A / std
    std = (a.T @ covariance @ a).diag().sqrt()
    drawn = torch.linalg.inv(a) @ b if "white" in changes else r.T @ b
    pictures = (drawn * std[:, None]).view(64, 1, 28, 28)
    common.save_grid(pictures / pictures.abs().amax((1, 2, 3), keepdim=True),
                     mine.out_dir / f"{mine.arm}_order.png",
                     f"{mine.arm}: what each of the 64 numbers draws", 8)

    def to_latent(mu: Tensor, logvar: Tensor) -> Tensor:
        return ((vae.sample_z(mu, logvar) - mean) @ a / std).view(-1, *shape)

    def to_images(x: Tensor) -> Tensor:
        return vae.decode((x.flatten(1) * std) @ torch.linalg.inv(a) + mean)

    schedule = latent.make_schedule(1000)
    torch.manual_seed(mine.seed)
    net = latent.UNet(width, 1000)
    if shape[0] > 1:
        net.conv_in = nn.Conv2d(shape[0], width, 3, padding=1)
        net.conv_out = nn.Conv2d(width, shape[0], 3, padding=1)
        nn.init.zeros_(net.conv_out.weight)
    if shape[1] == 2:  # too small to be halved: all layers work at 2x2
        net.down0_to_1.stride = net.down1_to_mid.stride = (1, 1)
        latent.F = SimpleNamespace(**vars(nn.functional) | {"interpolate": lambda h, **more: h})
    net = net.to(memory_format=torch.channels_last)
    large = [w for w in net.parameters() if w.dim() == 4 and min(w.shape[:2]) >= 16]
    small = [w for w in net.parameters() if w.dim() < 4 or min(w.shape[:2]) < 16]
    muon, adamw = common.Muon(large, 10 * lr), torch.optim.AdamW(small, lr, fused=True)
    ema, batches = copy.deepcopy(net), len(digits) // 128
    total, start, means = epochs * batches, time.process_time(), []
    for epoch in range(epochs):
        torch.manual_seed(epoch + 1000 * mine.seed)
        losses = []
        for chosen in tqdm(torch.randperm(len(digits)).split(128)[:batches], mininterval=10):
            i = epoch * batches + len(losses)
            x0 = to_latent(mu[chosen], logvar[chosen])
            step = torch.randint(1000, (len(x0),))
            loss = latent.diffusion_loss(net, schedule, x0, step, torch.randn_like(x0))
            net.zero_grad()
            loss.backward()
            rate = lr * min((i + 1) / 200, 1) * (1 - i / total)
            muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = 10 * rate, rate
            muon.step()
            adamw.step()
            with torch.no_grad():
                torch._foreach_lerp_([*ema.parameters()], [*net.parameters()], min(10 / total, 1))
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
        print(mine.arm, means, flush=True)
    rate = total * 128 / (time.process_time() - start)
    net.load_state_dict(ema.state_dict())
    torch.save(net.state_dict(), mine.out_dir / f"{mine.arm}_{mine.seed}.pt")

    judge = common.load("05_compare", "judge")
    noise = torch.randn(mine.samples, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        parts = [to_images(latent.ddim_sample(net, schedule, x, 50))
                 for x in noise.view(-1, *shape).split(100)]
    images = common.to_uint8(torch.cat(parts))
    real, _ = compare.features(judge, common.to_uint8(test))
    fake, _ = compare.features(judge, images)
    n = min(len(fake), 1000)
    result = {"arm": mine.arm, "seed": mine.seed, "losses": means, "images_per_second": rate,
              "FD": compare.frechet_distance(real, fake),
              "precision": compare.near(fake[:n], real[:n], 3).any(1).double().mean().item(),
              "recall": compare.near(real[:n], fake[:n], 3).any(1).double().mean().item()}
    common.save_grid(images[:40] / 127.5 - 1, mine.out_dir / f"{mine.arm}_{mine.seed}.png",
                     f"{mine.arm}: distance {result['FD']:.3g}", 10)
    with open(mine.out_dir / "results.jsonl", "a") as lines:
        print(json.dumps(result), file=lines)
    print(result)


if __name__ == "__main__":
    main()
