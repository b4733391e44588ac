#!/usr/bin/env bash
# matplotlib 3.11.2: savefig(bbox_inches="tight") does not see an image of Figure.figimage.
#
# figimage draws an array pixel by pixel, so it suits grids of small images that must stay sharp.
# Here it fills a figure of 100 x 100 pixels, and a text stands to the left of that. One expects a
# file of text and image side by side, as for an image in an Axes that fills the figure: 164
# columns. But the tight box is that of the text alone: the file has 54 columns, the image lies
# under the text, and the other half of it is gone. No warning. (The Axes with
# interpolation="nearest" is as sharp, pixel by pixel.)
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q matplotlib==3.11.2 numpy==2.4.6 pillow==13.0.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

black = np.zeros((100, 100))
edges = {}
for way in ("figimage", "axes"):
    figure = Figure(figsize=(1, 1), dpi=100)  # exactly 100 x 100 pixels
    figure.text(-0.1, 0.5, "a name", ha="right", va="center", color="red")
    if way == "figimage":
        figure.figimage(black, cmap="gray", vmin=0, vmax=1)
    else:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(black, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_axis_off()
    figure.savefig(f"{sys.argv[1]}/{way}.png", bbox_inches="tight", pad_inches=0)
    pixels = np.asarray(Image.open(f"{sys.argv[1]}/{way}.png").convert("RGB")).astype(int)
    row = pixels[2]  # above the text
    dark = np.flatnonzero(row.sum(1) == 0)
    edges[way] = (pixels.shape[1], int(dark[0]), int(dark[-1]))
    print(f"matplotlib {matplotlib.__version__}, {way}: a file of {pixels.shape[1]} columns, "
          f"the image in columns {dark[0]} to {dark[-1]}")
width, first, last = edges["axes"]
assert width > 150 and (first, last) == (width - 100, width - 1), "beside the text, and whole"
width, first, last = edges["figimage"]
assert width < 100 and (first, last) == (0, width - 1), "matplotlib has changed: this is whole now"
PYTHON
