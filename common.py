"""What the numbered scripts share. Networks, losses, samplers and loops are their own.

To read: the first third, with the blocks of the U-Nets, the images, Muon and `recorded`.
"""

import argparse
import functools
import hashlib
import importlib
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path

backend = os.environ.pop("MPLBACKEND", None)  # a notebook's may be unknown, an error at import
import matplotlib
import torch
from matplotlib import colormaps, figure, get_data_path
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import datasets, utils
from torchvision.transforms import v2
from tqdm import tqdm

with suppress(ValueError):  # so the pictures of a notebook still appear there
    matplotlib.rcParams.update({"backend": backend} if backend else {})
WEIGHTS = Path(__file__).parent / "weights"  # what is shipped


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Times (B,) from 0 to 1000 -> sinusoids (B, dim), after Vaswani et al. 2017, section 3.5."""
    angles = t.float()[:, None] * 10 ** torch.linspace(0, -4, dim // 2, device=t.device)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def in_bfloat16(forward):
    """A network's forward, whose layers compute in bfloat16 where that is faster: on CPUs that
    have instructions for it, and on CUDA with gradients (without, converting the weights takes
    longer). What it returns is float32, and so is all outside of the network: losses, optimizers,
    averages, and what samplers add up. --no-bf16 switches it off."""
    @functools.wraps(forward)
    def wrapped(self, x: Tensor, *rest: Tensor, **named: Tensor) -> Tensor:
        fast = x.is_cuda and torch.is_grad_enabled() and next(self.parameters()).requires_grad
        if x.is_cpu:
            fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
        if not fast or not in_bfloat16.allowed:
            return forward(self, x, *rest, **named)
        with torch.autocast(x.device.type, torch.bfloat16):
            return forward(self, x, *rest, **named).float()

    return wrapped


in_bfloat16.allowed = True


class GroupNorm(nn.GroupNorm):
    """In float32: in bfloat16 it takes four times as long on a CPU (findings/)."""
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class ResBlock(nn.Module):
    """Two convolutions; time scales and shifts the second norm (Dhariwal & Nichol 2021)."""
    def __init__(self, c_in: int, c_out: int, c_time: int):
        super().__init__()
        self.norm1 = GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(c_time, 2 * c_out)
        self.norm2 = GroupNorm(8, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # so a fresh block adds only a bias to skip(x)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(emb)[:, :, None, None].chunk(2, dim=1)  # (B, c_out, 1, 1)
        return self.skip(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class Attention(nn.Module):
    """Each pixel of (B, C, H, W) attends to all pixels, or to tokens (B, L, c_context).
    (Written out, since torch's own has no forward derivative on a CPU: 06 needs one.)"""
    def __init__(self, channels: int, c_context: int | None = None):
        super().__init__()
        self.norm = GroupNorm(8, channels)
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(c_context or channels, 2 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)  # as in ResBlock

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        pixels = self.norm(x).flatten(2).mT  # (B, H*W, C)
        q = self.q(pixels) / x.shape[1] ** 0.5
        k, v = self.kv(pixels if context is None else context).chunk(2, dim=-1)
        weights = (q @ k.mT).softmax(dim=-1)  # (B, H*W, H*W or L): one head
        h = self.out(weights @ v)  # (B, H*W, C)
        return x + h.mT.unflatten(2, x.shape[2:])


DATASETS = {"mnist": datasets.MNIST, "fashion": datasets.FashionMNIST,
            "kmnist": datasets.KMNIST, "synthetic": None}
RUN = ".run"  # an empty file that marks a folder of results


def load_images(args: argparse.Namespace) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """[images (N, 1, 28, 28) in [-1, 1], labels (N,)] to learn from, the same to test, classes."""
    n, left_out = args.train_images, {}
    if args.dataset == "synthetic":  # a sixth as many to test, as in MNIST
        parts = [synthetic_digits(n, seed=0), synthetic_digits(max(10, n // 6), seed=1)]
        classes = list("0123456789")
    elif args.dataset in DATASETS:
        data = [torchvision_set(args, train) for train in (True, False)]
        parts = [(part.data[:, None] / 127.5 - 1, part.targets) for part in data]
        classes = [name.split(" - ")[0] for name in data[0].classes]  # "7 - seven" is 7
    else:
        *parts, classes, left_out = folder_images(Path(args.dataset), args.out_dir)
    train, test = ([x[:size].to(args.device) for x in part] for part, size in zip(parts, (n, None)))
    counts = train[1].bincount(minlength=len(classes)).tolist()
    names = [name if name.isdecimal() else f"{i} {name}" for i, name in enumerate(classes)]
    names = ", ".join(f"{name} ({count:,})" for name, count in zip(names, counts))
    say(f"{args.dataset}: {len(train[0]):,} images to learn from, {len(test[0]):,} to test; "
        f"classes, and how many to learn from: {names}{told(left_out)}")
    if len(train[0]) < args.batch_size and not args.sample_only:
        say(f"--batch-size {args.batch_size} is too large: a batch has all {len(train[0])} images")
    return train, test, classes


def torchvision_set(args: argparse.Namespace, train: bool):
    """MNIST or the like from --data-dir; if it is not there, it is downloaded."""
    kind = DATASETS[args.dataset]
    folder = args.data_dir / kind.__name__
    with one_line_error(f"no {args.dataset} in {args.data_dir}; try --dataset synthetic"):
        for file in folder.glob("raw/*-ubyte"):  # sizes, four bytes each, then numbers
            data = file.read_bytes()
            ends = range(8, 8 + 4 * sum(data[3:4]), 4)  # byte 3 says how many sizes there are
            sizes = [int.from_bytes(data[end - 4 : end], "big") for end in ends]
            if len(data) != 4 + 4 * len(sizes) + math.prod(sizes):
                sys.exit(f"{file} is broken: delete it")
        if not folder.exists():  # all or nothing, as another run may want it, too
            args.data_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=args.data_dir) as new:
                kind(new, download=True)
                with suppress(OSError):  # that run was faster
                    Path(new, kind.__name__).rename(folder)
        data = kind(args.data_dir, train, download=True)
        if len(data.data) != len(data.targets):
            raise ValueError(f"{len(data.data)} images with {len(data.targets)} labels")
    return data


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


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024), for convolutions: if the mean of recent gradients, as a matrix with a
    row for each index of dimension 0, is U S Vᵀ (an SVD), the step is about lr U Vᵀ. (Left out:
    Nesterov's momentum, longer steps for tall matrices. That of torch takes matrices alone and
    reads the rate on the CPU: pytorch's pull requests 180561, 187133.)"""
    def __init__(self, weights: list, lr: float | Tensor, momentum=0.95, weight_decay=0.1):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([{"params": weights}], defaults)

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        kept = 1 - group["lr"] * group["weight_decay"]
        for rows in sorted({len(w) for w in group["params"]}):
            # Matrices of equally many rows go as one batch, padded by columns of zeros, which stay
            # zero: in 01 that takes 272 kernels of a GPU, one by one it would be 1,103.
            means, batch = [], [w for w in group["params"] if len(w) == rows]
            for w in batch:
                if w not in self.state:
                    self.state[w]["mean"] = torch.zeros_like(w)
                mean = self.state[w]["mean"].lerp_(w.grad, 1 - group["momentum"])
                means.append(mean.flatten(1))  # (rows, all else)
            widest = max(mean.shape[1] for mean in means)
            x = torch.stack([F.pad(mean, (0, widest - mean.shape[1])) for mean in means])
            x = F.normalize(x, dim=(1, 2))  # Frobenius norm 1: no singular value above 1
            # Newton and Schulz, five times: x becomes 3.4445 x - 4.775 (x xᵀ) x + 2.0315 (x xᵀ)² x
            # = p x. Singular values between 0.002 and 1 end between 0.68 and 1.2. p depends on x xᵀ
            # alone, which becomes p x xᵀ p. So we multiply the small p first, and x once, at the
            # end: that saves a third of the time of 02 on a CPU.
            gram, q = x @ x.mT, torch.eye(rows, device=x.device)
            first = 3.4445 * q
            for _ in range(5):
                p = first - 4.775 * gram + 2.0315 * gram @ gram
                q, gram = p @ q, p @ gram @ p
            x = q @ x
            for w, step in zip(batch, group["lr"] * x):
                w.mul_(kept).sub_(step[:, : w[0].numel()].reshape(w.shape))


def recorded(function, args: argparse.Namespace, one_shape: bool = False):
    """`function`; but on CUDA the fourth call (for each shape of inputs) is recorded as a graph,
    and replayed from then on, since Python takes longer to start our layers than a GPU to run
    them. (In the first three, libraries and optimizers allocate what they need.)

    `function` takes tensors, and returns one or several. A replay repeats the work of the GPU,
    and no Python. So a print or a counter in it would run four times, and a number keeps its
    value: what changes must be a tensor on the GPU (also the rate of an optimizer, with
    fused=True or capturable=True). An `if` on a tensor, .item() or a copy from the CPU is an
    error. The code that calls it may do all that. Inputs of other shapes get other graphs, or
    with `one_shape`, for a training step, an error. --no-graphs switches it off."""
    if args.device != "cuda" or args.no_graphs:
        return function
    calls, graphs = Counter(), {}

    def call(*inputs: Tensor):
        shapes = tuple(x.shape for x in inputs)
        calls[shapes] += 1
        if one_shape and len(calls) > 1:
            raise ValueError(f"a step with inputs of another shape, {shapes}, needs --no-graphs")
        if calls[shapes] <= 3:
            return function(*inputs)
        if shapes not in graphs:
            graph, copies = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
            with torch.cuda.graph(graph):
                graphs[shapes] = graph, copies, function(*copies)
        graph, copies, out = graphs[shapes]
        for copy, x in zip(copies, inputs):
            copy.copy_(x)
        graph.replay()
        return out.clone() if isinstance(out, Tensor) else tuple(x.clone() for x in out)

    return call


# What follows is plumbing: own pictures, options, checkpoints, pictures and times.

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


def find_pictures(root: Path, results: Path | None = None) -> tuple[list[Path], dict]:
    """All pictures under `root`, relative to it, and what is left out, by the reason for it."""
    found, errors, left_out, seen = [], [], defaultdict(list), {results and results.resolve()}
    for folder, folders, files in os.walk(root, onerror=errors.append, followlinks=True):
        hidden = [x for x in folders + files if x[0] == "." or x == "__MACOSX"]
        folder, folders[:] = Path(folder), sorted({*folders} - {*hidden})
        if RUN in files or folder.resolve() in seen:  # also at the end of a circle of links
            left_out["with results, or seen before"].append(folder.relative_to(root))
            folders.clear()
            continue
        seen.add(folder.resolve())
        left_out["hidden"] += hidden
        for path in sorted(folder / name for name in {*files} - {*hidden}):
            picture = path.suffix.lower() in PICTURES and path.is_file()
            (found if picture else left_out["of other kinds"]).append(path.relative_to(root))
    left_out["not to be opened"] = [error.filename for error in errors]
    return found, left_out


def read_pictures(root: Path, paths: list[Path], left_out: dict) -> tuple[list[Path], Tensor]:
    """Those paths that PIL can read, and what they show: (N, 1, 28, 28) in [-1, 1], upright, grey,
    the longer side 28 pixels; black beside the shorter one, white where it is transparent."""
    images = {}
    for path in tqdm(paths, "pictures", delay=2):
        try:
            image = ImageOps.exif_transpose(Image.open(root / path))
            if image.mode.startswith("I;16"):  # PIL would make white of all above 255
                pixels = v2.functional.pil_to_tensor(image.convert("I")).float() / 257
                image = v2.functional.to_pil_image(pixels.round().byte())
            if image.mode in ("I", "F"):
                raise ValueError("more than 16 bits a pixel")
            white = Image.new("RGBA", image.size, "white")
            grey = Image.alpha_composite(white, image.convert("RGBA")).convert("L")
            images[path] = v2.functional.pil_to_tensor(ImageOps.pad(grey, (28, 28)))
        except Exception as error:  # noqa: BLE001  PIL raises many kinds
            left_out["broken"].append(f"{path}: {error}")
    pixels = torch.stack([*images.values()]) if images else torch.zeros(0, 1, 28, 28)
    return [*images], pixels / 127.5 - 1


def folder_images(root: Path, results: Path) -> tuple[list[Tensor], list[Tensor], list[str], dict]:
    """As load_images, and what was left out. A class is a folder in `root`, whatever lies below.
    To test: all in test/ or val/, or a seventh, by a hash of each path, so that no file moves."""
    found, left_out = find_pictures(root, results)
    tops = {path.parts[0].lower(): path.parts[0] for path in found if len(path.parts) > 1}
    train = [tops[name] for name in ("train", "training") if name in tops]
    test = [tops[name] for name in ("test", "testing", "val", "validation") if name in tops]
    split = {train[0]: False, test[0]: True} if train and test else {}
    depth = 1 if split else 0  # of the class in a path
    inside = [path for path in found if not split or path.parts[0] in split]
    used = [path for path in inside if len(path.parts) > depth + 1] or inside  # or none
    left_out["beside the folders that count"] += sorted({*found} - {*used})
    digests = {path: hashlib.sha256(os.fsencode(path.as_posix())).digest() for path in used}
    paths, images = read_pictures(root, sorted(used, key=digests.get), left_out)  # mixed
    named = [path.parts[depth] if len(path.parts) > depth + 1 else root.name for path in paths]
    classes = sorted({*named}, key=lambda x: (int(x) if x.isdecimal() else math.inf, x))
    labels = torch.tensor([classes.index(name) for name in named])
    for_test = torch.tensor([split[path.parts[0]] if split else
                             int.from_bytes(digests[path], "big") % 7 == 0 for path in paths])
    n, tests = len(paths), int(for_test.sum())
    if n < 70 or not 1 < tests < n - 9:
        sys.exit(f"{root}: {n} pictures, {tests} of them for tests; at least 70 are needed, and 2 "
                 f"for tests, and 10 to learn from{told(left_out)}")
    return *([images[part], labels[part]] for part in (~for_test, for_test)), classes, left_out


def told(left_out: dict) -> str:
    """Text like "; left out: 2 hidden (.DS_Store, ...), 1 broken (cat/5.png: ...)"."""
    reasons = [f"{len(names)} {why} ({names[0]}{', ...' * (len(names) > 1)})"
               for why, names in left_out.items() if names]
    return "; left out: " + ", ".join(reasons) if reasons else ""


def test_images(args: argparse.Namespace) -> list:
    """[images, labels, classes] to test; [] if they are not here."""
    kind = DATASETS.get(args.dataset)
    place = args.data_dir / kind.__name__ if kind else Path(args.dataset)
    if args.dataset != "synthetic" and not place.is_dir():
        return []
    _, test, classes = load_images(args)
    return [*test, classes]


class Between:
    """The `choices` of an option that is a number."""
    def __init__(self, low: float, high: float = 1e9):
        self.low, self.high = low, high

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __iter__(self):  # what argparse prints
        yield f"{self.low:g} to {self.high:g}"


COUNT, RATE = {"type": int, "choices": Between(1)}, {"type": float, "choices": Between(1e-9)}


def make_parser(file: str, summary: str, epochs: int, lr: float) -> argparse.ArgumentParser:
    """The options that all scripts share; each adds those of its method."""
    script, whole = Path(file).stem, {"type": int, "choices": Between(0)}
    devices = [d for d in ("cuda", "mps") if getattr(torch, d).is_available()] + ["cpu"]
    parser = argparse.ArgumentParser(f"{script}.py", description=summary,
                                     conflict_handler="resolve",  # a script may say it otherwise
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.set_defaults(script=script)
    add = parser.add_argument
    add("--epochs", **COUNT, default=epochs, help="passes over the training images")
    add("--batch-size", **COUNT, default=128, help="images in a training step")
    add("--lr", **RATE, default=lr, help="peak rate of AdamW; that of Muon is ten times it")
    add("--seed", **whole, default=0, help="seed of training and sampling")
    add("--device", choices=devices, default=devices[0], help="where to compute")
    add("--dataset", type=lambda x: x if x in DATASETS else str(Path(x).resolve()),
        default="mnist", metavar="NAME",
        help="mnist, fashion, kmnist, synthetic, or a folder of pictures, as ./mnist")
    add("--train-images", type=int, choices=Between(10), default=60_000, help="use the first N")
    add("--data-dir", type=Path, default=Path("data"), help="folder of downloads")
    add("--out-dir", type=Path, help=f"folder of the results; None: runs/{script}, or similar")
    add("--resume", action="store_true", help="continue from the checkpoint in --out-dir")
    add("--sample-only", action="store_true", help="no training: use that checkpoint, or weights/")
    add("--eval-samples", **whole, default=0, help="samples of each sampler to keep for 05")
    add("--no-graphs", action="store_true", help="do not use CUDA graphs")
    add("--no-bf16", action="store_true", help="compute in float32 alone")
    add("--fast-dev", action="store_true", help="a complete run in miniature, in seconds")
    return parser


def parse(parser, argv: list[str] | None, tiny: dict, sampling: list[str]) -> argparse.Namespace:
    """Where an option comes from: what is typed; with --resume or --sample-only the checkpoint, but
    not for options of `sampling`; with --fast-dev `tiny`; and then the parser's default."""
    first = parser.parse_args(argv or [])  # a look at what decides about the defaults
    place = "" if first.dataset == "mnist" else first.dataset
    if place not in ("", *DATASETS):  # folders of one name have different places
        digest = hashlib.sha256(os.fsencode(place)).hexdigest()[:6]
        place = f"{Path(place).name}-{digest}"
    place = Path("runs", "fast_dev" if first.fast_dev else place, first.script)
    first.out_dir = first.out_dir or place
    state = load_checkpoint(first) if first.resume or first.sample_only else {"args": {}}
    known = {k: v for k, v in state["args"].items() if k not in (*sampling, "eval_samples")}
    tiny = tiny if first.fast_dev or known.get("fast_dev") else {}
    parser.set_defaults(**tiny | known | {"out_dir": first.out_dir})
    args = parser.parse_args(argv or [])
    for name in ("dataset", *state.get("network", ())):  # these cannot differ from it
        if (now := getattr(args, name, None)) != known.get(name, now):
            parser.error(f"{state['path']} has --{name} {known[name]}: train anew for {now}")
    if known and getattr(first, "vae", None):
        parser.error(f"{state['path']} has a VAE of its own: train anew for another --vae")
    if not (args.sample_only or args.dataset in DATASETS or Path(args.dataset).is_dir()):
        parser.error(f"--dataset {args.dataset}: neither a folder, nor {', '.join(DATASETS)}")
    return args


def asked_classes(parser, args: argparse.Namespace) -> list[int]:
    """--digits as numbers: names or numbers between commas, one name, or digit by digit."""
    text, names = args.digits, load_checkpoint(args)["classes"]
    words = [text] if text in names else list(text) or [""]
    if "," in text and text not in names:  # "12," is one class
        words = text.removesuffix(",").split(",")
    numbers = {str(i): i for i, name in enumerate(names) if not name.isdecimal()}
    numbers |= {name: i for i, name in enumerate(names)}  # if a number is a name, that name
    known = ", ".join(name if name.isdecimal() else f"{i} {name}" for i, name in enumerate(names))
    if wrong := [word for word in words if word not in numbers]:
        parser.error(f"--digits {text!r}: no class {wrong[0]!r}, only {known}")
    if len(words) > 20_000:
        parser.error(f"--digits: {len(words)} of them; a picture holds 20,000")
    return [numbers[word] for word in words]


@contextmanager
def one_line_error(what: str, kinds=Exception):
    """An error of these kinds, which a user has caused, ends the script in one line."""
    try:
        yield
    except kinds as error:
        sys.exit(f"{what} ({type(error).__name__}: {' '.join(str(error).split())[:200]})")


def run(main) -> None:
    """main() with what was typed; Ctrl-C or a lack of memory ends it in one line."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # it is None, or a notebook's
            stream.reconfigure(errors="replace")
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("stopped; --resume continues after the last epoch that was kept")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate", str(error)):
            raise
        sys.exit(f"out of memory: lower --batch-size, or --eval-samples (what was saved is kept; "
                 f"{' '.join(str(error).split())[:200]})")


def say(text: str | Path) -> None:
    """Prints. If the standard output is closed or full, the results do not suffer."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load_checkpoint(args: argparse.Namespace, path: Path | None = None) -> dict:
    """Of `path`, or --out-dir; for --sample-only, if there is none, the shipped one."""
    path = path or args.out_dir / "checkpoint.pt"
    if args.sample_only and not path.exists():
        path = WEIGHTS / f"{args.script}.pt"
    with one_line_error(f"cannot use {path} as a checkpoint of {args.script}.py"):
        state = torch.load(path, map_location=args.device, weights_only=True)
        if state["script"] != args.script or not {"network", "stages", "classes"} <= state.keys():
            raise ValueError(f"it is one of {state['script']}.py, or of an earlier version")
        return state | {"path": str(path), "args": dict(state["args"])}


def open_run(args: argparse.Namespace, **new) -> dict:
    """Makes --out-dir; returns its checkpoint, or a new one: network=, classes=."""
    in_bfloat16.allowed = not args.no_bf16
    torch.set_flush_denormal(True)  # numbers below 1e-38 make a CPU many times slower
    with one_line_error(f"--out-dir {args.out_dir} cannot be made", OSError):
        args.out_dir.mkdir(parents=True, exist_ok=True)
        (args.out_dir / RUN).touch()
    old, state = args.resume or args.sample_only, {"path": "new", "stages": {}} | new
    if old or (args.out_dir / "checkpoint.pt").exists():
        kept = load_checkpoint(args)
        if not old and kept["args"]["dataset"] != args.dataset:
            sys.exit(f"{kept['path']} is of {kept['args']['dataset']}: choose another --out-dir")
        state = kept if old else state
    if new:
        same_classes(state, new["classes"])
    say(f"{args.script} on {args.device}, weights: {state['path']}")
    return state


def same_classes(state: dict, classes: list[str]) -> None:
    """Ends, if the classes of the images, by name, are not those that a network knows."""
    if classes != state["classes"]:
        came = [name for name in classes if name not in state["classes"]]
        went = [name for name in state["classes"] if name not in classes]
        sys.exit(f"{state['path']} knows other classes: new are {came}, gone {went}; train anew")


def load_networks(state: dict, make_models, device: str) -> dict[str, nn.Module]:
    """All networks of a checkpoint, ready to sample from."""
    models = make_models(**state["network"], device=device)
    with one_line_error(f"{state['path']} is unfinished (--resume), or of another network"):
        for name, model in models.items():
            model.eval().requires_grad_(False).load_state_dict(state["stages"][name]["learned"][0])
    return models


def trained(args: argparse.Namespace, make_models) -> dict[str, nn.Module]:
    """The networks for --sample-only, from --out-dir or those that are shipped."""
    return load_networks(open_run(args), make_models, args.device)


def load(script: str, name: str, file: Path | None = None, device: str = "cpu") -> nn.Module:
    """A trained network, as load("04_rectified_flow", "flow"); file: one of your own."""
    args = argparse.Namespace(script=script, device=device, sample_only=False)
    state = load_checkpoint(args, Path(file or WEIGHTS / f"{script}.pt"))
    return load_networks(state, importlib.import_module(script).make_models, device)[name]


def restore(state: dict, name: str, epochs: int, learned: list) -> int:
    """Fills in what stage `name` has learned; returns its epochs. If it is to learn more, the
    stages after it are dropped, for they have learned from what it was."""
    stages = state["stages"]
    stage = stages.setdefault(name, {"epochs": [], "frames": [], "learned": []})
    with one_line_error(f"{state['path']} cannot be resumed", (RuntimeError, KeyError, ValueError)):
        if len(stage["learned"]) == 1:
            raise ValueError("it has only the average: see bench/export_weights.py --back")
        for part, old in zip(learned, stage["learned"]):
            groups = vars(part).get("param_groups")
            part.load_state_dict(old)
            if groups:  # of an optimizer: rates and decays stay those of the script
                part.param_groups = groups
    done, order = len(stage["epochs"]), [*stages]
    if done >= epochs:
        say(f"{name}: nothing to train, {done} epochs of {epochs} are done")
        return done
    for later in order[order.index(name) + 1 :]:
        del stages[later]
    return done


def test_loss(loss, model: nn.Module, images: list[Tensor]) -> float:
    """The mean of `loss` over up to 2,000 test images, from the same random numbers."""
    torch.manual_seed(0)  # training does not depend on it: each epoch sets its own seed
    with torch.no_grad():
        parts = zip(*[x[:2000].split(500) for x in images])
        total = sum(len(part[0]) * loss(model, *part).item() for part in parts)
    return total / len(images[0][:2000])


def keep_epoch(args, state, name, learned, losses, chosen, start, loss, test, draw) -> None:
    """What an epoch of stage `name` came to: checkpoint, metrics.jsonl and pictures."""
    mean = torch.stack(losses).mean().item()  # waits for the GPU
    seconds = time.perf_counter() - start
    if not mean < 1e9:  # it may be infinite, or no number
        sys.exit(f"the loss became {mean}: try a lower --lr (the checkpoint is kept)")
    stage, ema = state["stages"][name], learned[0]
    stage["epochs"].append({
        "stage": name, "epoch": len(stage["epochs"]) + 1, "loss": mean,
        "lr": float(learned[-1].param_groups[0]["lr"]),
        "test_loss": test_loss(loss, ema, test), "seconds": seconds,
        "images_per_second": len(losses) * len(chosen) / seconds})
    stage["frames"] += [to_uint8(draw(ema))] if draw else []
    stage["learned"] = [part.state_dict() for part in learned]
    lines = "".join(json.dumps(line) + "\n" for line in history(state))
    save(args.out_dir / "metrics.jsonl", lines)
    save(args.out_dir / "checkpoint.pt", state | origin(args))
    for old in args.out_dir.glob("eval_*.pt"):  # sets of what the network was before
        old.unlink()
    if seconds > 20:  # of a shorter epoch, pictures would take too large a share
        draw_progress(args.out_dir, state)


def history(state: dict) -> list[dict]:
    return [line for stage in state["stages"].values() for line in stage["epochs"]]


def save(path: Path, content: dict | str) -> None:
    """A kill, or a full disk, leaves the old file whole."""
    tmp = path.with_suffix(".tmp")
    try:
        with one_line_error(f"cannot write {path}", (OSError, RuntimeError)):
            if isinstance(content, str):
                tmp.write_text(content, encoding="utf-8", errors="replace")
            else:
                torch.save(content, tmp)
            tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def origin(args: argparse.Namespace) -> dict:
    """What made a file: the script, its options and the machine."""
    cpu = f"{torch.get_num_threads()} cores with {torch.backends.cpu.get_cpu_capability()}"
    options = {k: v for k, v in vars(args).items() if type(v) in (int, float, str)}
    del options["script"], options["device"]
    options |= {"fast_dev": args.fast_dev, "no_bf16": args.no_bf16}
    return {"script": args.script, "args": options,
            "torch": str(torch.__version__), "device": args.device,
            "hardware": torch.cuda.get_device_name() if args.device == "cuda" else
            cpu if args.device == "cpu" else f"{args.device}, {cpu}"}


def noise(args: argparse.Namespace, *shape: int) -> Tensor:
    """Gaussian noise by --seed, of the CPU's generator: the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(args.seed)).to(args.device)


def kept_pairs(args: argparse.Namespace, flow: nn.Module, make) -> tuple[Tensor, Tensor]:
    """--pairs for a reflow, and up to 2,000 for tests, (2, n, 1, H, W) each, by make(n, rng).

    Each thousand is kept in a file, for --resume, and has noise of its own for each flow. Its name
    tells solver and flow: pairs of another flow are not taken, and none but those are removed.
    """
    weights = b"".join(x.cpu().numpy().tobytes() for x in flow.state_dict().values())
    digest, folder = hashlib.sha256(weights).hexdigest()[:8], args.out_dir / "pairs"
    with one_line_error(f"{folder} cannot be made", OSError):
        folder.mkdir(exist_ok=True)
    for old in folder.glob("pairs_*_by_*_AB2_of_????????.pt"):
        if not old.stem.endswith(digest) and not folder.is_symlink():
            old.unlink()
    parts, size, tests = [], min(1000, args.pairs), min(2000, args.pairs)
    for start in tqdm(range(0, args.pairs + tests, size), "pairs, in thousands"):
        path = folder / f"pairs_{start}_to_{start + size}_by_{args.pair_steps}_AB2_of_{digest}.pt"
        if not path.exists():
            rng = torch.Generator().manual_seed(int(digest, 16) + start)
            save(path, torch.stack(make(size, rng)).half().cpu())
        with one_line_error(f"{path} is broken: delete it, and --resume"):
            parts.append(torch.load(path, map_location=args.device, weights_only=True))
    pairs = torch.cat(parts, dim=1)[:, : args.pairs + tests]
    return pairs[:, :-tests], pairs[:, -tests:]


def to_uint8(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)


@matplotlib.rc_context({"text.parse_math": False})  # so that a name may have a $
def save_grid(images: Tensor, path: Path, title: str, columns: int, rows=(), below=()) -> None:
    """(N, 1, 28, 28) in [-1, 1], twice as large, with names of rows and columns."""
    grid = utils.make_grid(to_uint8(images), nrow=columns)[0].numpy()
    picture = figure.Figure(figsize=[side / 50 for side in grid.T.shape], dpi=100)
    axes = picture.add_axes((0, 0, 1, 1), title=title)
    axes.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_yticks(range(16, 30 * len(rows), 30), rows)  # middles of images
    slope = 45 if max(map(len, below), default=0) > 6 else 0
    axes.set_xticks(range(16, 30 * len(below), 30), below, rotation=slope)
    picture.savefig(path, bbox_inches="tight")


def save_gif(frames: list[Tensor], path: Path, columns: int) -> None:
    """Batches of images as a film, three times enlarged; the last stays for 2 seconds."""
    big = [F.interpolate(images, scale_factor=3.0) for images in frames]
    film = [v2.functional.to_pil_image(utils.make_grid(to_uint8(x), columns)) for x in big]
    film[0].save(path, append_images=film[1:] + 16 * film[-1:], save_all=True, duration=120, loop=0)


def save_plot(path: Path, lines: dict, style: str = ".-", **labels) -> None:
    """`lines` maps a name to points (x, y); `labels` are title, xlabel, ylabel, yscale."""
    axes = figure.Figure(figsize=(6, 4)).subplots()
    axes.set_prop_cycle(color=[*colormaps["tab20"].colors, "black"])
    for points in lines.values():
        axes.plot(*zip(*points), style)
    axes.set(**labels)
    legend = axes.legend(axes.lines, [*lines], loc="upper left", bbox_to_anchor=(1, 1))
    for text, line in zip(legend.texts, axes.lines):
        text.set(color=line.get_color(), parse_math=False)  # for a name may have a $
    axes.figure.savefig(path, bbox_inches="tight")


def draw_progress(folder: Path, state: dict) -> None:
    """loss.png; and what the same ten noises became after each epoch, still and moving."""
    stages = {name: stage for name, stage in state["stages"].items() if stage["epochs"]}
    picture = figure.Figure(figsize=(5 * len(stages), 4), layout="constrained")
    rows = {}
    for axes, (name, stage) in zip(picture.subplots(1, len(stages), squeeze=False)[0],
                                   stages.items()):
        for key, label in ("loss", "training"), ("test_loss", "test images, averaged weights"):
            points = [(x["epoch"], x[key]) for x in stage["epochs"] if key in x]
            if points:  # earlier weights have no test_loss
                axes.plot(*zip(*points), ".-", label=label)
        axes.set(title=f"loss: {name}", xlabel="epoch")
        axes.locator_params("x", integer=True)
        axes.legend(loc="upper right")
        first = len(stage["epochs"]) - len(stage["frames"]) + 1
        frames = enumerate(stage["frames"], first)
        rows |= {f"{name}, epoch {i}": x.cpu() / 127.5 - 1 for i, x in frames}
    picture.savefig(folder / "loss.png")
    if rows:
        title = "The same ten noises after each epoch"
        save_grid(torch.cat([*rows.values()]), folder / "progress.png", title, 10, [*rows])
        save_gif([*rows.values()], folder / "progress.gif", columns=10)


def time_draw(args, draw, noise: Tensor) -> tuple[Tensor, float]:
    """Images and seconds: the median after a first run, which counts alone if it is long."""
    seconds, limit = [], 0 if args.fast_dev else 2
    least, most = (4, 9) if noise.is_cuda else (1, 4)  # a GPU records the fourth call
    while len(seconds) < least or (len(seconds) < most and sum(seconds) < limit):
        start = time.perf_counter()
        images = draw(noise, torch.Generator(noise.device).manual_seed(args.seed + 1))
        images.sum().item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return images, statistics.median(seconds[1:] or seconds)


def draw_and_time(args, samplers: list, noise: Tensor, title: str, below=(), **more) -> None:
    """Pictures and times of samplers from noise (16, ...), and --eval-samples of each for 05.
    samplers: (made, draw); draw(noise, rng) gives images, the dict `made` says what they are."""
    state, rows, n = load_checkpoint(args), {}, 1000 if noise.is_cuda else 64
    draw_progress(args.out_dir, state)
    for made, draw in samplers:
        images, seconds = time_draw(args, draw, noise)
        line = f"{made['name']}: {len(noise)} images in {seconds:.3f} s"
        made |= {"file": re.sub("[ ,=]+", "_", made["name"]), "seconds": seconds}
        save_grid(images, args.out_dir / f"samples_{made['file']}.png", line, columns=8)
        rows[f"{made['name']}\n{seconds:.3f} s"] = images[:10]
        made["images_per_second"] = n / time_draw(args, draw, noise.repeat(63, 1, 1, 1)[:n])[1]
        say(f"{line}; {made['images_per_second']:.1f} images/s in batches of {n}")
    save_grid(torch.cat([*rows.values()]), args.out_dir / "samples.png", title, 10, [*rows], below)
    report = origin(args) | more | {
        "trained_on": state["hardware"], "samplers": [made for made, _ in samplers],
        "training_seconds": sum(line["seconds"] for line in history(state))}
    save(args.out_dir / "timings.json", json.dumps(report, indent=1))
    for made, draw in samplers if args.eval_samples else ():
        drawn = draw_set(args, made, draw, noise.shape[1:])
        save(args.out_dir / f"eval_{made['file']}.pt",
             origin(args) | made | drawn | {"names": state["classes"]})


def draw_set(args, made: dict, draw, shape: torch.Size) -> dict:
    """--eval-samples images, of the same noise for every sampler, and labels if any."""
    few = args.device == "cpu" and made["network_calls"] > 100  # else it would take hours
    n = min(args.eval_samples, 1000) if few else args.eval_samples
    classes = made.get("classes", 1)
    size = max((1000 if args.device == "cuda" else 50) // classes, 1) * classes  # of a part
    begin = torch.Generator().manual_seed(args.seed + 1)  # of the CPU: the same anywhere
    rng, images = torch.Generator(args.device).manual_seed(args.seed), []
    for i in tqdm(range(0, n, size), made["name"]):
        noise = torch.randn(min(size, n - i), *shape, generator=begin).to(args.device)
        images.append(to_uint8(draw(noise, rng)))
    labels = {"labels": torch.arange(n) % classes} if "classes" in made else {}  # as 03 asks
    return {"images": torch.cat(images)} | labels
