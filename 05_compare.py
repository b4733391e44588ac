"""How good and fast are the samples? A classifier scores them, and ten claims are tested.

A picture shows that digits look like digits, but not whether all kinds are there. So a
small classifier turns each image into 64 numbers, its features, and we compare the cloud
of a sampler's images with that of the test digits: by the distance between Gaussians
fitted to both; by whether samples lie among digits (precision, density); and by whether
digits lie among samples (recall, coverage).

    FD        = |µ_r - µ_g|² + tr(Σ_r + Σ_g - 2 (Σ_r Σ_g)^½)     Heusel et al. 2017, Eq. 6
    precision = share of φ_g with |φ_g - φ_r| ≤ R_3(φ_r) for some φ_r   Kynkäänniemi et al. 2019
    recall    = share of φ_r with |φ_r - φ_g| ≤ R_3(φ_g) for some φ_g
    density   = a fifth of the number of φ_r with |φ_g - φ_r| ≤ R_5(φ_r), averaged over φ_g
    coverage  = share of φ_r with |φ_g - φ_r| ≤ R_5(φ_r) for some φ_g      Naeem et al. 2020
    R_k(φ) is the distance from φ to its k-th nearest neighbour in its own set
    φ_r, φ_g: features of test digits, samples, (N, 64); µ, Σ: mean, covariance

FD, the Fréchet distance, is really a squared distance, and a small set makes it too large.
So each size N has its own table and floor: the mean FD of ten draws of N training digits
(as many of each class if a set has that, as for 03 and 07). Claims compare times, shares
misread, or distances minus the floor. One is open if luck may decide: within two standard
errors of its limit. (For the error of a distance we leave out each twentieth of a set in
turn; it tells the luck of the noise, not of another training.) Recall alone proves little,
since scattered samples have a large R, nor does precision where one digit is far from all.

    python 05_compare.py                       score the sets of --eval-samples in runs/SCRIPT
    python 05_compare.py FILE.pt FOLDER        score these: a .pt, or a folder of pictures
    python 05_compare.py --train-judge         train the classifier again, on --dataset
"""

import importlib
import statistics
import sys
from pathlib import Path

import torch
from matplotlib import figure
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import common

fit = importlib.import_module("01_ddpm_ddim").fit  # the loop of all scripts


def parse_args(argv: list[str] | None = None):
    parser = common.make_parser(__file__, "Score samples.", epochs=5, lr=3e-3)
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="FILE", help="a .pt or a folder of pictures")
    add("--train-judge", action="store_true", help="train the classifier of --dataset")
    add("--runs", type=Path, help="folder of all results; None: the one with --out-dir")
    tiny = {"dataset": "synthetic", "train_images": 512, "epochs": 2, "batch_size": 32}
    add("--eval-samples", **common.COUNT, default=10_000, help="at most so many of a set")
    first = parser.parse_args(argv or [])
    parser.set_defaults(sample_only=not (first.train_judge or first.resume or first.fast_dev))
    args = common.parse(parser, argv, tiny, sampling=["files", "train_judge", "runs"])
    if args.runs and not args.runs.is_dir():
        parser.error(f"--runs: there is no folder {args.runs}")
    args.runs = args.runs or args.out_dir.parent
    if args.eval_samples < 5 or args.batch_size < 2:
        parser.error("--eval-samples must be at least 5, --batch-size at least 2")
    return args


def conv(c_in: int, c_out: int) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]


class Judge(nn.Module):
    """(B, 1, 28, 28) in [-1, 1] -> (B, classes), their scores; .features gives (B, 64)."""
    def __init__(self, classes: int = 10):
        super().__init__()
        self.features = nn.Sequential(
            *conv(1, 32), *conv(32, 32), nn.MaxPool2d(2),  # (B, 32, 14, 14)
            *conv(32, 64), *conv(64, 64), nn.MaxPool2d(2),  # (B, 64, 7, 7)
            *conv(64, 128), nn.MaxPool2d(2), nn.Flatten(),  # (B, 128 * 3 * 3)
            nn.Linear(1152, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU())
        self.classify = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))


def make_models(classes: int, device: str = "cpu") -> dict[str, nn.Module]:
    return {"judge": Judge(classes).to(device)}


