"""All scripts on CUDA: on a double of it everywhere, and on a GPU where there is one."""

import importlib
import itertools
import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from double import Claimed, DeviceError, Generator, on_cuda
from scripts import DRAWING, ROOT, cfg, compare, ddpm, flow, latent, latent_flow, options

import common

STEPS = ["--timesteps", "4", "--ddim-steps", "2"]
PAIRS = ["--pairs", "64", "--pair-steps", "1", "--reflow-epochs", "1",
         "--steps", "1", "2", "--ab2-steps", "4"]
MORE = {"01_ddpm_ddim": [*STEPS, "--ddim-sweep", "1"],
        "02_latent_diffusion": [*STEPS, "--vae-epochs", "1"],
        "03_cfg": [*STEPS, "--guidance", "3", "--guidance-sweep", "0"],
        "04_rectified_flow": PAIRS, "04b_latent_rflow": PAIRS, "05_compare": [],
        "06_meanflow": ["--steps", "1", "2", "--meanflow-epochs", "1"]}


def tiny(module, folder: Path, *more: str) -> list[str]:
    return ["--fast-dev", "--device", "cuda", "--out-dir", str(folder), "--epochs", "1",
            "--train-images", "32", "--batch-size", "16", *MORE[module.__name__], *more]


@pytest.fixture
def hurry(monkeypatch):
    """Nothing is timed often, for on this clock every run takes three seconds, nor with more than
    32 images; and straightness is that of two steps."""
    monkeypatch.setattr(common.time, "perf_counter", itertools.count(step=3.0).__next__)
    time = common.time_sampler
    monkeypatch.setattr(common, "time_sampler", lambda sample, noise, seed, least=0: (
        time(sample, noise[:32], seed)))
    for module in (flow, latent_flow):
        monkeypatch.setattr(module, "straightness", lambda net, x0, steps, s=module.straightness: (
            s(net, x0, 2)))


