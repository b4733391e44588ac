"""How good and how fast: one classifier measures every sampler's digits, and judges five claims.

Pictures show that digits look like digits; not that all kinds are there, nor how much ten steps
lose against a hundred. So a small classifier, trained on MNIST once and for all, turns each image
into 64 numbers, and the cloud of a sampler's images is held against the cloud of the 10,000 test
digits: by the distance between two Gaussians fitted to them, by the share of samples that lie
inside the digits' cloud (precision: are they digits?) and by the share of digits inside the
samples' cloud (recall: are all digits there?). Training digits in place of samples show what a
perfect sampler would get: the floor.

    FD        = |µ_r - µ_g|² + tr(Σ_r + Σ_g - 2 (Σ_r Σ_g)^½)    Heusel et al. 2017, Eq. 6
    precision = share of φ_g with |φ_g - φ_r| ≤ R(φ_r) for some φ_r   Kynkäänniemi et al. 2019,
    recall    = share of φ_r with |φ_r - φ_g| ≤ R(φ_g) for some φ_g   section 2
    with R(φ) = distance from φ to its third-nearest neighbour in its own set

    paper           code                              shape
    φ_r, φ_g        real, fake = features(judge, x)   (10,000, 64), (N, 64), float64
    µ, Σ            means and covariances of those    (64,), (64, 64)

A finite set scores too high, the more so the fewer images it has, so sets are compared at equal N
only, and the floor stands beside them at the same N. Sets are read from runs/*/eval_*.pt, as the
other scripts write them with --eval-samples: a dict of `images`, uint8 (N, 1, 28, 28); where they
have them `labels` (N,); `method`, `sampler`, `steps`, `guidance`. Times come from timings.json.

    python 05_compare.py                      all that is in runs/: tables, plots, verdicts
    python 05_compare.py FILE.pt FOLDER       score these sets: a .pt, or a folder of PNGs
    python 05_compare.py --train-judge        train the classifier anew
    python 05_compare.py --fast-dev           all of it in seconds, on what is in runs/fast_dev

The classifier (0.21M weights) learned in 4 minutes on two CPU cores (AMD EPYC with AVX-512, torch
2.15.0) and reads 99.66% of the test digits. For scale, 1,000 images each: training digits 0.155
(10,000 of them: 0.041), these without zeros 2.7, blurred by a Gaussian of one pixel 4.5, noised by
a tenth of the pixels' range 15, pure noise 88. Recall flatters what is imprecise: samples strewn
wide have wide neighbourhoods, which catch more digits (0.93 for 01's DDIM-100, 0.83 for training
digits); read it beside the precision.

Left out: confidence intervals (retraining moves a distance by 1-3%); the Inception network of the
usual FID, which has never seen a digit.
"""

import json
import pickle
import statistics
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import common


def parse_args(argv: list[str] | None = None):
    parser = common.make_parser(__file__, "Measure samples.", epochs=5, batch_size=128, lr=3e-3)
    parser.usage = "%(prog)s [FILE ...] [options]"
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help="score only these: a .pt, or a folder of PNGs")
    add("--eval-samples", type=int, default=10_000, help="score the first so many images of a set")
    add("--train-judge", dest="sample_only", action="store_false", help="train the classifier")
    add("--runs", type=Path, default=Path("runs"), help="where the other scripts put their results")
    parser.set_defaults(sample_only=True)
    tiny = {"sample_only": False, "epochs": 2, "batch_size": 32, "train_images": 512,
            "runs": Path("runs/fast_dev")}
    args = common.parse(parser, argv, fast_dev=tiny, shape=[])
    args.sample_only &= not args.resume  # --resume goes on training the classifier
    if args.eval_samples < 5:
        parser.error(f"--eval-samples {args.eval_samples}: a set needs at least 5")
    return args


# ---------------------------------------------------------------------------------- network


def conv(c_in: int, c_out: int) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]


