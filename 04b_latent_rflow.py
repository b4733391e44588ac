"""Rectified flow in the latent of a VAE: few steps, and each of them small.

02 made the steps of diffusion cheap: it takes them in 64 numbers instead of 784 pixels. 04 made
them few: straight paths, and a reflow. Here are both, the flow of 04 in the latent of 02. The VAE
is taken from 02 as it is, already trained. The paths are not straighter than in pixels (S below is
larger before the reflow), but the decoder draws clean digits from a slightly wrong latent.

    the VAE, its latents x_1 = (z - mean) / std and their layout as 1x8x8: see 02
    x_t, loss, Euler's method, reflow and straightness S: see 04; x_0 is the NOISE

    paper           code                      shape
    x_0 = z_0       x0, noise                 (B, 1, 8, 8)
    x_1, z_1        x1, latents               (B, 1, 8, 8), mean 0 and standard deviation 1
    t               t                         (B,) from 0, noise, to 1, data: the reverse of 02
    v_θ(x_t, t)     v = model(x_t, t)         (B, 1, 8, 8)

    python 04b_latent_rflow.py                 flow, pairs and reflow, for a GPU
    python 04b_latent_rflow.py --pairs 30000 --pair-steps 10 --reflow-epochs 8
                                               35 minutes on one CPU core
    python 04b_latent_rflow.py --vae runs/02_latent_diffusion/checkpoint.pt
                                               with a VAE that you trained
    python 04b_latent_rflow.py --sample-only   no training: the shipped weights
    python 04b_latent_rflow.py --fast-dev      everything in miniature, in seconds

RESULT
"""

import copy
import math
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import common
from common import Attention, ResBlock, number


def parse_args(argv: list[str] | None = None):
    parser = common.make_parser(__file__, "Rectified flow and reflow in a latent.", 10, 128, 2e-3)
    add, count = parser.add_argument, number(int, 1)
    add("--width", type=int, choices=[8, 16, 32, 64, 128], default=64, help="channels at 8x8")
    add("--vae", type=Path, metavar="FILE", default=VAE_FILE, help="checkpoint or weights of 02")
    add("--steps", type=count, nargs="+", default=[1, 2, 5, 10, 100], help="of Euler's method")
    add("--flow-t", choices=T_DENSITIES, default="logit-normal", help="density of t in training")
    add("--reflow-t", choices=T_DENSITIES, default="half-at-0", help="the same for the reflow")
    add("--pairs", type=number(int, 0), default=60_000, help="pairs made from noise")
    add("--real-pairs", type=number(int, 0), default=0, help="pairs made from images")
    add("--pair-steps", type=count, default=20, help="Heun steps to make a pair, of two calls")
    add("--reflow-epochs", type=count, default=10, help="passes over all the pairs")
    add("--reflow-lr", type=number(float, 1e-9), default=1e-3, help="peak learning rate there")
    tiny = {"epochs": 8, "batch_size": 16, "train_images": 256, "width": 8, "steps": [1, 2, 5],
            "pairs": 256, "real_pairs": 128, "pair_steps": 3, "reflow_epochs": 4,
            "eval_samples": 20}
    args = common.parse(parser, argv, tiny)
    if args.batch_size > args.pairs + args.real_pairs:
        parser.error(f"--batch-size {args.batch_size}: more than there will be pairs")
    if args.real_pairs > args.train_images:
        parser.error(f"--real-pairs {args.real_pairs}: there are {args.train_images} images")
    return args


T_DENSITIES = {  # t in [0, 1] from uniform u: the inverse of the density's integral
    "uniform": lambda u: u,
    # sigmoid of a normal number, most often near the middle: Esser et al. 2024, Eq. 19
    "logit-normal": lambda u: torch.special.ndtri(u).sigmoid(),
    # density ∝ cosh(4 (2t - 1)), most often near the ends: the idea of Lee et al. 2024, section 4,
    # but steeper than in their code, cosh(2 (2t - 1))
    "u-shaped": lambda u: 0.5 + torch.asinh((2 * u - 1) * math.sinh(4)) / 8,
    # every other t is 0, where a sampler of one step takes it; the others are u-shaped
    "half-at-0": lambda u: T_DENSITIES["u-shaped"]((2 * u - 1).clamp(min=0)),
    "all-at-0": lambda u: 0 * u,  # distillation (Liu et al.), for one step alone
}


VAE_FILE = Path(__file__).parent / "weights" / "02_latent_diffusion.pt"

# ------------------------------------------------------------- the VAE, word for word that of 02


def conv_block(conv: nn.Module) -> nn.Module:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())


