"""The figures of matrix.py from the results of their runs: curves, aggregate, caption and table. Called by plot.py.

Statistics as recommended by Agarwal et al. (2021), Deep Reinforcement Learning at the Edge of the Statistical
Precipice: interquartile means with 95% intervals of a bootstrap that is stratified by task, here with SciPy.
"""

import functools
import textwrap
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import matrix
import plot

COLOURS = [*plot.COLOURS, "#7a4a1e"]  # brown; grey stands for any method in legends
COLUMNS = [column for _, columns in plot.PANELS for column in columns]
RATIOS, DENSITIES = plot.PANELS[1][1], plot.PANELS[2][1]
RESAMPLES = 2_000


class Results(NamedTuple):
    """What there is of a figure. `runs` has every method and task of the figure, be it with an empty list."""

    figure: matrix.Figure
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: int  # wanted of each
    runs: dict[str, dict[str, list[plot.Seed]]]  # {method: {task: runs}}
    stretches: list[tuple[float, float, str]]  # of a sequence of tasks: when each was trained

    def label(self, method: str) -> str:
        return matrix.METHODS[method].label

    @property
    def wanted(self) -> str:
        return "1 seed" if self.seeds == 1 else f"{self.seeds} seeds"

    def end(self, task: str) -> float:
        """Last step of the longest run on a task; the other ones are unfinished if they are shorter. 0 without runs."""
        return max((run["step"][-1] for method in self.methods for run in self.runs[method][task]), default=0)

    def finished(self, method: str, task: str) -> list[plot.Seed]:
        return [run for run in self.runs[method][task] if run["step"][-1] == self.end(task)]

    def final(self, method: str, task: str, columns: list[str]) -> np.ndarray:
        """Mean of the columns over the last tenth of each finished run, (seeds,)."""
        runs = [(run, run["step"] >= 0.9 * run["step"][-1]) for run in self.finished(method, task)]
        return np.array([np.mean([run[column][late] for column in columns]) for run, late in runs])


# --- reading ----------------------------------------------------------------------------------------------------------
def find(folders: tuple[Path, ...], run: matrix.Run) -> Path | None:
    """Results of a run: PATH/results.csv, as run.py makes them, or PATH.csv, as in results/, with a row at least."""
    for folder in folders:
        for file in (folder / run.path / "results.csv", folder / f"{run.path}.csv"):
            if file.is_file() and file.read_bytes().count(b"\n") > 1:
                return file
    return None


def read(name: str, methods: tuple, tasks: tuple, seeds: int, folders: tuple[Path, ...]) -> Results:
    """Raises: SystemExit(2) where there is nothing to draw."""
    figure = matrix.FIGURES[name]
    files = [(run, find(folders, run)) for run in matrix.runs_of("full", seeds, tasks, methods)]
    there = [(run, file) for run, file in files if file]
    if not there:
        plot.die(f"there are no results of {name} in {', '.join(map(str, folders))}; make them with benchmark/run.py")
    stretches = []
    if tasks == matrix.CONTINUAL:
        sequences = [(run.name, plot.read_continual(file, ["step", *COLUMNS])) for run, file in there]
        longest = max((sequence for _, sequence in sequences), key=lambda sequence: sequence.stretches[-1][1])
        tasks, stretches = tuple(longest.tasks), longest.stretches
        found = [(method, task, rows) for method, sequence in sequences for task, rows in sequence.tasks.items()]
    else:
        found = [(run.name, run.task, plot.read_results(file, ["step", *COLUMNS])) for run, file in there]
    runs = {method: {task: [] for task in tasks} for method in methods}
    for method, task, rows in found:
        runs[method][task].append(rows)
    return Results(figure, methods, tasks, seeds, runs, stretches)


# --- statistics -------------------------------------------------------------------------------------------------------
def iqm(*tasks: np.ndarray, axis: int) -> np.ndarray:
    """Interquartile mean over the seeds of all tasks, (..., seeds) each. Of fewer than four values it is the mean."""
    from scipy.stats import trim_mean  # here, as it takes a second that the other commands of plot.py need not wait

    return trim_mean(np.concatenate(tasks, axis=axis), 0.25, axis=axis)


