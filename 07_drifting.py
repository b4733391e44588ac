"""Drifting on MNIST: a digit in one call of the network, trained from scratch.

Diffusion and flows draw in many small steps. A drifting model takes its small steps while
it trains. A network f turns noise ε into a sample x = f(ε). In each training step every
sample is told where to go: towards data near it, and away from other samples near it. This
is the field V. A step of the optimizer brings f(ε) a little nearer to x + V, so the samples
drift until they lie as the data do, where both forces cancel. To draw, one call is enough.

    x    = f(ε, c),  ε ~ N(0, I)                            a sample of class c
    loss = E ‖f(ε, c) - stopgrad(x + V(x))‖²                Deng et al. 2026, Eq. 6
    V    = E k(x, y⁺) (y⁺ - x) / Z⁺ - E k(x, y⁻) (y⁻ - x) / Z⁻       Eq. 8, 10: mean shift
         = E k(x, y⁺) k(x, y⁻) (y⁺ - y⁻) / (Z⁺ Z⁻)          Eq. 11; Z⁺ = E k(x, y⁺), so Z⁻
    k(x, y) = exp(-‖x - y‖ / τ)                             Eq. 12; the mean of ‖x - y‖ is our unit

    paper       code             shape
    ε           noise            (K, L, 64) for K classes, L = N + --others; or (B, 64)
    x, y⁺, y⁻   x, data, others  (K, N, 64), (K, M, 64), (K, L, 64): latents; y⁻ begin with the x

Exchange data and samples in Eq. 11, and V changes its sign. If they are distributed alike, that
changes nothing: V = -V = 0. (Only then is V = 0 everywhere: arXiv 2604.24196.) See toy.png.

Why in the latent of 02? V needs hundreds of neighbours, and distances that mean something: a
digit moved by two pixels is far from itself. Latents are better, and short. Data are means µ:
the noise of z says nothing. A 3 drifts towards threes, and away from threes. V is the sum for
three τ, each of mean square 1. Soon most of that is chance: which samples repel. (Look at
progress.png, not the loss.) So 40 of a class learn, and 160 more, without gradients, only repel.
It learns by AdamW (rate 0.001, falling to 0; weight decay 0.01), and averaged weights sample.

    python 07_drifting.py                         28 minutes on one core of an AMD EPYC (AVX2)
    python 07_drifting.py --digits 3141592653     these, by your weights or ours

Fréchet distance of 5,000: 0.103 (99.2% read as asked); 03 by 100 calls (s = 1) 0.105;
training digits 0.062. Left out: an encoder, guidance. No labels? bench/drifting_arms.py.
"""

import copy
import importlib
import math
import time
from pathlib import Path

import torch
from matplotlib import figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import common
from common import COUNT, Between

latent = importlib.import_module("02_latent_diffusion")  # its VAE; nothing else
TAUS = 0.01, 0.03, 0.1  # τ, in units of the mean distance (in the paper 0.02, 0.05, 0.2)


def parse_args(argv: list[str] | None = None):
    parser = common.make_parser(__file__, "One step by drifting.", epochs=180, lr=1e-3)
    add = parser.add_argument
    add("--batch-size", **COUNT, default=500, help="of each class in a step: ten passes an epoch")
    add("--width", type=int, choices=[8, 64, 256, 512, 1024], default=256, help="of a layer")
    add("--vae", type=Path, metavar="FILE", help="weights of 02; None: shipped, or yours")
    add("--samples", type=int, choices=Between(2), default=40, help="of a class that learn")
    add("--others", type=int, choices=Between(0), default=160, help="more that only repel")
    add("--toy-steps", type=int, choices=Between(16), default=1000, help="for toy.png")
    add("--digits", help="draw these classes and stop; no training")
    tiny = {"dataset": "synthetic", "train_images": 128, "epochs": 8, "batch_size": 16,
            "width": 64, "samples": 8, "others": 8, "toy_steps": 16, "eval_samples": 20}
    parser.set_defaults(sample_only=parser.parse_args(argv or []).digits is not None)
    args = common.parse(parser, argv, tiny, sampling=["digits"])
    if not args.vae:  # the shipped one has seen nothing but digits
        own = args.out_dir.parent / "02_latent_diffusion" / "checkpoint.pt"
        shipped = common.WEIGHTS / "02_latent_diffusion.pt"
        args.vae = shipped if args.dataset in ("mnist", "synthetic") else own
    if args.digits is not None:
        args.digits = common.asked_classes(parser, args)
    return args


