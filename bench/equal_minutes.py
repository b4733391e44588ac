"""Which method draws the best digits by one call, after equally many minutes of one core?

    export OMP_NUM_THREADS=1
    for arm in vae drifting clusters meanflow latent-reflow reflow guided; do
        python bench/equal_minutes.py $arm --minutes 30; done        some four hours

Each method gets as many minutes of the processor (not of the clock), from scratch, by the `train`
of its script. Of those in the latent the VAE takes its minutes first: `vae` trains that of a seed
(20 epochs, as in 02). We time some steps of a stage, and plan as many as fit: the learning rate
falls to 0 at their end. Up to ten passes are one long epoch, in which all images come equally
often, or once more; of more passes, each is of nearly all. Samples and scores are not counted.
Flow, pairs and reflow get 55, 15 and 30% of the time, one choice for both. All other options are
those of the scripts, which are meant for longer trainings, but for those of 07.

    drifting        07, told the class              latent-reflow   04b, by one, two and five calls
    clusters        07, 100 clusters for classes    reflow          04, the same, batches of 64
    meanflow        06, by one, two, five calls     guided          03, told the class, batches of
                                                                    64; by DDIM with 20 calls
    picture         ten images of each by one call, and by AB2 and DDIM

What else is typed goes to the script (but --samples, which is for 5,000 to score). Adds a line for
each sampler to results.jsonl in --out-dir: Fréchet distance and so on, the steps of each stage
(of `pairs` their number), and the minutes at its end.
"""

import argparse
import copy
import importlib
import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

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
TITLES = {"drifting": "drifting, told the class", "clusters": "drifting, 100 clusters",
          "meanflow": "MeanFlow", "latent-reflow": "latent", "reflow": "pixels",
          "guided": "03, told the class"}
ENDS = {"flow": 0.55, "pairs": 0.7}  # of the time after the VAE; of other stages: all of it


