"""The figures of matrix.py: curves, aggregate, caption and table. Commands of plot.py.

Statistics as recommended by Agarwal et al. (2021), Deep Reinforcement Learning at the Edge of the
Statistical Precipice: interquartile means with 95% intervals of a bootstrap that is stratified by
task, here with SciPy.
"""

import functools
import textwrap
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import drawing
import matrix
from drawing import COLOURS, COLUMNS, Panel, Seed
from estimates import ratio_of_spreads, versus

RETURN = "eval/return_mean"
RESAMPLES = 2_000
FEW = 4  # fewer seeds have no interval that means 95%
COMPARED = (  # (words after the task, column, format) of the second table
    ("", RETURN, "z,.0f"),
    (", critics' active ratio", "ne/critic/active_ratio_0.1", "z.2f"),  # z: no "-0.00"
)


class Results(NamedTuple):
    """What there is of a figure. `runs` has every method and task, be it with an empty list."""

    figure: matrix.Figure
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: int  # wanted of each
    runs: dict[str, dict[str, list[Seed]]]  # {method: {task: runs}}
    stretches: list[tuple[float, float, str]]  # of a sequence of tasks: when each was trained

    def label(self, method: str) -> str:
        return matrix.METHODS[method].label

    @property
    def wanted(self) -> str:
        return "1 seed" if self.seeds == 1 else f"{self.seeds} seeds"

    def end(self, task: str) -> float:
        """Last step of the longest run on a task; shorter ones are unfinished. 0 without runs."""
        ends = [0.0]
        for method in self.methods:
            ends += [run["step"][-1] for run in self.runs[method][task]]
        return max(ends)

    def finished(self, method: str, task: str) -> list[Seed]:
        end = self.end(task)
        return [run for run in self.runs[method][task] if run["step"][-1] == end]

    def final(self, method: str, task: str, column: str) -> np.ndarray:
        """Mean of a column over the last tenth of each finished run, (seeds,)."""
        means = []
        for run in self.finished(method, task):
            late = run["step"] >= 0.9 * run["step"][-1]
            means.append(np.mean(run[column][late]))
        return np.array(means)


# --- reading ------------------------------------------------------------------
def find(folders: tuple[Path, ...], run: matrix.Run) -> Path | None:
    """Results with a row at least: PATH/results.csv, as run.py makes them, or PATH.csv."""
    for folder in folders:
        for file in (folder / run.path / "results.csv", folder / f"{run.path}.csv"):
            if file.is_file() and file.read_bytes().count(b"\n") > 1:
                return file
    return None


def columns_of(figure: matrix.Figure) -> list[str]:
    """What is read: the columns of the table and those that the figure draws."""
    columns = ["step", *COLUMNS]
    for _, own in figure.panels:
        columns += own
    return list(dict.fromkeys(columns))


def read(name: str, methods: tuple, tasks: tuple, seeds: int, folders: tuple) -> Results:
    """Raises: SystemExit(2) where there is nothing to draw."""
    figure = matrix.FIGURES[name]
    files = []
    for run in matrix.runs_of("full", seeds, tasks, methods):
        file = find(folders, run)
        if file is not None:
            files.append((run, file))
    if not files:
        places = ", ".join(map(str, folders))
        drawing.die(f"there are no results of {name} in {places}; make them with benchmark/run.py")
    columns = columns_of(figure)
    found = []  # (method, task, rows)
    stretches = []
    if tasks == matrix.CONTINUAL:
        tasks = ()
        for run, file in files:
            sequence = drawing.read_continual(file, columns)
            found += [(run.name, task, rows) for task, rows in sequence.tasks.items()]
            if not stretches or sequence.stretches[-1][1] > stretches[-1][1]:
                stretches = sequence.stretches
                tasks = tuple(sequence.tasks)
    else:
        found = [(run.name, run.task, drawing.read_results(file, columns)) for run, file in files]
    runs = {}
    for method in methods:
        runs[method] = {task: [] for task in tasks}
    for method, task, rows in found:
        runs[method][task].append(rows)
    return Results(figure, methods, tasks, seeds, runs, stretches)


