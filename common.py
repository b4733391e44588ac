"""What the numbered scripts share. Each has its own schedule, loss and samplers.

For a first reading: ResBlock, Attention, Stage. The rest is data, options, files and pictures.
"""

import argparse
import copy
import json
import os
import re
import signal
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock
from matplotlib import colormaps, figure, get_data_path
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision import datasets, utils
from torchvision.transforms import v2
from tqdm import tqdm


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Times (B,) from 0 to 1000 -> sinusoids (B, dim), after Vaswani et al. 2017, section 3.5."""
    angles = t.float()[:, None] * 10 ** torch.linspace(0, -4, dim // 2, device=t.device)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ResBlock(nn.Module):
    """Two convolutions; time scales and shifts the second norm (Dhariwal & Nichol 2021)."""
    def __init__(self, c_in: int, c_out: int, c_time: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(c_time, 2 * c_out)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # so a fresh block adds only a bias to skip(x)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        scale, shift = self.time(emb)[:, :, None, None].chunk(2, dim=1)  # (B, c_out, 1, 1)
        return self.skip(x) + self.conv2(nn.functional.silu(self.norm2(h) * (1 + scale) + shift))


class Attention(nn.Module):
    """Each pixel of (B, C, H, W) attends to all pixels, or to tokens (B, L, c_context)."""
    def __init__(self, channels: int, c_context: int | None = None):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(c_context or channels, 2 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        pixels = self.norm(x).flatten(2).mT  # (B, H*W, C)
        q = self.q(pixels)[:, None]  # (B, 1, H*W, C): one head
        k, v = self.kv(pixels if context is None else context)[:, None].chunk(2, dim=-1)
        h = self.out(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])  # (B, H*W, C)
        return x + h.mT.unflatten(2, x.shape[2:])


DATASETS = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST", "synthetic": None}


def load_images(args: argparse.Namespace, train: bool = True) -> tuple[Tensor, Tensor]:
    """Training or test images (N, 1, 28, 28) in [-1, 1] and labels (N,), at most --train-images
    of either. args.classes gets the names of the classes, which the checkpoint keeps."""
    n = args.train_images
    with one_line_error(f"no images of {args.dataset} in {args.data_dir}; try --dataset synthetic"):
        if args.dataset == "synthetic":
            images, labels = synthetic_digits(n, seed=0 if train else 1)
        elif args.dataset in DATASETS:
            data = getattr(datasets, DATASETS[args.dataset])(args.data_dir, train, download=True)
            images, labels = data.data[:n, None] / 127.5 - 1, data.targets[:n]
            args.classes = [name.split(" - ")[0] for name in data.classes]  # "7 - seven" is 7
        else:
            images, labels, args.classes = folder_images(Path(args.dataset), n, train)
    return images.to(args.device), labels.to(args.device)


def folder_images(folder: Path, n: int, train: bool) -> tuple[Tensor, Tensor, list[str]]:
    """Up to n of a folder's PNG and JPEG files, in random order: grey images (n, 1, 28, 28) in
    [-1, 1], labels (n,), and names of the classes: the subfolders. Every seventh file is for tests.
    """
    files = sorted(p for p in folder.rglob("*.*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    classes = sorted({p.parent.name for p in files})
    assert len(files) >= 70, f"only {len(files)} PNG or JPEG files, and 70 are needed"
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    files = [files[i] for i in order if (i % 7 == 0) != train][:n]
    images = []
    for path in tqdm(files, "images", delay=2):
        with one_line_error(f"cannot use {path}"):
            image = ImageOps.exif_transpose(Image.open(path))  # upright, if a camera says how
            assert not image.mode.startswith("I"), "it has more than 8 bits a pixel"
            white = Image.new("RGBA", image.size, "white")  # what is transparent becomes white
            grey = Image.alpha_composite(white, image.convert("RGBA")).convert("L")
        images.append(v2.functional.pil_to_tensor(ImageOps.pad(grey, (28, 28))))
    labels = torch.tensor([classes.index(p.parent.name) for p in files])
    return torch.stack(images) / 127.5 - 1, labels, classes


def synthetic_digits(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28) in [-1, 1] and labels (n,) of printed digits."""
    fonts = [ImageFont.truetype(f"{get_data_path()}/fonts/ttf/{name}.ttf", 80)
             for name in ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmr10", "cmss10")]
    affine = v2.RandomAffine(degrees=15, translate=(0.05, 0.05), scale=(0.8, 1.1), shear=11)
    torch.manual_seed(seed)
    images, labels = [], torch.randint(10, (n,))
    for i, y in enumerate(labels.tolist()):
        image = Image.new("L", (84, 84))  # three times too large, for smooth edges
        ImageDraw.Draw(image).text((42, 42), str(y), 255, fonts[i % 5], "mm", stroke_width=i % 3)
        images.append(v2.functional.pil_to_tensor(affine(image).reduce(3)))
    return torch.stack(images) / 127.5 - 1, labels


def number(kind: type, low: float, high: float = 1e9):
    def number(text: str):  # argparse shows this name: "invalid number value"
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be {low:g} to {high:g}")
        return value
    return number


def make_parser(file: str, summary: str, epochs: int, batch_size: int, lr: float):
    """A parser with the options that all scripts share; each adds those of its method."""
    script, count = Path(file).stem, number(int, 1)
    devices = [d for d in ("cuda", "mps") if getattr(torch, d).is_available()] + ["cpu"]
    parser = argparse.ArgumentParser(f"{script}.py", description=summary,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.set_defaults(script=script, classes=list("0123456789"))
    add = parser.add_argument
    add("--epochs", type=count, default=epochs, help="passes over the training images")
    add("--batch-size", type=count, default=batch_size, help="images in a training step")
    add("--lr", type=number(float, 1e-9), default=lr, help="peak rate; times 10 for convolutions")
    add("--seed", type=number(int, 0), default=0, help="seed of training and sampling")
    add("--device", choices=devices, default=devices[0], help="where to compute")
    add("--dataset", type=os.path.normpath, default="mnist", metavar="NAME",
        help="mnist, fashion, kmnist, synthetic, or a folder of PNG or JPEG files")
    add("--train-images", type=number(int, 10), default=60_000, help="use the first N images")
    add("--data-dir", type=Path, default=Path("data"), help="folder of downloads")
    add("--out-dir", type=Path, default=Path("runs", script), help="folder of the results")
    add("--resume", action="store_true", help="continue from the checkpoint in --out-dir")
    add("--sample-only", action="store_true", help="no training: use that checkpoint, or weights/")
    add("--eval-samples", type=number(int, 0), help="samples for 05 (10000 after training on CUDA)")
    add("--no-graphs", action="store_true", help="do not use CUDA graphs")
    add("--fast-dev", action="store_true", help="a complete run in miniature, in seconds")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, tiny: dict):
    """The command line wins; then the checkpoint, then `tiny` if --fast-dev, then the defaults.

    Also loads the checkpoint, if one is asked for, and makes and locks --out-dir.
    """
    args = parser.parse_args(argv)  # for --dataset and --fast-dev
    place = "" if args.dataset == "mnist" else Path(args.dataset).resolve().name
    place = "fast_dev" if args.fast_dev else place
    parser.set_defaults(**tiny if args.fast_dev else {}, out_dir=Path("runs", place, args.script))
    args = parser.parse_args(argv)  # for --out-dir and --resume
    path = args.out_dir / "checkpoint.pt"
    state = {"args": {}, "history": [], "networks": {}, "training": {}}
    if args.resume or args.sample_only:
        shipped = Path(__file__).parent / "weights" / f"{args.script}.pt"
        state = load_checkpoint(path if args.resume or path.exists() else shipped, args.script)
        if bad := [k for k, v in state["args"].items() if type(v) is not type(getattr(args, k, v))]:
            sys.exit(f"{state['path']} holds options of another type than here: {bad}")
        parser.set_defaults(**state["args"])
    args = parser.parse_args(argv, argparse.Namespace(checkpoint=path, state=state))
    if (known := state["args"].get("dataset", args.dataset)) != args.dataset:
        parser.error(f"{state['path']} has learned {known}, not {args.dataset}: train first "
                     "(05: --train-judge)")
    if not (args.sample_only or args.dataset in DATASETS or Path(args.dataset).is_dir()):
        parser.error(f"--dataset {args.dataset}: neither a folder, nor {', '.join(DATASETS)}")
    print(f"{args.script} on {args.device}, weights: {state.get('path', 'new')}")
    if path.exists() and "path" not in state:
        print(f"the first epoch will replace {path}; --resume would continue from it")
    torch.set_flush_denormal(True)  # numbers below 1e-38 make a CPU many times slower
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a script like Ctrl-C
    with one_line_error(f"--out-dir {args.out_dir} cannot be made, or another run is using it"):
        args.out_dir.mkdir(parents=True, exist_ok=True)
        args.lock = FileLock(args.out_dir / ".lock", is_singleton=True).acquire(blocking=False)
    return args


@contextmanager
def one_line_error(what: str, kinds=Exception):
    """An error of these kinds in the block ends the script in one line."""
    try:
        yield
    except kinds as error:
        sys.exit(f"{what} ({type(error).__name__}: {' '.join(str(error).split())[:200]})")


def as_function(model: nn.Module, args: argparse.Namespace):
    """The network for sampling. On CUDA its work for each shape becomes a CUDA graph, since
    Python takes longer to start our small layers than a GPU to run them (RESULTS.md)."""
    graphs = {}
    @torch.no_grad()
    def network(*inputs: Tensor) -> Tensor:
        if (shape := inputs[0].shape) not in graphs and inputs[0].is_cuda and not args.no_graphs:
            graphs[shape] = torch.cuda.make_graphed_callables(
                model.forward, tuple(x.clone() for x in inputs))  # model itself stays as it is
        return graphs.get(shape, model)(*inputs).clone()  # the next replay overwrites it
    return network


class Muon(torch.optim.AdamW):
    """AdamW, but convolutions with at least 16 channels take steps of Muon (Jordan 2024): if
    the mean of recent gradients, as a matrix, is U S Vᵀ (its SVD), the step is almost U Vᵀ."""
    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        convolutions = [w for w in group["params"] if w.dim() == 4 and min(w.shape[:2]) >= 16]
        for rows in {len(w) for w in convolutions}:  # those with equally many rows in one batch
            weights, key = [w for w in convolutions if len(w) == rows], f"{rows} rows"
            g = pad_sequence([w.grad.flatten(1).mT for w in weights], batch_first=True).mT
            mean = self.state[key] = self.state.get(key, 0 * g).to(g.device).lerp_(g, 0.05)
            m = nn.functional.normalize(mean, dim=(1, 2))
            gram = m @ m.mT
            p = eye = torch.eye(rows, device=g.device)
            for _ in range(5):  # Newton and Schulz bring the singular values of p m near 1
                q = 3.4445 * eye + torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
                p, gram = q @ p, q @ gram @ q
            for w, step in zip(weights, 10 * group["lr"] * p @ m):
                step = step[:, : w[0].numel()].reshape(w.shape)  # without the padding
                w.mul_(1 - group["lr"]).sub_(step)  # weight decay: 0.1 × 10 lr
                w.grad = None  # so AdamW leaves it alone
        super().step()


class Stage:
    """Trains a network: `for x, y in stage: stage.step(loss)`; then stage.ema is the result."""
    def __init__(self, args, name: str, model: nn.Module, epochs: int, lr: float, *data: Tensor):
        self.args, self.name, self.model, self.epochs = args, name, model, epochs
        self.lr, self.done, self.data, self.steps = lr, 0, data, len(data[0]) // args.batch_size
        if not self.steps:
            sys.exit(f"--batch-size {args.batch_size}: there are only {len(data[0])} to learn from")
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizer = Muon(model.parameters(), lr, fused=True)
        if name in args.state["networks"]:
            with one_line_error(f"{args.checkpoint} does not fit these options"):
                self.done, weights, state = args.state["training"][name]
                self.ema.load_state_dict(args.state["networks"][name])
                model.load_state_dict(weights)
                self.optimizer.load_state_dict(state)
        else:  # it starts anew: forget the epochs of an earlier one
            args.state["history"] = [x for x in args.state["history"] if x["stage"] != name]

    def __iter__(self):
        """Yields batches. On CUDA, Python runs the loop's body for three of them. For the fourth,
        its work is recorded as a CUDA graph, which is replayed for all others, also of later
        epochs, without Python. So the body must do the same for every batch, on the GPU alone."""
        args, total, self.graph = self.args, self.epochs * self.steps, None
        self.index = torch.zeros(args.batch_size, dtype=torch.long, device=args.device)
        self.rate = torch.zeros((), device=args.device)  # tensors, which a graph reads anew
        self.optimizer.param_groups[0].update(lr=self.rate, capturable=True)
        self.slow, self.fast = ([x for x in net.state_dict().values() if x.is_floating_point()]
                                for net in (self.ema, self.model))  # weights, BatchNorm's averages
        with tqdm(None, self.name, total, initial=self.done * self.steps, mininterval=1) as bar:
            for done in range(self.done, self.epochs):
                yield from self.epoch(done, total, bar)

    def epoch(self, done: int, total: int, bar: tqdm):
        args, losses, start = self.args, [], time.perf_counter()
        torch.manual_seed(done + 1000 * args.seed)  # so a resumed run draws the same numbers
        order = torch.randperm(len(self.data[0]), device=args.device)
        for chosen in order.split(args.batch_size)[: self.steps]:  # not a smaller last one
            i, warm_up = done * self.steps + len(losses), min(200, total / 10)
            self.rate.fill_(self.lr * min((i + 1) / warm_up, 1) * (1 - i / total))  # up, down to 0
            self.index.copy_(chosen)
            if self.graph:
                self.graph.replay()
            elif args.device == "cuda" and not args.no_graphs and len(losses) == 3:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    yield [part[self.index] for part in self.data]
                self.graph.replay()  # the recording itself computed nothing
            else:
                yield [part[self.index] for part in self.data]
            losses.append(self.loss.clone())
            if bar.update():  # once a second, since reading a loss makes a GPU wait
                bar.set_postfix(loss=torch.stack(losses[-100:]).mean().item())
        loss, seconds = torch.stack(losses).mean().item(), time.perf_counter() - start
        if not loss < 1e9:  # it may be infinite, or no number
            sys.exit(f"the loss became {loss}: try a lower --lr (the last checkpoint is kept)")
        state, rate = args.state, self.steps * args.batch_size / seconds
        epoch = {"stage": self.name, "epoch": done + 1, "loss": loss, "lr": self.rate.item()}
        state["history"].append(epoch | {"seconds": seconds, "images_per_second": rate})
        state["networks"][self.name] = self.ema.state_dict()
        training = [done + 1, self.model.state_dict(), self.optimizer.state_dict()]
        state |= origin(args) | {"training": state["training"] | {self.name: training}}
        save(args.checkpoint, state)
        lines = "".join(json.dumps(epoch) + "\n" for epoch in state["history"])
        (args.out_dir / "metrics.jsonl").write_text(lines)

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        share = min(10 / (self.epochs * self.steps), 1)  # an average over a tenth of the run
        torch._foreach_lerp_(self.slow, self.fast, share)
        self.loss = loss.detach_()  # else it keeps the step alive, and a graph cannot be recorded


def stopped(args: argparse.Namespace):
    """For main(): Ctrl-C and files that cannot be written, as on a full disk, end in one line."""
    message = f"stopped; --resume continues from {args.checkpoint}, if there is one"
    return one_line_error(message, (KeyboardInterrupt, OSError))


def save(path: Path, state: dict) -> None:
    """A kill, or a full disk, leaves the old file whole."""
    tmp = path.with_suffix(".tmp")
    try:
        with one_line_error(f"cannot write {path}"):
            torch.save(state, tmp)
            tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def origin(args: argparse.Namespace) -> dict:
    """What made a file: script, machine, and the options that --resume takes over."""
    info = Path("/proc/cpuinfo")  # of Linux
    model = re.search("model name.*: (.+)", info.read_text() if info.exists() else "")
    cpu = f"{torch.get_num_threads()} cores, {model[1] if model else 'unknown'}"
    kept = {k: v for k, v in vars(args).items() if type(v) in (int, float, str, list)
            and k not in ("script", "device", "eval_samples", "files")}
    return {"script": args.script, "args": kept | {"fast_dev": args.fast_dev},
            "hardware": torch.cuda.get_device_name() if args.device == "cuda" else cpu,
            "torch": str(torch.__version__), "device": args.device}


def load_checkpoint(path: Path, script: str) -> dict:
    with one_line_error(f"cannot use {path} as a checkpoint of {script}.py"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        assert state["script"] == script, f"it is one of {state['script']}.py"
        assert {"networks", "history", "hardware"} <= state.keys() and dict(state["args"])
    return state | {"path": str(path)}


def load_networks(state: dict, models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Loads a checkpoint's weights into `models`, which it returns, ready to sample from."""
    with one_line_error(f"{state['path']} is unfinished (--resume), or does not fit the options"):
        for name, model in models.items():
            model.eval().load_state_dict(state["networks"][name])
    return models


def time_sampler(sample, noise: Tensor, seed: int, least: float = 2) -> tuple[Tensor, float]:
    """What sample(noise, rng) returns, and its seconds: the median of up to three runs.

    A run before them warms up. On a CPU it is the only one if it takes `least` seconds.
    """
    seconds, fewest = [], 1 if noise.is_cpu else 2
    while len(seconds) < fewest or (len(seconds) < 4 and sum(seconds) < least):
        start = time.perf_counter()
        images = sample(noise, torch.Generator(noise.device).manual_seed(seed))
        images.sum().item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return images, statistics.median(seconds[1:] or seconds)


def measure(args, samplers: list, noise: Tensor, overview: str, below=(), **more) -> None:
    """Pictures and times of each sampler from noise (16, ...), and, if wanted, sets for 05.

    samplers: (made, sample), where the dict made has name, method, sampler, steps and the like.
    """
    rows, losses = {}, {}
    for epoch in args.state["history"]:
        losses.setdefault(epoch["stage"], []).append((epoch["epoch"], epoch["loss"]))
    save_plot(args.out_dir / "loss.png", losses, title="Loss", xlabel="epoch", yscale="log")
    large = noise.repeat(63, 1, 1, 1)[: 1000 if noise.is_cuda else 64]  # 16 noises, repeated
    least = 0 if args.fast_dev else 2
    for made, sample in samplers:
        images, seconds = time_sampler(sample, noise, args.seed + 1, least)  # not the noise's
        title = f"{made['name']}: {len(noise)} images in {seconds:.3f} s"
        made |= {"file": re.sub("[ ,=]+", "_", made["name"]), "images": len(noise)}
        save_grid(images, args.out_dir / f"samples_{made['file']}.png", title, columns=8)
        rows[f"{made['name']}\n{seconds:.3f} s"] = images[:10]
        rate = len(large) / time_sampler(sample, large, args.seed + 1, least)[1]
        print(f"{title}; {rate:.1f} images/s in batches of {len(large)}")
        made |= {"seconds": seconds, "images_per_second": rate, "large_batch": len(large)}
    images = torch.cat([*rows.values()])
    save_grid(images, args.out_dir / "samples.png", overview, 10, [*rows], below)
    training_seconds = sum(epoch["seconds"] for epoch in args.state["history"])
    report = origin(args) | more | {
        "trained_on": args.state["hardware"], "training_seconds": training_seconds,
        "samplers": [made for made, _ in samplers]}
    (args.out_dir / "timings.json").write_text(json.dumps(report, indent=1))
    wanted = args.eval_samples
    if wanted is None:
        wanted = 10_000 if noise.is_cuda and not args.sample_only else 0
    if wanted:
        make_sets(args, samplers, wanted, noise.shape[1:])
    elif not args.sample_only and any(args.out_dir.glob("eval_*.pt")):
        print("old sets for 05 remain; make them anew with --sample-only --eval-samples N")


def make_sets(args, samplers: list, wanted: int, shape: torch.Size) -> None:
    """Sets for 05 by each sampler, from the same noise (wanted, *shape), in batches."""
    rng = torch.Generator().manual_seed(args.seed + 1)  # of the CPU: the same anywhere
    noise = torch.randn(wanted, *shape, generator=rng).to(args.device)
    size = 1000 if noise.is_cuda else 50
    for made, sample in samplers:
        slow = noise.is_cpu and made.get("network_calls", made["steps"]) > 100
        n = min(wanted, 1000) if slow else wanted
        rng = torch.Generator(args.device).manual_seed(args.seed)
        parts = tqdm(noise[:n].split(size), f"{n}, {made['name']}")
        made["images"] = torch.cat([to_uint8(sample(part, rng)) for part in parts])
        if "classes" in made:  # 0 ... 9, 0 ... 9, ... in each part, as 03 asks for them
            made["labels"] = torch.arange(n) % size % made["classes"]
        save(args.out_dir / f"eval_{made['file']}.pt", origin(args) | made)


def to_uint8(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)


def save_grid(images: Tensor, path: Path, title: str, columns: int, rows=(), below=()) -> None:
    """(N, 1, 28, 28) in [-1, 1] as a PNG, with names for the rows and columns."""
    grid = utils.make_grid(to_uint8(images), nrow=columns)[0].numpy()
    axes = figure.Figure(figsize=[side / 50 + 0.8 for side in grid.T.shape]).subplots()
    axes.imshow(grid, cmap="gray", vmin=0, vmax=255)
    axes.set(title=title, xticks=range(16, 30 * len(below), 30))  # middles of images
    axes.set_xticklabels(below, rotation=45 if max(map(len, below), default=0) > 6 else 0)
    axes.set(yticks=range(16, 30 * len(rows), 30), yticklabels=rows)
    axes.figure.savefig(path, bbox_inches="tight")


def save_gif(frames: list[Tensor], path: Path, columns: int) -> None:
    """Batches of images as a film, three times enlarged; the last stays for 2 seconds."""
    big = [nn.functional.interpolate(images, scale_factor=3.0) for images in frames]
    film = [v2.functional.to_pil_image(utils.make_grid(to_uint8(x), columns)) for x in big]
    film[0].save(path, append_images=film[1:] + 16 * film[-1:], save_all=True, duration=120, loop=0)


def save_plot(path: Path, lines: dict, style: str = ".-", **labels) -> None:
    """`lines` maps a name to points (x, y); `labels` are title, xlabel, ylabel, yscale."""
    axes = figure.Figure(figsize=(6, 4)).subplots()
    axes.set_prop_cycle(color=[*colormaps["tab20"].colors, "black"])
    for name, points in lines.items():
        axes.plot(*zip(*points), style, label=name)
    axes.set(**labels)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside the plot
    axes.figure.savefig(path, bbox_inches="tight")
