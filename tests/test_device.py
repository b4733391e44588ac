"""All scripts on CUDA: on a double of it everywhere, and on a GPU where there is one."""

import importlib
import inspect
import itertools
import sys
from pathlib import Path

import pytest
import torch
from double import Claimed, DeviceError, Generator, on_cuda
from scripts import DRAWING, ROOT, cfg, compare, ddpm, flow, latent, latent_flow, meanflow, options

import common

STEPS = ["--timesteps", "4", "--ddim-steps", "2"]
PAIRS = ["--pairs", "64", "--pair-steps", "1", "--reflow-epochs", "1",
         "--steps", "1", "2", "--ab2-steps", "4"]
MORE = {"01_ddpm_ddim": [*STEPS, "--ddim-sweep", "1"],
        "02_latent_diffusion": [*STEPS, "--vae-epochs", "1"],
        "03_cfg": [*STEPS, "--guidance", "3", "--guidance-sweep", "0"],
        "04_rectified_flow": PAIRS, "04b_latent_rflow": PAIRS, "05_compare": [],
        "06_meanflow": ["--steps", "1", "2"],
        "07_drifting": ["--toy-steps", "16"]}


def tiny(module, folder: Path, *more: str) -> list[str]:
    return ["--fast-dev", "--device", "cuda", "--out-dir", str(folder), "--epochs", "1",
            "--train-images", "32", "--batch-size", "16", *MORE[module.__name__], *more]


@pytest.fixture
def hurry(monkeypatch):
    """Nothing is timed often, for on this clock every run takes three seconds, and in batches of
    16 alone; and straightness is that of two steps."""
    monkeypatch.setattr(common.time, "perf_counter", itertools.count(step=3.0).__next__)
    time, timed = common.time_draw, {}

    def once(args, draw, noise):
        if draw not in timed:
            timed[draw] = time(args, draw, noise[:16])
        return timed[draw]

    monkeypatch.setattr(common, "time_draw", once)
    for module in (flow, latent_flow):
        monkeypatch.setattr(module, "straightness", lambda net, x0, steps, s=module.straightness: (
            s(net, x0, 2)))