# --- statistics ---------------------------------------------------------------
def iqm(*tasks: np.ndarray, axis: int) -> np.ndarray:
    """Interquartile mean over the seeds of all tasks, (..., seeds) each; of up to three: mean."""
    # here, as it takes a second that the other commands of plot.py need not wait
    from scipy.stats import trim_mean

    return trim_mean(np.concatenate(tasks, axis=axis), 0.25, axis=axis)


def interval(*tasks: np.ndarray) -> np.ndarray:
    """Bounds (2, ...) of the 95% interval of the interquartile mean of (seeds, ...).

    Seeds are drawn anew within each task. NaN where a task has one seed only, or no value, as the
    active ratios before the first update.
    """
    from scipy.stats import DegenerateDataWarning, bootstrap

    if min(len(scores) for scores in tasks) < 2:
        return np.full((2, *tasks[0].shape[1:]), np.nan)
    with warnings.catch_warnings(action="ignore", category=DegenerateDataWarning):  # of the NaN
        result = bootstrap(
            tasks,
            iqm,
            axis=0,
            method="percentile",
            n_resamples=RESAMPLES,
            rng=np.random.default_rng(0),
        )
    return np.stack(result.confidence_interval)


def final_returns(results: Results) -> dict[str, dict[str, np.ndarray]]:
    """{method: {task: (seeds,)}} of the methods that have a finished run."""
    returns = {}
    for method in results.methods:
        own = {task: results.final(method, task, RETURN) for task in results.tasks}
        if any(len(scores) for scores in own.values()):
            returns[method] = own
    return returns


def normalised(results: Results) -> tuple[dict[str, list[np.ndarray]], list[str]]:
    """Final returns in those of the reference, and the tasks that they are of.

    These are the tasks on which every method with finished runs has some, and the reference a
    positive return; without such a task both results are empty.

    Returns: {method: [(seeds,) of each task]}, tasks.
    """
    returns = final_returns(results)
    reference = {}
    for task, scores in returns.get(results.figure.reference, {}).items():
        everywhere = all(len(own[task]) for own in returns.values())
        if everywhere and iqm(scores, axis=0) > 0:
            reference[task] = iqm(scores, axis=0)
    if not reference:
        return {}, []
    ratios = {}
    for method, own in returns.items():
        ratios[method] = [own[task] / reference[task] for task in reference]
    return ratios, list(reference)


# --- words --------------------------------------------------------------------
def gaps_of(results: Results, method: str, task: str) -> str:
    """What a method lacks on a task, or nothing."""
    runs = results.runs[method][task]
    whole = len(results.finished(method, task))
    said = []
    if whole != results.seeds:
        said.append(f"{whole or 'none'} of {results.wanted}")
    if len(runs) > whole:
        ends = {run["step"][-1] for run in runs} - {results.end(task)}
        steps = " and ".join(drawing.step_label(end) for end in sorted(ends))
        said.append(f"{len(runs) - whole} more up to step {steps}")
    return ", ".join(said)


def missing(results: Results) -> list[str]:
    """What a figure from partial data does not show, equal cases together."""
    tasks_of: dict[tuple[str, str], list[str]] = {}  # {(methods, what they lack): tasks}
    for task in results.tasks:
        who: dict[str, list[str]] = {}
        for method in results.methods:
            gaps = gaps_of(results, method, task)
            if gaps:
                who.setdefault(gaps, []).append(results.label(method))
        for gaps, labels in who.items():
            names = ", ".join(labels)
            if len(labels) == len(results.methods):
                names = "all methods"
            tasks_of.setdefault((names, gaps), []).append(task)
    return [f"{names}: {gaps} on {', '.join(on)}" for (names, gaps), on in tasks_of.items()]


