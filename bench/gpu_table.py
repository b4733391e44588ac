"""The tables of bench/gpu.sh: what its stages left in a folder, as Markdown.

    python bench/gpu_table.py runs/gpu
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

TARGETS = {  # what 01 should reach on an H100 or H200: figure, unit, target, the report's
    "40 epochs of training": ("s", 60, "not given"),
    "DDIM, 100 steps, 16 images": ("ms", 30, "569"),
    "DDPM, 1000 steps, 16 images": ("ms", 300, "4,422"),
}


def describe(device: str) -> None:
    import torch  # here alone, for it takes seconds

    print(f"{os.cpu_count()} CPU cores, Python {sys.version.split()[0]}, torch {torch.__version__}")
    if device == "cuda":
        print(torch.cuda.get_device_name(), "of compute capability",
              ".".join(map(str, torch.cuda.get_device_capability())))
        subprocess.run("nvidia-smi", check=False)


def table(head: str, rows: list[list]) -> str:
    lines = [head.split(", "), ["---"] * len(head.split(", ")), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines) + "\n"


def training(folder: Path) -> list[list]:
    """A row for each stage of a script: the first epoch does not count for the images/s."""
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = []
    for stage in dict.fromkeys(epoch["stage"] for epoch in epochs):
        mine = [epoch for epoch in epochs if epoch["stage"] == stage]
        rate = statistics.median(epoch["images_per_second"] for epoch in mine[1:] or mine)
        rows.append([folder.name, stage, len(mine), f"{sum(e['seconds'] for e in mine):.1f}",
                     f"{rate:,.0f}"])
    return rows


def main() -> None:
    if sys.argv[1] == "--describe":
        return describe(sys.argv[2])
    out = Path(sys.argv[1])
    runs = [path.parent for path in sorted(out.glob("*/timings.json"))]
    timings = {}
    for run in runs:
        try:
            timings[run.name] = json.loads((run / "timings.json").read_text())
        except ValueError:
            sys.exit(f"{run}/timings.json is broken: --sample-only writes it again")
    hardware = {timing["hardware"] for timing in timings.values()}
    print(f"## On {' and '.join(sorted(hardware)) or 'no device yet'}\n")
    if (out / "machine.log").exists():
        print((out / "machine.log").read_text())
    rows = [row for run in runs for row in training(run)]
    print(table("script, stage, epochs, seconds, images/s", rows))
    rows = [[script, row["name"], f"{1000 * row['seconds']:.1f}",
             f"{row['images_per_second']:,.0f}"]
            for script, timing in timings.items() for row in timing["samplers"]]
    print(table("script, sampler, ms for 16 images, images/s in large batches", rows))
    if main_run := timings.get("01_ddpm_ddim"):
        measured = {f"{row['name']}, 16 images": 1000 * row["seconds"]
                    for row in main_run["samplers"]}
        measured["40 epochs of training"] = main_run["training_seconds"]
        print(table("01, measured, target, the report", [
            [name, f"{measured[name]:.1f} {unit}" if name in measured else "not measured",
             f"{target} {unit}", report] for name, (unit, target, report) in TARGETS.items()]))
    for name in ("speed_ups.log", "libraries.log", "05_compare/comparison.md"):
        if (out / name).exists():
            print(f"### {name}\n\n{(out / name).read_text()}")
    stages = [[path.stem, path.read_text().strip()] for path in sorted(out.glob("*.seconds"))]
    print(table("stage, seconds", stages))


if __name__ == "__main__":
    main()
