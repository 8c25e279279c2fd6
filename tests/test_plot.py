"""benchmark/plot.py: means over seeds, the picture it writes, and what it says about bad input."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from benchmark import plot

SCRIPT = Path(plot.__file__)
COLUMNS = ["step", *(column for _, columns in plot.PANELS for column in columns)]


def write_run(folder: Path, steps: list[int], value: float = 0.5, columns: list[str] = COLUMNS) -> Path:
    """A run's folder whose columns all hold `value`, except for the return, which is value * step."""
    folder.mkdir()
    with open(folder / "results.csv", "w", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        for step in steps:
            table.writerow(dict.fromkeys(COLUMNS, value) | {"step": step, "eval/return_mean": value * step})
    return folder


def run_plot(*args: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, "curves", *map(str, args)], capture_output=True, text=True)


def test_curves_writes_png_and_svg(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"ne_{seed}", [5000, 10000, 15000][: seed + 1], value=seed / 2)
    dense = write_run(tmp_path / "dense", [5000])  # a single point must be visible too
    out = tmp_path / "new" / "curves.png"
    done = run_plot(f"NE={tmp_path}/ne_*", f"dense={dense}/results.csv", "--out", out, "--title", "Task-v5", "--svg")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"wrote {out}", f"wrote {out.with_suffix('.svg')}"]
    height, width = imread(out).shape[:2]
    assert 600 < width < 3000 and 600 < height < 3000
    colours = {tuple(c) for c in (imread(out)[..., :3].reshape(-1, 3) * 255).round().astype(int)}
    for colour in plot.COLOURS[:2]:
        assert tuple(bytes.fromhex(colour[1:])) in colours
    svg = out.with_suffix(".svg").read_text()
    assert svg.count("<!-- NE -->") == 1 and svg.count("<!-- environment steps -->") == 1


def test_mean_is_over_the_steps_that_all_seeds_have(tmp_path):
    a = write_run(tmp_path / "a", [1000, 2000, 3000, 4000], value=1)
    b = write_run(tmp_path / "b", [2000, 3000], value=3)
    seeds = plot.read_runs([f"NE={a},{b}"], COLUMNS[1:])["NE"]
    steps, values = plot.on_common_steps(seeds, "eval/return_mean")
    assert steps.tolist() == [2000, 3000]
    assert values.tolist() == [[2000, 3000], [6000, 9000]]

    ax = plot.Figure().subplots()
    plot.draw(ax, seeds, "eval/return_mean", "black", "-")
    mean = max(ax.lines, key=lambda line: line.get_linewidth())
    np.testing.assert_array_equal(mean.get_xydata(), [[2000, 4000], [3000, 6000]])
    assert len(ax.lines) == 3 and len(ax.collections) == 1  # each seed, the mean, the range


def test_label_given_twice_collects_seeds(tmp_path):
    a, b = write_run(tmp_path / "a", [1]), write_run(tmp_path / "b", [1])
    assert len(plot.read_runs([f"NE={a}", f"NE={b}"], COLUMNS)["NE"]) == 2


@pytest.mark.parametrize(
    ("step", "label"),
    [(0, "0"), (500, "500"), (2500, "2.5k"), (50_000, "50k"), (1_000_000, "1M"), (1_250_000, "1.25M")],
)
def test_step_labels(step, label):
    assert plot.step_label(step) == label


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ("no-equals-sign", "LABEL=PATH"),
        ("=runs/a", "LABEL=PATH"),
        ("NE=", "LABEL=PATH"),
        ("NE={tmp}/good,", "LABEL=PATH"),
        ("NE={tmp}/absent", "no results at"),
        ("NE={tmp}/abs*", "no results at"),
        ("NE={tmp}/short", "no column ne/actor/density"),
        ("NE={tmp}/empty", "no rows"),
        ("NE={tmp}/text", "not a number"),
        ("NE={tmp}/backwards", "do not increase"),
        ("NE={tmp}/good,{tmp}/other", "no step in common"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, run, says):
    write_run(tmp_path / "good", [1000, 2000])
    write_run(tmp_path / "other", [1500])
    write_run(tmp_path / "short", [1000], columns=COLUMNS[:-1])
    write_run(tmp_path / "empty", [])
    write_run(tmp_path / "text", [1000], value="many")
    write_run(tmp_path / "backwards", [2000, 1000])
    with pytest.raises(SystemExit) as stop:
        plot.curves((run.format(tmp=tmp_path),), out=tmp_path / "curves.png")
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "curves.png").exists()


def test_bad_input_from_the_shell(tmp_path):
    for args in ((), ("NE=absent",), (f"NE={write_run(tmp_path / 'a', [1])}", "--out", tmp_path / "curves.pdf")):
        done = run_plot(*args)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_split_gives_critics_and_actor_panels_of_their_own(tmp_path):
    run = write_run(tmp_path / "run", [5000, 10000])
    done = run_plot(f"NE={run}", "--out", tmp_path / "split.png", "--split", "--svg")
    assert done.returncode == 0, done.stderr
    svg = (tmp_path / "split.svg").read_text()
    assert [svg.count(f'<g id="axes_{n}">') for n in range(1, 6)] == [1, 1, 1, 1, 0]
    assert svg.count("critics: active ratio") == svg.count("actor: active ratio") == 1
    columns = [column for _, panel in plot.panels(True) for column in panel]
    assert columns == [column for _, panel in plot.PANELS for column in panel]


