"""Figures from the results.csv files of runs.

Run:   python benchmark/plot.py curves "NE=runs/a,runs/b" "TD3=runs/c" --out curves.png
       python benchmark/plot.py continual "NE=runs/a,runs/b" "TD3=runs/c" --out continual.png
       python benchmark/plot.py topology runs/a --gif masks.gif    what NE did in one run
       python benchmark/plot.py figure6    from the runs of benchmark/run.py;
                                           likewise the other figures of matrix.py
"""

import functools
import importlib
import signal
import sys
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from tyro.conf import Positional

import drawing
import figures
import topology_picture
from drawing import Seed, die
from estimates import estimate, versus

ROOT = Path(__file__).resolve().parent.parent


def draw(ax, seeds: list[Seed], column: str, pen: drawing.Pen) -> None:
    """Mean over seeds, thick; of several seeds also each, faint, and their range, shaded."""
    steps, values = drawing.on_common_steps(seeds, column)
    if len(seeds) > 1 and pen.bands:
        drawing.draw_band(ax, steps, values.min(0), values.max(0), pen)
        for seed in seeds:
            drawing.draw_seed(ax, seed, column, pen)
    drawing.draw_line(ax, steps, values.mean(0), pen)


def draw_panel(ax, labels: dict[str, list[Seed]], panel: drawing.Panel, bands: bool = True) -> None:
    """One panel: the columns of every label, the first solid and the second dashed."""
    for place, (label, seeds) in enumerate(labels.items()):
        steps, _ = drawing.on_common_steps(seeds, panel.columns[0])
        if not len(steps):
            die(f"the seeds of {label} have no step in common")
        for column, style in zip(panel.columns, drawing.STYLES, strict=False):
            pen = drawing.pen_of(place, len(labels), column, style)
            draw(ax, seeds, column, pen._replace(bands=pen.bands and bands))
    ax.set_ylabel(panel.label)
    drawing.dress(ax, panel.columns)


def finish(part, axes, labels: dict[str, list], title: str, dashed: bool, more: tuple = ()) -> None:
    """What all panels have in common; with `dashed` the legend says whose lines are dashed.

    `more` are further handles of the legend.
    """
    part.align_ylabels(axes)
    handles = []
    for label, colour in zip(labels, drawing.COLOURS, strict=False):
        handles.append(Line2D([], [], color=colour, linewidth=2, label=label))
    if dashed:
        for name, style in zip(("critics", "actor"), drawing.STYLES, strict=True):
            line = Line2D([], [], color="grey", linewidth=2, linestyle=style, label=name)
            handles.append(line)
    handles += more
    part.suptitle(title)
    columns = min(len(handles), 4)
    part.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def files_of(figure: Figure, out: Path, svg: bool) -> dict:
    """For drawing.write."""
    save = functools.partial(drawing.save, figure)
    files = {out: save}
    if svg:
        files[out.with_suffix(".svg")] = save
    return files


def any_frames(runs: tuple[str, ...]) -> bool:
    """Whether a run says itself that it is from pixels."""
    files = []
    for own in drawing.files_of(list(runs)).values():
        files += own
    return any(drawing.counts_frames(file) for file in files)


def curves(
    runs: Positional[tuple[str, ...]],
    /,
    out: Path = Path("curves.png"),
    title: str = "",
    note: str = "",
    split: bool = False,
    frames: bool = False,
    svg: bool = False,
):
    """Evaluation return, active ratio and density over environment steps.

    Args:
        runs: LABEL=PATH[,PATH...]; a PATH is a run's folder, a CSV file or a glob; several are
            seeds of one label, which ends at the first = after which all paths exist
        out: where the PNG goes
        title: title of the figure
        note: a sentence below the figure
        split: panels of their own for critics and actor, which suits many labels
        frames: the axis counts frames, as runs from pixels do; where args.json lies beside the
            results this is known without the flag
        svg: also write an SVG beside the PNG
    """
    drawing.check_picture(out)
    labels = drawing.read_runs(list(runs), drawing.COLUMNS)
    panels = drawing.panels(split)
    figure, part = drawing.canvas(7, 2.4 * len(panels) + 0.8, note)
    axes = part.subplots(len(panels), sharex=True)
    for ax, panel in zip(axes, panels, strict=True):
        draw_panel(ax, labels, panel)
    frames = frames or any_frames(runs)
    axes[-1].set_xlabel("environment frames" if frames else "environment steps")
    finish(part, axes, labels, title, not split)
    drawing.write(files_of(figure, out, svg))


def require_same_tasks(runs: list[drawing.Continual]) -> None:
    """Raises: SystemExit(2)."""
    sequences = dict.fromkeys(", ".join(run.tasks) for run in runs)
    if len(sequences) > 1:
        die(f"all runs must have the same tasks, got {' and '.join(sequences)}")


