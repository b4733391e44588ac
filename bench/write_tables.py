"""Writes the tables of RESULTS.md from those of 05.

    python bench/write_tables.py runs/results/results.md RESULTS.md

The table of 01 is the first one below the heading "## 01: ...". Of each sampler it has the largest
set, that of the claims their verdicts on the largest sets. A table without sets stays as it is.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

METHODS = {  # of a section, and what they are called there
    "01:": {"diffusion": ""}, "02:": {"VAE prior": "noise", "latent diffusion": ""},
    "03:": {"guided diffusion": ""}, "04:": {"rectified flow": "flow", "reflow": "reflow"},
    "04b:": {"latent flow": "flow", "latent reflow": "reflow"}, "06:": {"MeanFlow": ""},
    "07:": {"drifting": ""},
}
SHARES = ["precision", "recall", "density", "coverage", "accuracy"]
COLUMNS = ["network calls", "N", "above the floor", *SHARES, "seconds for 16", "images/s"]


def read(text: str) -> list[dict]:
    """The rows of all tables of 05, each with its N."""
    rows, n, head = [], "", []
    for line in text.splitlines():
        if line.startswith("Sets of N = "):
            n = line.removeprefix("Sets of N = ").split(" ")[0]
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line[:1] == "|" else []
        if head and cells and not cells[0].startswith("--"):
            rows.append(dict(zip(head, cells)) | {"N": n})
        head = (head or cells) if cells else []
    return rows


def size(row: dict) -> int:
    return int(row["N"].replace(",", ""))


def largest(rows: list[dict], keys: list[str]) -> list[dict]:
    """Of rows that agree in `keys` the one with the largest N, in the order of the first."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row.get(key) for key in keys)].append(row)
    return [max(group, key=size) for group in groups.values()]


def table(head: list[str], lines: list[list[str]], words: int = 1) -> str:
    """Markdown; the first `words` columns are text, the others numbers."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, rule, *lines])


def number(text: str | None) -> float:
    return float(text.replace(",", "")) if text else 0


def sampler(row: dict, method: str) -> str:
    """Its name, as "DDIM-100, s = 1.25" or "flow, Euler, 1 step"."""
    steps = f"{row['steps']} step{'s' * (row['steps'] != '1')}"
    words = [method, row["sampler"], steps]
    if row["sampler"] in ("DDIM", "DDPM"):
        words = [method, f"{row['sampler']}-{row['steps']}"]
    if row["sampler"] == "decoder":
        words = [method, "decoded"]
    words += [f"s = {row['guidance']}"] if row.get("guidance") else []
    return ", ".join(word for word in words if word)


def scores(rows: list[dict], methods: dict[str, str]) -> str:
    """The table of a script; its last lines are those of training digits."""
    mine = [row for row in rows if row.get("method") in methods]
    if not mine:
        return ""
    chosen = largest(mine, ["method", "sampler", "steps", "guidance"])
    chosen.sort(key=lambda row: ([*methods].index(row["method"]), row["sampler"] == "AB2",
                                 row["sampler"], number(row.get("guidance")), number(row["steps"])))
    columns, lines = [key for key in COLUMNS if any(row.get(key) for row in chosen)], []
    for row in chosen:
        cells = dict(row)
        if row.get("above the floor"):  # else there are too few training images
            above, error = number(row["above the floor"]), number(row["standard error"])
            digits = 3 if above < 1 else 2 if above < 10 else 1  # three that count
            cells["above the floor"] = f"{above:.{digits}f} ± {error:.{digits}f}"
        if number(row.get("images/s")) >= 1000:
            cells["images/s"] = f"{number(row['images/s']):,.0f}"
        lines.append([sampler(row, methods[row["method"]]), *(cells.get(x, "") for x in columns)])
    even = {bool(row.get("accuracy")) for row in chosen}  # then sets have as many of each class
    kinds = {"training images": "training digits"} if False in even else {}
    if True in even:
        kinds["training images, classes alike"] = "training digits, as many of each class"
    for row in largest([row for row in rows if row.get("method") in kinds], ["method"]):
        cells = {"N": row["N"], "above the floor": f"0 ± {number(row.get('standard error')):.3f}"}
        cells |= {key: row.get(key, "") for key in SHARES}
        floor = f"*{kinds[row['method']]}: FD {number(row['Fréchet distance']):.3f}, the floor*"
        lines.append([floor, *(cells.get(key, "") for key in columns)])
    return table(["sampler", *columns], lines)


def claims(rows: list[dict]) -> str:
    """Each claim by the largest sets for which it has a verdict; else by any."""
    judged = sorted((row for row in rows if "verdict" in row),
                    key=lambda row: ("not measured" not in row["verdict"], size(row)))
    found, keys = {}, ("claim", "verdict", "figures", "N")
    for row in judged:  # of several, the last
        timed = re.fullmatch("[^;]* as fast", row["figures"])  # such a verdict is of no set
        found[row["claim"]] = row | ({"N": ""} if timed else {})
    lines = [[row[key] for key in keys] for _, row in sorted(found.items())]
    return table([*keys], lines, words=3) if lines else ""


def put(text: str, section: str, made: str) -> str:
    """`text` with `made` in place of the first table of a section."""
    head = re.search(rf"^## {section}.*\n", text, re.MULTILINE)
    old = head and re.compile(r"(?:^\|.*\n)+", re.MULTILINE).search(text, head.end())
    if not old or "\n## " in text[head.end() : old.start()]:
        sys.exit(f"there is no table below ## {section}")
    return text[: old.start()] + made + text[old.end() :]


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    rows, text = read(source.read_text(encoding="utf-8")), target.read_text(encoding="utf-8")
    tables = {"The claims": claims(rows)} | {k: scores(rows, names) for k, names in METHODS.items()}
    for section, made in tables.items():
        text = put(text, section, made) if made else text
        print(f"{section} {'written' if made else 'no sets, so the table stays'}")
    target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