class Block(nn.Module):
    """h plus two layers, which also see the class."""
    def __init__(self, width: int, classes: int):
        super().__init__()
        self.label = nn.Embedding(classes, width)
        self.layer1, self.layer2 = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.layer2.weight)

    def forward(self, h: Tensor, labels: Tensor) -> Tensor:
        return h + self.layer2(F.silu(self.layer1(h + self.label(labels))))


class Generator(nn.Module):
    """Noise (..., 64), labels (...), as (K, 1) for (K, N, 64) -> latents (..., 64)."""
    def __init__(self, width: int, classes: int, blocks: int = 4):
        super().__init__()
        self.first, self.last = nn.Linear(64, width), nn.Linear(width, 64)
        self.blocks = nn.ModuleList(Block(width, classes) for _ in range(blocks))

    @common.in_bfloat16  # where that is fast
    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        h = self.first(noise)
        for block in self.blocks:
            h = block(h, labels)
        return self.last(h)


def make_models(width: int, classes: int, device: str = "cpu") -> dict[str, nn.Module]:
    return {"drifting": Generator(width, classes).to(device), "vae": latent.VAE().to(device)}


def drifting_field(x: Tensor, data: Tensor, others: Tensor, tau: float, own=None) -> Tensor:
    """V (K, N, D) at x (K, N, D): Deng et al. 2026, Eq. 11 and 12, Algorithm 2. data (K, M, D)
    attract, others (K, L, D) repel, but where `own` (N, L) is true: that point is x itself."""
    y = torch.cat([data, others], dim=1)
    distance = torch.cdist(x, y)  # (K, N, M + L)
    logits = -distance / (tau * distance.mean((1, 2), keepdim=True))
    if own is not None:
        logits[:, :, data.shape[1]:].masked_fill_(own, -torch.inf)
    # In place of k / Z, Algorithm 2 has √(softmax over all y · softmax over all x)
    a = (logits.log_softmax(2) / 2 + logits.log_softmax(1) / 2).exp()
    towards, away = a.split([data.shape[1], others.shape[1]], dim=2)
    towards, away = towards * away.sum(2, keepdim=True), away * towards.sum(2, keepdim=True)
    return towards @ data - away @ others  # the sum over i, j of aᵢ aⱼ (y⁺ᵢ - y⁻ⱼ)


def drifting_loss(model, noise: Tensor, labels: Tensor, data: Tensor, n=None, taus=TAUS) -> Tensor:
    """Deng et al. 2026, Algorithm 1. noise (K, L, 64), labels (K, 1), data (K, M, 64): classes
    do not meet. n samples learn, the others only repel. Each V has a mean square of 1."""
    x = model(noise[:, :n], labels)
    with torch.no_grad():
        others = torch.cat([x, model(noise[:, x.shape[1]:], labels)], dim=1)
        own = torch.eye(x.shape[1], others.shape[1], dtype=torch.bool, device=x.device)
        V = [drifting_field(x, data, others, tau, own) for tau in taus]
        target = x + sum(v / v.square().mean((1, 2), keepdim=True).clamp(1e-20).sqrt() for v in V)
    return F.mse_loss(x, target)


def toy_data(n: int, spread: float = 0.15) -> Tensor:
    """(n, 2): five spots on a circle in turn."""
    angle = torch.arange(n) * 2 * math.pi / 5
    return torch.stack([angle.cos(), angle.sin()], dim=1) + spread * torch.randn(n, 2)


def toy(steps: int) -> list[Tensor]:
    """Points in a plane drift: 1,000 after 0, 1/16, 1/4 and all of the steps."""
    torch.manual_seed(0)
    layers = [part for _ in range(2) for part in (nn.Linear(128, 128), nn.SiLU())]
    model = nn.Sequential(nn.Linear(2, 128), nn.SiLU(), *layers, nn.Linear(128, 2))
    optimizer, shots = torch.optim.AdamW(model.parameters()), []
    for i in range(steps + 1):
        if i in (0, steps // 16, steps // 4, steps):
            shots.append(model(torch.randn(1000, 2)).detach())
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - i / (steps + 1))
        optimizer.zero_grad()
        drifting_loss(lambda noise, _: model(noise), torch.randn(1, 200, 2), None,
                      toy_data(400)[None]).backward()
        optimizer.step()
    return shots


