"""The figures of matrix.py: curves, aggregate, caption and table. Commands of plot.py."""

import functools
import itertools
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

import drawing
import matrix
from drawing import COLOURS, Panel, markdown
from estimates import aggregate, estimate, iqm, ratio_of_spreads, versus

(RETURN,) = drawing.RETURN.columns
FEW = 4  # fewer seeds have no interval that means 95%


class Results(NamedTuple):
    """What there is of a figure."""

    figure: matrix.Figure
    reference: str  # label of the method that the others are compared with
    tasks: tuple[str, ...]
    seeds: int  # wanted of each
    runs: drawing.Runs  # every label and task, be it with an empty list
    finished: drawing.Runs  # those that are as long as the longest on their task
    stretches: list[tuple[float, float, str]]  # of a sequence of tasks: when each was trained

    @property
    def wanted(self) -> str:
        return "1 seed" if self.seeds == 1 else f"{self.seeds} seeds"

    def final(self, task: str, column: str) -> dict[str, np.ndarray]:
        """{label: (seeds,)}: mean of a column over the last tenth of each finished run."""
        means = {}
        for label, own in self.finished.items():
            late = [run[column][run["step"] >= 0.9 * run["step"][-1]] for run in own[task]]
            means[label] = np.array([rows.mean() for rows in late])
        return means

    def is_few(self) -> bool:
        """Whether a method that has finished runs on a task has few."""
        counts = []
        for own in self.finished.values():
            counts += map(len, own.values())
        return min(filter(None, counts)) < FEW


# --- reading ------------------------------------------------------------------
def find(folders: tuple[Path, ...], run: matrix.Run) -> Path | None:
    """Results with a row at least: PATH/results.csv, as run.py makes them, or PATH.csv."""
    for folder in folders:
        for file in (folder / run.path / "results.csv", folder / f"{run.path}.csv"):
            if file.is_file() and file.read_bytes().count(b"\n") > 1:
                return file
    return None


def read(name: str, chosen: matrix.Choice, reference: str, folders: tuple[Path, ...]) -> Results:
    """Raises: SystemExit(2) where there is nothing to draw."""
    figure = matrix.FIGURES[name]
    columns = [*drawing.COLUMNS]
    for _, own in figure.panels:
        columns += own
    found = []
    for run in matrix.runs_of("full", chosen.seeds, chosen.tasks, chosen.methods):
        file = find(folders, run)
        if file is not None:
            found.append((run, drawing.read_run(file, columns)))
    if not found:
        places = ", ".join(map(str, folders))
        drawing.die(f"there are no results of {name} in {places}; make them with benchmark/run.py")
    tasks = chosen.tasks
    stretches = []
    if tasks == matrix.CONTINUAL:
        _, longest = max(found, key=lambda own: own[1].end)
        tasks = tuple(longest.tasks)
        stretches = longest.stretches
    runs: drawing.Runs = {}
    for method in chosen.methods:
        runs[matrix.METHODS[method].label] = {task: [] for task in tasks}
    ends = dict.fromkeys(tasks, 0)
    for run, own in found:
        for task, seed in own.tasks.items():
            runs[matrix.METHODS[run.name].label][task or run.task].append(seed)
            ends[task or run.task] = max(ends[task or run.task], own.end)
    finished: drawing.Runs = {label: {} for label in runs}
    for label, task in itertools.product(runs, tasks):
        finished[label][task] = [r for r in runs[label][task] if r["step"][-1] == ends[task]]
    label = matrix.METHODS[reference].label
    return Results(figure, label, tasks, chosen.seeds, runs, finished, stretches)


def normalised(results: Results) -> dict[str, dict[str, np.ndarray]]:
    """{task: {label: (seeds,)}}: final returns in those of the reference.

    Of the methods that have finished runs, and of the tasks on which all of these have some, and
    the reference a positive return.
    """
    returns = {task: results.final(task, RETURN) for task in results.tasks}
    labels = [label for label in results.runs if any(results.finished[label].values())]
    scores = {}
    for task, own in returns.items():
        one = aggregate([own.get(results.reference, ())]).value
        if one > 0 and all(len(own[label]) for label in labels):
            scores[task] = {label: own[label] / one for label in labels}
    return scores


def scores_of(scores: dict[str, dict[str, np.ndarray]], label: str) -> list[np.ndarray]:
    """(seeds,) of each task."""
    return [own[label] for own in scores.values() if label in own]


