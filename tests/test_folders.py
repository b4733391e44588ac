"""Own images: folders as people have them. What is read is said, and nothing saved is lost."""

import argparse
import ast
import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from scripts import ROOT, cfg, compare, ddpm, flow, latent, one_line, usage_error
from torchvision.datasets import FakeData

import common

TINY = ["--epochs", "1", "--width", "8", "--batch-size", "16"]


def picture(path, shade: int = 0, mode: str = "L", size=(28, 28), **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, shade).save(path, **options)


def pets(root, n: int = 40):
    """cat/ and dog/ with n pictures each; every one has its own shade, those of dogs are odd."""
    for i in range(n):
        picture(root / "cat" / f"{i}.png", 2 * i)
        picture(root / "dog" / f"{i}.png", 2 * i + 1)
    return root


def arguments(dataset, *more: str, module=ddpm, out=None):
    out = ["--out-dir", str(out)] if out else []
    return module.parse_args(["--device", "cpu", "--dataset", str(dataset), *out, *TINY, *more])


def load(dataset, capsys, *more: str) -> tuple[list[int], list[int], list[str], str]:
    """Shades to learn from and to test, sorted, classes, and what was said."""
    train, test, classes = common.load_images(arguments(dataset, *more))
    shades = [((x[:, 0, 14, 14] + 1) * 127.5).round().int() for x, _ in (train, test)]
    for part, (_, labels) in zip(shades, (train, test)):
        if classes == ["cat", "dog"]:
            assert (part % 2 == labels).all()
    return *(sorted(part.tolist()) for part in shades), classes, capsys.readouterr().out.strip()


def test_what_was_read_is_said_in_one_line(tmp_path, capsys):
    train, test, classes, said = load(pets(tmp_path / "pets"), capsys)
    assert classes == ["cat", "dog"] and sorted(train + test) == [*range(80)]
    cats = sum(shade % 2 == 0 for shade in train)
    assert said == (f"{tmp_path}/pets: {len(train)} images to learn from, {len(test)} to test; "
                    f"classes, and how many to learn from: 0 cat ({cats}), 1 dog "
                    f"({len(train) - cats})")


def test_a_zip_from_a_mac_with_hidden_files_and_other_things(tmp_path, capsys):
    root = pets(tmp_path / "pets")
    for name in ("._0.png", ".DS_Store", "cat/._1.png", ".thumbnails/a.png", "__MACOSX/cat/x.png",
                 "cat/.ipynb_checkpoints/0.png", "notes.txt", "dog/Thumbs.db"):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_bytes(b"no picture")
    picture(root / "left_over.png")
    (root / "cat" / "album.png").mkdir()
    train, test, classes, said = load(root, capsys)
    assert classes == ["cat", "dog"] and sorted(train + test) == [*range(80)]
    assert "6 hidden (" in said and "2 of other kinds (notes.txt, ...)" in said
    assert "1 beside the folders that count (left_over.png)" in said


