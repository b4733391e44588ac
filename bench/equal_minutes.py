"""Which one-step method draws the best digits after equally many minutes of one core?

    for arm in vae drifting clusters meanflow latent-reflow reflow guided; do
        OMP_NUM_THREADS=1 python bench/equal_minutes.py $arm --minutes 30; done

Everything from scratch, by the `train` of the numbered scripts. An arm in the latent first pays
for the VAE of its seed (20 epochs, as 02 has it). What is left goes to its stages by SHARES. We
time some steps of a stage, and then plan as many as fit, so that the rate falls to 0 at the end.

    drifting        07, told the class                  latent-reflow   04b
    clusters        07, 100 clusters for classes        reflow          04, batches of 64
    meanflow        06                                  guided          03, batches of 64

Other options go to the script. Adds a line for each sampler to results.jsonl in --out-dir:
Fréchet distance of 5,000 samples and so on, the steps of each stage, and the minutes of the
processor. Needs MNIST in data/.
"""

import argparse
import copy
import importlib
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
common = importlib.import_module("common")
compare = importlib.import_module("05_compare")
arms = importlib.import_module("drifting_arms")
SCRIPTS = {"vae": "02_latent_diffusion", "drifting": "07_drifting", "clusters": "07_drifting",
           "meanflow": "06_meanflow", "latent-reflow": "04b_latent_rflow",
           "reflow": "04_rectified_flow", "guided": "03_cfg"}
SHARES = {"flow": 0.55, "pairs": 0.15, "reflow": 0.3}  # all of it for other stages