@torch.no_grad()
def sample(model, noise: Tensor, labels: Tensor) -> Tensor:
    return model(noise, labels)  # noise (B, 64), labels (B,) -> latents (B, 64)


def fit(args, state, name, model, loss, data, test, epochs, lr, draw=None) -> nn.Module:
    """Trains `model` so that loss(model, *batch) falls; returns an average of its weights.
    data, test: lists of tensors, one row per image; draw(network) -> ten images to see."""
    ema = copy.deepcopy(model).eval().requires_grad_(False)  # moving average
    large = [w for w in model.parameters() if w.dim() == 4 and min(w.shape[:2]) >= 16]
    small = [w for w in model.parameters() if w.dim() < 4 or min(w.shape[:2]) < 16]
    muon_lr, adamw_lr = torch.zeros(2, device=args.device)  # tensors: step() sees changes
    muon = common.Muon(large, muon_lr, momentum=0.95, weight_decay=0.1)
    adamw = torch.optim.AdamW(small, adamw_lr, weight_decay=0.01, fused=True, capturable=True)
    learned = [ema, model, muon, adamw]
    done = common.restore(state, name, epochs, learned)  # epochs of a checkpoint, or 0
    batches = len(data[0]) // args.batch_size or 1  # full ones in an epoch
    total = epochs * batches
    averages, weights = ([x for x in net.state_dict().values() if x.is_floating_point()]
                         for net in (ema, model))

    def step(*batch: Tensor) -> Tensor:
        """On CUDA recorded and replayed: only work for the GPU may stand here."""
        value = loss(model, *batch)
        model.zero_grad()
        value.backward()
        muon.step()
        adamw.step()
        return value.detach()

    step = common.recorded(step, args, one_shape=True)
    with tqdm(total=total, initial=done * batches, desc=name, mininterval=1) as bar:
        for epoch in range(done, epochs):
            torch.manual_seed(epoch + 1000 * args.seed)  # so a resumed run is the same
            order = torch.randperm(len(data[0]), device=args.device).split(args.batch_size)
            losses, start = [], time.perf_counter()
            for chosen in order[:batches]:
                i = epoch * batches + len(losses)
                rate = lr * min((i + 1) / min(200, total / 10), 1) * (1 - i / total)
                muon_lr.fill_(10 * rate)  # up for at most 200 steps, then down to 0
                adamw_lr.fill_(rate)
                losses.append(step(*[part[chosen] for part in data]))
                average = get_ema_multi_avg_fn(1 - 10 / (i + 10))  # Karras et al. 2024
                average(averages, weights, None)  # over a tenth of the steps (Eq. 127)
                if bar.update():  # once a second: reading a loss makes a GPU wait
                    bar.set_postfix(loss=torch.stack(losses[-100:]).mean().item())
            common.keep_epoch(args, state, name, learned, losses, chosen, start, loss, test, draw)
    return ema