def interval(*tasks: np.ndarray) -> np.ndarray:
    """Bounds (2, ...) of the 95% interval of the interquartile mean of (seeds, ...), seeds drawn anew within each task.

    NaN where a task has one seed only, or no value, as the active ratios before the first update.
    """
    from scipy.stats import DegenerateDataWarning, bootstrap

    if min(len(scores) for scores in tasks) < 2:
        return np.full((2, *tasks[0].shape[1:]), np.nan)
    options = {"axis": 0, "method": "percentile", "n_resamples": RESAMPLES, "rng": np.random.default_rng(0)}
    with warnings.catch_warnings(action="ignore", category=DegenerateDataWarning):  # of the NaN
        return np.stack(bootstrap(tasks, iqm, **options).confidence_interval)


def normalised(results: Results) -> tuple[dict[str, list[np.ndarray]], list[str]]:
    """Final returns in those of the reference: {method: [(seeds,) of each task]}, and the tasks that they are of.

    These are the tasks on which every method with finished runs has some, and the reference a positive return. The
    second result is empty where there is none.
    """
    returns = {m: {t: results.final(m, t, ["eval/return_mean"]) for t in results.tasks} for m in results.methods}
    returns = {m: scores for m, scores in returns.items() if any(map(len, scores.values()))}
    reference = {t: iqm(x, axis=0) for t, x in returns.get(results.figure.reference, {}).items() if len(x)}
    tasks = [t for t in reference if reference[t] > 0 and all(len(scores[t]) for scores in returns.values())]
    return {m: [returns[m][t] / reference[t] for t in tasks] for m in returns if tasks}, tasks


# --- words ------------------------------------------------------------------------------------------------------------
def missing(results: Results) -> list[str]:
    """What a figure from partial data does not show, equal cases together."""
    cases: dict[tuple[str, str], list[str]] = {}
    for task in results.tasks:
        who: dict[str, list[str]] = {}
        for method in results.methods:
            runs, whole = results.runs[method][task], len(results.finished(method, task))
            said = [] if whole == results.seeds else [f"{whole or 'none'} of {results.wanted}"]
            if len(runs) > whole:
                ends = sorted({run["step"][-1] for run in runs} - {results.end(task)})
                said.append(f"{len(runs) - whole} more up to step {' and '.join(map(plot.step_label, ends))}")
            if said:
                who.setdefault(", ".join(said), []).append(results.label(method))
        for what, labels in who.items():
            names = "all methods" if len(labels) == len(results.methods) else ", ".join(labels)
            cases.setdefault((names, what), []).append(task)
    return [f"{names}: {what} on {', '.join(tasks)}" for (names, what), tasks in cases.items()]


def caption(results: Results, tasks: list[str]) -> str:
    """What is shown and what is missing; `tasks` are those of the aggregate."""
    text = "Thick: interquartile mean over seeds, shaded: its 95% interval (stratified bootstrap), thin: single seeds. "
    counts = [len(results.finished(m, t)) for m in results.methods for t in results.tasks if results.finished(m, t)]
    if min(counts) < 4:
        text += "With fewer than four seeds the mean is the plain one; with three the interval is their range; "
        text += "with one there is none. "
    reference = results.label(results.figure.reference)
    if tasks:
        text += f"Bars: mean return over the last tenth of a run, divided by {reference}'s, which is taken as known"
        text += ". " if tasks == list(results.tasks) else f", on {', '.join(tasks)} only. "
    else:
        text += f"No bars: no task has finished runs of all methods shown and a positive return of {reference}. "
    gaps = missing(results)
    if left := [t for t in results.figure.tasks if t not in results.tasks and not results.stretches]:
        gaps.append(f"left out: {', '.join(left)}")
    if left := [matrix.METHODS[m].label for m in results.figure.methods if m not in results.methods]:
        gaps.append(f"left out: {', '.join(left)}")
    if results.seeds < matrix.SEEDS:
        gaps.append(f"{results.wanted} instead of {matrix.SEEDS}")
    return text + (f"MISSING: {'; '.join(gaps)}." if gaps else "Nothing is missing.")


