"""What plot.py, figures.py and topology_picture.py share: reading, drawing, writing files."""

import csv
import functools
import glob
import io
import json
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

import matplotlib
import numpy as np
from matplotlib.figure import Figure

# a $ in a label or a title is a $, not the start of a formula
matplotlib.rcParams["text.parse_math"] = False

Seed = dict[str, np.ndarray]  # one run: {column: (rows,)}

# Okabe and Ito's colours for all kinds of colour vision, without yellow, which is faint on
# white; brown comes last, since grey stands for any method in legends
COLOURS = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#000000",
    "#56B4E9",
    "#E69F00",
    "#7A4A1E",
]
STYLES = ["-", (0, (4, 1.5))]
CROWD = 4  # more methods than that have no bands and thin lines


class Panel(NamedTuple):
    label: str  # of the y-axis
    columns: tuple[str, ...]  # drawn solid and dashed


RETURN = Panel("evaluation return\n(sum of rewards per episode)", ("eval/return_mean",))
RATIO = Panel(
    "active ratio, τ = 0.1\n(share of neurons)",
    ("ne/critic/active_ratio_0.1", "ne/actor/active_ratio_0.1"),
)
DENSITY = Panel(
    "density\n(share of connections)",
    ("ne/critic/density", "ne/actor/density"),
)
PANELS = [RETURN, RATIO, DENSITY]  # top to bottom
COLUMNS = [*RETURN.columns, *RATIO.columns, *DENSITY.columns]

# what there is to measure from the first update on only
MEASURED = ("dormant", "active_ratio", "active_ratio_0.025", "active_ratio_0.1", "fau")
MEASURED += ("qf_loss", "qf_values", "actor_loss")
COUNTS = ("dormant", "planned", "grown", "pruned")


