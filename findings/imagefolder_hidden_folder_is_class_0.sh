#!/usr/bin/env bash
# torchvision 0.29.1: ImageFolder takes a hidden folder as a class, and moves all other labels by one.
#
# File managers and notebooks leave folders such as .thumbnails or .ipynb_checkpoints beside the
# classes, with small copies of pictures in them. One expects that a data set skips what is hidden.
# But any folder with a picture in it is a class, a dot sorts before all letters, and labels are
# positions in that list: after somebody has looked at the pictures, "cat" is class 1 and no longer
# 0, there is one class more, and a network trained before reads every label wrong. Hidden files
# count, too, as the "._" copies that a Mac puts into a zip. No warning.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torchvision==0.29.1 torch==2.14.1 numpy==2.4.6 pillow==13.0.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import pathlib
import sys

import torchvision
from PIL import Image
from torchvision.datasets import ImageFolder


def draw(name):
    path = pathlib.Path(sys.argv[1]) / "pets" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (28, 28)).save(path)


for name in ("cat/1.png", "dog/1.png"):
    draw(name)
before = ImageFolder(f"{sys.argv[1]}/pets")
draw(".thumbnails/1.png")
draw("cat/._1.png")
after = ImageFolder(f"{sys.argv[1]}/pets")
for data in (before, after):
    print(f"torchvision {torchvision.__version__}: {data.class_to_idx}, {len(data)} images")
assert before.class_to_idx == {"cat": 0, "dog": 1}
assert after.class_to_idx == {".thumbnails": 0, "cat": 1, "dog": 2}, "this has changed"
assert len(after) == 4, "this has changed: hidden files are left out"
PYTHON
