"""What users and machines do wrong. Each fault ends in one line, and nothing saved is harmed."""

import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
from scripts import (
    DRAWING,
    MODULES,
    ROOT,
    cfg,
    compare,
    ddpm,
    flow,
    latent_flow,
    one_line,
    options,
    usage_error,
)

import common

# --------------------------------------------------------------------------------- options

COUNT = ["0", "-1", "1.5", "two", "nan", "9" * 99, ""]
RATE = ["0", "-0.1", "nan", "inf", "1e99", "fast", ""]
FROM_0 = ["-1", "0.5", "x", "nan", "9" * 99, ""]
WRONG = {  # an option, whichever script has it: values that it must refuse
    "--epochs": COUNT, "--batch-size": COUNT, "--lr": RATE, "--seed": FROM_0,
    "--train-images": [*COUNT, "9"], "--eval-samples": FROM_0,
    "--device": ["tpu", ""], "--dataset": ["cifar", "README.md"],
    "--timesteps": [*COUNT, "1"], "--ddim-steps": [*COUNT, "1001"],
    "--ddim-sweep": [*COUNT, "1001"], "--width": ["0", "7", "12", "-8", "128", "wide"],
    "--vae-epochs": COUNT, "--kl-weight": ["-1", "nan", "inf", "x"],
    "--tokens": COUNT, "--label-dropout": ["-0.1", "1.1", "nan", "x"],
    "--guidance": ["-1", "nan", "inf", "x"], "--guidance-sweep": ["-1", "nan", "inf", "x"],
    "--digits": ["x", "12a", "-3", ""], "--steps": COUNT, "--ab2-steps": COUNT,
    "--pairs": COUNT, "--pair-steps": COUNT, "--reflow-epochs": COUNT, "--reflow-lr": RATE,
    "--samples": [*COUNT, "1"], "--others": FROM_0, "--toy-steps": [*COUNT, "15"],
    "--flow-t": ["normal", ""], "--reflow-t": ["normal", ""],
    "--equal": ["-0.1", "1.1", "nan", "x"],
}
SWITCHES = {"--help", "--resume", "--sample-only", "--no-graphs", "--no-bf16", "--fast-dev",
            "--train-judge"}
FILES = {"--data-dir", "--out-dir", "--vae", "--runs"}  # see below


@pytest.mark.parametrize("module", MODULES)
def test_every_option_refuses_what_is_out_of_its_range(module, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").touch()
    seen = []
    monkeypatch.setattr(common, "parse", lambda parser, *rest, **more: (
        seen.append(parser) or sys.exit()))
    with pytest.raises(SystemExit):
        module.parse_args([])
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    known = {action.option_strings[-1] for action in seen[0]._actions if action.option_strings}
    assert known <= WRONG.keys() | SWITCHES | FILES, "an option that has no test"
    for option in sorted(known & WRONG.keys()):
        for value in WRONG[option]:
            last = usage_error(module, [f"{option}={value}"], capsys)
            assert option in last or value in last
            assert last.startswith(f"{module.__name__}.py: error: ")
        last = usage_error(module, [option], capsys)  # and none
        assert option in last
    assert [*tmp_path.iterdir()] == [tmp_path / "README.md"]


@pytest.mark.parametrize(("module", "typed", "why"), [
    (ddpm, "--epochs=0", "invalid choice: 0 (choose from 1 to 1e+09)"),
    (ddpm, "--seed=-1", "invalid choice: -1 (choose from 0 to 1e+09)"),
    (ddpm, "--timesteps=1", "invalid choice: 1 (choose from 2 to 1e+09)"),
    (ddpm, "--train-images=9", "invalid choice: 9 (choose from 10 to 1e+09)"),
    (flow, "--steps=0", "invalid choice: 0 (choose from 1 to 1e+09)"),
    (ddpm, "--lr=0", "invalid choice: 0.0 (choose from 1e-09 to 1e+09)"),
    (cfg, "--label-dropout=nan", "invalid choice: nan (choose from 0 to 1)"),
    (ddpm, "--width=12", "invalid choice: 12 (choose from 8, 16, 32, 64)"),
    (ddpm, "--epochs=two", "invalid int value: two"),
    (ddpm, "--lr=fast", "invalid float value: fast"),
])
def test_the_message_says_what_an_option_takes(module, typed, why, capsys):
    last = usage_error(module, [typed], capsys).replace("'", "")  # some versions quote choices
    assert last == f"{module.__name__}.py: error: argument {typed.split('=')[0]}: {why}"


# ------------------------------------------------------------------------- files and folders


@pytest.mark.parametrize("option", ["--out-dir", "--data-dir"])
@pytest.mark.parametrize("where", ["a file", "below a file", "where nothing can be"])
@pytest.mark.parametrize("module", DRAWING)
def test_a_folder_that_cannot_be_used(module, where, option, tmp_path):
    (tmp_path / "file").write_text("mine")
    place = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "below",
             "where nothing can be": "/proc/nothing"}[where]
    out = place if option == "--out-dir" else tmp_path / "out"
    typed = ["--device", "cpu", "--out-dir", str(out), "--data-dir", str(place)]
    if option == "--out-dir":  # with images that need no folder
        typed += ["--dataset", "synthetic", "--train-images", "10", "--batch-size", "10"]
    message = one_line(module.main, typed)
    assert str(place) in message
    assert ("--out-dir" if option == "--out-dir" else "no mnist in") in message
    assert (tmp_path / "file").read_text() == "mine"


