"""Figures from the results.csv files of runs.

Run:   python benchmark/plot.py curves "NE-TD3=runs/a,runs/b" "TD3=runs/c" --out curves.png --title HalfCheetah-v5
       python benchmark/plot.py continual "NE-TD3=runs/a,runs/b" "TD3=runs/c" --out continual.png
       python benchmark/plot.py figure6    from the runs of benchmark/run.py; likewise the other figures of matrix.py
"""

import csv
import functools
import glob
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import matplotlib
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
RATIO = PANELS[1]


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


def read_rows(file: Path, columns: list[str]) -> list[dict[str, str]]:
    """Raises: SystemExit(2) for a file without rows or without a column."""
    try:
        with open(file, newline="") as f:
            rows = list(csv.DictReader(f))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        die(f"cannot read {file}: {e}")
    if not rows:
        die(f"{file} has no rows")
    if missing := [c for c in columns if c not in rows[0]]:
        die(f"{file} has no column {', '.join(missing)}")
    return rows


def to_numbers(file: Path, rows: list[dict[str, str]], columns: list[str]) -> Seed:
    """Raises: SystemExit(2) for what is not made of numbers with growing steps."""
    try:
        seed = {c: np.array([float(row[c]) for row in rows]) for c in columns}
    except (TypeError, ValueError) as e:
        die(f"{file} holds something that is not a number: {e}")
    if (np.diff(seed["step"]) <= 0).any():
        die(f"the steps of {file} do not increase from row to row")
    return seed


def read_results(file: Path, columns: list[str]) -> Seed:
    """One run on a single task. Raises: SystemExit(2)."""
    return to_numbers(file, read_rows(file, columns), columns)


def read_runs(runs: list[str], columns: list[str], read=read_results) -> dict[str, list]:
    """LABEL=PATH[,PATH...] of the command line -> {label: seeds}. A label given twice collects the seeds of both."""
    seeds: dict[str, list] = {}
    for run in runs:
        label, _, paths = (part.strip() for part in run.partition("="))
        if not label or not all(paths.split(",")):
            die(f"runs are given as LABEL=PATH[,PATH...], got {run}")
        files = [file for path in paths.split(",") for file in find_results(path)]
        seeds.setdefault(label, []).extend(read(file, ["step", *columns]) for file in files)
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


def check(labels: dict[str, list], out: Path) -> None:
    if not 1 <= len(labels) <= len(COLOURS):
        die(f"one to {len(COLOURS)} labels can be drawn, got {len(labels)}")
    if out.suffix != ".png":
        die(f"--out must end in .png, got {out}")


def draw_panel(ax, labels: dict[str, list[Seed]], name: str, columns: list[str]) -> None:
    """One panel: the columns of every label, the first solid and the second dashed."""
    for (label, seeds), colour in zip(labels.items(), COLOURS, strict=False):
        if not len(on_common_steps(seeds, columns[0])[0]):
            die(f"the seeds of {label} have no step in common")
        for column, style in zip(columns, STYLES, strict=False):
            draw(ax, seeds, column, colour, style)
    ax.set_ylabel(name)
    dress(ax, columns)


def dress(ax, columns: list[str]) -> None:
    """What all panels look like."""
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.set_major_formatter(step_label)
    if columns[0].startswith("ne/"):
        bottom = min(ax.get_ylim()[0], 0.95)
        ax.set_ylim(bottom, 1 + 0.04 * (1 - bottom))  # shares end at 1, and so do the ticks


def finish(figure: Figure, axes, labels: dict[str, list], title: str, out: Path, svg: bool) -> None:
    """What all panels have in common, then the files. Raises: SystemExit(2) where they cannot be written."""
    axes[-1].set_xlabel("environment steps")
    figure.align_ylabels(axes)
    handles = [Line2D([], [], color=c, linewidth=2, label=n) for n, c in zip(labels, COLOURS, strict=False)]
    for name, style in zip(("critics", "actor"), STYLES, strict=True):
        handles.append(Line2D([], [], color="grey", linewidth=2, linestyle=style, label=name))
    figure.suptitle(title)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)
    write(dict.fromkeys([out, out.with_suffix(".svg")] if svg else [out], functools.partial(save, figure)))


def save(figure: Figure, file: Path) -> None:
    """The same figure gives the same file, byte for byte."""
    with matplotlib.rc_context({"svg.hashsalt": "same"}):
        figure.savefig(file, dpi=150, metadata={"Date": None})


