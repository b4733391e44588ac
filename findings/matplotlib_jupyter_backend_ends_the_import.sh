#!/usr/bin/env bash
# matplotlib 3.11.2: with the MPLBACKEND that Jupyter sets, `import matplotlib` itself raises where
# matplotlib-inline is not installed, even if nothing is ever shown on a screen.
#
# A notebook passes its environment to the processes that it starts (`!python train.py`), so they see
# MPLBACKEND=module://matplotlib_inline.backend_inline. One expects that a backend is looked up when
# it is used: of any other module that does not exist it is so, and a Figure that is only saved to a
# file never needs it. But this one name is turned into the short name "inline" first, which is
# known only if the package is there, and the check comes with the import.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q matplotlib==3.11.2 numpy==2.4.6
cat >"$folder/draw.py" <<'PYTHON'
import sys

from matplotlib.figure import Figure

Figure().subplots().figure.savefig(sys.argv[1])
PYTHON
for backend in module://no_such_package.backend module://matplotlib_inline.backend_inline; do
    file="$folder/$(basename "$backend").png" last=drawn
    MPLBACKEND=$backend "$folder/venv/bin/python" "$folder/draw.py" "$file" 2>"$folder/log" ||
        last=$(tail -n 1 "$folder/log" | cut -c 1-100)
    echo "matplotlib 3.11.2, $backend: $last"
done
[ -e "$folder/no_such_package.backend.png" ] || { echo "this has changed: another name ends, too" && exit 1; }
[ ! -e "$folder/matplotlib_inline.backend_inline.png" ] || { echo "this has changed: it draws" && exit 1; }
