"""What plot.py, figures.py and topology_picture.py share: reading, drawing, writing files."""

import csv
import functools
import glob
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from estimates import interval, iqm

# a $ in a label or a title is a $, not the start of a formula
matplotlib.rcParams["text.parse_math"] = False

# Okabe and Ito's colours for all kinds of colour vision, without yellow, which is faint on
# white; brown comes last, since grey stands for any method in legends
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00"]
COLOURS += ["#7A4A1E"]
NETWORKS = {"critics": "-", "actor": (0, (4, 1.5))}  # line styles
CROWD = 4  # more methods than that have no bands and thin lines

Seed = dict[str, np.ndarray]  # one run on one task: {column: (rows,)}
Runs = dict[str, dict[str, list[Seed]]]  # {label: {task: runs}}


class Panel(NamedTuple):
    label: str  # of the y-axis
    columns: tuple[str, ...]  # one, or the critics' and the actor's


RETURN = Panel("evaluation return\n(sum of rewards per episode)", ("eval/return_mean",))
RATIO = Panel(
    "active ratio, τ = 0.1\n(share of neurons)",
    ("ne/critic/active_ratio_0.1", "ne/actor/active_ratio_0.1"),
)
DENSITY = Panel("density\n(share of connections)", ("ne/critic/density", "ne/actor/density"))
COLUMNS = [*RETURN.columns, *RATIO.columns, *DENSITY.columns]
SHARES = ("density", "active_ratio_0.1", "review_epsilon")  # how columns up to 1 end


