"""Figures from the results.csv files of runs.

Run:   python benchmark/plot.py curves "NE=runs/a,runs/b" "TD3=runs/c" --out curves.png
       python benchmark/plot.py continual "NE=runs/a,runs/b" "TD3=runs/c" --out continual.png
       python benchmark/plot.py topology runs/a --gif masks.gif    what NE did in one run
       python benchmark/plot.py figure6    from the runs of benchmark/run.py;
                                           likewise the other figures of matrix.py
"""

import functools
import itertools
import sys
from pathlib import Path

import numpy as np
import tyro
from tyro.conf import Positional

import drawing
import figures
import matrix
import topology_picture
from estimates import estimate

ROOT = Path(__file__).resolve().parent.parent


def metrics_page(labels: dict[str, list[drawing.Run]], end: float) -> str:
    """Markdown: returns and metrics of the runs that are at the last step.

    Means over tasks, returns also by task; and differences from the first label (Welch, Holm).
    """
    sys.path.insert(0, str(ROOT))
    from ne_td3_continual import continual_metrics  # takes seconds that other runs need not wait

    values: dict[str, dict] = {}  # {metric: {label: (seeds,)}}
    for label, seeds in labels.items():
        for run in seeds:
            if run.end < end:
                continue
            metrics = continual_metrics(run.rows)
            returns = metrics["average performance"]
            own = {f"return on {task}": returns[task] for task in run.tasks}
            own |= {name: metrics[name]["mean"] for name in metrics}
            for name, value in own.items():
                seen = values.setdefault(name, {}).get(label, [])
                values[name][label] = np.append(seen, value)
    rows = []
    for label, seeds in values["average performance"].items():
        cells = [f"{estimate([own[label]]):z,.0f}" for own in values.values()]  # z: no "-0"
        rows.append([label, *cells, str(len(seeds))])
    page = drawing.markdown(["mean, 95% interval", *values, "seeds"], rows)
    if len(rows) > 1:
        columns = [(name, own, "z,.0f") for name, own in values.items()]
        page += "\n" + figures.differences(columns, rows[0][0])
    return page


def curves(
    runs: Positional[tuple[str, ...]],
    /,
    out: Path,
    title: str = "",
    note: str = "",
    split: bool = False,
    frames: bool = False,
    svg: bool = False,
):
    """Evaluation return, active ratio and density over environment steps.

    Of runs over a sequence of tasks: return on every task and active ratio (Figures 8 and 9), and
    beside the PNG a table of the returns at the end and the metrics of a sequence
    (docs/ne_td3_continual.md), of the runs that have come as far as the longest.

    Args:
        runs: LABEL=PATH[,PATH...]; a PATH is a run's folder, a CSV file or a glob; several are
            seeds of one label, which ends at the first =
        out: where the PNG goes
        title: title of the figure
        note: a sentence below the figure
        split: panels of their own for critics and actor, which suits many labels
        frames: the axis counts frames, as runs from pixels do; where args.json lies beside the
            results this is known without the flag
        svg: also write an SVG beside the PNG
    """
    drawing.check_picture(out)
    labels = drawing.read_runs(runs)
    every = list(itertools.chain(*labels.values()))
    longest = max(every, key=lambda run: run.end)
    frames = frames or any(run.frames for run in every)
    steps = "environment frames" if frames else "environment steps"
    panels = [drawing.RATIO] if longest.stretches else [drawing.RATIO, drawing.DENSITY]
    if split:
        panels = drawing.apart(panels)
    grid = drawing.grid_of(longest.tasks, panels)
    width, height = 7, 2.4 * len(grid) + 0.8  # inches
    if longest.stretches:
        width, height = 9, 2 * len(grid) + 2
    seeds: drawing.Runs = {label: {} for label in labels}
    for label, task in itertools.product(labels, longest.tasks):
        seeds[label][task] = [run.tasks[task] for run in labels[label]]
    content = drawing.Content(grid, seeds, seeds, longest.stretches, steps)
    figure, _, _ = drawing.picture(content, title, note, [width], height)
    files = {out: functools.partial(drawing.save, figure)}
    if svg:
        files[out.with_suffix(".svg")] = files[out]
    if len(longest.stretches) >= len(longest.tasks):
        page = metrics_page(labels, longest.end)
        files[out.with_suffix(".md")] = lambda file: file.write_text(page)
    drawing.write(files)


def main() -> None:
    commands = {}
    for name in ("curves", "continual"):
        commands[name] = functools.partial(curves, out=Path(f"{name}.png"))
    commands["topology"] = topology_picture.topology
    for name in matrix.FIGURES:
        commands[name] = functools.partial(figures.figure, name)
    tyro.extras.subcommand_cli_from_dict(commands)


if __name__ == "__main__":
    main()