class VAE(nn.Module):
    """Images (B, 1, 28, 28) in [-1, 1] -> latents (B, 64) -> images. Kingma & Welling 2014.

    `mean` and `std` (64,) of the training images' latents are measured once and saved.
    """

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            conv_block(nn.Conv2d(1, 16, 3, 2, 1)),  # (B, 16, 14, 14)
            conv_block(nn.Conv2d(16, 32, 3, 2, 1)),  # (B, 32, 7, 7)
            conv_block(nn.Conv2d(32, 64, 7)),  # (B, 64, 1, 1)
        )
        self.fc_mu, self.fc_logvar = nn.Linear(64, 64), nn.Linear(64, 64)
        self.fc_decode = nn.Linear(64, 64)
        self.decoder = nn.Sequential(
            conv_block(nn.ConvTranspose2d(64, 32, 7)),  # (B, 32, 7, 7)
            conv_block(nn.ConvTranspose2d(32, 16, 3, 2, 1, 1)),  # (B, 16, 14, 14)
            nn.ConvTranspose2d(16, 1, 3, 2, 1, 1),  # (B, 1, 28, 28)
        )
        self.register_buffer("mean", torch.zeros(64))
        self.register_buffer("std", torch.ones(64))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """µ and log v of q(z | x), (B, 64) each."""
        h = self.encoder(x).flatten(1)
        return self.fc_mu(h), self.fc_logvar(h)

    def logits(self, z: Tensor) -> Tensor:
        return self.decoder(self.fc_decode(z)[:, :, None, None])

    def decode(self, z: Tensor) -> Tensor:
        return self.logits(z).sigmoid() * 2 - 1

    def to_latent(self, mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        """A draw from q(z | x), of mean 0 and standard deviation 1, laid out as (B, 1, 8, 8)."""
        z = mu + (logvar / 2).exp() * noise
        return ((z - self.mean) / self.std).view(-1, 1, 8, 8)

    def to_images(self, latent: Tensor) -> Tensor:
        return self.decode(latent.flatten(1) * self.std + self.mean)


@torch.no_grad()
def encode(vae: VAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """µ and log v, (N, 64) each, of all images."""
    mu, logvar = zip(*(vae.encode(part) for part in images.split(1000)))
    return torch.cat(mu), torch.cat(logvar)


# ---------------------------------------------------------------------------------- network


class UNet(nn.Module):
    """Images (B, 1, H, W) and times (B,) from 0 to t_max -> (B, 1, H, W), zero when untrained.

    H and W are multiples of 4, width of 8. With width 32 it has 0.64M weights.
    """

    def __init__(self, width: int, t_max: float):
        super().__init__()
        c1, c2, c_time = width, 2 * width, 4 * width
        self.c_time, self.time_scale = c_time, 1000 / t_max
        self.time = nn.Sequential(
            nn.Linear(c_time, c_time), nn.SiLU(), nn.Linear(c_time, c_time), nn.SiLU()
        )
        self.conv_in = nn.Conv2d(1, c1, 3, padding=1)
        self.down0 = ResBlock(c1, c1, c_time)
        self.down0_to_1 = nn.Conv2d(c1, c1, 3, stride=2, padding=1)
        self.down1 = ResBlock(c1, c2, c_time)
        self.down1_attention = Attention(c2)
        self.down1_to_mid = nn.Conv2d(c2, c2, 3, stride=2, padding=1)
        self.mid1 = ResBlock(c2, c2, c_time)
        self.mid_attention = Attention(c2)
        self.mid2 = ResBlock(c2, c2, c_time)
        self.mid_to_up0 = nn.Conv2d(c2, c2, 3, padding=1)
        self.up0 = ResBlock(2 * c2, c2, c_time)
        self.up0_attention = Attention(c2)
        self.up0_to_1 = nn.Conv2d(c2, c1, 3, padding=1)
        self.up1 = ResBlock(2 * c1, c1, c_time)
        self.norm_out = nn.GroupNorm(8, c1)
        self.conv_out = common.zero_init(nn.Conv2d(c1, 1, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time(common.timestep_embedding(t * self.time_scale, self.c_time))
        h0 = self.down0(self.conv_in(x), emb)  # (B, c1, H, W)
        h1 = self.down1(self.down0_to_1(h0), emb)  # (B, c2, H/2, W/2)
        h1 = self.down1_attention(h1)
        h = self.mid1(self.down1_to_mid(h1), emb)  # (B, c2, H/4, W/4)
        h = self.mid2(self.mid_attention(h), emb)
        h = self.mid_to_up0(F.interpolate(h, scale_factor=2.0))  # (B, c2, H/2, W/2)
        h = self.up0(torch.cat([h, h1], dim=1), emb)  # the skip
        h = self.up0_attention(h)
        h = self.up0_to_1(F.interpolate(h, scale_factor=2.0))  # (B, c1, H, W)
        h = self.up1(torch.cat([h, h0], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 1, H, W)


def make_models(args) -> dict[str, nn.Module]:
    model = UNet(args.width, t_max=1).to(args.device, memory_format=torch.channels_last)
    return {"flow": model, "reflow": copy.deepcopy(model), "vae": VAE().to(args.device)}


# ----------------------------------------------------------------------------------- method


def flow_loss(model, x0: Tensor, x1: Tensor, t: Tensor, error=F.mse_loss) -> Tensor:
    """Liu et al. 2022, Eq. 1: the mean squared error of the velocity on the line from x0 to x1.

    x0, noise, and x1, data: (B, ...); t: (B,) in [0, 1]. Where lines cross, only the squared
    error has their average as its minimum; where they do not, any other `error` does as well.
    """
    t_ = t.view(-1, *[1] * (x0.dim() - 1))
    x_t = (1 - t_) * x0 + t_ * x1
    return error(model(x_t, t), x1 - x0)


# --------------------------------------------------------------------------------- samplers


def even_times(steps: int) -> list[float]:
    """steps + 1 times from 0 to 1."""
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64).tolist()


@torch.no_grad()
def euler_sample(model, x0: Tensor, steps: int, trace=None) -> Tensor:
    """From noise x0 (B, ...) to a latent along dx = v dt, by Euler's method in `steps` steps.

    `trace(t, x_t, v)`, if given, sees every step.
    """
    x = x0
    for t, t_next in tqdm(list(pairwise(even_times(steps))), "Euler", leave=False, delay=2):
        v = model(x, torch.full((len(x),), t, device=x.device))
        if trace:
            trace(t, x, v)
        x = x + (t_next - t) * v
    return x


@torch.no_grad()
def heun_solve(model, x: Tensor, times: list[float]) -> Tensor:
    """Follow dx = v dt from x (B, ...) at times[0] to times[-1] by Heun's method.

    Each step takes the average of the velocities at its two ends: second order, for two calls.
    """
    for t, t_next in pairwise(times):
        v = model(x, torch.full((len(x),), t, device=x.device))
        x_next = x + (t_next - t) * v
        v_next = model(x_next, torch.full((len(x),), t_next, device=x.device))
        x = x + (t_next - t) * (v + v_next) / 2
    return x


def straightness(model, x0: Tensor, steps: int) -> float:
    """S of Liu et al. 2022, as a mean over pixels, from noise x0 (B, ...) by Euler's method."""
    velocities = []
    x1 = euler_sample(model, x0, steps, trace=lambda t, x, v: velocities.append(v))
    return torch.stack([(x1 - x0 - v).square().mean() for v in velocities]).mean().item()


def make_pairs(model, n: int, steps: int, rng: torch.Generator, device="cpu", x1=None):
    """n pairs (x0, x1), (n, 1, 8, 8) each: noise from `rng` and where the flow takes it, or
    where real data x1 (n, ...) comes from: the same flow backwards in time.
    """
    start = torch.randn(n, 1, 8, 8, generator=rng).to(device) if x1 is None else x1
    times = even_times(steps) if x1 is None else even_times(steps)[::-1]
    size = 1000 if start.is_cuda else 100
    end = torch.cat([heun_solve(model, part, times) for part in start.split(size)])
    return (start, end) if x1 is None else (end, start)


# --------------------------------------------------------------------------------- training


def train(args) -> dict[str, nn.Module]:
    """Train the flow, make pairs, train the reflow on them; returns their moving averages."""
    images, labels = common.load_digits(args)
    torch.manual_seed(args.seed)
    models, folder = make_models(args), args.out_dir / "pairs"
    vae = load_vae(args, models["vae"])
    data = encode(vae, images)  # vs 04: µ and log v of all images, once
    stage = common.Stage(args, "flow", models["flow"], args.epochs, args.lr, *data)
    if stage.done < args.epochs:
        shutil.rmtree(folder, ignore_errors=True)  # the pairs of another flow
    for mu, logvar in stage:
        x1 = draw_latents(vae, mu, logvar, stage.rng)
        x0 = torch.randn(x1.shape, generator=stage.rng, device=x1.device)
        u = torch.rand(len(x1), generator=stage.rng, device=x1.device)
        stage.step(flow_loss(stage.net, x0, x1, T_DENSITIES[args.flow_t](u)))
    flow = stage.ema
    latents = draw_latents(vae, *data, torch.Generator(args.device).manual_seed(args.seed))
    pairs = load_pairs(args, common.as_function(flow, args, sampling=True), folder, latents)
    model, lr = models["reflow"], args.reflow_lr
    model.load_state_dict(flow.state_dict())
    stage = common.Stage(args, "reflow", model, args.reflow_epochs, lr, *pairs)
    for x0, x1 in stage:
        u = torch.rand(len(x1), generator=stage.rng, device=x1.device)
        t = T_DENSITIES[args.reflow_t](u)
        stage.step(flow_loss(stage.net, x0.float(), x1.float(), t, error=F.l1_loss))
    return {"flow": flow, "reflow": stage.ema, "vae": vae}


def load_vae(args, vae: VAE) -> VAE:
    """The VAE of --vae, or with --resume the one that the checkpoint was trained with."""
    state = args.state
    if "vae" not in state["networks"]:
        state = common.load_checkpoint(args.vae, "02_latent_diffusion")
        if "diffusion" not in state["networks"]:
            sys.exit(f"{args.vae}: the VAE is not finished; train 02 until its diffusion begins")
    common.load_networks(state, {"vae": vae})
    args.state["networks"]["vae"] = vae.state_dict()
    return vae


def draw_latents(vae: VAE, mu: Tensor, logvar: Tensor, rng) -> Tensor:
    noise = torch.randn(mu.shape, generator=rng, device=mu.device)
    return vae.to_latent(mu, logvar, noise)


def load_pairs(args, net, folder: Path, data: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs, in half precision on the device; each thousand is made once and kept in a file."""
    folder.mkdir(exist_ok=True)
    chunks = [(kind, n, min(n + 1000, size))
              for kind, size in (("noise", args.pairs), ("real", args.real_pairs))
              for n in range(0, size, 1000)]
    pairs = []
    for kind, n, end in tqdm(chunks, "pairs, in thousands"):
        path = folder / f"{kind}_{n}_to_{end}_by_{args.pair_steps}_steps_{args.seed}.pt"
        if not path.exists():
            rng = torch.Generator().manual_seed(args.seed + 1000 + n)
            real = data[n:end] if kind == "real" else None
            pair = make_pairs(net, end - n, args.pair_steps, rng, args.device, real)
            common.save(path, {"x0": pair[0].half().cpu(), "x1": pair[1].half().cpu()})
        pairs.append(torch.load(path, map_location=args.device, weights_only=True))
    return tuple(torch.cat([pair[side] for pair in pairs]) for side in ("x0", "x1"))


# ------------------------------------------------------------------------ figures and timings


@torch.no_grad()
def make_figures(args, flow: nn.Module, reflow: nn.Module, vae: VAE) -> None:
    """16 digits from the same noise by every sampler: pictures, timings, and sets for 05."""
    nets = {"latent flow": common.as_function(flow, args, sampling=True),
            "latent reflow": common.as_function(reflow, args, sampling=True)}
    x0 = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(args.seed))
    x0 = x0.to(args.device)  # drawn on the CPU: the same noise on every device
    draw_path(args, vae, nets, x0)

    def sample(net, x0: Tensor, steps: int) -> Tensor:  # vs 04: every sampler ends in the decoder
        return vae.to_images(euler_sample(net, x0, steps))


    samplers = []
    for method, net in nets.items():
        for n in sorted({*args.steps}):
            made = {"name": f"{method}, {n} steps", "method": method, "sampler": "Euler"}
            samplers.append((made | {"steps": n}, lambda x, rng, net=net, n=n: sample(net, x, n)))
    straight = {name: straightness(net, x0, 100) for name, net in nets.items()}
    print(f"straightness S (0 is straight): {straight}")
    overview = "Euler sampling, before and after one reflow; columns share their noise"
    common.measure(args, samplers, x0, overview, straightness=straight)


def draw_path(args, vae: VAE, nets: dict, x0: Tensor) -> None:
    """Paths of sixteen latents, decoded, as a moving picture, before and after the reflow."""
    paths = {name: [] for name in nets}  # x_t at every step
    for net, path in zip(nets.values(), paths.values()):
        path.append(euler_sample(net, x0, 30, trace=lambda t, x, v, path=path: path.append(x)))
    film = []
    for before, after in [*zip(*paths.values())][::2]:
        before, after = (vae.to_images(x).unflatten(0, (4, 4)) for x in (before, after))
        wall = torch.ones_like(before[:, :1])  # before | after
        film.append(torch.cat([before, wall, after], dim=1).flatten(0, 1))
    common.save_gif(film, args.out_dir / "path.gif", columns=9)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        ready = args.sample_only
        models = common.load_networks(args.state, make_models(args)) if ready else train(args)
        make_figures(args, **models)
    except KeyboardInterrupt:
        sys.exit(f"stopped; --resume continues from {args.checkpoint} if an epoch was finished")
    print(f"pictures, timings and weights are in {args.out_dir}")


if __name__ == "__main__":
    main()