class Judge(nn.Module):
    """(B, 1, 28, 28) in [-1, 1] -> (B, 10), scores of the digits; .features gives (B, 64)."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *conv(1, 32), *conv(32, 32), nn.MaxPool2d(2),  # (B, 32, 14, 14)
            *conv(32, 64), *conv(64, 64), nn.MaxPool2d(2),  # (B, 64, 7, 7)
            *conv(64, 128), nn.MaxPool2d(2), nn.Flatten(),  # (B, 128 * 3 * 3)
            nn.Linear(1152, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(),
        )
        self.classify = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))


def make_model(args) -> Judge:
    return Judge().to(args.device, memory_format=args.layout)


# ---------------------------------------------------------------------------------- metrics


@torch.no_grad()
def features(judge: Judge, images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 1, 28, 28) -> features (N, 64), float64, and the digits (N,) it sees."""
    weight, phi, digits = judge.classify.weight, [], []
    for part in images.split(500):
        phi.append(judge.features(part.to(weight.device) / 127.5 - 1))
        digits.append(judge.classify(phi[-1]).argmax(1))
    return torch.cat(phi).cpu().double(), torch.cat(digits).cpu()


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Between the Gaussians fitted to two sets of features (N, D), (M, D); 0 if they are equal.

    Factors with Σ = rᵀr come from a QR decomposition; the eigenvalues of Σ_r Σ_g are then the
    squared singular values of r_r r_gᵀ, whose sum is tr (Σ_r Σ_g)^½: no matrix root.
    """
    r_r, r_g = (torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R
                for x in (real, fake))
    mean = (real.mean(0) - fake.mean(0)).square().sum()
    cross = torch.linalg.matrix_norm(r_r @ r_g.mT, "nuc")  # the sum of the singular values
    return (mean + r_r.square().sum() + r_g.square().sum() - 2 * cross).item()


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Shares of `fake` (N, D) inside the manifold of `real` (M, D), and of real inside fake's."""

    def share_inside(points: Tensor, cloud: Tensor) -> float:
        radius = torch.cat([  # k + 1, for the nearest is the point itself
            torch.cdist(part, cloud).topk(k + 1, largest=False).values[:, -1]
            for part in cloud.split(200)
        ])
        inside = [(torch.cdist(part, cloud) <= radius).any(1) for part in points.split(200)]
        return torch.cat(inside).double().mean().item()

    return share_inside(fake, real), share_inside(real, fake)


def score(judge: Judge, real: Tensor, samples: dict) -> dict:
    """A row of the table: how the samples were made (method, sampler, ...) and what they score."""
    phi, digits = features(judge, samples["images"])
    row = {key: value for key, value in samples.items() if key not in ("images", "labels")}
    row |= {"N": len(phi), "distance": frechet_distance(real, phi)}
    row["precision"], row["recall"] = precision_recall(real, phi)
    if "labels" in samples:
        row["accuracy"] = (digits == samples["labels"]).double().mean().item()
        row["misread"] = 1 - row["accuracy"]
    return row


# --------------------------------------------------------------------------------- training