@pytest.fixture(params=["double", pytest.param("GPU", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no GPU"))])
def cuda(request, hurry):
    if request.param == "GPU":
        yield request.param
    else:
        with on_cuda():
            yield request.param


def load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


@pytest.mark.parametrize("module", DRAWING)
def test_each_script_trains_resumes_and_samples(module, cuda, tmp_path, capsys, monkeypatch):
    module.main(tiny(module, tmp_path))
    assert capsys.readouterr().out.splitlines()[0] == (
        f"{module.__name__} on cuda, weights: new")
    state = load(tmp_path / "checkpoint.pt")
    assert state["device"] == "cuda"
    assert state["hardware"] == torch.cuda.get_device_name()
    sets = {path.name: load(path)["images"] for path in tmp_path.glob("eval_*.pt")}
    assert sets and all(images.device.type == "cpu" for images in sets.values())

    with monkeypatch.context() as patch:  # figures once is enough
        patch.setattr(module, "make_figures", lambda *_, **networks: None)
        module.main(tiny(module, tmp_path, "--resume", "--epochs", "2"))
    state = load(tmp_path / "checkpoint.pt")
    for path in tmp_path.glob("eval_*.pt"):
        path.unlink()
    monkeypatch.setattr(module, "draw_path", lambda *_: None)
    module.main(["--sample-only", "--device", "cuda", "--out-dir", str(tmp_path)])
    assert not list(tmp_path.glob("eval_*.pt"))  # only after a training, unless they are asked for
    assert load(tmp_path / "checkpoint.pt")["history"] == state["history"]
    assert len(state["history"]) > len(state["networks"]) - ("vae" in state["networks"])


@pytest.mark.parametrize("module", [latent, cfg, latent_flow])  # 01 draws as 03 does
def test_cuda_and_cpu_draw_the_same_digits(module, cuda, tmp_path):
    """From the shipped weights: noise and labels are those of the CPU, rounding apart."""
    drawn = {}
    for device in ("cuda", "cpu"):
        folder = tmp_path / device
        module.main(["--sample-only", "--device", device, "--out-dir", str(folder), "--batch-size",
                     "16", "--eval-samples", "10", *MORE[module.__name__]])
        drawn[device] = {path.name: load(path)["images"].float()
                         for path in folder.glob("eval_*.pt") if "DDPM" not in path.name}
    assert drawn["cuda"].keys() == drawn["cpu"].keys() != set()
    for name, images in drawn["cuda"].items():
        assert (images - drawn["cpu"][name]).abs().mean() < 2  # of 255


def test_digits_and_another_vae(cuda, tmp_path):
    cfg.main(["--digits", "27", "--device", "cuda", "--out-dir", str(tmp_path / "03"), *STEPS])
    assert (tmp_path / "03" / "digits_27.png").exists()
    latent.main(tiny(latent, tmp_path / "02", "--eval-samples", "0"))
    file = str(tmp_path / "02" / "checkpoint.pt")
    latent_flow.main(tiny(latent_flow, tmp_path / "04b", "--vae", file, "--eval-samples", "0"))
    of_02, of_04b = (load(tmp_path / name / "checkpoint.pt")["networks"] for name in ("02", "04b"))
    torch.testing.assert_close(of_02["vae"], of_04b["vae"], rtol=0, atol=0)


def test_05_trains_a_classifier_and_scores_a_file(cuda, tmp_path, capsys):
    out = tmp_path / "runs" / "05"  # beside it are no sets of other tests
    compare.main(tiny(compare, out, "--train-images", "64"))
    file = tmp_path / "set.pt"
    torch.save({"images": torch.randint(256, (12, 1, 28, 28), dtype=torch.uint8),
                "labels": torch.arange(12) % 10}, file)
    compare.main(["--device", "cuda", "--dataset", "synthetic", "--train-images", "64",
                  "--sample-only", "--out-dir", str(out), str(file)])
    assert str(file) in capsys.readouterr().out


@pytest.fixture
def bench(monkeypatch):
    """The scripts in bench/ by their names, without the libraries that one of them measures."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    for library in ("accelerate", "denoising_diffusion_pytorch", "diffusers",
                    "diffusers.optimization"):
        monkeypatch.setitem(sys.modules, library, MagicMock())
    return importlib.import_module


def test_the_measurements_in_bench(cuda, bench, tmp_path, monkeypatch, capsys):
    """With one step of DDIM for a hundred, and eight digits for MNIST."""
    for script in (ddpm, latent):
        monkeypatch.setattr(script, "ddim_sample", lambda *three, sample=script.ddim_sample: (
            sample(*three[:3], steps=1)))
    monkeypatch.setattr(common, "load_images", lambda args, train=True: tuple(
        part.to(args.device) for part in common.synthetic_digits(8, 0)))
    counter = MagicMock()  # torch's own leaves the double
    counter().__enter__().get_total_flops.return_value = 2e6
    monkeypatch.setattr(bench("latent_cost"), "FlopCounterMode", counter)
    bench("latent_cost").main()
    assert "128 images in" in capsys.readouterr().out
    bench("loss_by_t").main()
    assert len(list(tmp_path.glob("runs/loss_by_t/*.png"))) == 2
    libraries = bench("libraries")
    monkeypatch.setattr(libraries, "FlopCounterMode", counter)
    monkeypatch.setattr(common, "load_images", lambda args: (
        torch.zeros(128, 1, 28, 28, device=args.device), torch.zeros(128, device=args.device)))
    weights, rate = libraries.train_ours("cuda", 2, tmp_path / "ours")
    assert weights == 1_241_537 and rate > 0
    assert libraries.sample_ours("cuda", tmp_path / "ours") > 0
    assert libraries.floor("cuda", 64)[0] > 0


@pytest.mark.parametrize(("arm", "samplers"), [
    ("01+eps+net=8/8/16/0", ["DDIM-50"]), ("04+adamw+minus+net=0/8/8+t=uniform",
                                         ["Euler-2", "Euler-5", "Euler-10"]),
    ("04+skip+net=8/8/8/0", ["Euler-2", "Euler-5", "Euler-10"])])
def test_an_arm_of_the_recipes_leaves_its_distances(arm, samplers, bench, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "load_images", lambda args, train=True: (
        common.synthetic_digits(99, train)))
    monkeypatch.setattr(sys, "argv", ["recipe.py", arm, "--images", "198", "--samples", "9",
                                      "--out-dir", str(tmp_path)])
    for _ in range(2):
        bench("recipe").main()
    one, two = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert one["arm"] == arm and one["images"] == 192 and one["images_per_second"] > 0
    assert all(one[name] == two[name] > 1 for name in samplers)
    assert len(list(tmp_path.glob("*.png"))) == len(samplers)


def test_the_kernels_can_be_counted_without_a_gpu(bench, capsys):
    bench("count_kernels").main()
    _, _, *rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    kernels = [int(row[2]) for row in rows]
    assert len(set(kernels[::2])) == 1  # as many for any number of images
    assert kernels[1] > 1.5 * kernels[0]  # and more of them with autocast


def test_a_checkpoint_of_cuda_is_exported_for_any_device(cuda, bench, tmp_path, monkeypatch):
    ddpm.main(tiny(ddpm, tmp_path, "--eval-samples", "0"))
    monkeypatch.setattr(sys, "argv", ["export_weights.py", str(tmp_path / "checkpoint.pt"),
                                      "--to", str(tmp_path / "weights")])
    bench("export_weights").main()
    state = torch.load(tmp_path / "weights" / "01_ddpm_ddim.pt", weights_only=True)
    assert {x.device.type for x in state["networks"]["diffusion"].values()} == {"cpu"}


def test_shipped_weights_can_be_trained_on(bench, tmp_path, monkeypatch):
    def export(*typed):
        monkeypatch.setattr(sys, "argv", ["export_weights.py", *map(str, typed)])
        bench("export_weights").main()

    flow.train(flow.parse_args(options(tmp_path / "first", "--epochs", "2")))
    export(tmp_path / "first" / "checkpoint.pt", "--to", tmp_path)
    export("--back", tmp_path / "04_rectified_flow.pt", "--to", tmp_path / "on")
    shipped, back = (torch.load(path, weights_only=True) for path in (
        tmp_path / "04_rectified_flow.pt", tmp_path / "on" / "checkpoint.pt"))
    assert {name: done for name, (done, _, _) in back["training"].items()} == {
        "flow": 2, "reflow": 4}
    assert back["history"] == shipped["history"]
    for name, (_, weights, _) in back["training"].items():
        for key, weight in shipped["networks"][name].items():
            assert torch.equal(weights[key], weight.float())
    more = ["--device", "cpu", "--out-dir", str(tmp_path / "on"), "--resume", "--epochs", "3"]
    flow.train(flow.parse_args(more))
    history = torch.load(tmp_path / "on" / "checkpoint.pt", weights_only=True)["history"]
    assert [epoch["epoch"] for epoch in history if epoch["stage"] == "flow"] == [1, 2, 3]


# ---------------------------------------------------------------------------- the CUDA graphs


@pytest.mark.parametrize(("more", "recorded"), [((), 2), (("--no-graphs",), 0)])
def test_one_graph_a_shape_and_no_answer_is_overwritten(
    more, recorded, cuda, tmp_path, monkeypatch
):
    shapes, record = [], torch.cuda.make_graphed_callables
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda function, inputs: (
        shapes.append(inputs[0].shape) or record(function, inputs)))
    args = ddpm.parse_args(tiny(ddpm, tmp_path, *more))
    model = ddpm.make_models(args)["diffusion"].eval()
    torch.nn.init.normal_(model.conv_out.weight)
    net = common.as_function(model, args)
    x, t = torch.randn(3, 1, 28, 28, device="cuda"), torch.tensor([1, 2, 3], device="cuda")
    kept = x.clone()
    once, other, fewer = net(x, t), net(x + 1, t), net(x[:2], t[:2])
    assert len(shapes) == recorded
    torch.testing.assert_close(x, kept, rtol=0, atol=0)
    close = {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(once, model(x, t), **close)
    torch.testing.assert_close(other, model(x + 1, t), **close)
    torch.testing.assert_close(fewer, once[:2], **close)
    assert not once.requires_grad


@pytest.mark.parametrize("module", [ddpm, flow, compare])
def test_a_recorded_step_learns_what_python_would(module, cuda, tmp_path):
    """Eight steps and a resumed run of as many: other batches, rates and noise in each. A GPU
    rounds in another order each time, and Adam makes much of it: there only the loss is alike."""
    states = []
    for more in ((), ("--no-graphs",)):
        folder = tmp_path / str(len(more))
        train = [*tiny(module, folder, "--eval-samples", "9", *more), "--train-images", "128"]
        for resume in ([], ["--resume", "--epochs", "2"]):
            module.train(module.parse_args([*train, *resume]))
        states.append(load(folder / "checkpoint.pt"))
    for graph, python in zip(*(state["history"] for state in states), strict=True):
        assert graph["loss"] == pytest.approx(python["loss"], rel=0.1)
    for name, network in states[1]["networks"].items() if cuda == "double" else ():
        for key, weight in network.items():
            recorded = states[0]["networks"][name][key]
            torch.testing.assert_close(recorded, weight, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("forward", [
    lambda x: x * x.max().item(), lambda x: x[x > 0], lambda x: x + torch.ones(1).to(x.device),
    lambda x: x if x.sum() > 0 else -x])
def test_what_cannot_be_recorded_is_refused(forward, tmp_path):
    with on_cuda():
        args, model = ddpm.parse_args(tiny(ddpm, tmp_path)), torch.nn.Identity()
        model.forward = forward
        with pytest.raises(DeviceError):
            common.as_function(model, args)(torch.ones(2, device="cuda"))
        args.no_graphs = True
        common.as_function(model, args)(torch.ones(2, device="cuda"))


# ------------------------------------------------------------------------- the double itself


def test_the_double_refuses_what_cuda_refuses():
    with on_cuda():
        x, y = torch.arange(6.0, device="cuda"), torch.arange(6.0)
        index = torch.tensor([0, 2])
        assert x.is_cuda and not y.is_cuda and str(x.device) == "cuda:0"
        assert isinstance((2 * x + 1).sum(), Claimed) and (x + y.sum()).tolist()[0] == 15
        assert x[index].tolist() == [0, 2] and x[y > 4].tolist() == [5]
        assert x.cpu().numpy().tolist() == y.to("cuda").tolist() == y.tolist()
        assert torch.randn(2, generator=Generator("cuda"), device="cuda").is_cuda
        for refused in (lambda: x + y, lambda: y[index.to("cuda")],
                        lambda: torch.where(y > 2, x, x), lambda: x.gather(0, index),
                        lambda: x.masked_fill(y > 2, 0.0), lambda: x.numpy(),
                        lambda: torch.cat([x, y]), lambda: x[index.float()],
                        lambda: torch.stack([x.sum(), y.sum()]),
                        lambda: torch.randn(2, generator=Generator(), device="cuda"),
                        lambda: torch.rand(2, generator=Generator("cuda")),
                        lambda: x.index_put_((index,), y[:2])):
            with pytest.raises((DeviceError, IndexError)):
                refused()


PLANTED = {  # fault: file, what stands there, what is planted, the script that meets it
    "a tensor without a device": (
        "01_ddpm_ddim", "t, device=x.device)", "t)", "01_ddpm_ddim"),
    "a table on the CPU that is indexed by CUDA times": (
        "01_ddpm_ddim", "make_schedule(args.timesteps, args.device)",
        "make_schedule(args.timesteps)", "01_ddpm_ddim"),
    "labels on the CPU that index an embedding": (
        "03_cfg", "torch.arange(len(x_T), device=x_T.device)", "torch.arange(len(x_T))", "03_cfg"),
    "times on the CPU for images on CUDA": (
        "04_rectified_flow", "torch.rand(len(x1), device=x1.device)", "torch.rand(len(x1))",
        "04_rectified_flow"),
    "a CPU generator in a sampler": (
        "common", "torch.Generator(noise.device)", "torch.Generator()", "02_latent_diffusion"),
    ".numpy() on a CUDA tensor": (
        "common", "utils.make_grid(to_uint8(images), nrow=columns)[0].numpy()",
        "utils.make_grid(images, nrow=columns)[0].numpy()", "02_latent_diffusion"),
    "a mask left on the CPU": (
        "03_cfg", "torch.rand(labels.shape, device=labels.device)",
        "torch.rand(labels.shape)", "03_cfg"),
    "images that do not come home": (
        "common", '.to("cpu", torch.uint8)', ".to(torch.uint8)", "01_ddpm_ddim"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(fault, hurry, tmp_path, monkeypatch):
    file, old, new, script = PLANTED[fault]
    for name in ("common", script):
        source = (ROOT / f"{name}.py").read_text()
        assert name != file or old in source
        (tmp_path / f"{name}.py").write_text(source.replace(old, new) if name == file else source)
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    faulty = importlib.import_module(script)
    with on_cuda(), pytest.raises(DeviceError):
        faulty.main(tiny(faulty, tmp_path / "out"))