def test_archives_that_are_folders(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    for kind in ("train", "t10k"):
        for part in ("images-idx3", "labels-idx1"):
            (raw / f"{kind}-{part}-ubyte").mkdir(parents=True)
    args = ddpm.parse_args(["--device", "cpu", "--data-dir", str(tmp_path), "--out-dir",
                            str(tmp_path)])
    message = one_line(common.load_images, args)
    assert f"no mnist in {tmp_path}" in message


@pytest.mark.parametrize("module", [flow, latent_flow])
def test_pairs_that_are_broken_are_named(module, tmp_path):
    more = ["--epochs", "1", "--train-images", "16", "--pairs", "16",
            "--reflow-epochs", "1"]
    module.train(module.parse_args(options(tmp_path, *more)))
    learn, test = sorted((tmp_path / "pairs").iterdir())
    again = module.parse_args(["--resume", "--reflow-epochs", "2", *options(tmp_path)[1:]])
    for file in (test, learn):
        file.write_bytes(file.read_bytes()[:100])
        message = one_line(module.train, again)
        assert str(file) in message and "delete" in message
        assert file.stat().st_size == 100


# ------------------------------------------------------------------------------ a full disk


@pytest.fixture
def full(monkeypatch):
    """From here on, the temporary file of a checkpoint is on a disk that is full."""

    def fill(path):
        path.with_suffix(".tmp").symlink_to("/dev/full")

    return fill


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, full):
    ddpm.train(ddpm.parse_args(options(tmp_path, "--epochs", "1", "--train-images", "16")))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    full(tmp_path / "checkpoint.pt")
    args = ddpm.parse_args(["--resume", "--epochs", "2", *options(tmp_path)[1:]])
    message = one_line(ddpm.train, args)
    assert f"cannot write {tmp_path}/checkpoint.pt" in message
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not (tmp_path / "checkpoint.tmp").exists()


def test_a_picture_that_cannot_be_written(tmp_path):
    (tmp_path / "loss.png").mkdir()
    typed = options(tmp_path, "--epochs", "1", "--train-images", "16")
    quick = ["--ddim-steps", "1", "--ddim-sweep", "1", "--eval-samples", "0"]
    with pytest.raises(IsADirectoryError, match=r"loss\.png"):
        ddpm.main(typed)
    checkpoint = tmp_path / "checkpoint.pt"
    before = checkpoint.read_bytes()
    (tmp_path / "loss.png").rmdir()
    ddpm.main([*typed, "--resume", *quick])  # there is nothing left to learn
    assert checkpoint.read_bytes() == before and (tmp_path / "loss.png").is_file()


def test_a_process_whose_files_may_not_grow(tmp_path):
    """The limit lies between the size of small files and that of a checkpoint."""
    code = ("import resource, runpy, sys; limit = 100_000;"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit));"
            f"sys.argv[0] = {str(ROOT / '01_ddpm_ddim.py')!r};"
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    typed = options(tmp_path, "--epochs", "1", "--train-images", "16")
    done = subprocess.run([sys.executable, "-c", code, *typed], capture_output=True, text=True,
                          check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"cannot write {tmp_path}/checkpoint.pt")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("checkpoint*"))


# ------------------------------------------------------------------------------ checkpoints