def train(args) -> tuple[Judge, list]:
    """Train the classifier on the training digits, shifted by up to two pixels."""
    images, labels = common.load_digits(args)
    steps_per_epoch = len(images) // args.batch_size
    total_steps = args.epochs * steps_per_epoch

    torch.manual_seed(args.seed)
    model = make_model(args)
    fused = "fused" in args.speed
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05, fused=fused)
    scheduler = torch.optim.lr_scheduler.LambdaLR(  # 200 steps up, then straight down to zero
        optimizer, lambda step: min((step + 1) / 200, 1) * max(1 - step / total_steps, 0)
    )
    rng = torch.Generator(args.device).manual_seed(args.seed)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    history = common.restore(args, rng, parts) if args.resume else []
    scheduler.base_lrs = [args.lr]  # --lr may be a new one

    progress = common.Progress(args, history, steps_per_epoch, args.epochs)
    for _ in range(progress.done, args.epochs):
        shifts = torch.randint(-2, 3, (steps_per_epoch, 2), generator=rng, device=args.device)
        batches = common.batches(images, labels, args.batch_size, rng)
        for (x, y), shift in zip(batches, shifts.tolist()):
            loss = F.cross_entropy(model(x.roll(shift, (2, 3))), y, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            progress.step(loss)
        progress.end_epoch(scheduler.get_last_lr()[0])
        common.save_checkpoint(args, history, rng, parts)
    progress.bar.close()
    return model, history


# --------------------------------------------------------------------------------- the sets


def load_set(path: Path, most: int) -> dict:
    """The first `most` samples of an evaluation set, or of a folder of 28x28 PNGs."""
    try:
        if path.is_dir():
            files = [Image.open(file).convert("L") for file in sorted(path.glob("*.png"))]
            samples = {"images": torch.stack([pil_to_tensor(file) for file in files])}
        else:
            samples = torch.load(path, map_location="cpu", weights_only=True)
        assert isinstance(samples, dict)
        images, labels = samples["images"], samples.get("labels", samples["images"])
        assert images.dtype == torch.uint8 and images.shape[1:] == (1, 28, 28)
        assert len(images) == len(labels) >= 5
    except FileNotFoundError:
        sys.exit(f"no such set: {path}")
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, AssertionError,
            AttributeError, LookupError, TypeError):
        sys.exit(f"{path} is not an evaluation set: that is a dict in a .pt with `images`, uint8 "
                 "(N, 1, 28, 28) with N >= 5, and maybe `labels` (N,); or a folder of 28x28 PNGs")
    samples = {"method": str(path), "sampler": "", "steps": None} | samples
    samples.setdefault("network_calls", samples["steps"])
    return samples | {k: samples[k][:most] for k in ("images", "labels") if k in samples}


def timing(samples: dict, path: Path) -> dict:
    """What the timings.json beside the set says of its sampler, if the same machine made both."""
    path = path.with_name("timings.json")
    timings = json.loads(path.read_text()) if path.exists() else {"hardware": ""}
    if timings["hardware"] != samples.get("hardware"):
        return {}
    trained_here = timings["trained_on"] == timings["hardware"]
    found = {"training_minutes": timings["training_seconds"] / 60} if trained_here else {}
    for entry in timings["samplers"]:
        keys = entry.keys() & {"method", "sampler", "steps", "guidance"}
        if all(entry[key] == samples.get(key) for key in keys):
            found |= {key: entry[key] for key in ("seconds", "images_per_second")}
    return found


def add_notes(rows: list[dict], args) -> None:
    """Why a row must not be mixed with the others: other knobs, other digits, another machine."""
    usual = statistics.mode([row.get("hardware") for row in rows if "args" in row] or [""])
    for row in rows:
        made = row.get("args", {})
        notes = {f"fast_dev {made.get('fast_dev')}": made.get("fast_dev") != args.fast_dev,
                 f"{made.get('dataset')} digits": made.get("dataset") != args.dataset,
                 f"on {row.get('hardware')}": row.get("hardware") != usual}
        notes = notes if made else {"unknown origin": True}
        row["note"] = ", ".join(note for note, applies in notes.items() if applies)


# ------------------------------------------------------------------------------- the claims