def left_out(results: Results) -> list[str]:
    """What the figure has and was not asked for."""
    gaps = []
    absent = []
    if not results.stretches:
        absent += [task for task in results.figure.tasks if task not in results.tasks]
    methods = [method for method in results.figure.methods if method not in results.methods]
    absent += [results.label(method) for method in methods]
    if absent:
        gaps.append(f"left out: {', '.join(absent)}")
    if results.seeds < matrix.SEEDS:
        gaps.append(f"{results.wanted} instead of {matrix.SEEDS}")
    return gaps


def fewest(results: Results) -> int:
    """The least number of finished runs of those that have any."""
    counts = []
    for method in results.methods:
        for task in results.tasks:
            counts.append(len(results.finished(method, task)))
    return min(count for count in counts if count > 0)


def caption(results: Results, tasks: list[str]) -> str:
    """What is shown and what is missing; `tasks` are those of the aggregate."""
    if crowded(results):
        text = "Lines: interquartile mean over seeds. "
    else:
        text = "Thick: interquartile mean over seeds, shaded: its 95% interval (stratified "
        text += "bootstrap), thin: single seeds. "
    few = fewest(results) < FEW
    if few:
        text += "Of fewer than four values it is the plain mean"
        text += ". " if crowded(results) else " and the shaded interval their range. "
    reference = results.label(results.figure.reference)
    if tasks:
        text += "Bars: mean return over the last tenth of a run"
        if few:
            text += ", dots: single seeds"
        elif crowded(results):
            text += ", with its 95% interval (stratified bootstrap)"
        text += f", divided by {reference}'s, which is taken as known"
        text += ". " if tasks == list(results.tasks) else f", on {', '.join(tasks)} only. "
    else:
        text += "No bars: no task has finished runs of all methods shown and a positive return of "
        text += f"{reference}. "
    gaps = missing(results) + left_out(results)
    if not gaps:
        return text + "Nothing is missing."
    return text + f"MISSING: {'; '.join(gaps)}."


def number(scores: list[np.ndarray], digits: int = 0) -> str:
    """Interquartile mean and interval of the scores of one or several tasks."""
    if not all(map(len, scores)):
        return "–"
    low, high = interval(*scores)
    text = f"{iqm(*scores, axis=0):,.{digits}f}"
    if np.isnan(low):
        return text
    return f"{text} [{low:,.{digits}f}, {high:,.{digits}f}]"


def share(results: Results, method: str, column: str) -> str:
    """Interquartile mean of a column over the finished runs of all tasks."""
    values = [results.final(method, task, column) for task in results.tasks]
    pooled = np.concatenate(values)
    return f"{iqm(pooled, axis=0):.2f}" if len(pooled) else "–"


def table(results: Results) -> str:
    """Markdown: final return on each task, aggregate, active ratios and density."""
    scores, _ = normalised(results)
    head = ["", *results.tasks, f"normalised by {results.label(results.figure.reference)}"]
    head += ["active ratio τ = 0.1, critics / actor", "density, critics / actor", "seeds"]
    lines = []
    for method in results.methods:
        line = [results.label(method)]
        for task in results.tasks:
            line.append(number([results.final(method, task, RETURN)]))
        line.append(number(scores[method], 2) if method in scores else "–")
        for columns in (drawing.RATIO.columns, drawing.DENSITY.columns):
            line.append(" / ".join(share(results, method, column) for column in columns))
        seeds = [str(len(results.finished(method, task))) for task in results.tasks]
        if len(set(seeds)) == 1:
            seeds = seeds[:1]
        line.append(", ".join(seeds))
        lines.append(line)
    return drawing.markdown(head, lines)


def differences(results: Results) -> str:
    """Markdown: final values minus the reference's on each task, of plain means.

    p is of no difference, corrected for the number of methods (Holm).
    """
    reference = results.figure.reference
    if reference not in results.methods:
        return ""
    head = ["95% interval (Welch)"]
    cells = {method: [results.label(method)] for method in results.methods}
    for task in results.tasks:
        for title, column, spec in COMPARED:
            head += [f"{task}{title}, minus {results.label(reference)}", "p"]
            values = {method: results.final(method, task, column) for method in cells}
            for method, own in versus(values, reference, spec).items():
                cells[method] += own
    del cells[reference]
    return drawing.markdown(head, cells.values())


