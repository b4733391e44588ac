"""Plumbing that the numbered scripts share: U-Net blocks, digits, options, speed, files, pictures.

Schedules, losses, samplers and training loops stand in each script, so that a diff of two of them
shows the method. Images are (B, 1, 28, 28) in [-1, 1]; B is the batch, C channels, L tokens."""

import argparse
import copy
import json
import math
import os
import pickle
import statistics
import sys
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.functional import to_pil_image, to_tensor
from torchvision.utils import make_grid
from tqdm import tqdm


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """(B,) times on a scale of 0 to 1000 -> (B, dim) sinusoids (Vaswani et al. 2017, section 3.5);
    on a scale of 0 to 1 most channels would be constant."""
    frequencies = torch.exp(torch.linspace(0, -math.log(10_000), dim // 2, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def zero_init(layer: nn.Module) -> nn.Module:
    """Start a residual branch at zero: a fresh block is its skip, a fresh U-Net outputs 0."""
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """Time scales and shifts the second norm (Dhariwal & Nichol 2021, "adaptive group norm")."""
    def __init__(self, c_in: int, c_out: int, c_time: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(c_time, 2 * c_out)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(emb)[:, :, None, None].chunk(2, dim=1)  # (B, c_out, 1, 1) each
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


class CrossAttention(nn.Module):
    """Every pixel of (B, C, H, W) attends to the L tokens of a context (B, L, c_context); with
    L = 1 the softmax would be a constant."""
    def __init__(self, channels: int, c_context: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(c_context, 2 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        pixels = self.norm(x).flatten(2).mT  # (B, H*W, C)
        q = self.q(pixels)[:, None]  # (B, 1 head, H*W, C)
        k, v = self.kv(pixels if context is None else context)[:, None].chunk(2, dim=-1)
        h = self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])  # (B, H*W, C)
        return x + h.mT.unflatten(2, x.shape[2:])


def SelfAttention(channels: int) -> nn.Module:
    """Every pixel to every pixel. One head trained 10% faster than four on two CPU cores."""
    return CrossAttention(channels, channels)


def Downsample(channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, stride=2, padding=1)


def Upsample(c_in: int, c_out: int) -> nn.Module:
    return nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(c_in, c_out, 3, padding=1))


class EMA:
    """ema.model, the moving average to sample from. The decay warms up: short runs forget, too."""
    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_([*self.model.parameters()], [*model.parameters()], 1 - decay)
        for mine, new in zip(self.model.buffers(), model.buffers()):  # those of batch norms
            mine.copy_(new)


def load_digits(args: argparse.Namespace, train: bool = True) -> tuple[Tensor, Tensor]:
    """All images (N, 1, 28, 28) in [-1, 1] and labels (N,) as tensors on args.device (188 MB)."""
    n = args.train_images if train else 10_000
    if args.dataset == "synthetic":
        images, labels = synthetic_digits(n, seed=0 if train else 1)
        return images.to(args.device), labels.to(args.device)
    try:
        data = MNIST(args.data_dir, train=train, download=True)
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        raw = args.data_dir / "MNIST" / "raw"
        bad = [name for name, md5 in MNIST.resources if not check_integrity(raw / name, md5)]
        sys.exit(f"{', '.join(bad) or 'an unpacked file'} in {raw} is missing or damaged, and no "
                 f"download works ({error}): put it right, or take --dataset synthetic")
    return data.data[:n, None].to(args.device) / 127.5 - 1, data.targets[:n].to(args.device)


def synthetic_digits(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28) in [-1, 1] and labels (n,), fixed by the seed: digits like MNIST's,
    20 pixels tall and centred by mass, from ten fonts under random rotation (up to 15°), shear
    (0.2), scale (0.8-1.1), shift (1.5 pixels) and stroke. 10,000 take a second; a classifier
    trained on MNIST (99.8% of its test digits) labels 97.8% of them right."""
    fonts = ["DejaVuSans", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Italic",
             "STIXGeneral", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10", "cmti10"]
    glyphs = torch.stack([_glyph(font, digit) for font in fonts for digit in "0123456789"])
    rng = torch.Generator().manual_seed(seed)
    index = torch.randint(len(glyphs), (n,), generator=rng)
    angle, shear, scale, dx, dy, stroke = torch.rand(6, n, generator=rng)
    angle, shear, zoom = (angle - 0.5) * math.pi / 6, 0.4 * shear - 0.2, 1 / (0.8 + 0.3 * scale)
    cos, sin, axis = angle.cos() * zoom, angle.sin() * zoom, torch.linspace(-1, 1, 84)
    mass = glyphs.sum((1, 2, 3))  # in grid_sample's coordinates the edges are -1 and 1
    x = (glyphs.sum((1, 2)) @ axis / mass)[index] + (dx - 0.5) * 3 / 14
    y = (glyphs.sum((1, 3)) @ axis / mass)[index] + (dy - 0.5) * 3 / 14
    theta = torch.stack([cos, shear * cos - sin, x, sin, shear * sin + cos, y], 1).view(n, 2, 3)
    images = []
    for part in torch.arange(n).split(1000):  # a thousand at a time, to bound the memory
        grid = F.affine_grid(theta[part], (len(part), 1, 56, 56), align_corners=False)
        field = F.grid_sample(glyphs[index[part]], grid, align_corners=False)
        level = 0.25 + 0.35 * stroke[part, None, None, None]  # a low level draws a bold stroke
        images.append(F.avg_pool2d(torch.sigmoid(24 * (field - level)), 2) * 2 - 1)
    return torch.cat(images), index % 10


def _glyph(font: str, digit: str) -> Tensor:
    """A digit, blurred, as (1, 84, 84) in [0, 1]; a threshold then sets its stroke's weight."""
    path, canvas = f"{matplotlib.get_data_path()}/fonts/ttf/{font}.ttf", Image.new("L", (84, 84))
    style = {"font": ImageFont.truetype(path, 80), "anchor": "mm", "stroke_width": 2}
    ImageDraw.Draw(canvas).text((42, 42), digit, fill=255, **style)
    return F.avg_pool2d(F.avg_pool2d(to_tensor(canvas), 5, 1, padding=2), 5, 1, padding=2)


def batches(images: Tensor, labels: Tensor, batch_size: int, rng: torch.Generator):
    """One epoch in random order, all batches of one shape: the smaller last one is left out."""
    order = torch.randperm(len(images), generator=rng, device=images.device)
    for index in order.split(batch_size)[: len(images) // batch_size]:
        yield images[index], labels[index]


SPEED_UPS = ["channels-last", "fused", "amp", "compile", "graph"]  # the last three on CUDA only


def make_parser(file: str, summary: str, epochs: int, batch_size: int, lr: float):
    """A parser with the options that all scripts share; each adds its own, or replaces one."""
    script, flag = Path(file).stem, {"action": "store_true"}
    how = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "conflict_handler": "resolve"}
    parser = argparse.ArgumentParser(f"{script}.py", "%(prog)s [options]", summary, **how)
    add = parser.add_argument
    parser.set_defaults(script=script, weights=Path(__file__).parent / "weights" / f"{script}.pt")
    add("--epochs", type=int, default=epochs, help="passes over the training images")
    add("--batch-size", type=int, default=batch_size, help="images in a training step")
    add("--lr", type=float, default=lr, help="peak learning rate of AdamW")
    add("--seed", type=int, default=0, help="start of all random numbers")
    add("--device", default="auto", help="cuda, mps or cpu; auto is the first of these there is")
    add("--dataset", choices=["mnist", "synthetic"], default="mnist", help="synthetic: from fonts")
    add("--train-images", type=int, default=60_000, help="train on the first so many images")
    add("--data-dir", type=Path, default=Path("data"), help="where MNIST is or will be put")
    add("--out-dir", type=Path, default=Path("runs", script), help="where the results go")
    add("--resume", **flag, help="go on from the checkpoint in --out-dir")
    add("--sample-only", **flag, help="no training: from the checkpoint in --out-dir or weights/")
    add("--export", **flag, help=f"write the EMA weights to weights/{script}.pt and stop")
    add("--eval-samples", type=int, help="samples a sampler to keep (None: 10,000 on CUDA, or 0)")
    add("--off", nargs="+", choices=SPEED_UPS, default=[], help="speed-ups not to use")
    add("--fast-dev", **flag, help="all of it in seconds: every knob tiny, synthetic digits")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, fast_dev: dict, shape: list):
    """Parse and check; --fast-dev only swaps the defaults for those in `fast_dev`. With --resume,
    --sample-only and --export args.saved is the checkpoint, and an option that was not typed is as
    it was in that run; those in `shape`, which make the network, must not differ."""
    script = parser.get_default("script")
    if parser.parse_args(argv).fast_dev:
        parser.set_defaults(**fast_dev, dataset="synthetic", out_dir=Path("runs/fast_dev", script))
    args = parser.parse_args(argv)
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.mps.is_available() + ["cpu"]
    args.device = there[0] if args.device == "auto" else args.device
    if args.device not in there:
        parser.error(f"--device {args.device}: this machine has only {', '.join(there)}")
    args.checkpoint = args.out_dir / "checkpoint.pt"
    if args.resume or args.sample_only or args.export:
        ours = args.checkpoint.exists() or args.resume or args.export
        args.saved = load_checkpoint(args.checkpoint if ours else args.weights, script)
        typed = argparse.Namespace(**dict.fromkeys(vars(args)))
        parser.parse_args(argv, typed)  # fills in what argv names, no defaults
        for name, value in args.saved["args"].items():
            if vars(typed)[name] is None:
                setattr(args, name, value)
            elif name in shape and vars(typed)[name] != value:
                parser.error(f"the checkpoint was made with --{name.replace('_', '-')} {value}")
    for name, value in vars(args).items():
        low = 0 if name in ("seed", "eval_samples", "pairs", "real_pairs") else 1e-9
        if type(value) in (int, float) and not low <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: out of range")
    if args.batch_size > args.train_images:
        parser.error(f"--batch-size {args.batch_size}: there are {args.train_images} images")
    if args.eval_samples is None:
        args.eval_samples = 10_000 if args.device == "cuda" else 0
    args.speed = [x for x in SPEED_UPS[: 5 if args.device == "cuda" else 2] if x not in args.off]
    # Channels-last: 156 images/s of training on two CPU cores; torch's default layout: 141.
    args.layout = torch.channels_last if "channels-last" in args.speed else torch.contiguous_format
    args.out_dir.mkdir(parents=True, exist_ok=True)
    return args


def for_sampling(model: nn.Module, args: argparse.Namespace):
    """The network as a function (x, t) -> float32. On CUDA it is compiled and captured in a CUDA
    graph, one launch a step, not a hundred; the next replay overwrites what is not cloned."""
    mode = "reduce-overhead" if "graph" in args.speed else "default"
    net = torch.compile(model, mode=mode) if "compile" in args.speed else model

    @torch.no_grad()
    def network(*inputs: Tensor) -> Tensor:
        with torch.autocast(args.device, torch.bfloat16, "amp" in args.speed):
            return net(*inputs).float().clone()

    return network


def time_sampler(sample, x: Tensor, large_on_cpu: int = 1) -> tuple[Tensor, dict]:
    """sample(x) and its cost: the median of up to five runs after a first that warms up (none is
    begun after 5 s: on a CPU the first may count), and the images/s of 64 (or so many) times x."""
    large = x.repeat(large_on_cpu if x.device.type == "cpu" else 64, 1, 1, 1)
    images, seconds = [], {len(x): [], len(large): []}
    for batch in (x, large)[: len(seconds)]:
        taken = seconds[len(batch)]
        while len(taken) <= 5 and sum(taken) < 5:
            start = time.perf_counter()
            images.append(sample(batch))
            images[-1].sum().item()  # waits for the device
            taken.append(time.perf_counter() - start)
    (first, *rest), rate = seconds[len(x)], len(large) / statistics.median(taken[1:] or taken)
    return images[0], {"images": len(x), "seconds": statistics.median(rest or [first]),
                       "runs": len(rest) or 1, "first_run_seconds": first,
                       "large_batch": len(large), "images_per_second": rate}


class Progress:
    """A stage's bar, with the mean loss of 100 steps and the stage's time left. `history` holds the
    epochs of all stages. To read a loss makes the device wait: once a second."""
    def __init__(self, args, history: list, steps: int, epochs: int, stage: str = "training"):
        self.args, self.history, self.stage, self.losses = args, history, stage, []
        self.done = sum(x["stage"] == stage for x in history)  # epochs
        self.bar = tqdm(range(epochs * steps), stage, initial=self.done * steps)
        self.start = self.last_read = time.perf_counter()

    def step(self, loss: Tensor) -> None:
        self.losses.append(loss.detach())
        self.bar.update()
        now = time.perf_counter()
        if now - self.last_read > 1:
            self.bar.set_postfix(loss=f"{self.mean(self.losses[-100:]):.4f}")
            self.last_read = now

    def mean(self, losses: list[Tensor]) -> float:
        if not math.isfinite(mean := torch.stack(losses).mean().item()):
            self.bar.close()
            sys.exit(f"{self.stage}: the loss became {mean} in epoch {self.done + 1}: try a lower "
                     f"learning rate ({self.args.checkpoint} is as it was)")
        return mean

    def end_epoch(self, lr: float) -> None:
        """Add the epoch to the history: one line of metrics.jsonl."""
        loss, seconds = self.mean(self.losses), time.perf_counter() - self.start
        rate = len(self.losses) * self.args.batch_size / seconds
        self.done += 1
        self.history.append({"stage": self.stage, "epoch": self.done, "loss": loss, "lr": lr,
                             "seconds": seconds, "images_per_second": rate})
        self.losses, self.start = [], time.perf_counter()


def save(path: Path, state: dict) -> None:
    """torch.save, whole or not at all: written beside, then renamed."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def origin(args: argparse.Namespace) -> dict:
    """What made a file: script, machine, and the options, but for those of this call alone."""
    leave = {"script", "device", "off", "resume", "sample_only", "export", "eval_samples", "speed"}
    options = {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str, list))}
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "no GPU"
    return {"script": args.script, "args": {k: v for k, v in options.items() if k not in leave},
            "hardware": f"{gpu}, {os.cpu_count()} {torch.backends.cpu.get_cpu_capability()} cores",
            "torch": str(torch.__version__), "device": args.device, "speed_ups": args.speed}


def save_checkpoint(args: argparse.Namespace, history: list, rng: torch.Generator, parts: dict):
    """All that training needs to go on, and metrics.jsonl. `parts` have a state_dict()."""
    state = {name: part.state_dict() for name, part in parts.items()}
    save(args.checkpoint, origin(args) | state | {"history": history, "rng": rng.get_state()})
    (args.out_dir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in history))


def load_checkpoint(path: Path, script: str) -> dict:
    """What `script` saved, on the CPU; anything else ends in one line."""
    if not path.exists():
        sys.exit(f"no checkpoint {path}: train first, or name its folder with --out-dir")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["script"] != script:
            sys.exit(f"{path} is a checkpoint of {saved['script']}.py, not of {script}.py")
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, LookupError, TypeError):
        sys.exit(f"{path} is damaged, or not a checkpoint")
    print(f"{script}: weights from {path}")
    return saved


def restore(args: argparse.Namespace, rng: torch.Generator, parts: dict) -> list:
    """Put args.saved back into the parts and the generator; returns the history."""
    for name, part in parts.items():
        part.load_state_dict(args.saved[name])
    if args.saved["device"] == args.device:  # a CPU's state means nothing to a GPU
        rng.set_state(args.saved["rng"])
    return args.saved["history"]


def export_weights(args: argparse.Namespace, *networks: str) -> None:
    """Write what sampling needs of args.saved, in half precision, to args.weights."""
    half = {n: {name: weight.half() for name, weight in args.saved[n].items()} for n in networks}
    leave = ("model", "optimizer", "scheduler", "rng")
    save(args.weights, {k: v for k, v in args.saved.items() if k not in leave} | half)


def training_report(args: argparse.Namespace, model: nn.Module, history: list) -> dict:
    """The head of timings.json: what made it, and what the network's training took."""
    made, last = origin(args), history[-1].get("stage")
    rates = [x["images_per_second"] for x in history if x.get("stage") == last]
    return made | {"parameters": sum(p.numel() for p in model.parameters()),
                   "training_seconds": sum(x["seconds"] for x in history),
                   "training_images_per_second": statistics.median(rates),
                   "trained_on": (args.saved if args.sample_only else made)["hardware"]}


def save_eval(args: argparse.Namespace, name: str, sample, shape=(1, 28, 28), **how) -> None:
    """args.eval_samples images by sample(x) for 05_compare.py, from noise fixed by the seed."""
    size, images = min(args.eval_samples, 1000 if args.device == "cuda" else 50), []
    rng = torch.Generator().manual_seed(args.seed + 1)
    for _ in tqdm(range(0, args.eval_samples, size), f"{args.eval_samples} images, {name}"):
        noise = torch.randn(size, *shape, generator=rng).to(args.device)
        images.append(to_uint8(sample(noise)))
    how["images"] = torch.cat(images)[: args.eval_samples]
    save(args.out_dir / f"eval_{name}.pt", origin(args) | how)


def to_uint8(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)


def save_grid(images: Tensor, path: Path, title: str, columns: int, rows=(), below=()) -> None:
    """(N, 1, 28, 28) in [-1, 1] as a PNG, `columns` in a row, with names for rows and columns."""
    grid = make_grid(to_uint8(images), nrow=columns)[0].numpy()
    axes = (figure := Figure(figsize=[side / 50 + 0.8 for side in grid.T.shape])).subplots()
    axes.imshow(grid, cmap="gray", vmin=0, vmax=255)
    ticks = [[17 + 30 * i for i in range(len(names))] for names in (below, rows)]
    axes.set(title=title, xticks=ticks[0], xticklabels=below, yticks=ticks[1], yticklabels=rows)
    figure.savefig(path, bbox_inches="tight")


def save_gif(frames: list[Tensor], path: Path, columns: int) -> None:
    """Batches of images, in [-1, 1] and three times enlarged, as a film; the last one stays 2 s."""
    grids = [make_grid(to_uint8(images), nrow=columns) for images in frames]
    film = [to_pil_image(grid.repeat_interleave(3, 1).repeat_interleave(3, 2)) for grid in grids]
    film[0].save(path, append_images=film[1:], save_all=True, loop=0,
                 duration=[120] * (len(film) - 1) + [2000])  # milliseconds


def save_plot(path: Path, lines: dict, style: str = ".-", **axes_labels) -> None:
    """`lines` maps a label to (x values, y values); the rest is title, xlabel, ylabel, yscale."""
    axes = (figure := Figure(figsize=(6, 4))).subplots()
    for label, (x, y) in lines.items():
        axes.plot(x, y, style, label=label)
    axes.set(**axes_labels)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside the plot, not on its points
    figure.savefig(path, bbox_inches="tight")