LIKE = 1.25  # as good as: a Fréchet distance at most so many times the other's
CLAIMS = [  # claim; the set that it speaks of; the one it is held against; so many times its value
    ("DDIM-100 is many times faster than DDPM", ("diffusion", "DDIM", 100),
     ("diffusion", "DDPM", 1000), [("seconds", "<=", 0.2)]),
    ("... and almost as good", ("diffusion", "DDIM", 100),
     ("diffusion", "DDPM", 1000), [("distance", "<=", LIKE)]),
    ("Latent diffusion is cheaper at like quality", ("latent diffusion", "DDIM", 100),
     ("diffusion", "DDIM", 100), [("images_per_second", ">=", 1), ("distance", "<=", LIKE)]),
    ("Guidance makes digits more distinct", ("guided diffusion", "DDIM", 100, 3),
     ("guided diffusion", "DDIM", 100, 1), [("misread", "<=", 0.5)]),
    ("One step after one reflow equals five before", ("reflow", "Euler", 1),
     ("rectified flow", "Euler", 5), [("distance", "<=", 1)]),
    ("The latent flow needs fewer steps", ("latent flow", "Euler", 5),
     ("rectified flow", "Euler", 10), [("distance", "<=", LIKE)]),
    ("... or less time", ("latent flow", "Euler", 10),
     ("rectified flow", "Euler", 10), [("images_per_second", ">=", 1), ("distance", "<=", LIKE)]),
]


def find(rows: list[dict], n: int, wanted: tuple) -> dict:
    """The row with N = n of a method, sampler, number of steps and, if it is given, guidance."""
    for row in rows:
        if row["N"] == n and all(row.get(key) == value for key, value in zip(COLUMNS, wanted)):
            return row
    raise LookupError(f"no {' '.join(map(str, wanted))}")


def judge_claim(rows: list[dict], claim: str, one: tuple, two: tuple, rules: list) -> list[str]:
    """Claim, rule, verdict, figures: by the largest sets of equal N that there are of both."""
    names = {key: COLUMNS.get(key, (key, ".2%")) for key, _, _ in rules}
    rule = " and ".join(f"{names[key][0]} {sign} {x:g} times" for key, sign, x in rules)
    sets = [" ".join(map(str, wanted)) for wanted in (one, two)]
    head, missing = [claim, f"{sets[0]}: {rule} that of {sets[1]}"], "no sets"
    for n in sorted({row["N"] for row in rows}, reverse=True):
        try:
            a, b = find(rows, n, one), find(rows, n, two)
            holds = all(a[key] <= x * b[key] if sign == "<=" else a[key] >= x * b[key]
                        for key, sign, x in rules)
            figures = "; ".join(f"{name} {a[key]:{form}} against {b[key]:{form}}"
                                for key, (name, form) in names.items())
            return [*head, "holds" if holds else "does not hold", f"{figures} (N = {n:,})"]
        except LookupError as error:  # no such row, or one without times or labels
            missing = str(error)
    return [*head, "not measured", missing]


# ----------------------------------------------------------------------------------- report

COLUMNS = {  # key of a row: head and format; first those by which find() knows a row
    "method": ("method", ""), "sampler": ("sampler", ""), "steps": ("steps", ","),
    "guidance": ("guidance", "g"), "network_calls": ("network calls", ","), "N": ("N", ","),
    "distance": ("Fréchet distance", ".3g"), "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"), "accuracy": ("accuracy", ".2%"),
    "seconds": ("seconds for 16", ".3g"), "images_per_second": ("images/s", ",.1f"),
    "note": ("not compared:", ""),
}


def table(head: list[str], lines: list[list[str]]) -> str:
    """Markdown, with columns as wide as their widest cell."""
    width = [max(map(len, column)) for column in zip(head, *lines)]
    cells = [head, ["-" * n for n in width], *lines]
    cells = [" | ".join(cell.ljust(n) for cell, n in zip(line, width)) for line in cells]
    return "".join(f"| {line} |\n" for line in cells)


def score_table(rows: list[dict]) -> str:
    keys = [key for key in COLUMNS if any(row.get(key) for row in rows)]
    lines = [["" if row.get(key) is None else f"{row[key]:{COLUMNS[key][1]}}" for key in keys]
             for row in rows]
    return table([COLUMNS[key][0] for key in keys], lines)


def curves(rows: list[dict], x: str, y: str) -> dict:
    """Lines for common.save_plot, from the rows with both x and y; row["line"] is the legend."""
    lines: dict = {}
    rows = [row for row in rows if x in row and y in row]
    for row in sorted(rows, key=lambda row: (row["line"], row[x])):  # a name, a colour
        xs, ys = lines.setdefault(row["line"], ([], []))
        xs.append(row[x]), ys.append(row[y])
    return lines