@torch.no_grad()
def features(judge: Judge, images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 1, 28, 28) -> features (N, 64), float64, and digits (N,) as read."""
    device = judge.classify.weight.device
    phi = torch.cat([judge.features(part.to(device) / 127.5 - 1) for part in images.split(500)])
    digits = judge.classify(phi).argmax(1).cpu()
    return (phi if phi.is_cuda else phi.cpu()).double(), digits  # Apple's GPUs: no float64


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """FD between the Gaussians fitted to two sets of features, (N, D) and (M, D).
    QR decompositions give factors with Σ = AᵀA. The singular values of A_r A_gᵀ are the
    square roots of the eigenvalues of Σ_r Σ_g, so they add up to tr (Σ_r Σ_g)^½."""
    a_r, a_g = (torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R
                for x in (real, fake))
    shift = (real.mean(0) - fake.mean(0)).square().sum()
    cross = torch.linalg.matrix_norm(a_r @ a_g.mT, "nuc")  # the sum of the singular values
    return (shift + a_r.square().sum() + a_g.square().sum() - 2 * cross).item()


def standard_error(without: Tensor) -> float:
    """Of a set's figure, from its values without each of K blocks: Tukey's jackknife."""
    return ((len(without) - 1) * without.var(correction=0)).sqrt().item()


def near(points: Tensor, cloud: Tensor, k: int) -> Tensor:
    """(N, M): does a point (N, D) lie within R_k(φ) of each φ in `cloud` (M, D)?"""
    k = min(k + 1, len(cloud))  # φ itself is the nearest
    radii = torch.cat([torch.cdist(part, cloud).topk(k, largest=False).values[:, -1]
                       for part in cloud.split(200)])
    return torch.cat([torch.cdist(part, cloud) <= radii for part in points.split(200)])


def score(judge: Judge, real: Tensor, samples: dict) -> dict:
    """A row of the table: how the samples were made (method, ...) and what they score."""
    phi, digits = features(judge, samples["images"])
    row = {key: value for key, value in samples.items() if key not in ("images", "labels")}
    row |= {"N": len(phi), "distance": frechet_distance(real, phi)}
    block = torch.arange(len(phi)) * 20 // len(phi)  # twentieths
    row["without"] = torch.tensor([frechet_distance(real, phi[block != k]) for k in block.unique()])
    n = min(len(real), len(phi))  # equally many of both
    fake, some = phi[:n], real[torch.arange(n) * len(real) // n]  # evenly: writers differ
    row |= {"precision": near(fake, some, 3).any(1).double().mean().item(),
            "recall": near(some, fake, 3).any(1).double().mean().item()}
    hits = near(fake, some, 5)
    row |= {"density": hits.double().sum().item() / (5 * n),
            "coverage": hits.any(0).double().mean().item()}
    if "labels" in samples:
        row["misread"] = (digits != samples["labels"]).double().mean().item()
        row["accuracy"] = 1 - row["misread"]
    return row


def floor_of(judge: Judge, real: Tensor, phi: Tensor, training: dict, n: int, even=False) -> dict:
    """The row of n training images, if `even` as many of each class: the mean distance of
    ten draws, and the error of one; the other scores are those of the first."""
    rng, draws, labels = torch.Generator().manual_seed(0), [], training["labels"]
    for _ in range(10):
        draw = torch.randperm(len(phi), generator=rng)
        if even:  # the first of each class, the second, ..., until one has no more
            turn = F.one_hot(labels[draw]).cumsum(0).gather(1, labels[draw, None])[:, 0]
            counts = labels.unique(return_counts=True)[1]
            draw = draw[turn.argsort(stable=True)][: len(counts) * counts.min()]
        draws.append(draw[:n])
    distances = torch.tensor([frechet_distance(real, phi[draw]) for draw in draws])
    row = score(judge, real, {key: part[draws[0]] for key, part in training.items()})
    shared = row["N"] / len(phi)  # of two draws: this makes them more alike
    row["error"] = distances.std().item() / (1 - shared) ** 0.5 if shared < 1 else None
    row["method"] = "training images" + ", classes alike" * even
    return row | {"distance": distances.mean().item()}


def train(args) -> dict[str, nn.Module]:
    """Trains the classifier; each batch is shifted, cyclically, by up to two pixels."""
    data, test, classes = common.load_images(args)
    if len(classes) < 2:
        sys.exit(f"{args.dataset} has one class: there is nothing to tell apart")
    state = common.open_run(args, network={"classes": len(classes)}, classes=classes)
    torch.manual_seed(args.seed)
    model = make_models(len(classes), args.device)["judge"]
    pixels = torch.arange(28, device=args.device)

    def loss(model, x: Tensor, y: Tensor) -> Tensor:
        rows, columns = (pixels + torch.randint(-2, 3, (2, 1), device=x.device)) % 28
        return F.cross_entropy(model(x[:, :, rows[:, None], columns]), y, label_smoothing=0.05)

    return {"judge": fit(args, state, "judge", model, loss, data, test, args.epochs, args.lr)}


def load_set(path: Path, limit: int) -> dict:
    """The first `limit` samples of an evaluation set, or of a folder of pictures."""
    with common.one_line_error(f"{path} is no set: a .pt of 5 images or more, or a folder of them"):
        if path.is_dir():
            found, left_out = common.find_pictures(path)
            images = common.read_pictures(path, found, left_out)[1]
            common.say(f"{path}: {len(images)} pictures{common.told(left_out)}")
            mixed = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
            samples = {"images": common.to_uint8(images[mixed])}  # so each part has all classes
        else:
            samples = torch.load(path, map_location="cpu", weights_only=True)
        images, n = samples["images"], len(samples["images"])
        samples = {"method": str(path), "sampler": "", "steps": None} | samples
        samples |= {"dataset": samples.get("args", {}).get("dataset", ""),
                    "network_calls": samples.get("network_calls", samples["steps"])}
        if (images.dtype != torch.uint8 or images.shape[1:] != (1, 28, 28) or n < 5
                or "labels" in samples and samples["labels"].shape != (n,)
                or any(type(samples[key]) is not str for key in ("method", "sampler", "dataset"))):
            raise ValueError(f"{images.dtype}, {(*images.shape,)}")
        score_table([samples])  # formats each figure, so one that is no number fails here
        return samples | {k: samples[k][:limit] for k in ("images", "labels") if k in samples}


COLUMNS = {  # key of a row: heading and format
    "method": ("method", ""), "sampler": ("sampler", ""), "steps": ("steps", ","),
    "guidance": ("guidance", "g"), "network_calls": ("network calls", ","),
    "distance": ("Fréchet distance", ".3g"), "above": ("above the floor", ".3g"),
    "error": ("standard error", ".2g"), "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"), "density": ("density", ".3f"), "coverage": ("coverage", ".3f"),
    "accuracy": ("accuracy", ".2%"), "seconds": ("seconds for 16", ".3g"),
    "images_per_second": ("images/s", ",.1f"), "note": ("times", ""),
}
HEADINGS = {key: heading for key, (heading, _) in COLUMNS.items()} | {"misread": "share misread"}
TIMES = ("seconds", "images_per_second")
AS_GOOD = 1.25  # at most so many times the other's distance above the floor
CLAIMS = [  # a text, one set, another, what counts, with its limit (1 to 5 are a report's)
    ("1a. DDIM-100 is many times as fast as DDPM",
     "diffusion DDIM 100", "diffusion DDPM 1000", {"seconds": 5}),
    ("1b. ... and as good",
     "diffusion DDIM 100", "diffusion DDPM 1000", {"above": AS_GOOD}),
    ("2. Latent diffusion is cheaper and as good", "latent diffusion DDIM 100",
     "diffusion DDIM 100", {"images_per_second": 1, "above": AS_GOOD}),
    ("3. Guidance (s = 3, not 1) makes digits more distinct", "guided diffusion DDIM 100 3",
     "guided diffusion DDIM 100 1", {"misread": AS_GOOD}),
    ("4a. One step after a reflow is as good as five before",
     "reflow Euler 1", "rectified flow Euler 5", {"above": AS_GOOD}),
    ("4b. ... and in the latent",
     "latent reflow Euler 1", "latent flow Euler 5", {"above": AS_GOOD}),
    ("5a. Five steps in the latent are as good as ten in pixels",
     "latent flow Euler 5", "rectified flow Euler 10", {"above": AS_GOOD}),
    ("5b. Ten of them are faster, and as good", "latent flow Euler 10",
     "rectified flow Euler 10", {"images_per_second": 1, "above": AS_GOOD}),
    ("6a. One step of MeanFlow is as good as one after the reflow of 04b",
     "MeanFlow MeanFlow 1", "latent reflow Euler 1", {"above": AS_GOOD}),
    ("6b. ... and so is one of drifting, told the class",
     "drifting drifting 1", "latent reflow Euler 1", {"above": AS_GOOD}),
]


def name(row: dict) -> str:
    """Of a set, as in CLAIMS: method, sampler, steps, and guidance, if any."""
    parts = [row.get(key) for key in ("method", "sampler", "steps", "guidance")]
    return " ".join(f"{x:g}" if type(x) in (int, float) else x for x in parts if x is not None)


def judge_rule(a: dict, b: dict, key: str, limit: float) -> tuple[str, str]:
    """Verdict on a beside b, and figures. Of times: is a at least `limit` times as fast? Of
    what should be small: better; as good (at most `limit` times b's); worse; or open."""
    figures = f"{HEADINGS[key]}: {a[key]:.3g} against {b[key]:.3g}"
    if key in TIMES:
        if a["note"] != b["note"]:
            return "not measured", f"{HEADINGS[key]}: of two machines"
        times = b[key] / a[key] if key == "seconds" else a[key] / b[key]
        slower = "slower" if times < 1 else f"not {limit:g} times as fast"
        return "faster" if times >= limit else slower, f"{figures}, {times:.2g} times as fast"

    def margin(times: float) -> float:
        """By how many standard errors a is below `times` b. Sets of one noise share luck."""
        times = 2 - times if b[key] < 0 else times  # below the floor: |b| / 4 more
        if key == "above":
            error = standard_error(times * b["without"] - a["without"])
        else:  # shares of N, in which one image more or less is never certain
            p, q = ((row[key] * row["N"] + 1) / (row["N"] + 2) for row in (a, b))
            error = ((p - p * p) / a["N"] + times**2 * (q - q * q) / b["N"]) ** 0.5
        return (times * b[key] - a[key]) / max(error, 1e-9)

    verdict = "as good" if margin(limit) > 2 else "worse" if margin(limit) < -2 else "open"
    if margin(1) > 2:
        verdict = "better"
    return verdict, figures + (f", {a[key] / b[key]:.3g} times" if min(a[key], b[key]) > 0 else "")


def judge_claim(rows: list[dict], n: int, claim: str, one: str, two: str, rules: dict) -> list:
    """Claim, sets, verdict and figures, from sets of n; times from sets of any size."""
    rows, found = sorted(rows, key=lambda row: row["N"] == n), []  # those of n last: they count
    for key, limit in rules.items():
        sets = {name(row): row for row in rows
                if row.get(key) is not None and (row["N"] == n or key in TIMES)}
        lacking = [wanted for wanted in (one, two) if wanted not in sets]
        found.append(("not measured", f"no {HEADINGS[key]} of {lacking[0]}") if lacking else
                     judge_rule(sets[one], sets[two], key, limit))
    return [claim, f"{one} against {two}", *("; ".join(parts) for parts in zip(*found))]


def table(head: list[str], lines: list[list[str]]) -> str:
    """Markdown, with columns as wide as their widest cell."""
    width = [max(map(len, column)) for column in zip(head, *lines)]
    cells = [head, ["-" * n for n in width], *lines]
    cells = [" | ".join(cell.ljust(n) for cell, n in zip(line, width)) for line in cells]
    return "".join(f"| {line} |\n" for line in cells)


def score_table(rows: list[dict]) -> str:
    keys = [key for key in COLUMNS if any(row.get(key) not in (None, "") for row in rows)]
    lines = [["" if row.get(key) is None else f"{row[key]:{COLUMNS[key][1]}}" for key in keys]
             for row in rows]
    return table([HEADINGS[key] for key in keys], lines)


def draw(args, n: int, rows: list[dict], floor: float) -> None:
    """Plots of sets of n images. Color: method; mark: sampler; bar: two standard errors."""
    marks = dict(zip(dict.fromkeys(x["sampler"] for x in rows), "osD^vP*X" * len(rows)))
    for x, xlabel in ("network_calls", "network calls for an image"), ("seconds", "seconds for 16"):
        lines = {row["method"]: {} for row in rows}
        axes = figure.Figure(figsize=(8, 5)).subplots()
        for row in rows:
            comparable = row.get(x) is not None and not (x == "seconds" and row["note"])
            if comparable and row.get("guidance") in (None, 1):
                point = row[x], row["distance"], 2 * row.get("error", 0)
                lines[row["method"]].setdefault(row["sampler"], []).append(point)
        for i, (method, parts) in enumerate(lines.items()):
            for sampler, points in parts.items():
                axes.errorbar(*zip(*points), color=f"C{i}", marker=marks[sampler], lw=1)
            up = 1 if "MeanFlow" in parts else -5  # names are left or right of lines
            side, place = ("left", (9, 2)) if "DDIM" in parts else ("right", (-6, up))
            if parts:
                axes.annotate(method, min(map(min, parts.values()))[:2], place, "data",
                              "offset points", ha=side, color=f"C{i}", size=8)
        axes.axhline(floor, color="black", ls=":", label="training images")
        axes.set(xlabel=xlabel, xscale="log", yscale="log", ylabel="Fréchet distance", xmargin=0.25,
                 title=f"Distance to the test images (guidance s = 1), N = {n:,}")
        for sampler in dict.fromkeys(s for parts in lines.values() for s in parts):
            axes.plot([], [], f"k{marks[sampler]}", label=sampler)
        axes.legend(loc="upper right")
        axes.figure.savefig(args.out_dir / f"quality_{x}_{n}.png", bbox_inches="tight", dpi=120)
    swept = [row for row in rows if row.get("guidance") is not None and row["sampler"] == "DDIM"]
    swept = [row for row in swept if row["steps"] == swept[-1]["steps"]]  # the most
    lines = {HEADINGS[key]: points for key in ("distance", "accuracy", "precision", "recall")
             if (points := [(row["guidance"], row[key]) for row in swept if key in row])}
    if swept:
        common.save_plot(args.out_dir / f"guidance_{n}.png", lines, xlabel="guidance scale s",
                         ylabel="share; distance", title=f"What guidance does, N = {n:,}")


def make_figures(args, judge: Judge) -> None:
    """Score the sets: a table, plots and verdicts for each size N."""
    paths = args.files or [path for path in sorted(args.runs.glob("*/eval_*.pt"))
                           if Path(__file__).with_name(f"{path.parent.name}.py").exists()]
    sets = {str(path): load_set(path, args.eval_samples) for path in paths}
    (images, labels), (test_images, test_labels), classes = common.load_images(args)
    training = {"images": common.to_uint8(images), "labels": labels.cpu()}
    if args.sample_only:  # else it has just been trained on these
        common.same_classes(common.load_checkpoint(args), classes)
    for path, made in sets.items():
        if made["dataset"] not in ("", args.dataset) or made.get("names", classes) != classes:
            sys.exit(f"{path} is of other images or classes than those of {args.dataset}")
        made |= {"method": path} if args.files else {}
    real, digits = features(judge, common.to_uint8(test_images))
    right = (digits == test_labels.cpu()).double().mean()
    text = f"The classifier of {args.dataset} reads {right:.2%} of {len(real):,} test images.\n"
    rows = [score(judge, real, made) for made in tqdm(sets.values(), "sets")]
    machines = [row.get("hardware", "an unknown machine") for row in rows]
    for row, machine in zip(rows, machines):  # most rows are of one, whose times compare
        row["note"] = "" if machine == statistics.mode(machines) else f"on {machine}"
    rows.sort(key=lambda row: (row["note"], row["method"], row["sampler"],
                               row["steps"] or 0, row.get("guidance") or 0))
    phi, _ = features(judge, training["images"])
    for n in sorted({row["N"] for row in rows}) or [args.eval_samples]:
        chosen = [row for row in rows if row["N"] == n]
        kinds = sorted({False, *("classes" in row for row in chosen)})  # even or not
        floors = {even: floor_of(judge, real, phi, training, n, even) for even in kinds}
        for row in chosen:
            if (floor := floors["classes" in row])["N"] == n:  # else too few training images
                row["above"] = row["distance"] - floor["distance"]
                row["error"] = standard_error(row["without"])
        text += f"\nSets of N = {n:,} (floor: {floors[False]['N']:,}):\n\n"
        text += score_table([*chosen, *floors.values()])
        if not args.files:
            draw(args, n, chosen, floors[False]["distance"])
            verdicts = [judge_claim(rows, n, *claim) for claim in CLAIMS]
            text += "\n" + table(["claim", "sets", "verdict", "figures"], verdicts)
    common.say(text)
    if not args.files:
        common.save(args.out_dir / "comparison.md", text)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    networks = common.trained(args, make_models) if args.sample_only else train(args)
    make_figures(args, **networks)


if __name__ == "__main__":
    common.run(main)