@pytest.fixture(params=["double", pytest.param("GPU", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no GPU"))])
def cuda(request, hurry, monkeypatch):
    if request.param == "GPU":
        yield request.param
    else:
        monkeypatch.setattr(meanflow, "total_derivative", lambda model, x, t, r, v: (
            model(x + v, t, r) - model(x, t, r)))  # the double has no forward-mode derivatives
        with on_cuda():
            yield request.param


def load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


@pytest.mark.parametrize("module", DRAWING)
def test_each_script_trains_resumes_and_samples(module, cuda, tmp_path, capsys, monkeypatch):
    module.main(tiny(module, tmp_path))
    assert capsys.readouterr().out.splitlines()[1] == (
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
    first = next(stage for stage in state["stages"].values() if stage["epochs"])
    assert len(first["epochs"]) == (2 if module is not latent else 1)
    if module is ddpm:  # the others draw shipped weights, below
        module.main(["--sample-only", "--device", "cuda", "--out-dir", str(tmp_path),
                     *MORE[module.__name__]])
        assert common.history(load(tmp_path / "checkpoint.pt")) == common.history(state)


SHIPPED = {latent: ["--ddim-steps", "2"], latent_flow: ["--steps", "1", "2", "--ab2-steps", "4"],
           cfg: ["--ddim-steps", "2", "--guidance", "3", "--guidance-sweep", "0"]}


@pytest.mark.parametrize("module", SHIPPED)  # 01 draws as 03 does
def test_cuda_and_cpu_draw_the_same_digits(module, cuda, tmp_path, monkeypatch):
    """From the shipped weights: noise and labels are those of the CPU, rounding apart."""
    drawn = {}
    monkeypatch.setattr(latent, "ddpm_sample", lambda model, schedule, x, rng: x)  # 1,000 calls
    monkeypatch.setattr(module, "draw_path", lambda *_: None, raising=False)
    for device in ("cuda", "cpu"):
        folder = tmp_path / device
        module.main(["--sample-only", "--device", device, "--out-dir", str(folder), "--batch-size",
                     "16", "--eval-samples", "5", *SHIPPED[module]])
        drawn[device] = {path.name: load(path)["images"].float()
                         for path in folder.glob("eval_*.pt") if "DDPM" not in path.name}
    assert drawn["cuda"].keys() == drawn["cpu"].keys() != set()
    for name, images in drawn["cuda"].items():
        assert (images - drawn["cpu"][name]).abs().mean() < 2  # of 255


def test_digits_and_another_vae(cuda, tmp_path):
    cfg.main(["--digits", "27", "--device", "cuda", "--out-dir", str(tmp_path / "03"),
              "--ddim-steps", "2"])
    assert (tmp_path / "03" / "digits_27.png").exists()
    latent.main(tiny(latent, tmp_path / "02"))
    file = str(tmp_path / "02" / "checkpoint.pt")
    latent_flow.main(tiny(latent_flow, tmp_path / "04b", "--vae", file))
    of_02, of_04b = (load(tmp_path / name / "checkpoint.pt")["stages"]["vae"]["learned"][0]
                     for name in ("02", "04b"))
    torch.testing.assert_close(of_02, of_04b, rtol=0, atol=0)


def test_05_trains_a_classifier_and_scores_a_file(cuda, tmp_path, capsys):
    out = tmp_path / "runs" / "05"  # beside it are no sets of other tests
    compare.main(tiny(compare, out, "--train-images", "64"))
    file = tmp_path / "set.pt"
    torch.save({"images": torch.randint(256, (12, 1, 28, 28), dtype=torch.uint8),
                "labels": torch.arange(12) % 10}, file)
    compare.main(["--device", "cuda", "--dataset", "synthetic", "--train-images", "64",
                  "--sample-only", "--out-dir", str(out), str(file)])
    assert str(file) in capsys.readouterr().out


# ---------------------------------------------------------------------------- the CUDA graphs


@pytest.fixture
def graphs(monkeypatch):
    """The CUDA graphs that are recorded from here on."""
    found, kind = [], torch.cuda.CUDAGraph
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: found.append(kind()) or found[-1])
    return found


@pytest.mark.parametrize(("more", "recorded"), [((), 2), (("--no-graphs",), 0)])
def test_one_graph_a_shape_and_no_answer_is_overwritten(more, recorded, cuda, graphs, tmp_path):
    args = ddpm.parse_args(tiny(ddpm, tmp_path, *more))
    model = ddpm.make_models(8, 4, "cuda")["diffusion"].eval().requires_grad_(False)
    torch.nn.init.normal_(model.conv_out.weight)
    net = common.recorded(model, args)
    x, t = torch.randn(3, 1, 28, 28, device="cuda"), torch.tensor([1, 2, 3], device="cuda")
    kept = x.clone()
    for _ in range(3):  # these run as they are
        net(x, t), net(x[:2], t[:2])
    assert not graphs
    once, other, fewer = net(x, t), net(x + 1, t), net(x[:2], t[:2])
    assert len(graphs) == recorded
    torch.testing.assert_close(x, kept, rtol=0, atol=0)
    close = {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(once, model(x, t), **close)
    torch.testing.assert_close(other, model(x + 1, t), **close)
    torch.testing.assert_close(fewer, once[:2], **close)
    assert not once.requires_grad and (net is model) == (recorded == 0)


def test_on_a_gpu_training_is_in_bfloat16_and_sampling_is_not(cuda, monkeypatch):
    monkeypatch.setattr(common.in_bfloat16, "allowed", True)
    model, seen = ddpm.make_models(8, 4, "cuda")["diffusion"], []
    model.conv_in.register_forward_hook(lambda layer, x, out: seen.append(out.dtype))
    x, t = torch.randn(3, 1, 28, 28, device="cuda"), torch.tensor([1, 2, 3], device="cuda")
    outputs = [model(x, t)]
    with torch.no_grad():
        outputs.append(model(x, t))
    model.requires_grad_(False)  # as common.load gives it
    outputs.append(model(x, t))
    assert seen == [torch.bfloat16, torch.float32, torch.float32]
    assert [v.dtype for v in outputs] == [torch.float32] * 3


def test_another_device_leaves_the_function_alone(tmp_path):
    args = ddpm.parse_args(options(tmp_path))
    assert common.recorded(len, args) is len


@pytest.mark.parametrize("module", [ddpm, latent_flow, compare])
def test_a_recorded_step_learns_what_python_would(module, cuda, graphs, tmp_path):
    """Six steps and a resumed run of as many: other batches, rates and noise in each; on the
    double bit for bit. A GPU rounds in another order: there only the loss is alike."""
    states = []
    for more in ((), ("--no-graphs",)):
        folder = tmp_path / str(len(more))
        train = [*tiny(module, folder, *more), "--train-images", "96"]
        for resume in ([], ["--resume", "--epochs", "2"]):
            module.train(module.parse_args([*train, *resume]))
        assert graphs and (cuda == "GPU" or any(graph.replays > 2 for graph in graphs))
        states.append(load(folder / "checkpoint.pt"))
    for graph, python in zip(*map(common.history, states), strict=True):
        assert graph["loss"] == pytest.approx(python["loss"], rel=0.1)
    for name, stage in states[1]["stages"].items() if cuda == "double" else ():
        torch.testing.assert_close(states[0]["stages"][name]["learned"], stage["learned"],
                                   rtol=0, atol=0)


def changed(source: str, *changes: tuple[str, str]):
    """fit of 01, changed as a student would: each line that is named is replaced by others."""
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    scope = dict(vars(ddpm))
    exec(source, scope)  # noqa: S102
    return scope["fit"]


CLIP = "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)"
CHANGES = {
    "a print and a counter in the loop": [
        ("            losses, start =", "            counter = 0\n            losses, start ="),
        ("                if bar.update():", """                counter += 1
                print("batch", counter)
                if bar.update():""")],
    "an early break": [
        ("                if bar.update():", """                if len(losses) == 6:
                    print("that is enough")
                    break
                if bar.update():""")],
    "a gradient norm that step returns and the loop prints": [
        ("        value.backward()\n", f"        value.backward()\n        norm = {CLIP}\n"),
        ("return value.detach()", "return value.detach(), norm"),
        ("                losses.append(step(*[part[chosen] for part in data]))",
         """                value, norm = step(*[part[chosen] for part in data])
                losses.append(value)
                print(f"norm {norm.item():.4f}")""")],
    "an .item() in the loop": [
        ("                if bar.update():", """                print(f"{losses[-1].item():.4f}")
                if bar.update():""")],
    "a constant rate": [
        ("rate = lr * min((i + 1) / min(200, total / 10), 1) * (1 - i / total)",
         "rate = lr")],
    "clipping": [("        value.backward()\n", f"        value.backward()\n        {CLIP}\n")],
    "AdamW for all weights": [
        ("[w for w in model.parameters() if w.dim() == 4 and min(w.shape[:2]) >= 16]", "[]"),
        ("[w for w in model.parameters() if w.dim() < 4 or min(w.shape[:2]) < 16]",
         "[*model.parameters()]")],
}


class Small(torch.nn.Module):
    """A denoiser with a weight for Muon, as cheap as can be."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3, stride=4), torch.nn.SiLU(), torch.nn.Conv2d(16, 16, 1),
            torch.nn.SiLU(), torch.nn.ConvTranspose2d(16, 1, 4, stride=4))

    def forward(self, x, t):
        return self.layers(x)


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_student_changes_works_alike_on_cpu_and_gpu(change, cuda, tmp_path, capsys):
    """What seven steps print, and the weights in the end: on a CPU, with a graph, without."""
    printed, weights = [], []
    fit = changed(inspect.getsource(ddpm.fit), *CHANGES[change])
    for device, more in (("cpu", ()), ("cuda", ()), ("cuda", ("--no-graphs",))):
        args = ddpm.parse_args([*tiny(ddpm, tmp_path / f"{device}{len(more)}", *more),
                                "--device", device, "--train-images", "112"])
        state = common.open_run(args, network={}, classes=[])
        torch.manual_seed(0)
        model = Small().to(device)
        images = torch.rand(112, 1, 28, 28, generator=Generator()).to(device)
        schedule = ddpm.make_schedule(4, device)

        def loss(model, x0, schedule=schedule):
            t = torch.arange(len(x0), device=x0.device) % 4
            return ddpm.diffusion_loss(model, schedule, x0, t, x0.flip(0))

        capsys.readouterr()
        ema = fit(args, state, "diffusion", model, loss, [images], [images[:9]], 1, 1e-3)
        printed.append(capsys.readouterr().out)
        weights.append({name: x.cpu() for name, x in ema.state_dict().items()})
    if cuda == "double":
        assert printed[1] == printed[2]
        torch.testing.assert_close(weights[1], weights[2], rtol=0, atol=0)
    assert len(printed[0].splitlines()) == len(printed[1].splitlines())
    if "in the loop" in change or "norm" in change:
        assert len(printed[1].splitlines()) == 7  # one for each step


def test_training_on_another_shape_is_one_clear_error(cuda, tmp_path):
    args = ddpm.parse_args(tiny(ddpm, tmp_path))
    step = common.recorded(lambda x: 2 * x, args, one_shape=True)
    x = torch.ones(4, device="cuda")
    for _ in range(5):
        assert step(x).tolist() == [2] * 4
    with pytest.raises(ValueError, match="another shape.*--no-graphs"):
        step(x[:2])


@pytest.mark.parametrize("function", [
    lambda x: x * x.max().item(), lambda x: x[x > 0], lambda x: x + torch.ones(1).to(x.device),
    lambda x: x if x.sum() > 0 else -x])
def test_what_cannot_be_recorded_is_refused(function, tmp_path):
    with on_cuda():
        args, x = ddpm.parse_args(tiny(ddpm, tmp_path)), torch.ones(2, device="cuda")
        for more in ({}, {"no_graphs": True}):
            vars(args).update(more)
            net = common.recorded(function, args)
            for _ in range(3):
                net(x)
            if not more:
                with pytest.raises(DeviceError):
                    net(x)
            else:
                net(x)


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
        "03_cfg", "torch.arange(len(x), device=x.device)", "torch.arange(len(x))", "03_cfg"),
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
