#!/usr/bin/env bash
# torchvision 0.29.1 with Pillow 13.0.0: ImageFolder reads a grey PNG or TIFF of 16 bits a pixel as
# white. No warning.
#
# Depth maps, X-rays and microscopes come as 16-bit grey images. ImageFolder's loader turns each
# picture into RGB by Image.convert, and one expects that to scale 0 ... 65535 to 0 ... 255. It cuts
# off instead: all that is above 255 becomes 255. Of a ramp over the whole range 1 pixel in 256 stays
# black and the others are white, so a network learns from blank images. (Dividing what
# torchvision's pil_to_tensor gives, a tensor of uint16, by 257 keeps the picture.)
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torchvision==0.29.1 torch==2.14.1 numpy==2.4.6 pillow==13.0.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import pathlib
import sys

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

root = pathlib.Path(sys.argv[1]) / "images"
(root / "ramp").mkdir(parents=True)
ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
Image.fromarray(ramp).save(root / "ramp" / "a.png")
Image.fromarray(ramp).save(root / "ramp" / "b.tif")
for (path, _), (image, _) in zip(ImageFolder(root).samples, ImageFolder(root)):
    read, name = pil_to_tensor(image)[0].flatten(), pathlib.Path(path).name
    whole = (pil_to_tensor(Image.open(path)).float() / 257).round().flatten()
    print(f"torchvision {torchvision.__version__}, Pillow {PIL.__version__}, {name}: "
          f"{(read == 255).sum()} of 256 pixels are white, first {read[:4].tolist()}")
    assert torch.equal(whole, torch.arange(256.0)), "the file itself holds the ramp"
    assert (read == 255).sum() == 255, "this has changed: the picture is scaled now"
PYTHON
