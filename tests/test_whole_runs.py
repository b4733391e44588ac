"""bench/gpu.sh on a CPU, in miniature."""

import tarfile

from conftest import GPU_SCRIPTS, gpu_script

FOREVER = 1800  # seconds: no test waits for the clock, this is only to end one that hangs


def printed(process, status: int) -> list[str]:
    lines = process.communicate(timeout=FOREVER)[0].splitlines()
    assert process.returncode == status, lines
    return lines


def test_the_script_for_a_gpu_stops_in_time(tmp_path):
    last = printed(gpu_script(tmp_path, minutes="0"), 1)[-1]
    assert last.startswith("not done: machine 04b_latent_rflow")
    assert not list(tmp_path.glob("*.log"))


def test_the_script_for_a_gpu_runs_in_miniature_and_repeats_nothing(first_gpu_run):
    folder, process = first_gpu_run
    lines = printed(process, 0)
    assert lines[-1] == f"all is done: {folder}/results.md"
    stages = [line.split(":")[0] for line in lines if ": " in line][:-1]
    assert {*GPU_SCRIPTS, "machine", "graphs", "no_graphs", "speed_ups", "05_compare"} <= {*stages}
    assert len([line for line in lines if "done in" in line]) + 1 >= len(stages)
    text = (folder / "results.md").read_text()
    for found in (*GPU_SCRIPTS, "DDIM, 2 steps", "Fréchet distance", "40 epochs of training",
                  "eager"):
        assert found in text
    weights = {path.stem for path in (folder / "weights").iterdir()}
    assert weights == {*GPU_SCRIPTS}
    for script in GPU_SCRIPTS:
        with tarfile.open(folder / f"{script}.tgz") as file:
            names = file.getnames()
        assert {f"weights/{script}.pt", f"{script}/samples.png", f"{script}/metrics.jsonl"} <= {
            *names} and not [name for name in names if "eval_" in name or "checkpoint" in name]

    (folder / "04b_latent_rflow.seconds").unlink()  # as if it had been cut off
    (folder / "02_latent_diffusion").mkdir()  # whose VAE the checkpoint of 04b has already
    (folder / "02_latent_diffusion" / "checkpoint.pt").touch()
    again = printed(gpu_script(folder), 0)
    assert [line.split(":")[0] for line in again if "--device" in line] == ["04b_latent_rflow"]
    assert "--resume" in again[0] and "--vae" not in again[0]
    log = (folder / "04b_latent_rflow.log").read_text()
    assert f"weights: {folder}/04b_latent_rflow/checkpoint.pt" in log
