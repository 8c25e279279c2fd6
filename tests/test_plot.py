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
