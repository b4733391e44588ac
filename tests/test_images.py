"""Data sets that are not MNIST: torchvision's other two, and folders of pictures."""

import gzip
import json
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from scripts import (
    DRAWING,
    cfg,
    compare,
    ddpm,
    drifting,
    flow,
    latent,
    latent_flow,
    meanflow,
    one_line,
    usage_error,
)
from torchvision.transforms.functional import to_pil_image

import common

SHADES = {"circles": 50, "squares": 120, "stars": 200}


def write_folder(folder, n: int = 28, side=(28, 28)):
    """n pictures for each class, of one shade of grey each, with one white row on top."""
    for name, shade in SHADES.items():
        (folder / name).mkdir(parents=True)
        for i in range(n):
            image = Image.new("L", side, shade)
            image.paste(255, (0, 0, side[0], 1 + i % 5))
            image.save(folder / name / f"{i:03}.png")
    return folder


def arguments(out, dataset, *more: str, module=ddpm):
    return module.parse_args(["--device", "cpu", "--out-dir", str(out), "--batch-size", "8",
                              "--dataset", str(dataset), *more])


@pytest.mark.parametrize(("dataset", "name", "sixth"), [
    ("mnist", "MNIST", "6"), ("fashion", "FashionMNIST", "Shirt"), ("kmnist", "KMNIST", "ma")])
@pytest.mark.parametrize("compressed", [False, True])
def test_torchvisions_sets_have_names_for_their_classes(
    dataset, name, sixth, compressed, tmp_path, monkeypatch
):
    """The idx format by hand: a magic number, sizes in four bytes each, then pixels or labels."""
    raw, size = tmp_path / name / "raw", (12).to_bytes(4, "big")
    raw.mkdir(parents=True)
    side = (28).to_bytes(4, "big")
    pixels = b"".join(bytes([0, 51, 255, *[10 * i] * 781]) for i in range(12))
    for kind in ("train", "t10k"):
        files = {f"{kind}-images-idx3-ubyte": bytes([0, 0, 8, 3]) + size + side + side + pixels,
                 f"{kind}-labels-idx1-ubyte": bytes([0, 0, 8, 1]) + size + bytes([6, 9] * 6)}
        for file, content in files.items():
            if compressed:
                (raw / f"{file}.gz").write_bytes(gzip.compress(content))
            else:
                (raw / file).write_bytes(content)
    if compressed:  # as torchvision leaves them; their checksums are of the real archives
        monkeypatch.setattr("torchvision.datasets.utils.check_integrity", lambda *rest: True)
    args = arguments(tmp_path / "out", dataset, "--data-dir", str(tmp_path))
    (images, labels), (test_images, test_labels), classes = common.load_images(args)
    assert images.shape == test_images.shape == (12, 1, 28, 28)
    assert labels.tolist() == test_labels.tolist() == [6, 9] * 6
    assert images[3, 0, 0, :4].tolist() == pytest.approx([-1, -0.6, 1, 60 / 255 - 1])
    assert len(classes) == 10 and classes[6] == sixth
    args.train_images = 10  # these are the first; of the test images, all
    (images_again, _), (test_images, _), _ = common.load_images(args)
    assert torch.equal(images_again, images[:10]) and len(test_images) == 12


def test_a_subfolder_is_a_class_and_about_a_seventh_of_the_pictures_is_for_testing(tmp_path):
    folder = write_folder(tmp_path / "shapes", 100)
    args = arguments(tmp_path / "out", folder)
    (images, labels), (test_images, test_labels), classes = common.load_images(args)
    assert len(images) + len(test_images) == 300 and 25 < len(test_images) < 60  # 43 expected
    assert classes == ["circles", "squares", "stars"]
    assert torch.cat([labels, test_labels]).bincount().tolist() == [100] * 3
    for x, y in ((images, labels), (test_images, test_labels)):
        shades = (x[:, 0, 20, 20] + 1) * 127.5
        assert shades.tolist() == pytest.approx([list(SHADES.values())[label] for label in y])
        assert (x[:, 0, 0] == 1).all()  # up is up
    assert {*labels[:12].tolist()} == {0, 1, 2}  # mixed, so the first few have all classes
    first, test, _ = common.load_images(
        arguments(tmp_path / "out", folder, "--train-images", "20"))
    assert torch.equal(first[0], images[:20]) and torch.equal(first[1], labels[:20])
    assert torch.equal(test[0], test_images) and torch.equal(test[1], test_labels)
    again, _, _ = common.load_images(arguments(tmp_path / "out", f"{folder}/"))
    assert torch.equal(again[0], images)