class Plan:
    """The `fit` of a script, and what makes pairs, until so many seconds of the processor."""
    def __init__(self, fit, seconds: float, paid: float):
        self.fit, self.seconds, self.paid = fit, seconds, paid
        self.start, self.tried, self.steps, self.minutes = time.process_time(), 0.0, {}, {}

    def used(self) -> float:
        return self.paid + time.process_time() - self.start - self.tried

    def left(self, name: str) -> float:
        """Seconds until the end of a stage."""
        return self.paid + ENDS.get(name, 1) * (self.seconds - self.paid) - self.used()

    def __call__(self, args, state, name, model, loss, data, test, epochs, lr, draw=None):
        def seconds_of(steps: int) -> float:
            start, rows = time.process_time(), torch.arange(steps * args.batch_size) % len(data[0])
            self.fit(trial, {"path": "new", "stages": {}}, name, copy.deepcopy(model), loss,
                     [x[rows] for x in data], test, 1, lr, draw)
            self.tried += time.process_time() - start
            return time.process_time() - start

        trial, n = argparse.Namespace(**vars(args)), 10
        trial.out_dir = args.out_dir / "trial"
        trial.out_dir.mkdir(exist_ok=True)
        seconds_of(2)  # the first steps are slower
        first = seconds_of(2)
        while (longer := seconds_of(2 + n) - first) < self.seconds / 180:
            n *= 4
        step = max(longer, 0.01) / n
        epoch = max(first - 2 * step, 0)  # what comes once an epoch: test loss, checkpoint
        full, seconds = len(data[0]) // args.batch_size or 1, self.left(name)
        passes = math.ceil(seconds / (epoch + full * step))
        epochs = passes if passes > 10 else 1  # few passes: one long epoch, which leaves out none
        steps = max(int((seconds / epochs - epoch) / step), 1)
        size = steps * args.batch_size
        even = torch.arange(size) * len(data[0]) // size  # all equally often, or once more
        self.steps[name] = epochs * steps
        net = self.fit(args, state, name, model, loss, [x[even] for x in data], test, epochs, lr,
                       draw)
        self.minutes[name] = self.used() / 60
        return net

    def pairs(self, args, flow, make):
        parts, rng = [], torch.Generator().manual_seed(args.seed)
        with tqdm(desc="pairs") as bar:
            while len(parts) < 2 or self.left("pairs") > 0:
                parts.append(torch.stack(make(100, rng)).half())
                bar.update(100)
        *train, test = parts
        self.steps["pairs"], self.minutes["pairs"] = 100 * len(train), self.used() / 60
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
    parser.add_argument("arm", choices=[*SCRIPTS, "picture"])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--out-dir", type=Path, default=Path("runs/equal_minutes"))
    mine, rest = parser.parse_known_args()
    if mine.arm == "picture":
        return draw_picture(mine)
    script, pixels = importlib.import_module(SCRIPTS[mine.arm]), mine.arm in ("reflow", "guided")
    vae_folder, share = mine.out_dir / f"vae_{mine.seed}", None
    name = "_".join([mine.arm, f"{mine.minutes:g}", str(mine.seed), *rest]).replace("/", "-")
    options = ["--seed", mine.seed, "--device", "cpu", "--out-dir", mine.out_dir / name]
    if mine.arm == "vae":
        options[-1] = vae_folder
    elif not pixels:
        options += ["--vae", vae_folder / "checkpoint.pt"]
    options += ["--batch-size", 64] if pixels else []
    options += {"clusters": ["--samples", 4, "--others", 16, "--batch-size", 50]}.get(mine.arm, [])
    options += ["--toy-steps", 16] if "07" in SCRIPTS[mine.arm] else []
    args, start = script.parse_args([*map(str, options), *rest]), time.process_time()
    torch.set_num_threads(1)
    *parts, names = common.load_images(args)

    if mine.arm == "vae":
        with patch.object(script, "fit", partial(fit_the_vae, script.fit)):
            script.train(args)
        seconds = time.process_time() - start
        (vae_folder / "seconds.json").write_text(json.dumps(seconds))
        return print(f"VAE of seed {mine.seed}: {seconds / 60:.1f} minutes")
    paid = 0 if pixels else json.loads((vae_folder / "seconds.json").read_text())
    if paid > 54 * mine.minutes:
        parser.error(f"--minutes: the VAE takes {paid / 60:.1f} of them")
    plan = Plan(script.fit, 60 * mine.minutes, paid)
    if mine.arm == "clusters":
        torch.manual_seed(mine.seed)
        vae = common.load(SCRIPTS["vae"], "vae", args.vae)
        parts, share = arms.into_clusters(parts, vae, 100)
        names = [str(i) for i in range(100)]
    with (patch.object(script, "fit", plan), patch.object(common, "kept_pairs", plan.pairs),
          patch.object(common, "load_images", lambda args: (*parts, names))):
        nets = script.train(args)
    minutes = plan.used() / 60

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
        row["error"] = compare.standard_error(row.pop("without"))
        torch.save(made["images"][:40], args.out_dir / f"samples_{name}.pt")
        common.save_grid(made["images"][:40] / 127.5 - 1, args.out_dir / f"samples_{name}.png",
                         f"{mine.arm}, {name}, after {minutes:.0f} minutes", 10)
        row = {"arm": mine.arm, "sampler": name, "seed": mine.seed, "options": rest,
               "planned": mine.minutes, "minutes": minutes, "vae_minutes": paid / 60,
               "steps": plan.steps, "until": plan.minutes, "folder": args.out_dir.name,
               "hardware": common.origin(args)["hardware"]} | row
        with open(mine.out_dir / "results.jsonl", "a") as lines:
            print(json.dumps(row), file=lines)
        print(row, flush=True)


def draw_picture(mine) -> None:
    rows = [json.loads(line) for line in (mine.out_dir / "results.jsonl").read_text().splitlines()]
    rows = [row for row in rows if (row["seed"], row["planned"]) == (mine.seed, mine.minutes)
            and any(kind in row["sampler"] for kind in ("1 call", "AB2", "DDIM"))]
    rows.sort(key=lambda row: row["distance"])
    images = [torch.load(mine.out_dir / row["folder"] / f"samples_{row['sampler']}.pt")[:10]
              for row in rows]
    names = [f"{TITLES[row['arm']]}: {row['sampler']}\n{row['distance']:.3g}" for row in rows]
    common.save_grid(torch.cat(images) / 127.5 - 1, mine.out_dir / "samples.png",
                     f"After {mine.minutes:g} minutes of one core; Fréchet distance, "
                     f"N = {rows[0]['N']:,}", 10, names)


def fit_the_vae(fit, args, state, name, model, loss, data, test, epochs, lr, draw=None):
    """The diffusion learns for one step alone, so that the file is complete."""
    if name != "vae":
        data, epochs = [x[: args.batch_size] for x in data], 1
    return fit(args, state, name, model, loss, data, test, epochs, lr, draw)


if __name__ == "__main__":
    main()
