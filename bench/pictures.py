"""The pictures of README.md and RESULTS.md that compare samplers, from the sets that 05 has scored.

    python bench/pictures.py runs/results assets

A row has the first ten images of a set, and its distance above the floor. The sets of a script
have the same noise, image by image, and so have those of 04b, 06 and 07. A set that is not there
has no row, and a picture of fewer than two sets is not drawn. 01_64_digits.png has the first 64
of DDIM-100, to count those that a person can read.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import write_tables

import common

EULER = [f"Euler_{n}_step{'s' * (n > 1)}" for n in (1, 2, 5, 100)]
NOISE = "The same noise in each column; distances above the floor"
PICTURES = {  # title, and of each row script and file
    "01_samples.png": (NOISE, [
        *(f"01_ddpm_ddim/eval_DDIM_{n}_steps" for n in (10, 20, 50, 100, 250)),
        "01_ddpm_ddim/eval_DDPM_1000_steps"]),
    "02_samples.png": (NOISE, [
        f"02_latent_diffusion/eval_{name}"
        for name in ("VAE_alone", "DDIM_100_steps", "DDPM_1000_steps")]),
    "03_samples.png": ("With s > 0 asked for 0 to 9. " + NOISE, [
        f"03_cfg/eval_DDIM_100_steps_s_{s}" for s in ("0", "1", "1.25", "1.5", "2", "3", "5")]),
    "04_samples.png": (NOISE, [
        *(f"04_rectified_flow/eval_rectified_flow_{x}" for x in [*EULER, "AB2_5_steps"]),
        *(f"04_rectified_flow/eval_reflow_{x}" for x in EULER[:2])]),
    "04b_samples.png": (NOISE, [
        *(f"04b_latent_rflow/eval_latent_flow_{x}" for x in [*EULER, "AB2_5_steps"]),
        *(f"04b_latent_rflow/eval_latent_reflow_{x}" for x in EULER[:2])]),
    "06_samples.png": ("One call each. " + NOISE, [
        "04b_latent_rflow/eval_latent_flow_Euler_1_step",
        "04b_latent_rflow/eval_latent_reflow_Euler_1_step",
        "06_meanflow/eval_MeanFlow_1_step", "07_drifting/eval_drifting_1_step"]),
}


def key(row: dict) -> tuple:
    """What tells a set, of its file or of a row in 05's tables."""
    guidance = row.get("guidance")
    return (row["method"], row["sampler"], str(row["steps"]).replace(",", ""),
            f"{float(guidance):g}" if guidance not in (None, "") else "")


def draw(path: Path, title: str, sets: list[dict], rows: list[dict], digits: torch.Tensor) -> None:
    """One picture; its last row are test digits."""
    labels = []
    for made in sets:
        scored = [row for row in rows if row.get("above the floor") and key(row) == key(made)]
        best = max(scored, key=write_tables.size, default=None)
        few = f" (N = {best['N']})" if best and best["N"] != "5,000" else ""
        labels.append(made["name"] + (f"\ndistance {best['above the floor']}{few}" if best else ""))
    images = torch.cat([*(made["images"][:10] for made in sets), digits])
    common.save_grid(images / 127.5 - 1, path, title, 10, [*labels, "test digits"])


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    rows = write_tables.read((source / "results.md").read_text(encoding="utf-8"))
    for name, (title, files) in PICTURES.items():
        paths = [source / f"{file}.pt" for file in files]
        sets = [torch.load(path, weights_only=True) for path in paths if path.exists()]
        if len(sets) > 1:
            ddpm = importlib.import_module("01_ddpm_ddim")
            typed = ["--dataset", sets[0]["args"]["dataset"], "--train-images", "60"]
            args = ddpm.parse_args([*typed, "--device", "cpu", "--batch-size", "10"])
            _, (test, _), _ = common.load_images(args)
            draw(target / name, title, sets, rows, common.to_uint8(test[:10]))
            print(target / name)
    path = source / "01_ddpm_ddim" / "eval_DDIM_100_steps.pt"
    if path.exists():
        digits = torch.load(path, weights_only=True)["images"][:64]
        title = "64 digits of 01 by DDIM, 100 steps: the first that it drew"
        common.save_grid(digits / 127.5 - 1, target / "01_64_digits.png", title, 16)
        print(target / "01_64_digits.png")


if __name__ == "__main__":
    main()