# --- words --------------------------------------------------------------------
def missing(results: Results) -> list[str]:
    """What a figure from partial data does not show, and what it has and was not asked for."""
    said = []
    for task in results.tasks:
        lacking = []
        for label, own in results.runs.items():
            whole = len(results.finished[label][task])
            unfinished = len(own[task]) - whole
            if whole < results.seeds:
                lacking.append(f"{label} {whole}")
            if unfinished:
                lacking[-1] += f" ({unfinished} more unfinished)"
        if lacking:
            said.append(f"of {results.wanted} on {task}: {', '.join(lacking)}")
    absent = []
    if not results.stretches:
        absent += [task for task in results.figure.tasks if task not in results.tasks]
    labels = [matrix.METHODS[method].label for method in results.figure.methods]
    absent += [label for label in labels if label not in results.runs]
    if absent:
        said.append(f"left out: {', '.join(absent)}")
    if results.seeds < matrix.SEEDS:
        said.append(f"{results.wanted} instead of {matrix.SEEDS}")
    return said


def caption(results: Results) -> str:
    """What is shown and what is missing."""
    tasks = list(normalised(results))  # of the bars
    crowded = len(results.runs) > drawing.CROWD
    few = results.is_few()
    if crowded:
        text = "Lines: interquartile mean over seeds. "
    else:
        text = "Thick: interquartile mean over seeds, shaded: its 95% interval (stratified "
        text += "bootstrap), thin: single seeds. "
    if few:
        text += "Of fewer than four values it is the plain mean"
        text += ". " if crowded else " and the shaded interval their range. "
    if tasks:
        text += "Bars: mean return over the last tenth of a run"
        if few:
            text += ", dots: single seeds"
        elif crowded:
            text += ", with its 95% interval (stratified bootstrap)"
        text += f", divided by {results.reference}'s, which is taken as known"
        text += ". " if tasks == list(results.tasks) else f", on {', '.join(tasks)} only. "
    else:
        text += "No bars: no task has finished runs of all methods shown and a positive return of "
        text += f"{results.reference}. "
    gaps = missing(results)
    if not gaps:
        return text + "Nothing is missing."
    return text + f"MISSING: {'; '.join(gaps)}."


# --- tables -------------------------------------------------------------------
def shares(results: Results, label: str, panel: Panel) -> str:
    """Interquartile means of the panel's columns over the finished runs of all tasks."""
    cells = []
    for column in panel.columns:
        pooled = np.concatenate([results.final(task, column)[label] for task in results.tasks])
        cells.append(f"{iqm(pooled):.2f}" if len(pooled) else "–")
    return " / ".join(cells)


def table(results: Results) -> str:
    """Markdown: final return on each task, aggregate, active ratios and density."""
    scores = normalised(results)
    head = ["", *results.tasks, f"normalised by {results.reference}"]
    head += ["active ratio τ = 0.1, critics / actor", "density, critics / actor", "seeds"]
    lines = []
    for label in results.runs:
        line = [label]
        for task in results.tasks:
            line.append(f"{aggregate([results.final(task, RETURN)[label]]):,.0f}")
        line.append(f"{aggregate(scores_of(scores, label)):.2f}")
        line.append(shares(results, label, drawing.RATIO))
        line.append(shares(results, label, drawing.DENSITY))
        line.append(", ".join(str(len(runs)) for runs in results.finished[label].values()))
        lines.append(line)
    return markdown(head, lines)


def differences(columns: list[tuple], reference: str) -> str:
    """Markdown: differences from the reference.

    Columns are (title, {label: (seeds,)}, format) and, if needed, what compares two of its values;
    p is of no difference, corrected for the number of methods (Holm).
    """
    head = ["95% interval (Welch)"]
    cells = {label: [label] for label in columns[0][1] if label != reference}
    for title, values, spec, *compare in columns:
        head += [f"{title}, minus {reference}", "p"]
        compared = versus(values, reference, spec, *compare)
        for label, row in cells.items():
            row += compared[label]
    return markdown(head, cells.values())


def spreads(results: Results) -> str:
    """Markdown: standard deviations of the final returns, and their ratios to the reference's.

    The interval is of an F test, p of Levene's, corrected for the number of methods (Holm).
    """
    head = ["standard deviation over seeds, 95% interval (F test), p (Levene)"]
    cells = {label: [label] for label in results.runs}
    for task in results.tasks:
        head += [task, f"divided by {results.reference}'s", "p"]
        values = results.final(task, RETURN)
        ratios = versus(values, results.reference, ".2f", ratio_of_spreads)
        for label, own in values.items():
            spread = f"{own.std(ddof=1):,.0f}" if len(own) > 1 else "–"
            cells[label] += [spread, *ratios[label]]
    return markdown(head, cells.values())