def spreads(results: Results) -> str:
    """Markdown: standard deviations of the final returns, and their ratios to the reference's.

    The interval is of an F test, p of Levene's, corrected for the number of methods (Holm).
    """
    reference = results.figure.reference
    if reference not in results.methods:
        return ""
    head = ["standard deviation over seeds, 95% interval (F test), p (Levene)"]
    cells = {method: [results.label(method)] for method in results.methods}
    for task in results.tasks:
        head += [task, f"divided by {results.label(reference)}'s", "p"]
        values = {method: results.final(method, task, RETURN) for method in cells}
        ratios = versus(values, reference, ".2f", ratio_of_spreads)
        for method, own in values.items():
            spread = f"{own.std(ddof=1):,.0f}" if len(own) > 1 else "–"
            cells[method] += [spread, *ratios[method]]
    return drawing.markdown(head, cells.values())


# --- drawing ------------------------------------------------------------------
def crowded(results: Results) -> bool:
    return len(results.methods) > drawing.CROWD


def draw(ax, runs: list[Seed], finished: list[Seed], column: str, pen: drawing.Pen) -> None:
    """Interquartile mean and interval of the finished runs, or of all where none is; each run."""
    if not runs:
        return
    if pen.bands:
        for run in runs:
            drawing.draw_seed(ax, run, column, pen)
    steps, values = drawing.on_common_steps(finished or runs, column)
    if not len(steps):
        return
    if pen.bands:
        low, high = interval(values)
        drawing.draw_band(ax, steps, low, high, pen)
    drawing.draw_line(ax, steps, iqm(values, axis=0), pen)


def draw_panel(ax, results: Results, task: str, columns: tuple[str, ...]) -> None:
    count = len(results.methods)
    for place, method in enumerate(results.methods):
        for column, style in zip(columns, drawing.STYLES, strict=False):
            pen = drawing.pen_of(place, count, column, style)
            draw(ax, results.runs[method][task], results.finished(method, task), column, pen)
    drawing.dress(ax, columns)


def draw_bar(ax, place: int, colour: str, scores: list[np.ndarray], few: bool) -> None:
    """A method's aggregate with its number, and its interval or, if seeds are few, each of them."""
    value = iqm(*scores, axis=0)
    ax.barh(place, value, color=colour, alpha=0.4, height=0.6)
    style = {"color": "black", "linewidth": 1.2, "marker": "|", "markersize": 6}
    if few:
        shown = np.concatenate(scores)
        style |= {"linewidth": 0, "marker": "o", "markersize": 3}
    else:
        shown = interval(*scores)
    ax.plot(shown, [place] * len(shown), **style)
    style = {"va": "center", "fontsize": 9, "textcoords": "offset points"}
    ax.annotate(f"{value:.2f}", (0, place), (4, 0), **style)


def draw_bars(ax, results: Results, scores: dict[str, list[np.ndarray]]) -> None:
    """The aggregate, one bar per method; dots in all of them where one has few seeds."""
    few = fewest(results) < FEW
    for place, method in enumerate(results.methods):
        if method in scores:
            draw_bar(ax, place, COLOURS[place], scores[method], few)
        else:
            ax.text(0, place, " no finished run", va="center", fontsize=8, color="grey")
    labels = [textwrap.fill(results.label(method), 18) for method in results.methods]
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    ax.set_xlabel(f"final return, {results.label(results.figure.reference)} = 1")
    ax.spines[["top", "right"]].set_visible(False)


def grid_of(results: Results) -> list[list[tuple[str, Panel]]]:
    """Rows of (task, panel): a column per task, a single one for a sequence of tasks."""
    panels = [Panel(*panel) for panel in results.figure.panels] or drawing.panels(split=True)
    grid = []
    if results.stretches:
        first = results.tasks[0]
        for task in results.tasks:
            grid.append([(task, Panel(f"{task}\nreturn", (RETURN,)))])
        for panel in panels[1:]:
            grid.append([(first, panel)])
        return grid
    tasks = [task for task in results.tasks if results.end(task)]
    for panel in panels:
        grid.append([(task, panel) for task in tasks])
    return grid