@pytest.mark.parametrize("kind", ["png", "PNG", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif"])
def test_what_pil_reads_is_read(kind, tmp_path, capsys):
    for i in range(70):
        picture(tmp_path / "all" / f"{i}.{kind}", 3 * i)
    train, test, classes, said = load(tmp_path / "all", capsys)
    shades = sorted(train + test)
    assert classes == ["all"] and "left out" not in said
    assert max(abs(shade - 3 * i) for i, shade in enumerate(shades)) <= 2  # some are compressed


def test_of_a_gif_the_first_frame_counts(tmp_path, capsys):
    frames = [Image.new("L", (28, 28), shade) for shade in (50, 250)]
    for i in range(70):
        path = tmp_path / "films" / f"{i}.gif"
        path.parent.mkdir(exist_ok=True)
        frames[0].save(path, save_all=True, append_images=frames[1:])
    train, test, *_ = load(tmp_path / "films", capsys)
    assert {*train, *test} == {50}


def test_links_are_followed_once(tmp_path, capsys):
    """Also those that lead in a circle."""
    pets(tmp_path / "elsewhere")
    root = tmp_path / "pets"
    root.mkdir()
    for name in ("cat", "dog"):
        (root / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere" / "cat" / "up").symlink_to(root)
    (root / "dog" / "broken.png").symlink_to(tmp_path / "nowhere")
    train, test, classes, said = load(root, capsys)
    assert classes == ["cat", "dog"] and sorted(train + test) == [*range(80)]
    assert "1 with results, or seen before" in said
    assert "1 of other kinds (dog/broken.png)" in said


def test_a_folder_that_cannot_be_opened_is_said(tmp_path, capsys, monkeypatch):
    root, scandir = pets(tmp_path / "pets"), os.scandir

    def closed(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    picture(root / "secret" / "0.png")
    *_, classes, said = load(root, capsys)
    assert classes == ["cat", "dog"]
    assert f"1 not to be opened ({root}/secret)" in said


@pytest.mark.parametrize("content", ["empty", "text", "half", "32 bits"])
def test_a_broken_picture_is_left_out_before_the_training_and_said(content, tmp_path, capsys):
    root = pets(tmp_path / "pets")
    path = root / "cat" / "5.png"
    Image.effect_noise((28, 28), 50).save(path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"hello", "half": whole[:300], "32 bits": b""}[content])
    if content == "32 bits":
        path.unlink()
        picture(root / "cat" / "5.tif", 7, "F")
    train, test, _, said = load(root, capsys)
    assert sorted(train + test) == [i for i in range(80) if i != 10]
    assert re.search(r"; left out: 1 broken \(cat/5\.(png|tif): .+\)$", said)


def test_a_class_is_a_folder_whatever_lies_below(tmp_path, capsys):
    for i in range(80):
        kind = tmp_path / "animals" / ("dog" if i % 2 else "cat")
        picture(kind / "ab"[i // 2 % 2] / f"{i}.png", i)
    train, test, classes, _ = load(tmp_path / "animals", capsys)
    assert classes == ["cat", "dog"] and sorted(train + test) == [*range(80)]


@pytest.mark.parametrize(("first", "second", "third"), [
    ("train", "test", "val"), ("Train", "val", "extra"), ("training", "testing", "notes")])
def test_train_beside_test_is_the_split(first, second, third, tmp_path, capsys):
    for i in range(80):
        part, pet = first if i < 60 else second, "dog" if i % 2 else "cat"
        picture(tmp_path / "pets" / part / pet / f"{i}.png", i)
    picture(tmp_path / "pets" / third / "cat" / "0.png")
    train, test, classes, said = load(tmp_path / "pets", capsys)
    assert classes == ["cat", "dog"] and train == [*range(60)] and test == [*range(60, 80)]
    assert f"1 beside the folders that count ({third}/cat/0.png)" in said


def test_a_split_without_tests_ends_in_one_line(tmp_path):
    """As some downloads have it: classes in train/, and loose files in test/."""
    pets(tmp_path / "pets" / "train")
    picture(tmp_path / "pets" / "test" / "1.png")
    message = one_line(common.load_images, arguments(tmp_path / "pets"))
    assert "80 pictures, 0 of them for tests" in message and "and 2 for tests" in message
    assert "1 beside the folders that count (test/1.png)" in message


def test_a_split_without_classes_and_a_class_that_is_called_train(tmp_path, capsys):
    for i in range(80):
        picture(tmp_path / "flat" / ("train" if i < 60 else "test") / f"{i}.png", i)
        picture(tmp_path / "toys" / ("train" if i < 40 else "plane") / f"{i}.png", i)
    train, test, classes, _ = load(tmp_path / "flat", capsys)
    assert classes == ["flat"] and train == [*range(60)] and test == [*range(60, 80)]
    train, test, classes, _ = load(tmp_path / "toys", capsys)
    assert classes == ["plane", "train"] and sorted(train + test) == [*range(80)] and test


def test_classes_that_are_numbers_are_in_their_order(tmp_path, capsys, monkeypatch):
    for i in range(120):
        picture(tmp_path / "numbers" / str(i % 12) / f"{i}.png", i)
        picture(tmp_path / "mixed" / ("x" if i % 3 else str(i % 12)) / f"{i}.png", i)
    assert load(tmp_path / "numbers", capsys)[2] == [str(i) for i in range(12)]
    assert load(tmp_path / "mixed", capsys)[2] == ["0", "3", "6", "9", "x"]
    parser = argparse.ArgumentParser()
    for text, names, numbers in (("23", ["2", "3", "10"], [0, 1]), ("10", ["2", "3", "10"], [2]),
                                 ("a,b", ["a", "a,b"], [1]), ("1,a", ["a", "b"], [1, 0]),
                                 ("12,", [*"abcdefghijklm"], [12])):
        monkeypatch.setattr(common, "load_checkpoint", lambda args, names=names: {"classes": names})
        assert common.asked_classes(parser, argparse.Namespace(digits=text)) == numbers


def test_one_file_more_or_less_moves_no_other(tmp_path, capsys):
    """Between training and test, nor to another place among the first N."""
    root = pets(tmp_path / "pets", 100)
    train, test, *_ = load(root, capsys)
    (root / "cat" / "3.png").unlink()
    picture(root / "dog" / "a_new_one.png", 211)
    now, now_test, *_ = load(root, capsys)
    assert {*train} ^ {*now} | {*test} ^ {*now_test} == {6, 211}
    assert 15 < len(test) < 45  # a seventh of 200 is 29
    (tmp_path / "pets").rename(tmp_path / "moved")
    assert load(tmp_path / "moved", capsys)[:2] == (now, now_test)


# ------------------------------------------------------------------------------ what is kept


def test_a_class_is_a_name_also_on_resume(tmp_path):
    root = pets(tmp_path / "pets")
    cfg.train(arguments(root, module=cfg, out=tmp_path / "out"))
    before = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    (root / "cat").rename(root / "hen")
    for change in ("renamed", "one more"):
        args = arguments(root, "--resume", "--epochs", "2", module=cfg, out=tmp_path / "out")
        message = one_line(cfg.train, args)
        assert "new are ['hen']" in message
        assert ("gone ['cat']" if change == "renamed" else "gone []") in message
        assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == before
        for i in range(40):
            picture(root / "cat" / f"{i}.png", 2 * i)


def test_our_results_are_not_data(tmp_path, monkeypatch, capsys):
    root = pets(tmp_path / "pets")
    monkeypatch.chdir(root)
    ddpm.train(arguments("."))
    out = arguments(".").out_dir
    picture(out / "samples.png")
    assert out.parts[0] == "runs" and (out / "checkpoint.pt").exists()
    capsys.readouterr()
    for module in (ddpm, cfg):  # each has a folder of its own for its results
        train, test, classes = common.load_images(arguments(".", module=module))
        assert classes == ["cat", "dog"] and len(train[0]) + len(test[0]) == 80
        assert "with results, or seen before (" in capsys.readouterr().out
    args = arguments(".", out=root)  # the results beside the pictures: they could not be told apart
    message = one_line(ddpm.train, args)
    assert f"{root}: 0 pictures, " in message and "1 with results, or seen before (.)" in message


def test_results_are_kept_apart_by_the_folder_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/pics", "b/pics", "mnist"):
        pets(tmp_path / name)
    one, two, mine = (arguments(name).out_dir for name in ("a/pics", "b/pics", "./mnist"))
    assert len({one, two, mine, arguments("mnist").out_dir}) == 4
    assert one == arguments(tmp_path / "a" / "pics").out_dir == arguments("b/../a/pics/").out_dir
    ddpm.train(arguments("a/pics"))
    ddpm.train(arguments(tmp_path / "a" / "pics", "--resume", "--epochs", "2"))  # spelled anew
    before = (one / "checkpoint.pt").read_bytes()
    message = one_line(ddpm.train, arguments("b/pics", out=one))
    assert f"{one}/checkpoint.pt is of {tmp_path}/a/pics: choose another --out-dir" in message
    assert "it is one of 01_ddpm_ddim.py" in one_line(
        cfg.train, arguments("a/pics", module=cfg, out=one))
    assert (one / "checkpoint.pt").read_bytes() == before
    ddpm.train(arguments("a/pics"))  # the same anew is what was asked for
    assert (one / "checkpoint.pt").read_bytes() != before


def test_resume_of_what_is_done_says_so(tmp_path, capsys):
    root = pets(tmp_path / "pets")
    ddpm.train(arguments(root, "--epochs", "2", out=tmp_path / "out"))
    capsys.readouterr()
    before = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    ddpm.train(arguments(root, "--resume", "--epochs", "1", out=tmp_path / "out"))
    assert "diffusion: nothing to train, 2 epochs of 1 are done" in capsys.readouterr().out
    assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == before


# ----------------------------------------------------------------------------- 05, and pictures


@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "16 bits, high byte first",
                                  "ink on nothing", "colour", "webp"])
def test_05_reads_folders_by_the_rules_of_training(kind, tmp_path):
    digits, _ = common.synthetic_digits(80, seed=3)
    pixels = common.to_uint8(digits)[:, 0]
    (tmp_path / "digits").mkdir()
    for i, one in enumerate(pixels):
        image = Image.fromarray(one.numpy())
        if kind.startswith("16 bits"):
            image = Image.fromarray((one.int() * 257).to(torch.uint16).numpy())
        if kind.endswith("high byte first"):  # as many scanners write TIFF
            image = Image.frombytes("I;16B", (28, 28), (one.int() * 257).numpy().astype(">u2"))
        if kind == "ink on nothing":  # black, as opaque as the digit is black
            black = Image.new("L", (28, 28))
            image = Image.merge("LA", [black, Image.eval(image, lambda x: 255 - x)])
        if kind == "colour":
            image = image.convert("RGB")
        ending = {"webp": "webp", "16 bits, high byte first": "tif"}.get(kind, "PNG")
        image.save(tmp_path / "digits" / f"{i:02}.{ending}", lossless=True)
    scored = compare.load_set(tmp_path / "digits", 1000)["images"]
    order = lambda images: sorted(images.flatten(1).tolist())  # 05 mixes them
    assert order(scored) == order(pixels)
    train, test, _ = common.load_images(arguments(tmp_path / "digits"))
    assert order(common.to_uint8(torch.cat([train[0], test[0]]))) == order(pixels)


def test_05_refuses_sets_whose_classes_have_other_names(tmp_path, monkeypatch):
    root = pets(tmp_path / "pets")
    args = ["--device", "cpu", "--dataset", str(root), "--out-dir", str(tmp_path / "05")]
    training = compare.parse_args([*args, "--train-judge", "--epochs", "1", "--batch-size", "8"])
    networks = compare.train(training)
    (tmp_path / "runs").mkdir()
    images = torch.zeros(6, 1, 28, 28, dtype=torch.uint8)
    made = {"images": images, "labels": torch.tensor([0, 1] * 3), "args": {"dataset": str(root)}}
    torch.save(made | {"names": ["cat", "hen"]}, tmp_path / "old.pt")
    scoring = compare.parse_args([*args, str(tmp_path / "old.pt")])
    judged = compare.make_figures, scoring, networks["judge"]
    assert "of other images or classes than" in one_line(*judged)
    (root / "cat").rename(root / "ape")
    assert "gone ['cat']" in one_line(*judged)


@pytest.mark.parametrize("name", ["$a$", "$", "_b", "a_b^c", "\\alpha", "%"])
def test_names_reach_pictures_as_they_are(name, tmp_path, monkeypatch):
    """What matplotlib would take for mathematics, or would leave out of a legend."""
    shown = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, *rest, **named: (
        shown.extend(x.get_text() for x in self.findobj(Text) if not x.get_parse_math())))
    common.save_plot(tmp_path / "a.png", {name: [(0, 1)], "x": [(1, 9)]}, yscale="log")
    assert shown == [name, "x"]  # nothing else, for numbers on a log axis are mathematics
    shown.clear()
    images = torch.zeros(2, 1, 28, 28)
    common.save_grid(images, tmp_path / "a.png", f"T {name}", 2, [name], [name, ""])
    assert {name, f"T {name}"} <= {*shown}


def test_03_draws_62_classes_and_says_which(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(common, "draw_and_time", lambda args, samplers, noise, title, below: (
        titles.append((title, below))))
    monkeypatch.setattr(cfg, "draw_path", lambda *rest: None)
    names = [f"name {i}" for i in range(62)]
    monkeypatch.setattr(common, "load_checkpoint", lambda args: {"classes": names})
    cfg.make_figures(cfg.parse_args(["--device", "cpu"]), lambda x, t, labels: x)
    (title, below), = titles
    assert "the first 10 of 62 classes" in title and below == names[:10]


# ------------------------------------------------------------------- around a run: environments


def test_a_notebook_and_a_console_without_accents(tmp_path):
    """MPLBACKEND as Jupyter sets it, where its package is not installed: matplotlib would end."""
    code = f"""
import common
from pathlib import Path
def main(argv):
    common.say("café ≤")
    common.save(Path("{tmp_path}/a.md"), "café ≤")
common.run(main)"""
    settings = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline",
                "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (tmp_path / "code.py").write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, tmp_path / "code.py"], text=True, check=False,
                          env=os.environ | settings | {"PYTHONPATH": str(ROOT)},
                          capture_output=True)
    assert (done.stdout, done.stderr, done.returncode) == ("caf? ?\n", "", 0)
    assert (tmp_path / "a.md").read_bytes() == "café ≤".encode()


def test_an_import_leaves_the_backend_of_matplotlib(tmp_path):
    """That of a notebook, whose pictures would not appear otherwise; here svg."""
    code = "import common, matplotlib.pyplot as plt; print(plt.get_backend())"
    shown = subprocess.run([sys.executable, "-c", code], text=True, check=True, cwd=ROOT,
                           env=os.environ | {"MPLBACKEND": "svg"}, capture_output=True).stdout
    assert shown == "svg\n"


def test_python_O_changes_nothing():
    for path in [*ROOT.glob("0*.py"), ROOT / "common.py"]:
        nodes = {type(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))}
        assert not {ast.Assert} & nodes and "__debug__" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("output", ["pipe", "full", "none"])
def test_a_closed_or_full_output_costs_no_results(output, monkeypatch):
    if output == "pipe":
        read, write = os.pipe()
        os.close(read)  # as of `| head` that has seen enough
        stream = os.fdopen(write, "w")
    else:
        full = os.open("/dev/full", os.O_WRONLY)
        stream = os.fdopen(full, "w") if output == "full" else None
    monkeypatch.setattr(sys, "stdout", stream)
    for _ in range(3):
        common.say("x" * 100_000)
    if stream:
        stream.close()  # as at the end: what is left in its buffer goes nowhere


def test_out_of_memory_is_one_line_and_a_bug_is_a_traceback():
    def too_much(argv):
        torch.empty(10**15)

    assert "out of memory: lower --batch-size" in one_line(common.run, too_much)
    with pytest.raises(RuntimeError, match="shape"):
        common.run(lambda argv: torch.zeros(3).view(2))
    with pytest.raises(RuntimeError):
        common.run(lambda argv: torch.zeros(3) @ torch.zeros(4))


def test_4000_digits_are_drawn_in_parts(tmp_path, monkeypatch, capsys):
    sizes, grids = [], []
    monkeypatch.setattr(cfg, "ddim_sample", lambda model, schedule, x, steps: (
        sizes.append(len(x)) or x))
    monkeypatch.setattr(common, "save_grid", lambda images, path, title, columns: (
        grids.append((len(images), path.name, title))))
    cfg.main(["--device", "cpu", "--out-dir", str(tmp_path), "--digits", "7" * 4000])
    assert sizes == [100] * 40 and grids[0][0] == 4000
    assert grids[0][1] == f"digits_{'7' * 20}.png" and grids[0][2].endswith("7 ...")
    last = usage_error(cfg, ["--digits", "7" * 20_001], capsys)
    assert "20001 of them; a picture holds 20,000" in last


def test_the_batch_norms_of_02_want_two_images(capsys):
    assert "--batch-size must be at least 2" in usage_error(latent, ["--batch-size", "1"], capsys)


# ---------------------------------------------------------------------------------- archives


def idx(path, *sizes: int, numbers: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, len(sizes)]) + b"".join(n.to_bytes(4, "big") for n in sizes)
    count = torch.tensor(sizes).prod().item() if numbers is None else numbers
    path.write_bytes(head + bytes(count))