def number(scores: list[np.ndarray], digits: int = 0) -> str:
    """Interquartile mean and interval of the scores of one or several tasks."""
    if not all(map(len, scores)):
        return "–"
    low, high = interval(*scores)
    text = f"{iqm(*scores, axis=0):,.{digits}f}"
    return text if np.isnan(low) else f"{text} [{low:,.{digits}f}, {high:,.{digits}f}]"


def table(results: Results) -> str:
    """Markdown: final return on each task, aggregate, active ratios and density."""
    scores, tasks = normalised(results)
    head = ["", *results.tasks, f"normalised by {results.label(results.figure.reference)}"]
    lines = [[*head, "active ratio τ = 0.1, critics / actor", "density, critics / actor", "seeds"]]
    lines.append(["---"] * len(lines[0]))
    for method in results.methods:
        cells = [number([results.final(method, task, ["eval/return_mean"])]) for task in results.tasks]
        cells.append(number(scores[method], 2) if method in scores else "–")
        for columns in (RATIOS, DENSITIES):
            late = [[results.final(method, task, [column]) for task in results.tasks] for column in columns]
            pooled = [np.concatenate(values) for values in late]
            cells.append(" / ".join(f"{iqm(values, axis=0):.2f}" if len(values) else "–" for values in pooled))
        seeds = [str(len(results.finished(method, task))) for task in results.tasks]
        lines.append([results.label(method), *cells, ", ".join(seeds if len(set(seeds)) > 1 else seeds[:1])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# --- drawing ----------------------------------------------------------------------------------------------------------
def draw(ax, runs: list[plot.Seed], finished: list[plot.Seed], column: str, colour: str, style) -> None:
    """Interquartile mean and interval of the finished runs, or of all where none is, and every run, faint."""
    for run in runs:
        ax.plot(run["step"], run[column], color=colour, linestyle=style, linewidth=0.6, alpha=0.3)
    if not runs:
        return
    steps, values = plot.on_common_steps(finished or runs, column)
    if not len(steps):
        return
    low, high = interval(values)
    ax.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.plot(
        steps, iqm(values, axis=0), color=colour, linestyle=style, linewidth=2, marker="o" if len(steps) == 1 else ""
    )


def draw_panel(ax, results: Results, task: str, columns: list[str]) -> None:
    for method, colour in zip(results.methods, COLOURS, strict=False):
        for column, style in zip(columns, plot.STYLES, strict=False):
            draw(ax, results.runs[method][task], results.finished(method, task), column, colour, style)
    plot.dress(ax, columns)


def draw_bars(ax, results: Results, scores: dict[str, list[np.ndarray]]) -> None:
    """The aggregate: one bar per method, with its interval and its number."""
    for place, (method, colour) in enumerate(zip(results.methods, COLOURS, strict=False)):
        if method not in scores:
            ax.text(0, place, " no finished run", va="center", fontsize=8, color="grey")
            continue
        value, (low, high) = iqm(*scores[method], axis=0), interval(*scores[method])
        ax.barh(place, value, color=colour, alpha=0.6, height=0.6)
        ax.plot([low, high], [place, place], color="black", linewidth=1.2, marker="|", markersize=6)
        right = np.nanmax([value, high, 0])
        label = {"va": "center", "fontsize": 9, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}}
        ax.annotate(f"{value:.2f}", (right, place), (6, 0), textcoords="offset points", **label)
    ax.set_yticks(range(len(results.methods)), [textwrap.fill(results.label(m), 18) for m in results.methods])
    ax.set_ylim(len(results.methods) - 0.4, -0.6)
    ax.set_xlim(right=ax.get_xlim()[1] * 1.15)
    ax.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    ax.set_xlabel(f"final return, {results.label(results.figure.reference)} = 1")
    ax.spines[["top", "right"]].set_visible(False)


def panels(results: Results) -> list[list[tuple[str, str, list[str]]]]:
    """The grid, row by row: (label of the y-axis, task, columns). A column per task, a single one for a sequence."""
    shares = plot.panels(split=True)[1:]
    if results.stretches:
        rows = [[(f"{task}\nreturn", task, ["eval/return_mean"])] for task in results.tasks]
        return rows + [[(label, results.tasks[0], columns)] for label, columns in shares]
    tasks = [task for task in results.tasks if results.end(task)]
    return [[(label, task, columns) for task in tasks] for label, columns in [plot.PANELS[0], *shares]]


def picture(results: Results, text: str) -> Figure:
    grid = panels(results)
    rows, columns = len(grid), len(grid[0])
    scores, _ = normalised(results)
    widths = [4.2 if columns > 1 else 6.3] * columns + ([4.2] if scores else [])  # inches
    lines = textwrap.wrap(text, int(sum(widths) * 15))
    figure = Figure(figsize=(sum(widths), 2.1 * rows + 1.4 + 0.17 * len(lines)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[2.1 * rows + 1.3, 0.17 * len(lines) + 0.1])
    places = above.add_gridspec(rows, len(widths), width_ratios=widths)
    axes = np.empty((rows, columns), dtype=object)
    for i, row in enumerate(grid):
        for j, (label, task, names) in enumerate(row):
            ax = axes[i, j] = above.add_subplot(places[i, j], sharex=axes[0, j])
            draw_panel(ax, results, task, names)
            if results.stretches:
                evaluated = task if names == ["eval/return_mean"] else ""
                plot.draw_stretches(ax, results.stretches, evaluated, named=i == 0)
            elif i == 0:
                ax.set_title(task, fontsize=11)
            if j == 0:
                ax.set_ylabel(label, fontsize=9)
            ax.tick_params(labelbottom=i == rows - 1)
    above.align_ylabels(axes[:, 0])
    for ax in axes[-1]:
        ax.set_xlabel(results.figure.steps)
    if scores:
        draw_bars(above.add_subplot(places[:, -1]), results, scores)
    named = [(results.label(m), c) for m, c in zip(results.methods, COLOURS, strict=False)]
    handles = [Line2D([], [], color=colour, linewidth=2, label=name) for name, colour in named]
    for name, style in zip(("density of critics", "of actor"), plot.STYLES, strict=True):
        handles.append(Line2D([], [], color="grey", linewidth=2, linestyle=style, label=name))
    above.suptitle(results.figure.title)
    above.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4 + columns), frameon=False)
    below.text(0.01, 0.98, "\n".join(lines), fontsize=8, va="top")
    return figure