def test_a_folder_without_subfolders_is_one_class(tmp_path):
    (tmp_path / "flat").mkdir()
    for i in range(70):
        Image.new("L", (28, 28), i).save(tmp_path / "flat" / f"{i}.PNG")
    (tmp_path / "flat" / "notes.txt").write_text("no picture")
    args = arguments(tmp_path / "out", tmp_path / "flat")
    (images, labels), (test_images, _), classes = common.load_images(args)
    assert classes == ["flat"] and labels.tolist() == [0] * len(images)
    shades = torch.cat([images, test_images])[:, 0, 0, 0]
    assert sorted(((shades + 1) * 127.5).round().tolist()) == [*range(70)]


@pytest.mark.parametrize(("ending", "mode", "color", "grey"), [
    ("png", "L", 128, 128), ("jpg", "L", 128, 128), ("png", "RGB", (255, 0, 0), 76),
    ("jpeg", "RGB", (255, 0, 0), 76), ("png", "RGBA", (0, 255, 0, 255), 150), ("png", "1", 1, 255),
    ("png", "RGBA", (9, 9, 9, 0), 255), ("png", "LA", (0, 51), 204)])  # white where transparent
def test_pictures_become_grey_and_fit_into_28x28(ending, mode, color, grey, tmp_path):
    """Twice as wide as high: black above and below. Grey is 0.299 red + 0.587 green + ..."""
    (tmp_path / "wide").mkdir()
    for i in range(70):
        Image.new(mode, (120, 60), color).save(tmp_path / "wide" / f"{i}.{ending}")
    (images, _), _, _ = common.load_images(arguments(tmp_path / "out", tmp_path / "wide"))
    pixels = (images[0, 0] + 1) * 127.5
    assert (pixels[:7] == 0).all() and (pixels[21:] == 0).all()
    assert pixels[7:21].flatten().tolist() == pytest.approx([grey] * 14 * 28, abs=2)