def page_of(results: Results) -> str:
    """All tables, and the caption."""
    tables = [table(results)]
    if results.reference in results.runs:
        columns = []
        for task in results.tasks:
            columns.append((task, results.final(task, RETURN), "z,.0f"))  # z: no "-0"
            for network, column in zip(drawing.NETWORKS, drawing.RATIO.columns, strict=True):
                ratios = results.final(task, column)
                columns.append((f"{task}, {network}: active ratio", ratios, "z.2f"))
        scores = normalised(results)
        if len(scores) > 1:
            means = {}
            for label in results.runs:
                # `estimate` adds the tasks' means; without runs there is none
                own = scores_of(scores, label) or [np.array([])]
                means[label] = [values / len(scores) for values in own]
            columns.append(("mean of the normalised", means, "z.2f", estimate))
        tables += [differences(columns, results.reference), spreads(results)]
    return "\n".join([*tables, f"{caption(results)}\n"])


# --- drawing ------------------------------------------------------------------
def draw_bar(ax, place: int, scores: list[np.ndarray], few: bool) -> None:
    """A method's aggregate with its number, and its interval or, if seeds are few, each of them."""
    own = aggregate(scores)
    ax.barh(place, own.value, color=COLOURS[place], alpha=0.4, height=0.6)
    shown = [own.low, own.high]
    style = {"color": "black", "linewidth": 1.2, "marker": "|", "markersize": 6}
    if few:
        shown = np.concatenate(scores)
        style |= {"linewidth": 0, "marker": "o", "markersize": 3}
    ax.plot(shown, [place] * len(shown), **style)
    style = {"va": "center", "fontsize": 9, "textcoords": "offset points"}
    ax.annotate(f"{own.value:.2f}", (0, place), (4, 0), **style)


def draw_bars(ax, results: Results) -> None:
    """The aggregate, one bar per method; dots in all of them where one has few seeds."""
    scores = normalised(results)
    for place, label in enumerate(results.runs):
        if any(results.finished[label].values()):
            draw_bar(ax, place, scores_of(scores, label), results.is_few())
        else:
            ax.text(0, place, " no finished run", va="center", fontsize=8, color="grey")
    names = [textwrap.fill(label, 18) for label in results.runs]
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    ax.set_xlabel(f"final return, {results.reference} = 1")
    ax.spines[["top", "right"]].set_visible(False)


def picture(results: Results) -> Figure:
    """A column per task, a single one for a sequence of tasks, and the bars."""
    panels = [drawing.RETURN, *drawing.apart([drawing.RATIO, drawing.DENSITY])]
    if results.figure.panels:
        panels = [Panel(*panel) for panel in results.figure.panels]
    tasks = []
    for task in results.tasks:
        if any(own[task] for own in results.runs.values()):
            tasks.append(task)
    grid = [list(itertools.product(tasks, [panel])) for panel in panels]
    if results.stretches:
        grid = drawing.grid_of(tasks, panels[1:])
    columns = len(grid[0])
    widths = [4.2 if columns > 1 else 6.3] * columns  # inches
    if normalised(results):
        widths.append(4.2)
    height = max(2.1 * len(grid), 3) + 1.3
    shown = (results.runs, results.finished, results.stretches)
    content = drawing.Content(grid, *shown, results.figure.steps)
    title, text = results.figure.title, caption(results)
    figure, part, places = drawing.picture(content, title, text, widths, height, fontsize=9)
    if normalised(results):
        draw_bars(part.add_subplot(places[:, -1]), results)
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
    if reference is not None and reference not in chosen.methods:
        drawing.die(f"--reference must be of {', '.join(chosen.methods)}, got {reference}")
    folders = results or (Path("runs") / chosen.length,)
    reference = reference or matrix.FIGURES[name].reference
    found = read(name, chosen, reference, folders)
    page = page_of(found)
    save = functools.partial(drawing.save, picture(found))
    files = {out: save, out.with_suffix(".svg"): save}
    files[out.with_suffix(".md")] = lambda file: file.write_text(page)
    drawing.write(files)