def metrics_of(labels: dict[str, list[drawing.Continual]], last: float) -> dict[str, dict]:
    """{metric: {label: (seeds,)}}, means over tasks, of the runs that are at the last step.

    Returns are those at the end, by task.
    """
    sys.path.insert(0, str(ROOT))
    script = importlib.import_module("ne_td3_continual")  # takes seconds, `curves` need not wait
    values: dict[str, dict] = {}
    for label, seeds in labels.items():
        for run in seeds:
            if run.stretches[-1][1] < last:
                continue
            metrics = script.continual_metrics(run.rows)
            returns = metrics["average performance"]
            own = {f"return on {task}": returns[task] for task in run.tasks}
            own |= {name: metrics[name]["mean"] for name in metrics}
            for name, value in own.items():
                values.setdefault(name, {}).setdefault(label, []).append(value)
    for own in values.values():
        own.update({label: np.array(seeds) for label, seeds in own.items()})
    return values


def metrics_page(values: dict[str, dict]) -> str:
    """Markdown: means over seeds, and differences from the first label (Welch, Holm)."""
    labels = list(values["average performance"])  # every metric has all of them
    first = labels[0]
    means_head = ["mean, 95% interval", *values, "seeds"]
    means = []
    for label in labels:
        seeds = [own[label] for own in values.values()]
        cells = [f"{estimate([own]):z,.0f}" for own in seeds]
        means.append([label, *cells, str(len(seeds[0]))])
    head = ["95% interval (Welch)"]
    rows = {label: [label] for label in labels if label != first}
    for name, own in values.items():
        head += [f"{name}, minus {first}", "p"]
        compared = versus(own, first, "z,.0f")
        for label, row in rows.items():
            row += compared[label]
    tables = [drawing.markdown(means_head, means)]
    if rows:
        tables.append(drawing.markdown(head, rows.values()))
    return "\n".join(tables)


def continual(
    runs: Positional[tuple[str, ...]],
    /,
    out: Path = Path("continual.png"),
    title: str = "",
    note: str = "",
    svg: bool = False,
):
    """Return on every task and active ratio over a sequence of tasks (Figures 8 and 9).

    Beside the PNG goes a table of the returns at the end and the metrics of a sequence
    (docs/ne_td3_continual.md), of the runs that have come as far as the longest.

    Args:
        runs: LABEL=PATH[,PATH...]; a PATH is a run's folder, a CSV file or a glob; several are
            seeds of one label, which ends at the first = after which all paths exist
        out: where the PNG goes
        title: title of the figure
        note: a sentence below the figure
        svg: also write an SVG beside the PNG
    """
    drawing.check_picture(out)
    columns = [*drawing.RETURN.columns, *drawing.RATIO.columns]
    labels = drawing.read_runs(list(runs), columns, drawing.read_continual)
    every = []
    for seeds in labels.values():
        every += seeds
    require_same_tasks(every)
    longest = max(every, key=lambda run: run.stretches[-1][1])  # draws the boundaries
    tasks = list(longest.tasks)

    figure, part = drawing.canvas(9, 2 * len(tasks) + 4, note)
    axes = part.subplots(len(tasks) + 1, sharex=True)
    for ax, task in zip(axes, tasks, strict=False):
        own = {}
        for label, seeds in labels.items():
            own[label] = [run.tasks[task] for run in seeds]
        draw_panel(ax, own, drawing.Panel(f"{task}\nreturn", drawing.RETURN.columns))
        drawing.draw_stretches(ax, longest.stretches, task, named=ax is axes[0])
    # the same in the rows of all tasks; means only, as it has two lines per label
    draw_panel(axes[-1], own, drawing.RATIO, bands=False)
    drawing.draw_stretches(axes[-1], longest.stretches, "", named=False)
    axes[-1].set_xlabel("environment steps")
    shade = Patch(color="black", alpha=0.08, linewidth=0, label="the task is trained")
    finish(part, axes, labels, title, dashed=True, more=(shade,))
    files = files_of(figure, out, svg)
    if len(longest.stretches) >= len(tasks):
        page = metrics_page(metrics_of(labels, longest.stretches[-1][1]))
        files[out.with_suffix(".md")] = lambda file: file.write_text(page)
    drawing.write(files)


def main() -> None:
    commands = {"curves": curves, "continual": continual}
    commands["topology"] = topology_picture.topology
    for name, figure in figures.SUBCOMMANDS.items():
        commands[name] = figure
    tyro.extras.subcommand_cli_from_dict(commands)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name may not be printable
    main()