@pytest.mark.parametrize(("n", "left"), [(0, ""), (69, ""), (69, "notes.txt")])
def test_a_folder_of_fewer_than_70_pictures_ends_in_one_line(n, left, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(n):
        Image.new("L", (28, 28), i).save(folder / f"{i}.png")
    if left:
        (folder / left).write_text("no picture")
    message = one_line(common.load_images, arguments(tmp_path / "out", folder))
    assert f"{folder}: {n} pictures, " in message and "at least 70 are needed" in message
    assert ("1 of other kinds (notes.txt)" in message) == bool(left)


def test_a_photo_is_turned_as_its_camera_says(tmp_path):
    """Exif orientation 6: the first row of the file is the right edge of the scene."""
    (tmp_path / "photos").mkdir()
    picture, exif = Image.new("L", (28, 28)), Image.Exif()
    picture.paste(255, (0, 0, 28, 14))  # the stored upper half is bright
    exif[0x0112] = 6
    for i in range(70):
        picture.save(tmp_path / "photos" / f"{i}.jpg", exif=exif, quality=95)
    (images, _), _, _ = common.load_images(arguments(tmp_path / "out", tmp_path / "photos"))
    assert (images[0, 0, :, 16:] > 0.8).all() and (images[0, 0, :, :12] < -0.8).all()


@pytest.mark.parametrize(("folder", "place"), [
    ("pictures/mnist", "runs/mnist-......"), (".", "runs/pictures-......"),
    ("..", "runs/home-......"), ("./mnist", "runs/mnist-......"), ("mnist", "runs"),
    ("fashion", "runs/fashion")])
def test_a_folder_has_its_own_place_for_results(folder, place, tmp_path, monkeypatch):
    """Beside the runs on MNIST, also if its name is mnist or does not show."""
    (tmp_path / "home" / "pictures" / "mnist").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home" / ("" if folder == "pictures/mnist" else "pictures"))
    args = ddpm.parse_args(["--device", "cpu", "--dataset", folder])
    assert re.fullmatch(f"{place}/01_ddpm_ddim", args.out_dir.as_posix())


def test_a_batch_of_more_pictures_than_there_are_is_all_of_them(tmp_path, capsys):
    folder = write_folder(tmp_path / "shapes", 24)
    args = arguments(tmp_path / "out", folder, "--batch-size", "72", *TINY, *LEARNING[ddpm],
                     *SAMPLING[ddpm])
    ddpm.train(args)
    said = re.search(r"--batch-size 72 is too large: a batch has all (\d+) images",
                     capsys.readouterr().out)
    n, line = int(said[1]), json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    assert n < 72 and line["images_per_second"] * line["seconds"] == pytest.approx(n)


@pytest.fixture
def untimed(monkeypatch):
    """Every sampler draws once, 16 images at most, and is said to take a second."""
    monkeypatch.setattr(common, "time_draw", lambda args, draw, noise: (
        draw(noise[:16], torch.Generator().manual_seed(0)), 1.0))


TINY = ["--epochs", "1", "--width", "8"]
PAIRS = ["--pairs", "16", "--pair-steps", "1", "--reflow-epochs", "1"]
LEARNING = {  # what the checkpoint remembers, and below that what must be typed again
    ddpm: ["--timesteps", "4"], latent: ["--timesteps", "4", "--vae-epochs", "1"],
    cfg: ["--timesteps", "4"], flow: PAIRS, latent_flow: PAIRS,
    meanflow: [], drifting: ["--toy-steps", "16"]}
SAMPLING = {
    ddpm: ["--ddim-steps", "2", "--ddim-sweep", "1"], latent: ["--ddim-steps", "2"],
    cfg: ["--ddim-steps", "2", "--guidance-sweep", "0"], flow: ["--steps", "1", "--ab2-steps", "3"],
    latent_flow: ["--steps", "1", "--ab2-steps", "3"], meanflow: ["--steps", "1"], drifting: []}


@pytest.mark.parametrize("module", DRAWING)
def test_each_script_learns_samples_resumes_and_draws_a_folder(
    module, tmp_path, monkeypatch, untimed
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "straightness", lambda *rest: 0.0, raising=False)
    write_folder(tmp_path / "shapes", 24)
    seen, save_grid = [], common.save_grid
    monkeypatch.setattr(common, "save_grid", lambda *rest, **named: (
        seen.append(str(rest[1:])), save_grid(*rest, **named)))
    typed = ["--device", "cpu", "--dataset", "shapes"]
    place = ddpm.parse_args(typed).out_dir.parent  # not where a run on MNIST would be
    learning, sampling = ["--batch-size", "8", *TINY], [*SAMPLING[module], "--eval-samples", "6"]
    if module in (latent_flow, meanflow, drifting):
        assert f"{place}/02_latent_diffusion/checkpoint.pt" in one_line(
            module.main, [*typed, *learning, *LEARNING[module], *sampling])
        latent.main([*typed, *learning, *LEARNING[latent], *SAMPLING[latent]])
    module.main([*typed, *learning, *LEARNING[module], *sampling])
    out = place / module.__name__
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["args"]["dataset"] == f"{tmp_path}/shapes"
    assert state["classes"] == ["circles", "squares", "stars"]
    if module is cfg:
        overview = next(line for line in seen if "samples.png" in line)
        assert "circles" in overview and "stars" in overview
    assert {"loss.png", "progress.png", "progress.gif", "samples.png"} <= {*os.listdir(out)}
    monkeypatch.setattr(module, "draw_path", lambda *rest: None, raising=False)  # the slow ones
    for name in ("save_grid", "save_gif", "save_plot"):
        monkeypatch.setattr(common, name, lambda *rest, **named: None)
    module.main([*typed, "--resume", "--epochs", "2", *sampling])
    again = torch.load(out / "checkpoint.pt", weights_only=True)
    assert again["network"] == state["network"] and again["classes"] == state["classes"]
    assert again["args"] == state["args"] | {"epochs": 2}
    assert len(common.history(again)) == len(common.history(state)) + 1
    sets = [torch.load(path, weights_only=True) for path in out.glob("eval_*.pt")]
    assert sets and all(one["images"].shape == (6, 1, 28, 28) for one in sets)
    if module is cfg:
        weights, *_ = state["stages"]["diffusion"]["learned"]
        assert weights["label_tokens.weight"].shape[0] == 4
        assert [one["labels"].tolist() for one in sets if one["guidance"]] == [[0, 1, 2] * 2] * 2
    drawn = []
    monkeypatch.setattr(common, "save_grid", lambda _, path, *rest, **named: (
        drawn.append(path.name)))
    if module is latent:  # what needs images is drawn anew where they are
        module.main([*typed, "--sample-only", *SAMPLING[module]])
        assert drawn.pop(0) == "samples_vae.png"
    drawn.clear()
    (tmp_path / "shapes").rename(tmp_path / "gone")  # what is trained needs no data
    module.main([*typed, "--sample-only", *SAMPLING[module]])
    assert "samples.png" in drawn and "samples_vae.png" not in drawn


def test_the_labels_of_a_set_are_the_classes_in_turn(tmp_path, monkeypatch, untimed):
    """Also where 50, the images drawn at a time, is no multiple of their number."""
    args = arguments(tmp_path / "out", write_folder(tmp_path / "shapes", 24), *TINY,
                     *LEARNING[cfg], *SAMPLING[cfg], "--eval-samples", "120", "--guidance", "1",
                     module=cfg)
    networks = cfg.train(args)
    shade = lambda x, t, labels: 0 * x + labels.view(-1, 1, 1, 1) / 2 - 1
    monkeypatch.setattr(common, "recorded", lambda model, args: shade)
    monkeypatch.setattr(cfg, "draw_path", lambda *rest: None)
    monkeypatch.setattr(cfg, "ddim_sample", lambda model, schedule, x, *rest: (
        model(x, torch.zeros(len(x)))))
    cfg.make_figures(args, **networks)
    one, = (torch.load(path, weights_only=True) for path in (tmp_path / "out").glob("*s_1.pt")
            if "DDIM" in path.name)
    assert one["labels"].tolist() == [0, 1, 2] * 40 and one["names"] == [*SHADES]
    assert one["images"][:, 0, 0, 0].tolist() == [(0, 64, 128)[y] for y in one["labels"]]


@pytest.mark.parametrize(("classes", "parts"), [
    (None, [50, 50, 20]), (10, [50, 50, 20]), (62, [62, 58]), (200, [120])])
def test_a_set_is_drawn_in_parts_of_whole_rounds_of_classes(classes, parts):
    """From one stream of noise, however it is parted."""
    args = ddpm.parse_args(["--device", "cpu", "--eval-samples", "120", "--seed", "4"])
    made, seen = {"name": "", "network_calls": 1}, []
    made |= {"classes": classes} if classes else {}
    common.draw_set(args, made, lambda x, rng: seen.append(x) or x, (1, 8, 8))
    assert [*map(len, seen)] == parts
    rng = torch.Generator().manual_seed(5)
    assert torch.equal(torch.cat(seen), torch.randn(120, 1, 8, 8, generator=rng))


def test_03_draws_classes_by_number_and_names_them(tmp_path, monkeypatch, capsys, untimed):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "shapes", 24)
    typed = ["--device", "cpu", "--dataset", "shapes"]
    cfg.main([*typed, "--batch-size", "8", *TINY, *LEARNING[cfg], *SAMPLING[cfg]])
    titles, save_grid = [], common.save_grid
    monkeypatch.setattr(common, "save_grid", lambda *rest, **named: (
        titles.append(rest[2]), save_grid(*rest, **named)))
    for asked in ("201", "2,0,1", "stars,circles,1"):
        cfg.main([*typed, "--digits", asked, *SAMPLING[cfg]])
    cfg.main([*typed, "--digits", "stars", *SAMPLING[cfg]])
    assert titles == ["Guided, s = 3: stars circles squares"] * 3 + ["Guided, s = 3: stars"]
    capsys.readouterr()
    for asked, wrong in (("3", "3"), ("", ""), ("stars,moons", "moons"), ("1,,", ""), ("x", "x")):
        last = usage_error(cfg, [*typed[2:], "--digits", asked, *SAMPLING[cfg]], capsys)
        assert f"--digits {asked!r}: no class {wrong!r}, only 0 circles, 1 squares, 2" in last