class Evil:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("how", ["--resume", "--sample-only"])
def test_code_in_a_checkpoint_does_not_run(how, module, tmp_path):
    for content in (pickle.dumps(Evil()), saved({"script": module.__name__, "args": Evil()})):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        message = one_line(module.main, [how, "--device", "cpu", "--out-dir", str(tmp_path)])
        assert str(tmp_path / "checkpoint.pt") in message
    assert not list(tmp_path.glob("harmed"))


def saved(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize("module", MODULES)
def test_a_checkpoint_of_another_script_or_shape(module, tmp_path):
    """Those that we ship: each of another script; and each of its own with a weight changed."""
    out = tmp_path / "out"
    out.mkdir()
    path = out / "checkpoint.pt"
    typed = ["--sample-only", "--device", "cpu", "--out-dir", str(out)]
    for other in MODULES:
        state = torch.load(ROOT / "weights" / f"{other.__name__}.pt", weights_only=True)
        if other is module:
            states = with_another_weight(state, next(iter(state["stages"])))
        else:
            states = [state]
        for state in states:
            torch.save(state, path)
            before = path.read_bytes()
            message = one_line(module.main, typed)
            assert str(path) in message
            assert path.read_bytes() == before


def with_another_weight(state: dict, stage: str) -> list[dict]:
    """The checkpoint with a weight of another shape or kind, and with one too many."""
    network, *_ = state["stages"][stage]["learned"]
    name = next(iter(network))
    changed = [{name: network[name].flatten()[:1]}, {name: "a"}, {"new": network[name]}]
    return [state | {"stages": state["stages"] | {stage: {"learned": [network | change]}}}
            for change in changed]


@pytest.mark.parametrize("how", ["missing", "of 01", "another", "unfinished"])
def test_a_vae_that_does_not_fit_is_blamed_on_the_file_that_it_comes_from(how, tmp_path):
    vae, out = tmp_path / "other.pt", tmp_path / "out"
    state = torch.load(ROOT / "weights" / "02_latent_diffusion.pt", weights_only=True)
    stages = {"unfinished": {"vae": state["stages"]["vae"]}}.get(how, state["stages"])
    states = with_another_weight(state, "vae") if how == "another" else [state | {"stages": stages}]
    for made in states:
        if how != "missing":
            torch.save(made | ({"script": "01_ddpm_ddim"} if how == "of 01" else {}), vae)
        message = one_line(latent_flow.main, options(out, "--vae", str(vae)))
        assert str(vae) in message
    assert [*out.iterdir()] == [out / common.RUN]


# --------------------------------------------------------------------------- evaluation sets

IMAGES = torch.zeros(8, 1, 28, 28, dtype=torch.uint8)


@pytest.mark.parametrize("content", [
    {"images": IMAGES, "args": 3}, {"images": IMAGES, "args": {"dataset": [1]}},
    {"images": IMAGES, "steps": "many"}, {"images": IMAGES, "guidance": "x"},
    {"images": IMAGES, "seconds": "fast"}, {"images": IMAGES, "network_calls": [1]},
    {"images": IMAGES, "labels": 3}, {"images": IMAGES, "labels": torch.zeros(8, 2)},
    {"images": IMAGES, "method": None}, {"images": IMAGES, "sampler": 3},
    {"images": IMAGES.expand(8, 3, 28, 28)}, {"images": IMAGES[:0]}, {"images": "some"}, 3, None,
    {"images": IMAGES, "labels": ["a"] * 8}, {"images": IMAGES.to_sparse()},
])
def test_an_evaluation_set_of_a_wrong_kind_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "eval_1.pt")
    before = (tmp_path / "eval_1.pt").read_bytes()
    message = one_line(compare.load_set, tmp_path / "eval_1.pt", 100)
    assert str(tmp_path / "eval_1.pt") in message
    assert (tmp_path / "eval_1.pt").read_bytes() == before


def test_timings_that_are_cut_off(tmp_path):
    (tmp_path / "01_ddpm_ddim").mkdir()
    (tmp_path / "01_ddpm_ddim" / "timings.json").write_text('{"samplers": [')
    done = subprocess.run([sys.executable, ROOT / "bench/gpu_table.py", tmp_path], text=True,
                          check=False, capture_output=True)
    assert done.returncode == 1 and "01_ddpm_ddim/timings.json is broken" in done.stderr
    assert len(done.stderr.splitlines()) == 1