def write(files: dict[Path, Callable]) -> None:
    """Files by what writes them. Raises: SystemExit(2) where they cannot be written."""
    for file, save in files.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save(file)
        except OSError as e:
            die(f"cannot write {file}: {e}")
        print(f"wrote {file}")


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
    check(labels, out)

    shown = panels(split)
    figure = Figure(figsize=(7, 2.4 * len(shown) + 0.8), layout="constrained")
    axes = figure.subplots(len(shown), sharex=True)
    for ax, (name, columns) in zip(axes, shown, strict=True):
        draw_panel(ax, labels, name, columns)
    finish(figure, axes, labels, title, out, svg)


class Continual(NamedTuple):
    """One run over a sequence of tasks. The rows of one evaluation differ in the task evaluated and its return only."""

    tasks: dict[str, Seed]  # {task evaluated: its rows}
    stretches: list[tuple[float, float, str]]  # first step, last step and task of each uninterrupted training


def read_continual(file: Path, columns: list[str]) -> Continual:
    """Raises: SystemExit(2) as for the results of a single task, and where evaluations are not of the same tasks."""
    rows = read_rows(file, [*columns, "cycle", "task_trained", "task_evaluated"])
    names = list(dict.fromkeys(row["task_evaluated"] for row in rows))
    tasks = {name: [row for row in rows if row["task_evaluated"] == name] for name in names}
    if len({tuple(row["step"] for row in own) for own in tasks.values()}) > 1:
        die(f"{file} does not evaluate the same tasks at each step")
    seeds = {name: to_numbers(file, own, columns) for name, own in tasks.items()}
    ends = {(row["cycle"], row["task_trained"]): float(row["step"]) for row in rows}
    starts = [seeds[names[0]]["step"][0], *ends.values()]
    stretches = [(start, end, task) for start, ((_, task), end) in zip(starts, ends.items(), strict=False)]
    return Continual(seeds, stretches)


def draw_stretches(ax, stretches: list[tuple[float, float, str]], evaluated: str, named: bool) -> None:
    """Boundaries between tasks; shaded where the evaluated task is trained; with names above the panel if `named`."""
    for start, end, task in stretches:
        ax.axvline(end, color="grey", linewidth=0.8, linestyle=":")
        if task == evaluated:
            ax.axvspan(start, end, color="black", alpha=0.08, linewidth=0)
        if named:
            style = {"rotation": 30, "fontsize": 8, "ha": "left", "va": "bottom", "transform": ax.get_xaxis_transform()}
            ax.text((start + end) / 2, 1.02, task, **style)


def continual(
    runs: Positional[tuple[str, ...]], /, out: Path = Path("continual.png"), title: str = "", svg: bool = False
):
    """Evaluation return on every task and active ratio over a sequence of tasks (Figures 8 and 9 of the paper).

    Args:
        runs: LABEL=PATH[,PATH...]; a PATH is a run's folder, a CSV file or a glob; several are seeds of one label
        out: where the PNG goes
        title: title of the figure
        svg: also write an SVG beside the PNG
    """
    labels = read_runs(list(runs), ["eval/return_mean", *RATIO[1]], read_continual)
    check(labels, out)
    every = [run for seeds in labels.values() for run in seeds]
    if len({tuple(run.tasks) for run in every}) > 1:
        die("all runs must have the same tasks, got " + " and ".join({", ".join(run.tasks): None for run in every}))
    longest = max(every, key=lambda run: run.stretches[-1][1])  # draws the boundaries

    tasks = list(longest.tasks)
    figure = Figure(figsize=(9, 2 + 2 * len(tasks) + 2), layout="constrained")
    axes = figure.subplots(len(tasks) + 1, sharex=True)
    for ax, task in zip(axes, tasks, strict=False):
        own = {label: [run.tasks[task] for run in seeds] for label, seeds in labels.items()}
        draw_panel(ax, own, f"{task}\nreturn", ["eval/return_mean"])
        draw_stretches(ax, longest.stretches, task, named=ax is axes[0])
    first = {label: [run.tasks[tasks[0]] for run in seeds] for label, seeds in labels.items()}
    draw_panel(axes[-1], first, *RATIO)
    draw_stretches(axes[-1], longest.stretches, "", named=False)
    finish(figure, axes, labels, title, out, svg)


if __name__ == "__main__":
    import figures  # which draws with what is above

    tyro.extras.subcommand_cli_from_dict({"curves": curves, "continual": continual} | figures.SUBCOMMANDS)