def draw(args, rows: list[dict], floors: list[dict]) -> None:
    """Quality against network calls, time, training and guidance, each where it was measured."""
    for row in (*rows, *floors):
        keys = [key for key in ("method", "sampler", "guidance") if key in row]
        row["line"] = " ".join([str(row[key]) for key in keys] + [f"(N = {row['N']:,})"])
    for x, xlabel in (("network_calls", "network calls for an image"),
                      ("seconds", "seconds for 16 images"),
                      ("training_minutes", "minutes of training (in a column: by steps)")):
        if lines := curves(rows, x, "distance"):
            ends = [f(value for xs, _ in lines.values() for value in xs) for f in (min, max)]
            lines |= {floor["line"]: (ends, [floor["distance"]] * 2) for floor in floors}
            common.save_plot(args.out_dir / f"quality_{x}.png", lines, xlabel=xlabel, xscale="log",
                             yscale="log", ylabel="Fréchet distance to the test digits",
                             title="How close the samples come to digits (lower is better)")
    shares = [row | {"share": row[y], "line": f"{y}, {row['sampler']} (N = {row['N']:,})"}
              for y in ("accuracy", "precision", "recall") for row in rows if y in row]
    if lines := curves(shares, "guidance", "share"):
        common.save_plot(args.out_dir / "guidance.png", lines, xlabel="guidance scale",
                         title="Guidance: more distinct digits, of fewer kinds", ylabel="share")


def report(args, judge: Judge) -> None:
    """Score the sets and print the table; of runs also write it, with plots and verdicts."""
    paths = [Path(file) for file in args.files] or sorted(args.runs.glob("*/eval_*.pt"))
    sets = [load_set(path, args.eval_samples) for path in paths]
    images, labels = common.load_digits(args, train=False)
    real, seen = features(judge.eval(), common.to_uint8(images))
    accuracy = (seen == labels.cpu()).double().mean()
    images, labels = common.load_digits(args)
    rows, floors = [], []
    for path, samples in zip(tqdm(paths, "sets"), sets):
        known = {"method": str(path)} if args.files else timing(samples, path)
        rows.append(score(judge, real, samples | known))
    for n in sorted({row["N"] for row in rows}) or [args.eval_samples]:
        digits = {"images": common.to_uint8(images[:n]), "labels": labels[:n].cpu()}
        floors.append({"method": "training digits"} | score(judge, real, digits))
    add_notes(rows, args)
    order = lambda row: (row["method"], row["sampler"], row["steps"] or 0, row.get("guidance", 0))
    rows.sort(key=lambda row: (row["note"], *order(row)))
    text = (f"Against {len(real):,} test digits of {args.dataset}, of which the classifier gets "
            f"{accuracy:.2%} right:\n\n{score_table([*rows, *floors])}")
    if not args.files:
        rows = [row for row in rows if not row["note"]]
        draw(args, rows, floors)
        verdicts = [judge_claim(rows, *claim) for claim in CLAIMS]
        text += "\n" + table(["the report's claim", "rule", "verdict", "measured"], verdicts)
        ours = {path.stem for path in Path(__file__).parent.glob("0[1-4]*.py")}
        for script in sorted(ours - {path.parent.name for path in paths}):
            text += f"\nMissing: {args.runs / script} has no sets; --eval-samples makes them.\n"
        (args.out_dir / "comparison.md").write_text(text)
    print(text)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.export:
        return common.export_weights(args, "model")
    try:
        if args.sample_only:
            judge = make_model(args)
            judge.load_state_dict(args.saved["model"])
        else:
            judge, _ = train(args)
        report(args, judge)
    except KeyboardInterrupt:
        sys.exit("stopped")


if __name__ == "__main__":
    main()