def train(args) -> dict[str, nn.Module]:
    """Trains the generator on latents of the VAE; returns its moving average."""
    data, test, classes = common.load_images(args)  # images and labels
    network = {"width": args.width, "classes": len(classes)}
    state = common.open_run(args, network=network, classes=classes)
    torch.manual_seed(args.seed)
    models = make_models(**network, device=args.device)
    if "vae" not in state["stages"]:  # with --resume, it is in our checkpoint
        weights = common.load("02_latent_diffusion", "vae", args.vae, args.device).state_dict()
        state["stages"]["vae"] = {"epochs": [], "frames": [], "learned": [weights]}
    vae = models["vae"].eval().requires_grad_(False)  # fixed from here on
    vae.load_state_dict(state["stages"]["vae"]["learned"][0])
    mu, _ = latent.encode_all(vae, torch.cat([data[0], test[0]]))  # training images first
    mu = (mu @ vae.R - vae.mean) / vae.std  # vs 02: not draws of z, which are noisy
    rows, test_rows = one_of_each(data[1], len(classes)), one_of_each(test[1], len(classes))
    noise, ten = common.noise(args, 10, 64), torch.arange(10, device=args.device) % len(classes)

    def loss(model, rows: Tensor) -> Tensor:
        y = mu[rows.T]  # (K, M, 64): M images of each class
        eps = torch.randn(len(classes), args.samples + args.others, 64, device=y.device)
        labels = torch.arange(len(classes), device=y.device)[:, None]
        return drifting_loss(model, eps, labels, y, args.samples)

    ema = fit(args, state, "drifting", models["drifting"], loss, [rows],
              [test_rows + len(data[1])], args.epochs, args.lr,
              draw=lambda model: vae.to_images(sample(model, noise, ten)))
    draw_nearest(args, ema, vae, mu[: len(data[1])], data[0], classes)
    draw_toy(args)
    return {"drifting": ema, "vae": vae}


def one_of_each(labels: Tensor, classes: int) -> Tensor:
    """(N, classes), as many rows as labels: in each row one image of each class, by number."""
    every = torch.arange(len(labels), device=labels.device)  # for a class without images
    own = [every[labels == c] if (labels == c).any() else every for c in range(classes)]
    return torch.stack([i[every % len(i)] for i in own], dim=1)  # in turn


@torch.no_grad()
def draw_nearest(args, net, vae, mu: Tensor, images: Tensor, classes: list[str]) -> None:
    """Does it copy? Of 100 samples of each class the nearest to a training image."""
    labels = torch.arange(100 * len(classes), device=args.device) % len(classes)
    x = sample(net, common.noise(args, len(labels), 64), labels)
    near = [torch.cdist(part, mu).min(dim=1) for part in x.split(1000)]
    distances, nearest = (torch.cat(parts) for parts in zip(*near))
    first = distances.view(100, -1).argmin(0) * len(classes) + labels[: len(classes)]
    pairs = torch.cat([vae.to_images(x[first]), images[nearest[first]]])
    title = "Of 100 samples of a class, the one nearest to a training image"
    common.save_grid(pairs, args.out_dir / "samples_nearest.png", title, len(first),
                     ["samples", "training images"], classes)


def draw_toy(args) -> None:
    picture, clouds = figure.Figure(figsize=(10, 2.2)), [*toy(args.toy_steps), toy_data(1000)]
    names = "at first", "after 1/16", "after 1/4", f"after {args.toy_steps} steps", "data"
    for axes, name, cloud in zip(picture.subplots(1, 5), names, clouds):
        axes.scatter(*cloud.T, s=1)
        axes.set(title=name, aspect="equal", xticks=[], yticks=[], xlim=(-2, 2), ylim=(-2, 2))
    picture.savefig(args.out_dir / "toy.png", bbox_inches="tight")


@torch.no_grad()
def make_figures(args, drifting: nn.Module, vae: nn.Module) -> None:
    """16 images by one call: pictures, timings, sets for 05."""
    net, names = common.recorded(drifting, args), common.load_checkpoint(args)["classes"]
    if args.digits:
        labels = torch.tensor(args.digits, device=args.device)
        images = vae.to_images(sample(net, common.noise(args, len(labels), 64), labels))
        path = args.out_dir / f"digits_{''.join(map(str, args.digits[:20]))}.png"
        common.save_grid(images, path, "Each digit by one call of the network", 20)
        return common.say(path)

    def draw(noise: Tensor, rng) -> Tensor:
        labels = torch.arange(len(noise), device=noise.device) % len(names)
        return vae.to_images(sample(net, noise.flatten(1), labels))

    made = {"name": "drifting, 1 step", "method": "drifting", "sampler": "drifting", "steps": 1,
            "network_calls": 1, "classes": len(names)}
    noise = common.noise(args, 16, 1, 8, 8)  # as for 02: so 05 compares
    common.draw_and_time(args, [(made, draw)], noise, "One call", (names * 10)[:10])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    networks = common.trained(args, make_models) if args.sample_only else train(args)
    make_figures(args, **networks)
    common.say(f"the results are in {args.out_dir}")


if __name__ == "__main__":
    common.run(main)
