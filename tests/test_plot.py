"""benchmark/plot.py: what curves, continual and topology draw, and say about bad input."""

import csv
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import drawing
import plot
import topology_picture
from helpers import assert_one_line, call

COLUMNS = ["step", *drawing.COLUMNS]


def write_rows(folder: Path, rows: list[dict], columns: list[str] = COLUMNS) -> Path:
    """A run's folder; what a row does not say is 0.5."""
    folder.mkdir(parents=True)
    with open(folder / "results.csv", "w", newline="") as file:
        table = csv.DictWriter(file, columns, restval=0.5)
        table.writeheader()
        table.writerows(rows)
    return folder


def write_run(folder: Path, steps: list[int], value: float = 0.5) -> Path:
    """The return is value * step."""
    rows = [{"step": step, "eval/return_mean": value * step} for step in steps]
    return write_rows(folder, rows)


def write_continual(
    folder: Path, steps=(0, 100, 200, 300, 400), tasks=("Big-v1", "Small-v1"), value=0.5
) -> Path:
    """Tasks are trained in turn, 200 steps each.

    The return is value * step on the first task, minus that on others.
    """
    rows = []
    for step, task in itertools.product(steps, tasks):
        stretch = max(step - 1, 0) // 200
        sign = 1 if task == tasks[0] else -1
        row = {"step": step, "task_evaluated": task, "eval/return_mean": sign * value * step}
        row["task_trained"] = tasks[stretch % len(tasks)]
        rows.append(row | {"cycle": 1 + stretch // len(tasks)})
    return write_rows(folder, rows, [*COLUMNS, "cycle", "task_trained", "task_evaluated"])


def refused(result: tuple, *words: str) -> None:
    """Exit code 2 and one line."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert_one_line(err, *words)


def texts(svg: Path) -> list[str]:
    return re.findall(r"<!-- (.*?) -->", svg.read_text())


# --- curves -------------------------------------------------------------------
def test_curves_writes_png_and_svg(tmp_path, monkeypatch, capsys):
    for seed in (1, 2):
        write_run(tmp_path / f"ne_{seed}", [5000, 10000, 15000][: seed + 1], value=seed / 2)
    dense = write_run(tmp_path / "dense", [5000])  # a single point must be visible too
    out = tmp_path / "new" / "curves.png"
    runs = (f"5 $ and $\\nope$={tmp_path}/ne_*", f"dense={dense}/results.csv")
    more = ("--title", "$\\neither$", "--note", "one seed: shows that it runs", "--svg")
    _, said, _ = call(capsys, plot, "curves", *runs, "--out", out, *more)
    svg = out.with_suffix(".svg")
    assert said.splitlines() == [f"wrote {out}", f"wrote {svg}"]
    said = texts(svg)
    for text in ("5 $ and $\\nope$", "$\\neither$", more[3], "environment steps", "actor"):
        assert said.count(text) == 1


def test_the_mean_is_over_the_steps_that_all_seeds_have(tmp_path):
    a = write_run(tmp_path / "a", [1000, 2000, 3000, 4000], value=1)
    b = write_run(tmp_path / "b", [2000, 3000], value=3)
    runs = drawing.read_runs([f"NE={a}", f"NE={b}"])["NE"]  # a label given twice
    seeds = [run.tasks[""] for run in runs]
    look = {"color": "red", "linewidth": 2}
    ax = Figure().subplots()
    drawing.draw(ax, seeds, seeds, "eval/return_mean", bands=True, **look)
    mean = max(ax.lines, key=lambda line: line.get_linewidth())
    np.testing.assert_array_equal(mean.get_xydata(), [[2000, 4000], [3000, 6000]])
    assert len(ax.lines) == 3  # each seed, too
    (band,) = ax.collections
    assert band.get_paths()[0].get_extents().extents.tolist() == [2000, 2000, 3000, 9000]


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ("no-equals-sign", "LABEL=PATH"),
        ("NE=absent", "no results at absent: name a run's folder"),
        ("NE=short", "no column ne/actor/density"),
        ("NE=empty", "no rows"),
        ("NE=cut", "cut/results.csv is damaged: a row of it is not complete"),
        ("NE=good,other", "no step in common"),
        ("NE=good,sequence", "must have the same tasks: good/results.csv has one, sequence/"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, run, says):
    monkeypatch.chdir(tmp_path)
    write_run(Path("good"), [1000, 2000])
    write_run(Path("other"), [1500])
    write_rows(Path("short"), [{"step": 1}], COLUMNS[:-1])
    write_run(Path("empty"), [])
    cut = write_run(Path("cut"), [1000, 2000]) / "results.csv"
    cut.write_text(cut.read_text()[:-10])
    write_continual(Path("sequence"))
    for command in ("curves", "continual"):
        refused(call(capsys, plot, command, run), says)
    assert not list(Path().glob("*.png"))


# --- continual ----------------------------------------------------------------
def test_a_sequence_is_read_task_by_task(tmp_path):
    folder = write_continual(tmp_path / "a", (0, 100, 200, 300, 400, 500))
    run = drawing.read_run(folder / "results.csv", drawing.COLUMNS)
    assert run.stretches == [(0, 200, "Big-v1"), (200, 400, "Small-v1"), (400, 500, "Big-v1")]
    assert list(run.tasks) == ["Big-v1", "Small-v1"] and run.end == 500
    assert run.tasks["Small-v1"]["step"].tolist() == [0, 100, 200, 300, 400, 500]
    assert run.tasks["Small-v1"]["eval/return_mean"].tolist() == [0, -50, -100, -150, -200, -250]


# --- topology -----------------------------------------------------------------
ROUNDS = [100, 200, 300, 400]
LAYERS = {"actor": [(6, 4), (5, 6), (2, 5)], "critic": [(6, 5), (8, 6), (1, 8)] * 2}


def synthetic_mask(shape: tuple[int, int], n: int) -> np.ndarray:
    """The first n + 1 of 6 columns of each row, repeated: a density that grows with n."""
    n_out, n_in = shape
    columns = np.arange(n_in) % 6
    return np.tile(columns <= n, (n_out, 1)).astype(np.float32)


def write_masks(folder: Path, tags: dict = LAYERS, steps: tuple = (0, *ROUNDS)) -> None:
    writer = SummaryWriter(str(folder))
    for n, step in enumerate(steps):
        for network, shapes in tags.items():
            for layer, shape in enumerate(shapes):
                tag = f"masks/{network}/{layer}"
                writer.add_image(tag, torch.from_numpy(synthetic_mask(shape, n))[None], step)
    writer.close()


def write_ne_run(folder: Path) -> Path:
    """Rows at 150, 250, 300 and 450; networks have grown 10 n, pruned n at the n-th of them."""
    rows = []
    for n, step in enumerate((150, 250, 300, 450), 1):
        row = {"step": step, "eval/return_mean": 5 * n, "ne/review_epsilon": 1 / n}
        row["ne/review_share"] = 0.1 * n
        for network in ("actor", "critic"):
            row |= {f"ne/{network}/grown": 10 * n, f"ne/{network}/pruned": n}
            row |= {f"ne/{network}/dormant": n}
        rows.append(row)
    return write_rows(folder, rows, list(rows[0]))


@pytest.fixture(scope="module")
def ne_run(tmp_path_factory) -> Path:
    run = write_ne_run(tmp_path_factory.mktemp("ne") / "run")
    write_masks(run)
    return run


def test_masks_are_read_from_the_events(ne_run):
    masks = topology_picture.read_masks(ne_run)
    assert [len(masks[network]) for network in ("actor", "critic")] == [3, 3]
    for network, layers in masks.items():
        for layer, shape in zip(layers, LAYERS[network], strict=False):
            assert list(layer) == [0, *ROUNDS]
            for n, mask in enumerate(layer.values()):
                np.testing.assert_array_equal(mask, synthetic_mask(shape, n))
    assert topology_picture.middle(masks["critic"])[0].shape == (8, 6)


def test_of_a_run_that_is_resumed_or_at_work_what_all_layers_have_is_drawn(tmp_path):
    write_masks(tmp_path)
    write_masks(tmp_path, steps=(100, 200))  # by a resumed run, another mask
    write_masks(tmp_path, {"actor": LAYERS["actor"]}, steps=(500,))  # the critic's are to come
    masks = topology_picture.read_masks(tmp_path)
    for layer in masks["actor"] + masks["critic"]:
        assert list(layer) == [0, *ROUNDS]
    np.testing.assert_array_equal(masks["critic"][1][100], synthetic_mask((8, 6), 0))


def test_births_are_counted_per_round():
    steps, counts = np.array([50.0, 150, 250, 300, 350]), np.array([0.0, 10, 20, 26, 26])
    changes = topology_picture.per_round(steps, counts, [100, 160, 170, 300])
    np.testing.assert_array_equal(changes, [np.nan, 10, 5, 6, np.nan])


def test_topology_draws_what_the_run_holds(ne_run, tmp_path, monkeypatch, capsys):
    data = drawing.read_run(ne_run / "results.csv", topology_picture.COLUMNS)
    axes = topology_picture.picture(data, topology_picture.read_masks(ne_run), "a $ run").axes
    panels = {}
    for ax in axes:
        panels[ax.get_title()] = {line.get_label(): line.get_ydata() for line in ax.lines}
    assert list(panels)[:4] == ["birth: 17%", "step 200: 50%", "step 300: 67%", "step 400: 83%"]
    density = panels["density per layer"]
    np.testing.assert_allclose(density["critic 1, layer 2"], np.arange(1, 6) / 6)
    assert len(density) == 6
    changes = panels["connections born and pruned per round"]
    np.testing.assert_array_equal(changes["actor: born"], [10, 10, 10, 10])
    np.testing.assert_array_equal(changes["critic: pruned"], [1, 1, 1, 1])

    out, gif = tmp_path / "new" / "topology.png", tmp_path / "masks.gif"
    _, said, _ = call(capsys, plot, "topology", ne_run, "--out", out, "--gif", gif)
    assert said.splitlines() == [f"wrote {out}", f"wrote {gif}"]
    assert imread(out).shape[1] == 1350  # 900 pixels, one and a half times as sharp
    with Image.open(gif) as animation:
        assert animation.format == "GIF" and animation.n_frames == len(ROUNDS) + 1


def test_bad_runs_for_topology_are_one_line_and_exit_code_2(ne_run, tmp_path, monkeypatch, capsys):
    dense = write_run(tmp_path / "dense", [1000])
    without = write_ne_run(tmp_path / "without")
    write_masks(without, {"actor": LAYERS["actor"]})
    cases = {
        dense: "has no column ne/review_epsilon, ne/review_share",
        without: "no pictures of the critic's masks",
    }
    out = ("--out", tmp_path / "out.png")
    for run, says in cases.items():
        refused(call(capsys, plot, "topology", run, *out), says)
    assert not out[1].exists()