# --- continual -----------------------------------------------------------------------------------------------------
CONTINUAL = ["cycle", "task_trained", "task_evaluated"]


def write_continual(folder: Path, steps=(0, 100, 200, 300, 400), tasks=("Big-v1", "Small-v1"), value=0.5) -> Path:
    """Tasks are trained in turn, 200 steps each; the return is value * step on the first task, minus that on others."""
    folder.mkdir()
    with open(folder / "results.csv", "w", newline="") as file:
        table = csv.DictWriter(file, [*COLUMNS, *CONTINUAL])
        table.writeheader()
        for step in steps:
            stretch = max(step - 1, 0) // 200
            trained = {"cycle": 1 + stretch // len(tasks), "task_trained": tasks[stretch % len(tasks)]}
            for task in tasks:
                row = dict.fromkeys(COLUMNS, value) | trained | {"step": step, "task_evaluated": task}
                table.writerow(row | {"eval/return_mean": value * step * (1 if task == tasks[0] else -1)})
    return folder


def test_continual_reads_returns_per_task_and_the_boundaries(tmp_path):
    run = plot.read_continual(write_continual(tmp_path / "a", (0, 100, 200, 300, 400, 500)) / "results.csv", COLUMNS)
    assert run.stretches == [(0, 200, "Big-v1"), (200, 400, "Small-v1"), (400, 500, "Big-v1")]
    assert list(run.tasks) == ["Big-v1", "Small-v1"]
    assert run.tasks["Small-v1"]["step"].tolist() == [0, 100, 200, 300, 400, 500]
    assert run.tasks["Small-v1"]["eval/return_mean"].tolist() == [0, -50, -100, -150, -200, -250]


def test_continual_shades_where_a_task_is_trained():
    ax = plot.Figure().subplots()
    plot.draw_stretches(ax, [(0, 200, "Big-v1"), (200, 400, "Small-v1"), (400, 500, "Big-v1")], "Big-v1", named=True)
    assert [line.get_xdata()[0] for line in ax.lines] == [200, 400, 500]
    assert [(patch.get_x(), patch.get_width()) for patch in ax.patches] == [(0, 200), (400, 100)]
    assert [(text.get_text(), text.get_position()[0]) for text in ax.texts] == [
        ("Big-v1", 100),
        ("Small-v1", 300),
        ("Big-v1", 450),
    ]


def test_continual_writes_png_and_svg(tmp_path):
    a, b = write_continual(tmp_path / "ne_1"), write_continual(tmp_path / "ne_2", value=0.7)
    other, out = write_continual(tmp_path / "td3", value=0.3), tmp_path / "continual.png"
    args = [f"NE={a},{b}", f"TD3={other}", "--out", out, "--title", "Two tasks", "--svg"]
    done = subprocess.run([sys.executable, SCRIPT, "continual", *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"wrote {out}", f"wrote {out.with_suffix('.svg')}"]
    colours = {tuple(c) for c in (imread(out)[..., :3].reshape(-1, 3) * 255).round().astype(int)}
    for colour in plot.COLOURS[:2]:
        assert tuple(bytes.fromhex(colour[1:])) in colours
    svg = out.with_suffix(".svg").read_text()
    for text, times in (("NE", 1), ("TD3", 1), ("Big-v1", 2), ("Small-v1", 2), ("environment steps", 1)):
        assert svg.count(f"<!-- {text} -->") == times, text  # a task: above its stretch and at its panel


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ("no-equals-sign", "LABEL=PATH"),
        ("NE={tmp}/absent", "no results at"),
        ("NE={tmp}/single", "no column cycle, task_trained, task_evaluated"),
        ("NE={tmp}/good,{tmp}/foreign", "all runs must have the same tasks, got Big-v1, Small-v1 and Big-v1, Other-v1"),
        ("NE={tmp}/good,{tmp}/later", "no step in common"),
        ("NE={tmp}/cut", "does not evaluate the same tasks at each step"),
        ("NE={tmp}/backwards", "do not increase"),
    ],
)
def test_bad_continual_input_is_one_line_and_exit_code_2(tmp_path, capsys, run, says):
    write_run(tmp_path / "single", [1000])
    write_continual(tmp_path / "good")
    write_continual(tmp_path / "foreign", tasks=("Big-v1", "Other-v1"))
    write_continual(tmp_path / "later", (50, 150))
    write_continual(tmp_path / "backwards", (100, 50))
    cut = write_continual(tmp_path / "cut") / "results.csv"
    cut.write_text("".join(cut.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(SystemExit) as stop:
        plot.continual((run.format(tmp=tmp_path),), out=tmp_path / "continual.png")
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "continual.png").exists()