@pytest.mark.parametrize("how", ["--resume", "--sample-only"])
def test_weights_of_another_data_set_are_named(how, tmp_path, capsys):
    folder = write_folder(tmp_path / "shapes", 24)
    ddpm.train(arguments(tmp_path, folder, *TINY, *LEARNING[ddpm], *SAMPLING[ddpm]))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    last = usage_error(ddpm, [how, "--out-dir", str(tmp_path), "--dataset", "fashion"], capsys)
    assert f"{tmp_path}/checkpoint.pt has --dataset {folder}: train anew for fashion" in last
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    last = usage_error(ddpm, ["--sample-only", "--dataset", "kmnist"], capsys)
    assert "weights/01_ddpm_ddim.pt has --dataset mnist: train anew for kmnist" in last


def test_05_judges_a_set_with_the_classifier_of_that_set_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "shapes", 24)
    last = usage_error(compare, ["--dataset", "shapes"], capsys)
    shapes = f"{tmp_path}/shapes"
    assert f"weights/05_compare.pt has --dataset mnist: train anew for {shapes}" in last
    typed = ["--device", "cpu", "--dataset", "shapes", "--eval-samples", "5"]
    place = ddpm.parse_args(typed).out_dir.parent
    images = torch.randint(256, (5, 1, 28, 28)).byte()
    for folder, dataset in (("01_ddpm_ddim", shapes), ("03_cfg", "fashion")):
        (place / folder).mkdir(parents=True)
        torch.save({"images": images, "method": dataset, "args": {"dataset": dataset}},
                   place / folder / "eval_1.pt")
    training = [*typed, "--train-judge", "--epochs", "8", "--batch-size", "8"]
    stranger = f"{place}/03_cfg/eval_1.pt"
    message = f"{stranger} is of other images or classes than those of {shapes}"
    assert message in one_line(compare.main, training)
    assert message in one_line(compare.main, [*typed, stranger])  # now it is loaded, not trained
    Path(stranger).unlink()
    compare.main(training)
    text = (place / "05_compare" / "comparison.md").read_text()
    assert f"The classifier of {shapes} reads " in text
    methods = {line.split("|")[1].strip() for line in text.splitlines() if line.count("|") > 5}
    assert {shapes, "training images"} <= methods
    checkpoint = place / "05_compare" / "checkpoint.pt"
    before = checkpoint.read_bytes()
    state = torch.load(checkpoint, weights_only=True)
    assert state["network"] == {"classes": 3} and state["classes"] == [*SHADES]
    assert len(state["stages"]["judge"]["learned"][0]["classify.weight"]) == 3
    compare.main([*typed, f"{place}/01_ddpm_ddim/eval_1.pt"])
    assert checkpoint.read_bytes() == before
    last = usage_error(compare, [*typed[:2], "--out-dir", f"{place}/05_compare", "--dataset",
                                 "mnist"], capsys)
    assert f"has --dataset {shapes}: train anew for mnist" in last


def test_printed_digits_as_pictures_are_the_same_digits(tmp_path):
    images, labels = common.synthetic_digits(70, seed=0)
    for i, (image, label) in enumerate(zip(images, labels.tolist())):
        folder = tmp_path / "digits" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(common.to_uint8(image)).save(folder / f"{i}.png")
    args = arguments(tmp_path / "out", tmp_path / "digits")
    ours, _, classes = common.load_images(args)
    assert classes == list("0123456789")
    for image, label in zip(*ours):
        same = (images - image).abs().amax((1, 2, 3)) < 0.01
        assert labels[same].tolist() == [label]