def figure(
    name: str,
    results: tuple[Path, ...] = (),
    seeds: int | None = None,
    quick: bool = False,
    short: bool = False,
    tasks: tuple[str, ...] = (),
    methods: tuple[str, ...] = (),
    out: Path | None = None,
):
    """Curves, aggregate, caption and table from the results of a figure's runs, as far as there are any.

    Args:
        name: of the figure
        results: folders with results, the first that has a run wins; default: runs/full, with the next flags another
        seeds: how many of each there should be; default: as in run.py
        quick: the small versions, in runs/quick
        short: the runs of 200,000 steps, in runs/short
        tasks: these tasks instead of the figure's
        methods: only these of the figure's methods, by the names in matrix.py
        out: where the PNG goes, and beside it SVG and Markdown; default: NAME.png
    """
    try:
        chosen = matrix.choose(name, quick, short, seeds, tasks, methods)
    except ValueError as e:
        plot.die(str(e))
    length, seeds, tasks, methods = chosen
    found = read(name, methods, tasks, seeds, results or (Path("runs") / length,))
    text, out = caption(found, normalised(found)[1]), out or Path(f"{name}.png")
    save = functools.partial(plot.save, picture(found, text))
    page = f"{table(found)}\n{text}\n"
    plot.write({out: save, out.with_suffix(".svg"): save, out.with_suffix(".md"): lambda file: file.write_text(page)})


SUBCOMMANDS = {name: functools.partial(figure, name) for name in matrix.FIGURES}
