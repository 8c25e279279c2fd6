"""Figures from the results.csv files of runs.

Run:   python benchmark/plot.py curves "NE-TD3=runs/a,runs/b" "TD3=runs/c" --out curves.png --title HalfCheetah-v5
"""

import csv
import functools
import glob
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tyro.conf import Positional

Seed = dict[str, np.ndarray]  # one run: {column: (rows,)}

# Okabe and Ito's colours for all kinds of colour vision, without yellow, which is faint on white
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00"]

# (label of the y-axis, columns drawn solid and dashed), top to bottom
PANELS = [
    ("evaluation return\n(sum of rewards per episode)", ["eval/return_mean"]),
    ("active ratio, τ = 0.1\n(share of neurons)", ["ne/critic/active_ratio_0.1", "ne/actor/active_ratio_0.1"]),
    ("density\n(share of connections)", ["ne/critic/density", "ne/actor/density"]),
]
STYLES = ["-", (0, (4, 1.5))]


def die(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def find_results(path: str) -> list[Path]:
    """The results files that one PATH stands for: a run's folder, a CSV file or a glob of either."""
    paths = [Path(path)] if Path(path).exists() else [Path(p) for p in sorted(glob.glob(path))]
    files = [p / "results.csv" if p.is_dir() else p for p in paths]
    files = [f for f in files if f.is_file() and (f.suffix == ".csv" or len(files) == 1)]
    if not files:
        die(f"there are no results at {path}: it must be a run's folder, a CSV file or a glob of either")
    return files


def read_results(file: Path, columns: list[str]) -> Seed:
    """Raises: SystemExit(2) for a file without rows, without a column, or not made of numbers with growing steps."""
    try:
        with open(file, newline="") as f:
            rows = list(csv.DictReader(f))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        die(f"cannot read {file}: {e}")
    if not rows:
        die(f"{file} has no rows")
    if missing := [c for c in columns if c not in rows[0]]:
        die(f"{file} has no column {', '.join(missing)}")
    try:
        seed = {c: np.array([float(row[c]) for row in rows]) for c in columns}
    except (TypeError, ValueError) as e:
        die(f"{file} holds something that is not a number: {e}")
    if (np.diff(seed["step"]) <= 0).any():
        die(f"the steps of {file} do not increase from row to row")
    return seed


def read_runs(runs: list[str], columns: list[str]) -> dict[str, list[Seed]]:
    """LABEL=PATH[,PATH...] of the command line -> {label: seeds}. A label given twice collects the seeds of both."""
    seeds: dict[str, list[Seed]] = {}
    for run in runs:
        label, _, paths = (part.strip() for part in run.partition("="))
        if not label or not all(paths.split(",")):
            die(f"runs are given as LABEL=PATH[,PATH...], got {run}")
        files = [file for path in paths.split(",") for file in find_results(path)]
        seeds.setdefault(label, []).extend(read_results(file, ["step", *columns]) for file in files)
    return seeds


def on_common_steps(seeds: list[Seed], column: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps (n,) that all seeds have, and the column there, (seeds, n)."""
    steps = functools.reduce(np.intersect1d, [seed["step"] for seed in seeds])
    return steps, np.stack([seed[column][np.searchsorted(seed["step"], steps)] for seed in seeds])


def step_label(step: float, _: int | None = None) -> str:
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if abs(step) >= unit:
            return f"{step / unit:g}{letter}"
    return f"{step:g}"


def draw(ax, seeds: list[Seed], column: str, colour: str, style) -> None:
    """Mean over seeds, thick; with several seeds also each of them, faint, and their range, shaded."""
    steps, values = on_common_steps(seeds, column)
    if len(seeds) > 1:
        ax.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        for seed in seeds:
            ax.plot(seed["step"], seed[column], color=colour, linestyle=style, linewidth=0.7, alpha=0.35)
    marker = "o" if len(steps) == 1 else None
    ax.plot(steps, values.mean(0), color=colour, linestyle=style, linewidth=2, marker=marker)


def panels(split: bool) -> list[tuple[str, list[str]]]:
    """PANELS, or the same with critics and actor apart in that of the active ratio."""
    if not split:
        return PANELS
    label, columns = PANELS[1]
    apart = [(f"{network}: {label}", [c]) for network, c in zip(("critics", "actor"), columns, strict=True)]
    return [PANELS[0], *apart, PANELS[2]]


def curves(
    runs: Positional[tuple[str, ...]],
    /,
    out: Path = Path("curves.png"),
    title: str = "",
    split: bool = False,
    svg: bool = False,
):
    """Evaluation return, active ratio and density over environment steps.

    Args:
        runs: LABEL=PATH[,PATH...]; a PATH is a run's folder, a CSV file or a glob; several are seeds of one label
        out: where the PNG goes
        title: title of the figure
        split: active ratios of critics and actor in panels of their own, which suits many labels
        svg: also write an SVG beside the PNG
    """
    labels = read_runs(list(runs), [column for _, columns in PANELS for column in columns])
    if not 1 <= len(labels) <= len(COLOURS):
        die(f"one to {len(COLOURS)} labels can be drawn, got {len(labels)}")
    if out.suffix != ".png":
        die(f"--out must end in .png, got {out}")

    shown = panels(split)
    figure = Figure(figsize=(7, 2.4 * len(shown) + 0.8), layout="constrained")
    axes = figure.subplots(len(shown), sharex=True)
    for ax, (name, columns) in zip(axes, shown, strict=True):
        for (label, seeds), colour in zip(labels.items(), COLOURS, strict=False):
            if not len(on_common_steps(seeds, columns[0])[0]):
                die(f"the seeds of {label} have no step in common")
            for column, style in zip(columns, STYLES, strict=False):
                draw(ax, seeds, column, colour, style)
        ax.set_ylabel(name)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        if columns[0].startswith("ne/"):
            bottom = min(ax.get_ylim()[0], 0.95)
            ax.set_ylim(bottom, 1 + 0.04 * (1 - bottom))  # shares end at 1, and so do the ticks
    axes[-1].set_xlabel("environment steps")
    axes[-1].xaxis.set_major_formatter(step_label)
    figure.align_ylabels(axes)

    handles = [Line2D([], [], color=c, linewidth=2, label=n) for n, c in zip(labels, COLOURS, strict=False)]
    for name, style in zip(("critics", "actor"), STYLES, strict=True):
        handles.append(Line2D([], [], color="grey", linewidth=2, linestyle=style, label=name))
    figure.suptitle(title)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)
    for file in [out, out.with_suffix(".svg")] if svg else [out]:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file, dpi=150)
        except OSError as e:
            die(f"cannot write {file}: {e}")
        print(f"wrote {file}")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"curves": curves})