def die(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def apart(panels: list[Panel]) -> list[Panel]:
    """Critics and actor in panels of their own."""
    split = []
    for label, columns in panels:
        for network, column in zip(NETWORKS, columns, strict=True):
            split.append(Panel(f"{network}: {label}", (column,)))
    return split


# --- reading ------------------------------------------------------------------
class Run(NamedTuple):
    """The rows of one evaluation differ in the task evaluated and its return only."""

    tasks: dict[str, Seed]  # {task evaluated: its rows}, {"": rows} where there is one task
    # first step, last step and task of each training; none where there is one task
    stretches: list[tuple[float, float, str]]
    rows: list[dict[str, str]]  # of results.csv
    frames: bool  # whether steps are frames, as args.json beside it says

    @property
    def end(self) -> float:
        return float(self.rows[-1]["step"])


def read_rows(file: Path, columns: list[str]) -> list[dict[str, str]]:
    """Raises: SystemExit(2) for a damaged file and one without rows or without a column."""
    try:
        with open(file, newline="") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        die(f"cannot read {file}: {e}")
    if not rows:
        die(f"{file} has no rows")
    missing = [column for column in columns if column not in rows[0]]
    if missing:
        die(f"{file} has no column {', '.join(missing)}")
    if any(None in row.values() for row in rows):
        die(f"{file} is damaged: a row of it is not complete")
    return rows


def to_numbers(file: Path, rows: list[dict[str, str]], columns: list[str]) -> Seed:
    """Raises: SystemExit(2) for what is not made of numbers with growing steps."""
    seed = {}
    for column in ["step", *columns]:
        try:
            seed[column] = np.array([row[column] for row in rows], dtype=float)
        except (TypeError, ValueError) as e:
            die(f"{file} holds something that is not a number: {e}")
    if (np.diff(seed["step"]) <= 0).any():
        die(f"the steps of {file} do not increase from row to row")
    return seed


def read_run(file: Path, columns: list[str]) -> Run:
    """A results.csv. Raises: SystemExit(2)."""
    rows = read_rows(file, ["step", *columns])
    rows_of: dict[str, list] = {}
    for row in rows:
        rows_of.setdefault(row.get("task_evaluated", ""), []).append(row)
    tasks = {task: to_numbers(file, own, columns) for task, own in rows_of.items()}
    if len(set(map(len, rows_of.values()))) > 1:
        die(f"{file} does not evaluate the same tasks at each step")
    ends = {}
    for row in rows:
        if "task_trained" in row:
            ends[row["cycle"], row["task_trained"]] = float(row["step"])
    stretches = []
    start = float(rows[0]["step"])
    for (_, task), end in ends.items():
        stretches.append((start, end, task))
        start = end
    args = file.parent / "args.json"
    frames = args.is_file() and '"frame_size"' in args.read_text()
    return Run(tasks, stretches, rows, frames)


def find_results(path: str) -> list[Path]:
    """The results files that one PATH stands for: a run's folder, a CSV file or a glob."""
    files = []
    for name in sorted(glob.glob(path)) or [path]:
        file = Path(name)
        if file.is_dir():
            file = file / "results.csv"
        if file.is_file() and file.suffix == ".csv":
            files.append(file)
    if not files:
        die(f"there are no results at {path}: name a run's folder, a CSV file or a glob of either")
    return files


def read_runs(runs: Iterable[str]) -> dict[str, list[Run]]:
    """LABEL=PATH[,PATH...] -> {label: its runs}. A label given twice has the runs of both.

    Raises: SystemExit(2), also where tasks differ.
    """
    labels: dict[str, list[Run]] = {}
    sequences = {}
    for words in runs:
        label, _, paths = words.partition("=")
        if not label or not paths:
            die(f"runs are given as LABEL=PATH[,PATH...], got {words}")
        for path in paths.split(","):
            for file in find_results(path.strip()):
                run = read_run(file, COLUMNS)
                labels.setdefault(label.strip(), []).append(run)
                sequences[", ".join(run.tasks)] = file
    if not 1 <= len(labels) <= len(COLOURS):
        die(f"one to {len(COLOURS)} labels can be drawn, got {len(labels)}")
    if len(sequences) > 1:
        named = [f"{file} has {tasks or 'one'}" for tasks, file in sequences.items()]
        die(f"all runs must have the same tasks: {', '.join(named)}")
    return labels


# --- panels -------------------------------------------------------------------
class Content(NamedTuple):
    """What is drawn over steps."""

    grid: list[list[tuple[str, Panel]]]  # rows of (task, panel)
    runs: Runs
    finished: Runs  # those of them that count for the mean, of a task that has some
    stretches: list[tuple[float, float, str]]  # of a sequence of tasks
    steps: str  # label of the x-axis


def on_common_steps(seeds: list[Seed], column: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps (n,) that all seeds have, and the column there, (seeds, n)."""
    steps = functools.reduce(np.intersect1d, [seed["step"] for seed in seeds])
    if not len(steps):
        die("the seeds of a label have no step in common")
    values = [seed[column][np.isin(seed["step"], steps)] for seed in seeds]
    return steps, np.stack(values)


def draw(ax, runs: list[Seed], averaged: list[Seed], column: str, bands: bool, **look) -> None:
    """Thick: interquartile mean of `averaged`; with `bands` its interval and each run, faint."""
    steps, values = on_common_steps(averaged, column)
    if bands and len(runs) > 1:
        for run in runs:
            ax.plot(run["step"], run[column], **look | {"linewidth": 0.6, "alpha": 0.3})
        ax.fill_between(steps, *interval(values), color=look["color"], alpha=0.15, linewidth=0)
    marker = "o" if len(steps) == 1 else ""  # a single point is visible too
    ax.plot(steps, iqm(values), marker=marker, **look)


def step_label(step: float, _: int | None = None) -> str:
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if abs(step) >= unit:
            return f"{step / unit:g}{letter}"
    return f"{step:g}"


def dress(ax) -> None:
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.set_major_formatter(step_label)


def draw_panel(ax, content: Content, task: str, panel: Panel) -> None:
    count = len(content.runs)
    bands = count <= CROWD and len(panel.columns) == 1
    for place, (label, own) in enumerate(content.runs.items()):
        look = {"color": COLOURS[place], "linewidth": 2.0 if count <= CROWD else 1.3}
        if panel.columns[0].endswith("/density"):
            # methods of equal density: each line shows on both sides of the next one
            look["linewidth"] = 1.3 + (count - 1 - place)
        averaged = content.finished[label][task] or own[task]
        for column, style in zip(panel.columns, NETWORKS.values(), strict=False):
            if averaged:
                draw(ax, own[task], averaged, column, bands, linestyle=style, **look)
    dress(ax)
    if panel.columns[0].endswith(SHARES):
        # shares end at 1, and so do the ticks
        bottom = min(ax.get_ylim()[0], 0.95)
        ax.set_ylim(bottom, 1 + 0.04 * (1 - bottom))


def grid_of(tasks: Iterable[str], more: list[Panel]) -> list[list[tuple[str, Panel]]]:
    """One column: the return on each task, and more, whose columns are the same for all tasks."""
    grid = []
    for task in tasks:
        label = f"{task}\nreturn" if task else RETURN.label
        grid.append([(task, Panel(label, RETURN.columns))])
    first = grid[0][0][0]
    return grid + [[(first, panel)] for panel in more]


def draw_stretches(ax, stretches: list, evaluated: str, named: bool) -> None:
    """Boundaries between tasks, shaded where the evaluated one is trained; names above."""
    for start, end, task in stretches:
        ax.axvline(end, color="grey", linewidth=0.8, linestyle=":")
        if task == evaluated:
            ax.axvspan(start, end, color="black", alpha=0.08, linewidth=0)
        if named:
            style = {"rotation": 30, "fontsize": 8, "ha": "left", "va": "bottom"}
            middle = (start + end) / 2
            ax.text(middle, 1.02, task, transform=ax.get_xaxis_transform(), **style)


def draw_grid(part, places, content: Content, fontsize: int = 10) -> None:
    """Axes of one column share their steps."""
    grid = content.grid
    axes = np.empty((len(grid), len(grid[0])), dtype=object)
    for (i, j), _ in np.ndenumerate(axes):
        task, panel = grid[i][j]
        ax = part.add_subplot(places[i, j], sharex=axes[0, j])
        axes[i, j] = ax
        draw_panel(ax, content, task, panel)
        if content.stretches:
            evaluated = task if panel.columns == RETURN.columns else ""
            draw_stretches(ax, content.stretches, evaluated, named=i == 0)
        elif i == 0:
            ax.set_title(task, fontsize=11)
        if j == 0:
            ax.set_ylabel(panel.label, fontsize=fontsize)
        if i == len(grid) - 1:
            ax.set_xlabel(content.steps)
        ax.tick_params(labelbottom=i == len(grid) - 1)
    part.align_ylabels(axes[:, 0])


# --- pictures -----------------------------------------------------------------
def canvas(width: float, height: float, text: str) -> tuple:
    """A figure (inches) with `text` wrapped below: the figure, and the part to draw in."""
    if not text:
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure
    lines = textwrap.wrap(text, int(width * 15))
    below = 0.17 * len(lines) + 0.1
    figure = Figure(figsize=(width, height + below), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[height, below])
    lower.text(0.01, 0.98, "\n".join(lines), fontsize=8, va="top")
    return figure, upper


def handles_of(content: Content) -> list:
    """Of the legend."""
    handles = []
    for label, colour in zip(content.runs, COLOURS, strict=False):
        handles.append(Line2D([], [], color=colour, linewidth=2, label=label))
    if any(len(panel.columns) > 1 for ((_, panel), *_) in content.grid):
        for name, style in NETWORKS.items():
            line = Line2D([], [], color="grey", linewidth=2, linestyle=style, label=name)
            handles.append(line)
    if content.stretches:
        handles.append(Patch(color="black", alpha=0.08, linewidth=0, label="the task is trained"))
    return handles


def picture(content: Content, title: str, note: str, widths: list[float], height: float, **font):
    """Panels of these inches, the legend and a note below.

    Returns: figure, and a cell as high as the panels for each width that they leave.
    """
    figure, part = canvas(sum(widths), height, note)
    places = part.add_gridspec(len(content.grid), len(widths), width_ratios=widths)
    draw_grid(part, places, content, **font)
    handles = handles_of(content)
    part.suptitle(title)
    ncols = min(len(handles), 3 + len(content.grid[0]))
    part.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False)
    return figure, part, places


# --- files --------------------------------------------------------------------
def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table."""
    rule = ["---" for _ in head]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rows))


def check_picture(out: Path, ending: str = ".png", flag: str = "--out") -> None:
    """Raises: SystemExit(2) for another format."""
    if out.suffix != ending:
        die(f"{flag} must end in {ending}, got {out}")


def save(figure: Figure, file: Path) -> None:
    """The same figure gives the same file, byte for byte."""
    # laid out for good, at round places: the last bits differ from time to time
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for part in figure.subfigs:
        part.bbox_relative.set_points(np.round(part.bbox_relative.get_points(), 6))
    for ax in figure.get_axes():
        ax.set_position(np.round(ax.get_position().bounds, 6))
    with matplotlib.rc_context({"svg.hashsalt": "same"}):
        figure.savefig(file, dpi=150, metadata={"Date": None})


def write(files: dict[Path, Callable]) -> None:
    """Files by what writes them. Raises: SystemExit(2) where they cannot be written."""
    for file, write_file in files.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file)
        except OSError as e:
            die(f"cannot write {file}: {e}")
        print(f"wrote {file}")