def raw_mnist(folder, images: int = 30, labels: int = 30):
    raw = folder / "MNIST" / "raw"
    for kind in ("train", "t10k"):
        idx(raw / f"{kind}-images-idx3-ubyte", images, 28, 28)
        idx(raw / f"{kind}-labels-idx1-ubyte", labels)
    return raw


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("kept", [0, 3, 10, 20])
def test_a_broken_archive_is_named(name, kept, tmp_path):
    raw = raw_mnist(tmp_path)
    (raw / name).write_bytes((raw / name).read_bytes()[:kept])
    message = one_line(common.load_images, arguments("mnist", "--data-dir", str(tmp_path)))
    assert message == f"{raw / name} is broken: delete it"


def test_images_without_labels_are_said(tmp_path):
    raw_mnist(tmp_path, 60, 40)
    message = one_line(common.load_images, arguments("mnist", "--data-dir", str(tmp_path)))
    assert "60 images with 40 labels" in message


class Archive(FakeData):
    """Stands for MNIST: its download takes a while, and leaves half a file meanwhile."""
    meet = threading.Barrier(2)
    classes = tuple("0123456789")

    def __init__(self, root, train=True, download=False):
        folder = common.Path(root) / "Archive"
        if not folder.exists():
            folder.mkdir(parents=True)
            (folder / "data").write_text("half")
            self.meet.wait(10)
            (folder / "data").write_text("whole")
        assert (folder / "data").read_text() == "whole"
        self.data, self.targets = torch.zeros(30, 28, 28).byte(), torch.arange(30) % 10


def test_two_first_runs_at_once_do_not_break_one_anothers_download(tmp_path, monkeypatch):
    monkeypatch.setitem(common.DATASETS, "mnist", Archive)
    ends = []

    def load():
        ends.append(len(common.load_images(arguments("mnist", "--data-dir", str(tmp_path)))[0][0]))

    runs = [threading.Thread(target=load) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert ends == [30, 30] and os.listdir(tmp_path) == ["Archive"]


@pytest.mark.parametrize("module", [flow, compare])
def test_70_pictures_are_enough_for_the_defaults(module, tmp_path, capsys):
    """Of the batch; the rest is made small for a test."""
    for i in range(70):
        picture(tmp_path / "few" / "ab"[i % 2] / f"{i}.png", i)
    more = ["--train-judge"] if module is compare else [
        "--width", "8", "--pairs", "128", "--pair-steps", "1", "--reflow-epochs", "1"]
    args = module.parse_args(["--device", "cpu", "--dataset", str(tmp_path / "few"), "--epochs",
                              "1", "--out-dir", str(tmp_path / "out"), *more])
    assert module.train(args)
    assert "--batch-size 128 is too large: a batch has all " in capsys.readouterr().out
