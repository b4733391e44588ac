#!/usr/bin/env bash
# matplotlib 3.11.2: with text.parse_math off, a logarithmic axis shows its ticks as raw markup.
#
# Who plots classes that users have named turns text.parse_math off, so that a name like "$5 - $9"
# is drawn as it stands. One expects only such texts to change. But the formatter of logarithmic
# axes writes its numbers in the same markup and does not look at the setting: the ticks read
# $\mathdefault{10^{2}}$, letter by letter, six times as wide. No warning, and linear axes are
# fine. (set_parse_math(False) on the texts with foreign names alone does what was meant.)
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q matplotlib==3.11.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import matplotlib
from matplotlib.figure import Figure


def ticks(scale, **settings):
    """The texts beside the y axis, which of them are taken as they stand, and the widest."""
    with matplotlib.rc_context(settings):
        figure = Figure(dpi=100)
        axes = figure.subplots()
        axes.plot([1, 2, 3], [1, 30, 1000])
        axes.set_yscale(scale)
        figure.canvas.draw()
        texts = [text for text in axes.get_yticklabels() if text.get_text()]
        raw = [text.get_text() for text in texts if not text.get_parse_math()]
        return [x.get_text() for x in texts], raw, max(x.get_window_extent().width for x in texts)


print("matplotlib", matplotlib.__version__)
usual, none, narrow = ticks("log")
texts, raw, wide = ticks("log", **{"text.parse_math": False})
linear, _, _ = ticks("linear", **{"text.parse_math": False})
print("log, as usual:       ", usual[1], f"{narrow:.0f} pixels wide")
print("log, no parse_math:  ", raw[1], f"{wide:.0f} pixels wide, taken as it stands")
print("linear, no parse_math:", linear[1])
assert not none and texts == raw == usual, "matplotlib has changed"
assert all("mathdefault" in text for text in raw) and wide > 4 * narrow, "matplotlib has changed"
assert not any("$" in text for text in linear)
PYTHON
