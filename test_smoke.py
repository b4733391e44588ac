"""Every script as a user runs it: a process in a folder of its own, without a network.

    pytest                  these, and all in tests/: some minutes on two cores
    pytest test_smoke.py    these alone: one or two
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent
STAGES = {"01_ddpm_ddim": ["diffusion"], "02_latent_diffusion": ["vae", "diffusion"],
          "03_cfg": ["diffusion"], "04_rectified_flow": ["flow", "reflow"],
          "04b_latent_rflow": ["flow", "reflow"], "06_meanflow": ["meanflow"],
          "07_drifting": ["drifting"]}
FOREVER = 1800  # seconds: no test waits for the clock, this is only to end one that hangs


def start(script: str, *options: str, cwd: Path) -> subprocess.Popen:
    """The script as a process on the CPU, with one thread and the network out of reach."""
    settings = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    settings |= {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}  # threads would wait for each other
    cwd.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, ROOT / f"{script}.py", "--device", "cpu", *options],
        cwd=cwd, env=os.environ | settings, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)


def end(process: subprocess.Popen, status: int = 0) -> str:
    """Wait for it; returns all that was printed, stdout first."""
    try:
        output = "".join(process.communicate(timeout=FOREVER))
    finally:
        process.kill()
    assert process.returncode == status, output
    assert "Traceback" not in output
    return output


def run(script: str, *options: str, cwd: Path, status: int = 0) -> str:
    return end(start(script, *options, cwd=cwd), status)


@pytest.fixture(scope="session")
def fast_dev(tmp_path_factory):
    """script -> the folder in which its --fast-dev run has finished; all run once, together."""
    folders = {script: tmp_path_factory.mktemp(script) for script in STAGES}
    running = {script: start(script, "--fast-dev", cwd=folders[script]) for script in STAGES}

    def folder(script: str) -> Path:
        if script in running:
            end(running.pop(script))
        return folders[script]

    yield folder
    for process in running.values():  # those that no test asked for
        process.kill()
        process.communicate()


def wait_for(file: Path, process: subprocess.Popen) -> None:
    late = time.monotonic() + FOREVER
    while not file.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < late, "waited in vain"
        time.sleep(0.02)


def check_picture(path: Path) -> None:
    with Image.open(path) as picture:
        assert min(picture.size) >= 80
        darkest, brightest = picture.convert("L").getextrema()
        assert darkest < brightest
        assert path.suffix == ".png" or picture.n_frames >= 3


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("script", STAGES)
def test_fast_dev_leaves_all_results(script, fast_dev):
    folder = fast_dev(script)
    assert [path.name for path in folder.iterdir()] == ["runs"]  # nothing anywhere else
    assert [path.name for path in (folder / "runs").iterdir()] == ["fast_dev"]
    results = folder / "runs" / "fast_dev" / script
    pictures = {path.name for path in results.iterdir() if path.suffix in (".png", ".gif")}
    assert {"loss.png", "progress.png", "progress.gif", "samples.png"} < pictures
    own = {"samples_nearest.png", "toy.png"} if script == "07_drifting" else {"path.gif"}
    assert own < pictures
    for name in pictures:
        check_picture(results / name)

    timings = json.loads((results / "timings.json").read_text())
    assert timings["script"] == script and timings["device"] == "cpu"
    assert timings["torch"] == torch.__version__ and "cores" in timings["hardware"]
    assert timings["training_seconds"] > 0
    for row in timings["samplers"]:
        assert f"samples_{row['file']}.png" in pictures
        assert row["steps"] > 0 and row["network_calls"] > 0
        assert row["seconds"] > 0 and row["images_per_second"] > 0

    lines = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(line["stage"] for line in lines)) == STAGES[script]
    for stage in STAGES[script]:
        epochs = [line for line in lines if line["stage"] == stage]
        assert [line["epoch"] for line in epochs] == list(range(1, len(epochs) + 1))
        for key in ("loss", "lr") if stage != "drifting" else ["lr"]:  # it has no loss that falls
            assert epochs[-1][key] < epochs[0][key]
        for key in ("images_per_second", "seconds"):
            assert all(line[key] > 0 for line in epochs)
        assert all("test_loss" in line for line in epochs)

    saved = load(results / "checkpoint.pt")
    assert saved["script"] == script and saved["args"]["dataset"] == "synthetic"
    assert [line for stage in saved["stages"].values() for line in stage["epochs"]] == lines
    assert {*STAGES[script]} <= {*saved["stages"]}
    for stage in saved["stages"].values():
        assert len(stage["frames"]) == len(stage["epochs"])

    sets = {path.name: load(path) for path in results.glob("eval_*.pt")}
    assert {*sets} == {f"eval_{row['file']}.pt" for row in timings["samplers"]}
    for samples in sets.values():
        assert samples["images"].dtype == torch.uint8
        assert samples["images"].shape == (20, 1, 28, 28)
        assert len(samples["images"].unique(dim=0)) == 20  # no image twice
        assert samples["args"]["train_images"] == 128 and samples["method"] and samples["sampler"]
        asked_for = script == "07_drifting" or samples.get("guidance", 0) > 0
        assert samples.get("labels", torch.empty(0)).tolist() == [*range(10)] * 2 * asked_for


def test_02_draws_its_autoencoder_and_the_flows_their_straightness(fast_dev):
    results = fast_dev("02_latent_diffusion") / "runs/fast_dev/02_latent_diffusion"
    for name in ("samples_vae.png", "latent_map.png"):
        check_picture(results / name)
    for script in ("04_rectified_flow", "04b_latent_rflow"):
        path = fast_dev(script) / "runs/fast_dev" / script / "timings.json"
        assert all(s > 0 for s in json.loads(path.read_text())["straightness"].values())


def test_kill_and_resume_is_bit_identical(tmp_path):
    """Killed as soon as there is a checkpoint, so after the first or second of six epochs."""
    options = ["--fast-dev", "--epochs", "6", "--train-images", "64", "--timesteps", "4",
               "--ddim-steps", "2", "--ddim-sweep", "1", "--eval-samples", "0"]
    whole = start("01_ddpm_ddim", *options, cwd=tmp_path / "whole")
    results = tmp_path / "killed" / "runs" / "fast_dev" / "01_ddpm_ddim"
    killed = start("01_ddpm_ddim", *options, cwd=tmp_path / "killed")
    wait_for(results / "checkpoint.pt", killed)
    killed.kill()
    killed.communicate()
    assert len(load(results / "checkpoint.pt")["stages"]["diffusion"]["epochs"]) < 6
    end(whole)
    run("01_ddpm_ddim", "--fast-dev", "--resume", "--ddim-steps", "2", "--ddim-sweep", "1",
        "--eval-samples", "0", cwd=tmp_path / "killed")
    one, two = (load(tmp_path / name / "runs/fast_dev/01_ddpm_ddim/checkpoint.pt")
                for name in ("whole", "killed"))
    assert one["args"] == two["args"]
    one, two = one["stages"]["diffusion"], two["stages"]["diffusion"]
    assert len(two["epochs"]) == 6
    for part in ("loss", "test_loss"):
        assert [line[part] for line in one["epochs"]] == [line[part] for line in two["epochs"]]
    for part in ("learned", "frames"):  # the average, the network, both optimizers; pictures
        torch.testing.assert_close(one[part], two[part], rtol=0, atol=0)


def test_ctrl_c_ends_in_one_line(tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup's children would ignore it
    process = start("01_ddpm_ddim", "--fast-dev", "--epochs", "1000000", cwd=tmp_path)
    results = tmp_path / "runs" / "fast_dev" / "01_ddpm_ddim"
    wait_for(results / "checkpoint.pt", process)
    process.send_signal(signal.SIGINT)
    assert end(process, status=1).splitlines()[-1].startswith("stopped; --resume")
    assert load(results / "checkpoint.pt")["stages"]["diffusion"]["epochs"]


def test_bad_input_ends_in_one_line(tmp_path):
    """There is no MNIST, and no way to download it."""
    *before, last = run("04b_latent_rflow", cwd=tmp_path, status=1).splitlines()
    assert last.startswith("no mnist in data") and "--dataset synthetic" in last
    assert not [line for line in before if "rror" in line]
    assert not list(tmp_path.glob("**/*.p*"))


def test_05_reports_on_the_runs_there_are(fast_dev, tmp_path):
    for script in STAGES:
        results = Path("runs", "fast_dev", script)
        shutil.copytree(fast_dev(script) / results, tmp_path / results)
    printed = run("05_compare", "--fast-dev", cwd=tmp_path)
    results = tmp_path / "runs" / "fast_dev" / "05_compare"
    text = (results / "comparison.md").read_text()
    assert text in printed
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    head = next(line for line in lines if line[:1] == ["method"])
    rows = [dict(zip(head, line)) for line in lines if len(line) == len(head) and line != head]
    found = [(row["method"], row["sampler"], row["steps"]) for row in rows]
    for row in [("diffusion", "DDIM", "2"), ("diffusion", "DDPM", "20"),
                ("latent diffusion", "DDIM", "10"), ("guided diffusion", "DDIM", "10"),
                ("rectified flow", "Euler", "5"), ("rectified flow", "AB2", "4"),
                ("reflow", "Euler", "1"), ("latent flow", "AB2", "4"),
                ("latent flow", "Euler", "5"), ("latent reflow", "Euler", "1"),
                ("MeanFlow", "MeanFlow", "1")]:
        assert row in found
    for row in rows[1:]:  # after the line below the head
        assert float(row["Fréchet distance"]) > 0
        if not row["method"].startswith("training images"):
            assert float(row["seconds for 16"]) > 0 and int(row["network calls"]) > 0
    assert "training images" in text and "not measured" in text
    for name in ("quality_network_calls_20", "quality_seconds_20", "guidance_20"):
        check_picture(results / f"{name}.png")
    epochs = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    assert epochs[-1]["loss"] < epochs[0]["loss"]
