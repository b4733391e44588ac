"""The scripts in bench/, on CUDA where they may run there: on a double of it, and on a GPU."""

import argparse
import contextlib
import importlib
import json
import sys
from unittest.mock import MagicMock

import pytest
import torch
from double import on_cuda
from scripts import DRAWING, ROOT, compare, ddpm, flow, latent, options

import common


@pytest.fixture
def bench(monkeypatch):
    """The scripts in bench/ by their names, without the libraries that one of them measures."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    for library in ("accelerate", "denoising_diffusion_pytorch", "diffusers",
                    "diffusers.optimization"):
        monkeypatch.setitem(sys.modules, library, MagicMock())
    return importlib.import_module


@pytest.fixture(params=["double", pytest.param("GPU", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no GPU"))])
def cuda(request):
    if request.param == "GPU":
        yield
    else:
        with on_cuda():
            yield


@pytest.fixture
def run(bench, monkeypatch):
    """run("recipe", "01"): its main(), with what is typed. It leaves the modules as they were."""
    def run(script, *typed):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, typed)])
        main, before = bench(script).main, [dict(vars(module)) for module in (common, *DRAWING)]
        main()
        assert before == [vars(module) for module in (common, *DRAWING)]
    return run


@pytest.fixture
def digits(monkeypatch):
    """digits(8): so many printed ones stand for MNIST, to learn from and for tests."""
    def set_number(n):
        monkeypatch.setattr(common, "load_images", lambda args: (
            *[[x.to(args.device) for x in common.synthetic_digits(n, seed)] for seed in (0, 1)],
            list("0123456789")))
    return set_number


def test_the_measurements_in_bench(cuda, bench, run, digits, tmp_path, monkeypatch, capsys):
    """With one step of DDIM for a hundred, eight digits for MNIST, and 8 images at most."""
    for script in (ddpm, latent):
        monkeypatch.setattr(script, "ddim_sample", lambda *three, sample=script.ddim_sample: (
            sample(*three[:3], steps=1)))
    time = common.time_draw
    monkeypatch.setattr(common, "time_draw", lambda args, draw, noise: (
        time(args, draw, noise[:8])))
    counter = MagicMock()  # torch's own leaves the double
    counter().__enter__().get_total_flops.return_value = 2e6
    monkeypatch.setattr(bench("latent_cost"), "FlopCounterMode", counter)
    run("latent_cost")
    assert capsys.readouterr().out.count("128 images in") == 2
    digits(8)
    run("loss_by_t")
    assert len(list(tmp_path.glob("runs/loss_by_t/*.png"))) == 2
    libraries = bench("libraries")
    monkeypatch.setattr(libraries, "FlopCounterMode", counter)
    monkeypatch.setattr(libraries, "BATCH", 8)
    digits(16)
    weights, rate = libraries.train_ours("cuda", 2, tmp_path / "ours")
    assert weights == 1_898_945 and rate > 0
    assert libraries.sample_ours("cuda") > 0
    assert libraries.floor("cuda", 64)[0] > 0


def test_the_training_step_that_is_measured_can_be_recorded(cuda, bench):
    args, model = ddpm.parse_args(["--device", "cuda"]), ddpm.UNet(8, 4).to("cuda")
    schedule = ddpm.make_schedule(1000, "cuda")
    step = bench("speed_ups").training_step(model, schedule, contextlib.nullcontext())
    step, x = common.recorded(step, args), torch.ones(4, 1, 28, 28, device="cuda")
    before = [w.tolist() for w in model.parameters()]
    losses = {step(x).item() for _ in range(6)}
    assert len(losses) == 6  # a graph draws new noise, too
    assert all(w.tolist() != old for w, old in zip(model.parameters(), before))


@pytest.mark.parametrize(("arm", "samplers"), [
    ("01+eps+net=8/8/16/0", ["DDIM-50"]), ("04+adamw+minus+net=0/8/8+t=uniform",
                                         ["Euler-2", "Euler-5", "Euler-10"]),
    ("04+skip+net=8/8/16/0", ["Euler-2", "Euler-5", "Euler-10"])])
def test_an_arm_of_the_recipes_leaves_its_distances(arm, samplers, run, digits, tmp_path):
    digits(99)
    for _ in range(2):
        run("recipe", arm, "--images", 198, "--samples", 9, "--out-dir", tmp_path / "runs")
    text = (tmp_path / "runs" / "results.jsonl").read_text()
    one, two = map(json.loads, text.splitlines())
    assert one["arm"] == arm and one["images"] == 192 and one["images_per_second"] > 0
    assert all(one[name] == two[name] > 1 for name in samplers)
    assert len(list(tmp_path.glob("runs/*.png"))) == len(samplers)


def test_the_kernels_can_be_counted_without_a_gpu(run, capsys):
    run("count_kernels")
    call, step = capsys.readouterr().out.split("\n\n")
    _, _, *rows = [line.split("|")[1:-1] for line in call.splitlines()]
    kernels = [int(row[2]) for row in rows]
    assert len(set(kernels[::2])) == 1  # as many for any number of images
    assert kernels[1] > 1.5 * kernels[0]  # and more of them with autocast
    _, _, *rows = [line.split("|")[1:-1] for line in step.splitlines()]
    forward, backward, muon, adamw, average, one_by_one = (int(kernels) for _, kernels in rows)
    assert kernels[0] < forward < kernels[0] + 20 < backward  # forward: with noise and loss
    assert adamw + average < 10 < 2 * muon < one_by_one


def test_muon_for_one_matrix_after_the_other_is_muon(bench):
    """So their numbers of kernels may be compared."""
    torch.manual_seed(0)
    ours = [torch.randn(16, n, 3, 3) for n in (16, 32)]
    theirs, means = [w.clone() for w in ours], [torch.zeros_like(w) for w in ours]
    muon, rate = common.Muon(ours, 0.02), torch.tensor(0.02)
    for _ in range(3):
        for one, two in zip(ours, theirs):
            one.grad = two.grad = torch.randn(one.shape)
        muon.step()
        bench("count_kernels").matrix_after_matrix(theirs, means, rate, 0.95, 0.1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_cuda_is_exported_for_any_device(cuda, run, tmp_path):
    tiny = ["--device", "cuda", "--epochs", "1", "--train-images", "32", "--timesteps", "4"]
    ddpm.train(ddpm.parse_args(options(tmp_path, *tiny, "--ddim-steps", "2", "--ddim-sweep", "1")))
    run("export_weights", tmp_path / "checkpoint.pt", "--to", tmp_path / "weights")
    state = torch.load(tmp_path / "weights" / "01_ddpm_ddim.pt", weights_only=True)
    average, = state["stages"]["diffusion"]["learned"]
    assert {x.device.type for x in average.values()} == {"cpu"}
    assert {(x.numel() > 4096, x.dtype) for x in average.values()} == {
        (True, torch.half), (False, torch.float)}


def test_shipped_weights_can_be_trained_on(run, tmp_path):
    """At a rate of almost 0, so that they must come out as they went in."""
    small = ["--train-images", "64", "--pairs", "64"]
    flow.train(flow.parse_args(options(tmp_path / "first", "--epochs", "2", *small)))
    run("export_weights", tmp_path / "first" / "checkpoint.pt", "--to", tmp_path)
    run("export_weights", "--back", tmp_path / "04_rectified_flow.pt", "--to", tmp_path / "on")
    first, shipped, back = (torch.load(path, weights_only=True)["stages"] for path in (
        tmp_path / "first" / "checkpoint.pt", tmp_path / "04_rectified_flow.pt",
        tmp_path / "on" / "checkpoint.pt"))
    assert [*first] == [*shipped] == [*back] == ["flow", "reflow"]
    for name, n in (("flow", 2), ("reflow", 4)):
        assert len(back[name]["epochs"]) == n
        assert first[name]["epochs"] == shipped[name]["epochs"] == back[name]["epochs"]
        assert shipped[name]["frames"] == back[name]["frames"] == []
        average, = shipped[name]["learned"]
        for weights in back[name]["learned"]:
            for key, weight in average.items():
                assert torch.equal(weights[key], weight.float())
                assert torch.equal(weight, first[name]["learned"][0][key].to(weight.dtype))

    more = ["--resume", "--epochs", "3", "--lr", "1e-9", "--reflow-epochs", "1"]
    flow.train(flow.parse_args(options(tmp_path / "on", *more)))
    on = torch.load(tmp_path / "on" / "checkpoint.pt", weights_only=True)["stages"]
    assert [line["epoch"] for line in on["flow"]["epochs"]] == [1, 2, 3]
    assert len(on["reflow"]["epochs"]) == 1 and len(on["flow"]["learned"]) == 4
    for weights in on["flow"]["learned"][:2]:
        torch.testing.assert_close(weights, back["flow"]["learned"][0], rtol=0, atol=1e-5)


def test_the_stages_of_shipped_weights_stand_as_they_were_learned():
    """Otherwise, to train on an early one would drop others."""
    for script, stages in {"02_latent_diffusion": ["vae", "diffusion"],
                           "04_rectified_flow": ["flow", "reflow"],
                           "04b_latent_rflow": ["vae", "flow", "reflow"],
                           "06_meanflow": ["vae", "meanflow"]}.items():
        file = common.WEIGHTS / f"{script}.pt"
        assert [*torch.load(file, weights_only=True)["stages"]] == stages


def test_faint_pixels_are_counted_and_a_distance_is_without_them(bench, judge):
    images = torch.tensor([0, 1, 15, 16, 255, 240], dtype=torch.uint8)
    images = images.view(-1, 1, 1, 1).repeat(1, 1, 28, 28)
    black = images * (images > 15)
    real = torch.randn(50, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    faint = bench("faint").faint
    share, as_it_is, without = faint(judge, real, images)
    assert share == pytest.approx(2 / 6) and as_it_is != pytest.approx(without)
    assert faint(judge, real, black) == (0, pytest.approx(without), pytest.approx(without))


def sets(table, n, rows, claims):
    """What 05 writes about sets of `n` images; rows: method, sampler, steps, distance, above."""
    head = ["method", "sampler", "steps", "network calls", "Fréchet distance", "above the floor",
            "standard error"]
    return (f"Sets of N = {n} (floor: {n}):\n\n"
            + table(head, [[*row[:3], row[2], *row[3:], "0.01"] for row in rows]) + "\n"
            + table(["claim", "sets", "verdict", "figures"], claims) + "\n")


def test_results_get_the_largest_set_of_each_sampler(run, bench, tmp_path):
    table, floor = compare.table, ["training images", "", "", "0.045", ""]
    large = sets(table, "5,000", [["diffusion", "DDIM", "10", "0.571", "0.526"], floor],
                 [["1a", "a against b", "not measured", "no b"],
                  ["2", "c against d", "worse", "3 against 1"]])
    small = sets(table, "1,000", [["diffusion", "DDIM", "10", "0.6", "0.4"],
                                  ["diffusion", "DDPM", "1,000", "0.3", "0.1"], floor],
                 [["1a", "a against b", "faster", "2 against 20"],
                  ["2", "c against d", "open", "2 against 1"]])
    (tmp_path / "results.md").write_text("Read well.\n\n" + large + small, encoding="utf-8")
    old = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    (tmp_path / "RESULTS.md").write_text(old, encoding="utf-8")
    run("write_tables", tmp_path / "results.md", tmp_path / "RESULTS.md")
    new = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")

    def tables(text):  # the lines of tables of each section, and all other lines
        parts = {part.split("\n")[0].split(":")[0]: part for part in text.split("\n## ")}
        return {name: [line for line in part.splitlines() if line.startswith("|")]
                for name, part in parts.items()}, [x for x in text.splitlines() if x[:1] != "|"]

    (before, words), (after, same_words) = tables(old), tables(new)
    assert words == same_words
    assert after["01"][2:] == [
        "| DDIM-10 | 10 | 5,000 | 0.526 ± 0.010 |",
        "| DDPM-1,000 | 1,000 | 1,000 | 0.100 ± 0.010 |",
        "| *training digits: FD 0.045, the floor* |  | 5,000 | 0 ± 0.010 |"]
    assert after["The claims"][2:] == ["| 1a | faster | 2 against 20 | 1,000 |",
                                       "| 2 | worse | 3 against 1 | 5,000 |"]
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"01", "The claims"}
    for section in bench("write_tables").METHODS:  # that all have their place
        assert "new\n" in bench("write_tables").put(old, section, "new\n")
    with pytest.raises(SystemExit, match="no table below ## 99:"):
        bench("write_tables").put(old, "99:", "new\n")


def test_a_table_names_its_samplers_and_rounds_their_figures(bench):
    def row(method, sampler, steps, above, error="0.02", **more):
        return {"method": method, "sampler": sampler, "steps": steps, "N": "5,000",
                "above the floor": above, "standard error": error} | more

    def lines(section, *rows):
        methods = bench("write_tables").METHODS[section]
        made = bench("write_tables").scores([*rows, *floors], methods).splitlines()
        return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in made[2:]]

    floors = [{"method": name, "N": "5,000", "Fréchet distance": fd, "standard error": "0.01"}
              for name, fd in (("training images", "0.0448"),
                               ("training images, classes alike", "0.0622"))]
    flow = [row("latent flow", "AB2", "5", "0.23"),
            row("latent flow", "Euler", "10", "-0.0082", **{"images/s": "999.9"}),
            row("latent flow", "Euler", "1", "35.93", "0.12", **{"images/s": "27,232.6"}),
            row("latent reflow", "Euler", "2", "1.618", "0.077")]
    assert lines("04b:", *flow) == [
        ["flow, Euler, 1 step", "5,000", "35.9 ± 0.1", "27,233"],
        ["flow, Euler, 10 steps", "5,000", "-0.008 ± 0.020", "999.9"],
        ["flow, AB2, 5 steps", "5,000", "0.230 ± 0.020", ""],
        ["reflow, Euler, 2 steps", "5,000", "1.62 ± 0.08", ""],
        ["*training digits: FD 0.045, the floor*", "5,000", "0 ± 0.010", ""]]
    guided = [row("guided diffusion", "DDIM", "100", "0.4", guidance="3", accuracy="99%"),
              row("guided diffusion", "DDIM", "100", "0.03", guidance="1.25", accuracy="98%")]
    named = [line[0] for line in lines("03:", *guided)]
    alike = "*training digits, as many of each class: FD 0.062, the floor*"
    assert named == ["DDIM-100, s = 1.25", "DDIM-100, s = 3", alike]
    free = row("guided diffusion", "DDIM", "100", "", guidance="0")  # of too many images
    named = lines("03:", free, *guided)
    assert named[0] == ["DDIM-100, s = 0", "5,000", "", ""] and len(named) == 5
    noise = [row("latent diffusion", "DDPM", "1,000", "2"), row("VAE prior", "decoder", "1", "16")]
    assert [line[0] for line in lines("02:", *noise)][:2] == ["noise, decoded", "DDPM-1,000"]


def test_k_means_finds_clusters_that_lie_apart(bench):
    torch.manual_seed(0)
    spots = 100 * torch.eye(4)
    points = (spots[:, None] + torch.randn(4, 50, 4)).flatten(0, 1)
    centres = bench("drifting_arms").k_means(points, 4)
    assert sorted(torch.cdist(spots, centres).argmin(1).tolist()) == [0, 1, 2, 3]
    means = points.view(4, 50, 4).mean(1)
    assert torch.cdist(means, centres).min(1).values.max() < 1e-3


@pytest.mark.parametrize(("typed", "classes"), [(["-k", 25], 25), (["-k", 0, "--sinkhorn", 3], 10)])
def test_an_arm_of_drifting(typed, classes, run, digits, tmp_path):
    digits(200)
    run("drifting_arms", *typed, "--epochs", 1, "--samples", 60, "--out-dir", tmp_path)
    result = json.loads((tmp_path / "results.jsonl").read_text())
    assert result["k"] == typed[1] and len(result["distances"]) == 3 and result["seconds"] > 0
    file, = tmp_path.glob("*/checkpoint.pt")
    state = torch.load(file, weights_only=True)
    assert state["network"]["classes"] == len(state["classes"]) == classes
    assert len(list(file.parent.glob("samples_?.png"))) == 3


def test_sinkhorn_makes_all_data_count_alike(bench):
    """So the field changes its sign under exchange, and is 0 between equal sets."""
    rng, arms = torch.Generator().manual_seed(0), bench("drifting_arms")
    logits = 3 * torch.randn(2, 5, 8, dtype=torch.double, generator=rng)
    P = arms.coupling(logits, 500)
    torch.testing.assert_close(P.sum(2), torch.ones(2, 5).double())
    torch.testing.assert_close(P.sum(1), torch.full((2, 8), 5 / 8).double())
    log_ab = (P / logits.exp()).log()  # log a_i + log b_j: all rows differ by constants
    torch.testing.assert_close(log_ab.diff(dim=1).diff(dim=2), torch.zeros(2, 4, 7).double())
    x, y, z = torch.randn(3, 2, 6, 3, dtype=torch.double, generator=rng)
    none = torch.zeros(6, 6, dtype=torch.bool)
    field = [arms.sinkhorn_field(x, *two, 0.1, none, 3) for two in ((y, z), (z, y), (y, y))]
    torch.testing.assert_close(field[0], -field[1])
    assert field[0].abs().max() > 0.1 and field[2].abs().max() < 1e-12


def test_how_near_copies_come(bench):
    """Distances 0, 1, ..., 20 to the nearest of the cloud: their median and 5% quantile."""
    cloud = torch.tensor([[0.0, 0.0], [0.0, 100.0]])
    points = torch.stack([torch.arange(21.0), torch.arange(21) % 2 * 100.0], dim=1)
    assert bench("copies").nearest(points, cloud) == pytest.approx((10, 1))


def test_pictures_of_sets_say_their_distance(bench, run, tmp_path, monkeypatch):
    """Rows in their order, with the distance of the largest set; those that lack are left out."""
    pictures, drawn = bench("pictures"), []
    rows = sets(compare.table, "1,000", [["reflow", "Euler", "1", "0.9", "0.7"],
                                         ["rectified flow", "Euler", "100", "0.5", "0.3"]], [])
    rows = sets(compare.table, "5,000", [["reflow", "Euler", "1", "0.8", "0.75"]], []) + rows
    (tmp_path / "results.md").write_text(rows, encoding="utf-8")
    (tmp_path / "04_rectified_flow").mkdir()
    for name, method, steps in (("reflow_Euler_1_step", "reflow", 1),
                                ("rectified_flow_Euler_100_steps", "rectified flow", 100),
                                ("rectified_flow_Euler_5_steps", "rectified flow", 5)):
        made = {"name": f"{method}, {steps}", "method": method, "sampler": "Euler", "steps": steps,
                "images": torch.full((20, 1, 28, 28), steps).byte(),
                "args": {"dataset": "synthetic"}}
        torch.save(made, tmp_path / "04_rectified_flow" / f"eval_{name}.pt")
    (tmp_path / "01_ddpm_ddim").mkdir()
    many = torch.arange(100).byte().view(100, 1, 1, 1).expand(-1, 1, 28, 28)
    torch.save(made | {"images": many}, tmp_path / "01_ddpm_ddim" / "eval_DDIM_100_steps.pt")
    monkeypatch.setattr(common, "save_grid", lambda *given: drawn.append(given))
    monkeypatch.setattr(sys, "argv", ["pictures.py", str(tmp_path), str(tmp_path)])
    pictures.main()
    (images, path, _, columns, labels), (first, place, _, wide) = drawn  # no sets for others
    assert place == tmp_path / "01_64_digits.png" and wide == 16
    assert torch.equal(common.to_uint8(first), many[:64])
    assert path == tmp_path / "04_samples.png" and columns == 10
    assert labels == ["rectified flow, 5", "rectified flow, 100\ndistance 0.3 (N = 1,000)",
                      "reflow, 1\ndistance 0.75", "test digits"]
    shades = ((images + 1) * 127.5).round()
    assert [int(shades[row * 10].max()) for row in range(3)] == [5, 100, 1] and len(images) == 40


def test_the_plan_of_equal_minutes_fits_them(bench, tmp_path, monkeypatch):
    """Steps of half a second, and 3 seconds for each epoch; 20 were paid, and 7 are lost before.
    Few passes are one epoch with all images alike; of many, each is of most images."""
    clock, seen = [0.0], []

    def fit(args, state, name, model, loss, data, test, epochs, lr, draw=None):
        clock[0] += 3 * epochs + 0.5 * epochs * (len(data[0]) // args.batch_size)
        seen.append(data[0])

    plans = bench("equal_minutes")
    monkeypatch.setattr(plans.time, "process_time", lambda: clock[0])
    plan, args = plans.Plan(fit, 200, 20), argparse.Namespace(batch_size=4, out_dir=tmp_path)
    clock[0] += 7
    plan(args, {}, "flow", None, None, [torch.arange(100)], [torch.arange(8)], 40, 1e-3)
    assert plan.steps["flow"] == 178 and len(seen[-1]) == 4 * 178  # 92 seconds, 3 for an epoch
    assert plan.minutes["flow"] == pytest.approx((20 + 7 + 92) / 60)
    assert sorted({*seen[-1].bincount().tolist()}) == [7, 8]

    def make(n, rng):
        clock[0] += 1
        return [torch.zeros(n, 1)] * 2

    pairs, test = plan.pairs(argparse.Namespace(seed=0), None, make)
    assert plan.minutes["pairs"] * 60 == 20 + 0.7 * 180 and pairs.shape == (2, 2600, 1)
    assert test.shape == (2, 100, 1)
    plan(args, {}, "reflow", None, None, [torch.arange(100)], [torch.arange(8)], 40, 1e-3)
    assert 195 < plan.minutes["reflow"] * 60 <= 200  # nothing is lost, nor taken

    plan = plans.Plan(fit, 200, 20)
    plan(args, {}, "drifting", None, None, [torch.arange(100)], [torch.arange(8)], 40, 1e-3)
    assert plan.steps["drifting"] == 12 * 24 and len(seen[-1]) == 96  # 180 s: 15 for an epoch
    assert seen[-1].diff().min() >= 1 and seen[-1][-1] > 97  # from all of the file


def test_methods_after_equally_many_minutes(run, digits, tmp_path):
    """Arms in miniature: a script's training as planned, and a score of what it draws."""
    digits(200)
    typed = "--out-dir", tmp_path, "--width", 8, "--batch-size", 16
    run("equal_minutes", "vae", *typed, "--vae-epochs", 1)
    (tmp_path / "vae_0" / "seconds.json").write_text("1")
    for arm in ("clusters", "meanflow", "latent-reflow"):
        run("equal_minutes", arm, *typed, "--minutes", 0.05, "--samples", 60)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["clusters", *3 * ["meanflow"], *4 * ["latent-reflow"]]
    assert all(row["N"] == 60 and row["distance"] > 0 and row["vae_minutes"] for row in rows)
    assert rows[-1]["steps"].keys() == {"flow", "pairs", "reflow"}
    run("equal_minutes", "picture", *typed, "--minutes", 0.05)
    assert (tmp_path / "samples.png").exists()
