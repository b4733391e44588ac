"""Two questions about drifting: what if nobody told the classes, and what if all data count alike?

    OMP_NUM_THREADS=1 python bench/drifting_arms.py                100 clusters stand for classes
    OMP_NUM_THREADS=1 python bench/drifting_arms.py -k 0 --sinkhorn 3 --tau 0.005 --epochs 180

Without labels all samples would be in one field, and rare shapes get lost: small kernels do not
see what is far, so a shape with no samples near it attracts none. k-means in the latent of 02
makes clusters, of one shape each if they are many. They train 07 in place of the classes, each
with its part of the 400 samples, 1,600 others and 5,000 data of a step. Then each sample draws
its cluster, as often as there are images of it. -k 0: the classes, as in 07.

--sinkhorn: the weights of the field are scaled so that all data, and all others, count alike
(He et al. 2026, arXiv 2603.12366), in so many rounds.

Prints the distances of three sets of 5,000 and adds a line to results.jsonl in --out-dir. Needs
MNIST in data/.
"""

import argparse
import importlib
import json
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
common = importlib.import_module("common")
compare = importlib.import_module("05_compare")
latent = importlib.import_module("02_latent_diffusion")
drifting = importlib.import_module("07_drifting")


def k_means(x: Tensor, k: int, rounds: int = 60) -> Tensor:
    """(k, D) centres of x (N, D): Lloyd's algorithm, begun as k-means++ does."""
    centres = x[torch.randint(len(x), (1,))]
    while len(centres) < k:  # a new one where the others are far
        far = torch.cdist(x, centres).min(1).values.square()
        centres = torch.cat([centres, x[torch.multinomial(far, 1)]])
    for _ in range(rounds):
        nearest = torch.cdist(x, centres).argmin(1)
        own = [x[nearest == i] for i in range(k)]
        centres = torch.stack([y.mean(0) if len(y) else c for y, c in zip(own, centres)])
    return centres


def into_clusters(parts: list, vae, k: int) -> tuple[list, Tensor]:
    """[images, labels] to learn from and to test -> the same with clusters for labels; how many."""
    mu = [(latent.encode_all(vae, x)[0] @ vae.R - vae.mean) / vae.std for x, _ in parts]
    centres = k_means(mu[0], k)
    parts = [[x, torch.cdist(z, centres).argmin(1)] for (x, _), z in zip(parts, mu)]
    return parts, parts[0][1].bincount(minlength=k).double()


def coupling(logits: Tensor, rounds: int) -> Tensor:
    """(K, N, M) -> P_ij = a_i b_j exp(logits_ij): rows sum to 1, and columns all to the same,
    if not exactly, after some rounds of Sinkhorn (1967)."""
    b = torch.zeros_like(logits[:, :1])  # logarithms, as all here
    for _ in range(rounds):
        a = -(logits + b).logsumexp(2, keepdim=True)
        b = -(logits + a).logsumexp(1, keepdim=True)
    return (logits + b).softmax(2)


def sinkhorn_field(x: Tensor, data: Tensor, others: Tensor, tau: float, own, rounds: int) -> Tensor:
    """As drifting_field of 07: where data draw x, minus where others do."""
    near, far = torch.cdist(x, data), torch.cdist(x, others)  # (K, N, M), (K, N, L)
    unit = tau * torch.cat([near, far], dim=2).mean((1, 2), keepdim=True)
    far = (far / unit).masked_fill(own, torch.inf)
    return coupling(-near / unit, rounds) @ data - coupling(-far, rounds) @ others


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", type=int, default=100, help="clusters; 0: classes")
    parser.add_argument("--sinkhorn", type=int, default=0, help="rounds; 0: the field of 07")
    parser.add_argument("--tau", type=float, nargs="+", default=drifting.TAUS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3, help="1,200 steps for 100 clusters")
    parser.add_argument("--samples", type=int, default=5000, help="in a set")
    parser.add_argument("--out-dir", type=Path, default=Path("runs/drifting_arms"))
    mine = parser.parse_args()
    k, name = mine.k or 10, f"k{mine.k}_sinkhorn{mine.sinkhorn}_seed{mine.seed}"
    args = drifting.parse_args([
        "--device", "cpu", "--toy-steps", "16", "--seed", str(mine.seed),
        "--epochs", str(mine.epochs), "--samples", str(max(2, 400 // k)),
        "--others", str(1600 // k), "--batch-size", str(5000 // k),
        "--out-dir", str(mine.out_dir / name)])
    *parts, names = common.load_images(args)
    vae, start = common.load("02_latent_diffusion", "vae"), time.process_time()
    if mine.k:
        torch.manual_seed(mine.seed)
        parts, share = into_clusters(parts, vae, k)
        names = [str(i) for i in range(k)]
    field, loss = drifting.drifting_field, partial(drifting.drifting_loss, taus=mine.tau)
    if mine.sinkhorn:
        field = partial(sinkhorn_field, rounds=mine.sinkhorn)
    with (torch.enable_grad(), patch.object(common, "load_images", lambda args: (*parts, names)),
          patch.multiple(drifting, drifting_field=field, drifting_loss=loss)):
        net = drifting.train(args)["drifting"]
    seconds = time.process_time() - start

    judge, sets = common.load("05_compare", "judge"), []
    real, _ = compare.features(judge, common.to_uint8(parts[1][0]))
    for seed in range(3):
        torch.manual_seed(100 + seed)
        labels = torch.arange(mine.samples) % k  # as many of each class
        if mine.k:
            labels = torch.multinomial(share, mine.samples, replacement=True)
        z = drifting.sample(net, torch.randn(mine.samples, 64), labels)
        images = torch.cat([common.to_uint8(vae.to_images(part)) for part in z.split(500)])
        sets.append(compare.score(judge, real, {"images": images}))
        common.save_grid(images[:40] / 127.5 - 1, args.out_dir / f"samples_{seed}.png",
                         f"{name}: one call each", 10)
    found = {name: sets[0][name] for name in ("precision", "recall", "density", "coverage")}
    typed = {name: value for name, value in vars(mine).items() if name != "out_dir"}
    result = typed | {"seconds": seconds, "distances": [one["distance"] for one in sets]} | found
    with open(mine.out_dir / "results.jsonl", "a") as lines:
        print(json.dumps(result), file=lines)
    print(result)


if __name__ == "__main__":
    main()