def draw_grid(part, places, results: Results, grid: list) -> None:
    axes = np.empty((len(grid), len(grid[0])), dtype=object)
    for i, row in enumerate(grid):
        for j, (task, panel) in enumerate(row):
            ax = part.add_subplot(places[i, j], sharex=axes[0, j])
            axes[i, j] = ax
            draw_panel(ax, results, task, panel.columns)
            if results.stretches:
                evaluated = task if panel.columns == (RETURN,) else ""
                drawing.draw_stretches(ax, results.stretches, evaluated, named=i == 0)
            elif i == 0:
                ax.set_title(task, fontsize=11)
            if j == 0:
                ax.set_ylabel(panel.label, fontsize=9)
            ax.tick_params(labelbottom=i == len(grid) - 1)
    part.align_ylabels(axes[:, 0])
    for ax in axes[-1]:
        ax.set_xlabel(results.figure.steps)


def picture(results: Results, text: str) -> Figure:
    grid = grid_of(results)
    scores, _ = normalised(results)
    columns = len(grid[0])
    widths = [4.2 if columns > 1 else 6.3] * columns  # inches
    if scores:
        widths.append(4.2)
    figure, part = drawing.canvas(sum(widths), max(2.1 * len(grid), 3) + 1.3, text)
    places = part.add_gridspec(len(grid), len(widths), width_ratios=widths)
    draw_grid(part, places, results, grid)
    if scores:
        draw_bars(part.add_subplot(places[:, -1]), results, scores)
    handles = []
    for method, colour in zip(results.methods, COLOURS, strict=False):
        label = results.label(method)
        handles.append(Line2D([], [], color=colour, linewidth=2, label=label))
    part.suptitle(results.figure.title)
    ncols = min(len(handles), 3 + columns)
    part.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False)
    return figure


def figure(
    name: str,
    results: tuple[Path, ...] = (),
    seeds: int | None = None,
    quick: bool = False,
    short: bool = False,
    tasks: tuple[str, ...] = (),
    methods: tuple[str, ...] = (),
    reference: str | None = None,
    out: Path | None = None,
):
    """Curves, aggregate, caption and table from a figure's runs, as far as there are any.

    Args:
        name: of the figure
        results: folders with results, the first that has a run wins; default: runs/full, with the
            next flags another
        seeds: how many of each there should be; default: as in run.py
        quick: the small versions, in runs/quick
        short: the runs of 200,000 steps, in runs/short
        tasks: these tasks instead of the figure's
        methods: only these of the figure's methods, by the names in matrix.py
        reference: the method that the others are compared with; default: the figure's
        out: where the PNG goes, and beside it SVG and Markdown; default: NAME.png
    """
    out = out or Path(f"{name}.png")
    drawing.check_picture(out)
    try:
        chosen = matrix.choose(name, quick, short, seeds, tasks, methods)
    except ValueError as e:
        drawing.die(str(e))
    folders = results or (Path("runs") / chosen.length,)
    found = read(name, chosen.methods, chosen.tasks, chosen.seeds, folders)
    if reference is not None:
        if reference not in chosen.methods:
            known = ", ".join(chosen.methods)
            drawing.die(f"--reference must be of {known}, got {reference}")
        found = found._replace(figure=found.figure._replace(reference=reference))
    text = caption(found, normalised(found)[1])
    save = functools.partial(drawing.save, picture(found, text))
    page = "\n".join([table(found), differences(found), spreads(found), f"{text}\n"])
    files = {out: save, out.with_suffix(".svg"): save}
    files[out.with_suffix(".md")] = lambda file: file.write_text(page)
    drawing.write(files)


SUBCOMMANDS = {}
for _name in matrix.FIGURES:
    SUBCOMMANDS[_name] = functools.partial(figure, _name)