def die(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def panels(split: bool) -> list[Panel]:
    """PANELS, or the same with critics and actor in panels of their own."""
    if not split:
        return PANELS
    apart = [RETURN]
    for label, (critic, actor) in (RATIO, DENSITY):
        apart.append(Panel(f"critics: {label}", (critic,)))
        apart.append(Panel(f"actor: {label}", (actor,)))
    return apart


# --- reading ------------------------------------------------------------------
def read_rows(file: Path, columns: list[str]) -> list[dict[str, str]]:
    """Raises: SystemExit(2) for a damaged file and one without rows or without a column."""
    try:
        text = file.read_text()
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        die(f"cannot read {file}: {e}")
    if "\0" in text:
        die(f"{file} is damaged: it holds NUL bytes")
    if not rows:
        die(f"{file} has no rows")
    complete = text.endswith("\n")
    for row in rows:
        complete &= None not in row and None not in row.values()  # too many values, too few
    if not complete:
        die(f"{file} is damaged: a row of it is not complete")
    missing = [column for column in columns if column not in rows[0]]
    if missing:
        die(f"{file} has no column {', '.join(missing)}")
    return rows


def to_numbers(file: Path, rows: list[dict], columns: list[str], gaps: bool = False) -> Seed:
    """What is measured may be NaN before the first update, with `gaps` in any row.

    Raises: SystemExit(2) for what is not made of numbers with growing steps.
    """
    seed = {}
    for column in columns:
        try:
            seed[column] = np.array([float(row[column]) for row in rows])
        except (TypeError, ValueError) as e:
            die(f"{file} holds something that is not a number: {e}")
    for column, values in seed.items():
        refused = refused_values(column, values, gaps)
        if refused.any():
            row = refused.argmax()
            die(f"{file} holds {values[row]} in {column}, row {row + 1}")
    if (np.diff(seed["step"]) <= 0).any():
        die(f"the steps of {file} do not increase from row to row")
    return seed


def refused_values(column: str, values: np.ndarray, gaps: bool) -> np.ndarray:
    """Which (rows,) are infinite, or NaN where a run writes no NaN."""
    allowed = np.isfinite(values)
    name = column.rpartition("/")[2]
    if name == "episodic_return" or (gaps and name in MEASURED):
        # no episode ended since the last row; the buffer was just emptied
        allowed |= np.isnan(values)
    elif name in MEASURED:
        started = np.maximum.accumulate(allowed)
        allowed |= np.isnan(values) & ~started
    return ~allowed


def read_results(file: Path, columns: list[str]) -> Seed:
    """One run on a single task. Raises: SystemExit(2)."""
    return to_numbers(file, read_rows(file, columns), columns)


class Continual(NamedTuple):
    """A run over a sequence of tasks.

    The rows of one evaluation differ in the task evaluated and its return only.
    """

    tasks: dict[str, Seed]  # {task evaluated: its rows}
    # first step, last step and task of each uninterrupted training
    stretches: list[tuple[float, float, str]]
    rows: list[dict[str, str]]  # of results.csv


def read_continual(file: Path, columns: list[str]) -> Continual:
    """Raises: SystemExit(2) as read_results, and where evaluations differ in their tasks."""
    rows = read_rows(file, [*columns, "cycle", "task_trained", "task_evaluated"])
    rows_of: dict[str, list] = {}
    for row in rows:
        rows_of.setdefault(row["task_evaluated"], []).append(row)
    evaluations = set()
    for own in rows_of.values():
        evaluations.add(tuple(row["step"] for row in own))
    if len(evaluations) > 1:
        die(f"{file} does not evaluate the same tasks at each step")
    seeds = {}
    for name, own in rows_of.items():
        seeds[name] = to_numbers(file, own, columns, gaps=True)
    ends = {}
    for row in rows:
        ends[row["cycle"], row["task_trained"]] = float(row["step"])
    start = float(rows[0]["step"])
    stretches = []
    for (_, task), end in ends.items():
        stretches.append((start, end, task))
        start = end
    return Continual(seeds, stretches, rows)


def counts_frames(file: Path) -> bool:
    """Whether the run of a results.csv is from pixels, as args.json beside it says."""
    try:
        args = json.loads((file.parent / "args.json").read_text())
    except (OSError, ValueError):
        return False
    return "frame_size" in args


# --- runs on the command line -------------------------------------------------
def find_results(path: str) -> list[Path]:
    """The results files that one PATH stands for: a run's folder, a CSV file or a glob."""
    paths = [Path(path)]
    if not paths[0].exists():
        paths = [Path(p) for p in sorted(glob.glob(path))]
    files = []
    for p in paths:
        file = p / "results.csv" if p.is_dir() else p
        if file.is_file() and (file.suffix == ".csv" or len(paths) == 1):
            files.append(file)
    if not files:
        die(f"there are no results at {path}: name a run's folder, a CSV file or a glob of either")
    return files


def exists(path: str) -> bool:
    return path != "" and (Path(path).exists() or glob.glob(path) != [])


def split_label(run: str) -> tuple[str, list[str]]:
    """LABEL=PATH[,PATH...] -> label and paths.

    The label ends at the first = after which all paths exist, else at the last one.
    Raises: SystemExit(2).
    """
    parts = run.split("=")
    label = ""
    paths = []
    for n in range(1, len(parts)):
        label = "=".join(parts[:n]).strip()
        paths = [path.strip() for path in "=".join(parts[n:]).split(",")]
        if all(exists(path) for path in paths):
            break
    if not label or not all(paths):
        die(f"runs are given as LABEL=PATH[,PATH...], got {run}")
    return label, paths


def files_of(runs: list[str]) -> dict[str, list[Path]]:
    """{label: files}. A label given twice collects the seeds of both."""
    files: dict[str, list[Path]] = {}
    for run in runs:
        label, paths = split_label(run)
        own = files.setdefault(label, [])
        for path in paths:
            own += find_results(path)
    if not 1 <= len(files) <= len(COLOURS):
        die(f"one to {len(COLOURS)} labels can be drawn, got {len(files)}")
    return files


def read_runs(runs: list[str], columns: list[str], read=read_results) -> dict[str, list]:
    """{label: seeds}"""
    labels = {}
    for label, files in files_of(runs).items():
        labels[label] = [read(file, ["step", *columns]) for file in files]
    return labels


# --- drawing ------------------------------------------------------------------
class Pen(NamedTuple):
    colour: str
    style: str | tuple = "-"
    width: float = 2.0  # points
    bands: bool = True  # also each seed, and the spread of all


def pen_of(place: int, count: int, column: str, style) -> Pen:
    """The pen of a method: its place in the legend, counted from 0, and how many there are."""
    width = 2.0 if count <= CROWD else 1.3
    if column.endswith("/density"):
        # methods of equal density: each line shows on both sides of the next one
        width = 1.3 + (count - 1 - place)
    return Pen(COLOURS[place], style, width, bands=count <= CROWD)


def on_common_steps(seeds: list[Seed], column: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps (n,) that all seeds have, and the column there, (seeds, n)."""
    steps = functools.reduce(np.intersect1d, [seed["step"] for seed in seeds])
    values = []
    for seed in seeds:
        rows = np.searchsorted(seed["step"], steps)
        values.append(seed[column][rows])
    return steps, np.stack(values)


def draw_line(ax, steps: np.ndarray, values: np.ndarray, pen: Pen) -> None:
    """The thick line of a panel; a single point is visible too."""
    marker = "o" if len(steps) == 1 else ""
    style = {"color": pen.colour, "linestyle": pen.style, "linewidth": pen.width}
    ax.plot(steps, values, marker=marker, **style)


def draw_seed(ax, seed: Seed, column: str, pen: Pen) -> None:
    style = {"color": pen.colour, "linestyle": pen.style}
    ax.plot(seed["step"], seed[column], linewidth=0.6, alpha=0.3, **style)


def draw_band(ax, steps: np.ndarray, low: np.ndarray, high: np.ndarray, pen: Pen) -> None:
    ax.fill_between(steps, low, high, color=pen.colour, alpha=0.15, linewidth=0)


def step_label(step: float, _: int | None = None) -> str:
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if abs(step) >= unit:
            return f"{step / unit:g}{letter}"
    return f"{step:g}"


def is_share(column: str) -> bool:
    return column.startswith("ne/") and column.rpartition("/")[2] not in COUNTS


def dress(ax, columns: tuple[str, ...]) -> None:
    """What all panels look like."""
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.set_major_formatter(step_label)
    if is_share(columns[0]):
        # shares end at 1, and so do the ticks
        bottom = min(ax.get_ylim()[0], 0.95)
        ax.set_ylim(bottom, 1 + 0.04 * (1 - bottom))


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


# --- files --------------------------------------------------------------------
def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table."""
    rule = ["---" for _ in head]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rows))


def check_picture(out: Path, ending: str = ".png", flag: str = "--out") -> None:
    """Raises: SystemExit(2) for another format."""
    if out.suffix != ending:
        die(f"{flag} must end in {ending}, got {out}")


def settle(figure: Figure) -> None:
    """Lays the figure out for good, at round places: the last bits differ from time to time."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for part in figure.subfigs:
        part.bbox_relative.set_points(np.round(part.bbox_relative.get_points(), 6))
    for ax in figure.get_axes():
        ax.set_position(np.round(ax.get_position().bounds, 6))


def save(figure: Figure, file: Path) -> None:
    """The same figure gives the same file, byte for byte."""
    settle(figure)
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