class Plan:
    """The `fit` of a script, and what makes pairs, for so many seconds of the processor."""
    def __init__(self, fit, seconds: float):
        self.fit, self.seconds, self.steps, self.tried = fit, seconds, {}, 0

    def __call__(self, args, state, name, model, loss, data, test, epochs, lr, draw=None):
        def seconds_of(steps: int) -> float:
            start, rows = time.process_time(), steps * args.batch_size
            few = [[x[torch.arange(rows) % len(x)] for x in data],
                   [x[: args.batch_size] for x in test]]
            self.fit(trial, {"path": "new", "stages": {}}, name, copy.deepcopy(model), loss, *few,
                     1, lr)
            self.tried += time.process_time() - start
            return time.process_time() - start

        trial = argparse.Namespace(**vars(args))
        trial.out_dir = args.out_dir / "trial"
        trial.out_dir.mkdir(exist_ok=True)
        step = (seconds_of(22) - seconds_of(2)) / 20
        rows = self.seconds * SHARES.get(name, 1) / step * args.batch_size
        epochs = int(rows // len(data[0])) + 1
        size = max(int(rows / epochs), args.batch_size)
        even = torch.arange(size) * len(data[0]) // size  # writers differ
        self.steps[name] = epochs * (size // args.batch_size)
        return self.fit(args, state, name, model, loss, [x[even] for x in data], test, epochs, lr,
                        draw)

    def pairs(self, args, flow, make):
        start, parts, rng = time.process_time(), [], torch.Generator().manual_seed(args.seed)
        with tqdm(desc="pairs") as bar:
            while time.process_time() - start < self.seconds * SHARES["pairs"]:
                parts.append(torch.stack(make(100, rng)).half())
                bar.update(100)
        *train, test = parts
        self.steps["pairs"] = 100 * len(train)
        return torch.cat(train, dim=1), test


def samplers_of(arm: str, nets: dict, share) -> dict:
    """{name: draw(noise) -> images}; a class is asked for in turn, a cluster as often as it is."""
    script, vae = importlib.import_module(SCRIPTS[arm]), nets.get("vae")
    if arm in ("drifting", "clusters"):
        def one_call(noise):
            labels = torch.arange(len(noise)) % 10
            if arm == "clusters":
                labels = torch.multinomial(share, len(noise), replacement=True)
            return vae.to_images(script.sample(nets["drifting"], noise.flatten(1), labels))
        return {"1 call": one_call}
    if arm == "meanflow":
        return {f"{n} call{'s' * (n > 1)}": lambda x, n=n: vae.to_images(script.meanflow_sample(
            nets["meanflow"], x, n)) for n in (1, 2, 5)}
    if arm == "guided":
        schedule = script.make_schedule(1000)
        return {"DDIM-20": lambda x: script.ddim_sample(script.guided(
            nets["diffusion"], torch.arange(len(x)) % 10, 1), schedule, x, 20)}
    shown = vae.to_images if vae else lambda x: x
    return {f"reflow, {n} call{'s' * (n > 1)}": lambda x, n=n: shown(script.euler_sample(
        nets["reflow"], x, n)) for n in (1, 2, 5)} | {
        "flow, AB2, 5 calls": lambda x: shown(script.adams_sample(nets["flow"], x, 5))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arm", choices=SCRIPTS)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--out-dir", type=Path, default=Path("runs/equal_minutes"))
    mine, more = parser.parse_known_args()
    script, pixels = importlib.import_module(SCRIPTS[mine.arm]), mine.arm in ("reflow", "guided")
    vae_folder, share = mine.out_dir / f"vae_{mine.seed}", None
    options = ["--seed", mine.seed, "--device", "cpu",
               "--out-dir", mine.out_dir / f"{mine.arm}_{mine.minutes:g}_{mine.seed}"]
    if mine.arm == "vae":
        options[-1] = vae_folder
    elif not pixels:
        options += ["--vae", vae_folder / "checkpoint.pt"]
    options += ["--batch-size", 64] if pixels else []
    options += {"clusters": ["--samples", 4, "--others", 16, "--batch-size", 50]}.get(mine.arm, [])
    options += ["--toy-steps", 16] if "07" in SCRIPTS[mine.arm] else []
    args, start = script.parse_args([*map(str, options), *more]), time.process_time()
    *parts, names = common.load_images(args)

    if mine.arm == "vae":  # one step of the diffusion, so that the file is complete
        fit = script.fit
        script.fit = lambda *a, **more: fit(*(a if a[2] == "vae" else cut(*a)), **more)
        script.train(args)
        seconds = time.process_time() - start
        (vae_folder / "seconds.json").write_text(json.dumps(seconds))
        return print(f"VAE of seed {mine.seed}: {seconds / 60:.1f} minutes")
    paid = 0 if pixels else json.loads((vae_folder / "seconds.json").read_text())
    if mine.arm == "clusters":
        torch.manual_seed(mine.seed)
        vae = common.load(SCRIPTS["vae"], "vae", args.vae)
        parts, share = arms.into_clusters(parts, vae, 100)
        names = [str(i) for i in range(100)]
    common.load_images = lambda args: (*parts, names)
    script.fit = plan = Plan(script.fit, 60 * mine.minutes - paid)
    common.kept_pairs = plan.pairs
    nets = script.train(args)
    minutes = (paid + time.process_time() - start - plan.tried) / 60

    judge = common.load("05_compare", "judge")
    real, _ = compare.features(judge, common.to_uint8(parts[1][0]))
    shape = (1, 28, 28) if pixels else (1, 8, 8)
    for name, draw in samplers_of(mine.arm, nets, share).items():
        torch.manual_seed(100 + mine.seed)
        noise = tqdm(torch.randn(mine.samples, *shape).split(50), name)
        made = {"images": torch.cat([common.to_uint8(draw(part)) for part in noise])}
        if mine.arm in ("drifting", "guided"):
            made["labels"] = torch.arange(mine.samples) % 10
        row = compare.score(judge, real, made)
        del row["without"]
        common.save_grid(made["images"][:40] / 127.5 - 1, args.out_dir / f"samples_{name}.png",
                         f"{mine.arm}, {name}, after {minutes:.0f} minutes", 10)
        row = {"arm": mine.arm, "sampler": name, "seed": mine.seed, "planned": mine.minutes,
               "minutes": minutes, "vae_minutes": paid / 60, "steps": plan.steps} | row
        with open(mine.out_dir / "results.jsonl", "a") as lines:
            print(json.dumps(row), file=lines)
        print(row, flush=True)


def cut(args, state, name, model, loss, data, test, epochs, lr):
    data, test = ([x[: args.batch_size] for x in part] for part in (data, test))
    return args, state, name, model, loss, data, test, 1, lr


if __name__ == "__main__":
    main()
