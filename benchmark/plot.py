"""Figures from the results.csv files of runs.

Run:   python benchmark/plot.py curves "NE=runs/a,runs/b" "TD3=runs/c" --out curves.png
       python benchmark/plot.py continual "NE=runs/a,runs/b" "TD3=runs/c" --out continual.png
       python benchmark/plot.py topology runs/a --gif masks.gif    what NE did in one run
       python benchmark/plot.py figure6    from the runs of benchmark/run.py;
                                           likewise the other figures of matrix.py
"""

import functools
import signal
import sys
from pathlib import Path

import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tyro.conf import Positional

import drawing
import figures
import topology_picture
from drawing import Seed, die


def draw(ax, seeds: list[Seed], column: str, pen: drawing.Pen) -> None:
    """Mean over seeds, thick; of several seeds also each, faint, and their range, shaded."""
    steps, values = drawing.on_common_steps(seeds, column)
    if len(seeds) > 1 and pen.bands:
        drawing.draw_band(ax, steps, values.min(0), values.max(0), pen)
        for seed in seeds:
            drawing.draw_seed(ax, seed, column, pen)
    drawing.draw_line(ax, steps, values.mean(0), pen)


def draw_panel(ax, labels: dict[str, list[Seed]], panel: drawing.Panel) -> None:
    """One panel: the columns of every label, the first solid and the second dashed."""
    for place, (label, seeds) in enumerate(labels.items()):
        steps, _ = drawing.on_common_steps(seeds, panel.columns[0])
        if not len(steps):
            die(f"the seeds of {label} have no step in common")
        for column, style in zip(panel.columns, drawing.STYLES, strict=False):
            pen = drawing.pen_of(place, len(labels), column, style)
            draw(ax, seeds, column, pen)
    ax.set_ylabel(panel.label)
    drawing.dress(ax, panel.columns)


def finish(part, axes, labels: dict[str, list], title: str, dashed: bool, frames: bool) -> None:
    """What all panels have in common; with `dashed` the legend says whose lines are dashed."""
    axes[-1].set_xlabel("environment frames" if frames else "environment steps")
    part.align_ylabels(axes)
    handles = []
    for label, colour in zip(labels, drawing.COLOURS, strict=False):
        handles.append(Line2D([], [], color=colour, linewidth=2, label=label))
    if dashed:
        for name, style in zip(("critics", "actor"), drawing.STYLES, strict=True):
            line = Line2D([], [], color="grey", linewidth=2, linestyle=style, label=name)
            handles.append(line)
    part.suptitle(title)
    columns = min(len(handles), 4)
    part.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def write(figure: Figure, out: Path, svg: bool) -> None:
    save = functools.partial(drawing.save, figure)
    files = {out: save}
    if svg:
        files[out.with_suffix(".svg")] = save
    drawing.write(files)


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
    finish(part, axes, labels, title, not split, frames)
    write(figure, out, svg)


def require_same_tasks(runs: list[drawing.Continual]) -> None:
    """Raises: SystemExit(2)."""
    sequences = dict.fromkeys(", ".join(run.tasks) for run in runs)
    if len(sequences) > 1:
        die(f"all runs must have the same tasks, got {' and '.join(sequences)}")


def continual(
    runs: Positional[tuple[str, ...]],
    /,
    out: Path = Path("continual.png"),
    title: str = "",
    note: str = "",
    svg: bool = False,
):
    """Return on every task and active ratio over a sequence of tasks (Figures 8 and 9).

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
    draw_panel(axes[-1], own, drawing.RATIO)  # the same in the rows of all tasks
    drawing.draw_stretches(axes[-1], longest.stretches, "", named=False)
    finish(part, axes, labels, title, dashed=True, frames=False)
    write(figure, out, svg)


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
