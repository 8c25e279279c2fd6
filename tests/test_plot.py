"""benchmark/plot.py: what curves, continual and topology draw, and say about bad input."""

import csv
import itertools
import json
import re
import sys
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


def call(monkeypatch, *args: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, args)])
    plot.main()


def refusal(monkeypatch, capsys, *args: str | Path) -> str:
    """The one line that a command says before it exits with 2."""
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *args)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


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
    call(monkeypatch, "curves", *runs, "--out", out, *more)
    svg = out.with_suffix(".svg")
    assert capsys.readouterr().out.splitlines() == [f"wrote {out}", f"wrote {svg}"]
    colours = set(map(tuple, np.unique(imread(out).reshape(-1, 4), axis=0)[:, :3]))
    for colour in drawing.COLOURS[:2]:
        rgb = np.float32(list(bytes.fromhex(colour[1:]))) / np.float32(255)
        assert tuple(rgb) in colours
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
    ax = Figure().subplots()
    drawing.draw(ax, seeds, seeds, "eval/return_mean", bands=False, **look)
    (line,) = ax.lines
    assert line.get_marker() == "" and not ax.collections
    point = {"step": np.ones(1), "eval/return_mean": np.ones(1)}
    drawing.draw(ax, [point], [point], "eval/return_mean", bands=True, **look)
    assert ax.lines[1].get_marker() == "o"  # a single point is visible too


@pytest.mark.parametrize(
    ("args", "options", "axis"),
    [
        ({}, {}, "environment steps"),
        ({}, {"frames": True}, "environment frames"),
        ({"frame_size": 84}, {}, "environment frames"),
        ({"total_timesteps": 10}, {}, "environment steps"),
    ],
)
def test_runs_from_pixels_count_frames(tmp_path, args, options, axis):
    run = write_run(tmp_path / "run", [5000, 10000])
    (run / "args.json").write_text(json.dumps(args))
    plot.curves((f"NE={run}",), out=tmp_path / "curves.png", svg=True, **options)
    assert re.findall("environment [a-z]+", (tmp_path / "curves.svg").read_text()) == [axis]


@pytest.mark.parametrize("count", [4, 5])
@pytest.mark.parametrize("panel", [drawing.RETURN, drawing.RATIO, drawing.DENSITY])
def test_lines_of_many_methods_are_thin_and_without_bands(tmp_path, count, panel):
    a, b = write_run(tmp_path / "a", [1, 2]), write_run(tmp_path / "b", [1, 2], value=2)
    seeds = [run.tasks[""] for run in drawing.read_runs([f"NE={a},{b}"])["NE"]]
    runs = {label: {"": seeds} for label in "abcdefgh"[:count]}
    ax = Figure().subplots()
    drawing.draw_panel(ax, drawing.Content([], runs, runs, [], ""), "", panel)
    bands = count == 4 and panel is drawing.RETURN  # nor where each method has two lines
    assert len(ax.collections) == bands * count
    widths = [line.get_linewidth() for line in ax.lines if line.get_alpha() is None]
    assert len(widths) == count * len(panel.columns)
    if panel is drawing.DENSITY:  # of equal densities each shows on both sides of the next
        assert widths[::2] == pytest.approx(np.arange(count, 0, -1) + 0.3)
    else:
        assert set(widths) == {2.0 if count == 4 else 1.3}


@pytest.mark.parametrize(
    ("step", "label"), [(0, "0"), (500, "500"), (2500, "2.5k"), (1_250_000, "1.25M")]
)
def test_step_labels(step, label):
    assert drawing.step_label(step) == label


def test_split_gives_critics_and_actor_panels_of_their_own(tmp_path):
    run = write_run(tmp_path / "run", [5000, 10000])
    plot.curves((f"NE={run}",), out=tmp_path / "split.png", split=True, svg=True)
    svg = (tmp_path / "split.svg").read_text()
    assert '<g id="axes_5">' in svg and '<g id="axes_6">' not in svg
    for label in ("critics: active ratio", "actor: active ratio", "critics: density"):
        assert svg.count(label) == 1
    panels = drawing.apart([drawing.RATIO, drawing.DENSITY])
    columns = [column for panel in panels for column in panel.columns]
    assert ["eval/return_mean", *columns] == drawing.COLUMNS


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ("no-equals-sign", "LABEL=PATH"),
        ("=good", "LABEL=PATH"),
        ("NE=", "LABEL=PATH"),
        ("NE=good,", "no results at"),
        ("NE=absent", "no results at absent: name a run's folder"),
        ("NE=abs*", "no results at abs*"),
        ("NE=short", "no column ne/actor/density"),
        ("NE=empty", "no rows"),
        ("NE=text", "not a number"),
        ("NE=cut", "cut/results.csv is damaged: a row of it is not complete"),
        ("NE=latin", "cannot read latin/results.csv"),
        ("NE=backwards", "do not increase"),
        ("NE=good,other", "no step in common"),
        ("NE=good,sequence", "must have the same tasks: good/results.csv has one, sequence/"),
        ("NE=partial", "does not evaluate the same tasks at each step"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, run, says):
    monkeypatch.chdir(tmp_path)
    write_run(Path("good"), [1000, 2000])
    write_run(Path("other"), [1500])
    write_rows(Path("short"), [{"step": 1}], COLUMNS[:-1])
    write_run(Path("empty"), [])
    write_rows(Path("text"), [{"step": 1, "eval/return_mean": "many"}])
    cut = write_run(Path("cut"), [1000, 2000]) / "results.csv"
    cut.write_text(cut.read_text()[:-10])
    latin = write_run(Path("latin"), [1000]) / "results.csv"
    latin.write_bytes(latin.read_bytes() + b"\xe9")
    write_run(Path("backwards"), [2000, 1000])
    write_continual(Path("sequence"))
    partial = write_continual(Path("partial")) / "results.csv"
    partial.write_text("".join(partial.read_text().splitlines(keepends=True)[:-1]))
    for command in ("curves", "continual"):
        assert says in refusal(monkeypatch, capsys, command, run)
    assert not list(Path().glob("*.png"))


@pytest.mark.parametrize("command", ["curves NE=x", "continual NE=x", "figure6", "topology x"])
def test_an_unknown_picture_format_is_refused(monkeypatch, capsys, command):
    said = refusal(monkeypatch, capsys, *command.split(), "--out", "x.txt")
    assert said == "error: --out must end in .png, got x.txt\n"


def test_no_runs_and_too_many_are_refused(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", [1])
    assert "got 0" in refusal(monkeypatch, capsys, "curves")
    assert "got 9" in refusal(monkeypatch, capsys, "curves", *[f"{n}={run}" for n in range(9)])


# --- continual ----------------------------------------------------------------
def test_a_sequence_is_read_task_by_task(tmp_path):
    folder = write_continual(tmp_path / "a", (0, 100, 200, 300, 400, 500))
    run = drawing.read_run(folder / "results.csv", drawing.COLUMNS)
    assert run.stretches == [(0, 200, "Big-v1"), (200, 400, "Small-v1"), (400, 500, "Big-v1")]
    assert list(run.tasks) == ["Big-v1", "Small-v1"] and run.end == 500
    assert run.tasks["Small-v1"]["step"].tolist() == [0, 100, 200, 300, 400, 500]
    assert run.tasks["Small-v1"]["eval/return_mean"].tolist() == [0, -50, -100, -150, -200, -250]

    ax = Figure().subplots()
    drawing.draw_stretches(ax, run.stretches, "Big-v1", named=True)
    assert [line.get_xdata()[0] for line in ax.lines] == [200, 400, 500]
    assert [(patch.get_x(), patch.get_width()) for patch in ax.patches] == [(0, 200), (400, 100)]
    names = [(text.get_text(), text.get_position()[0]) for text in ax.texts]
    assert names == [("Big-v1", 100), ("Small-v1", 300), ("Big-v1", 450)]


def test_continual_has_a_panel_for_each_task(tmp_path, monkeypatch, capsys):
    a, b = write_continual(tmp_path / "ne_1"), write_continual(tmp_path / "ne_2", value=0.7)
    late = write_continual(tmp_path / "td3", (0, 100), value=0.3)
    out = tmp_path / "continual.png"
    call(monkeypatch, "continual", f"NE={a},{b}", f"TD3={late}", "--out", out, "--svg")
    files = [out, out.with_suffix(".svg"), out.with_suffix(".md")]
    assert capsys.readouterr().out.splitlines() == [f"wrote {file}" for file in files]
    said = texts(files[1])
    for text in ("NE", "TD3", "environment steps", "the task is trained", "return"):
        assert said.count(text) == (2 if text == "return" else 1)
    for task in ("Big-v1", "Small-v1"):
        assert said.count(task) == 2  # above its stretch and at its panel


def test_the_table_of_continual_has_the_metrics_of_runs_that_are_at_the_end(tmp_path):
    for label, values in (("ne", (0.4, 0.5, 0.6)), ("td3", (0.3, 0.2, 0.1))):
        for seed, value in enumerate(values):
            write_continual(tmp_path / f"{label}_{seed}", value=value)
    write_continual(tmp_path / "ne_late", (0, 100, 200, 300), value=9)
    runs = [f"{label}={tmp_path}/{label.lower()}_*" for label in ("NE", "TD3")]
    plot.curves(tuple(runs), out=tmp_path / "continual.png")
    means, differences = (tmp_path / "continual.md").read_text().split("\n\n")
    head, _, ne, td3 = means.splitlines()
    assert head.split(" | ")[1:3] == ["return on Big-v1", "return on Small-v1"]
    # the return on Big is 400 times the value at the end, 200 times at the end of its stretch;
    # on Small it is minus that
    assert ne == (
        "| NE | 200 [101, 299] | -200 [-299, -101] | 0 | -100 [-150, -50] | -100 [-150, -50] | 3 |"
    )
    assert td3.endswith("| -40 [-90, 10] | 3 |")
    cells = differences.splitlines()[2].split(" | ")
    assert cells[0] == "| TD3" and cells[1] == "-120 [-211, -29]"
    plot.curves((f"NE={tmp_path}/ne_late",), out=tmp_path / "one.png")
    assert "| NE | 2,700 | -2,700 | 0 |" in (tmp_path / "one.md").read_text()
    write_continual(tmp_path / "first", (0, 100, 200))
    plot.curves((f"NE={tmp_path}/first",), out=tmp_path / "first.png")
    assert not (tmp_path / "first.md").exists()


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


def write_ne_run(folder: Path, tasks: tuple[str, ...] = ()) -> Path:
    """Rows at 150, 250, 300 and 450; networks have grown 10 n, pruned n at the n-th of them."""
    rows = []
    for (n, step), task in itertools.product(enumerate((150, 250, 300, 450), 1), tasks or ("",)):
        row = {"step": step, "eval/return_mean": 5 * n, "ne/review_epsilon": 1 / n}
        row["ne/review_share"] = 0.1 * n
        for network in ("actor", "critic"):
            row |= {f"ne/{network}/grown": 10 * n, f"ne/{network}/pruned": n}
            row |= {f"ne/{network}/dormant": n}
        if tasks:
            row |= {"cycle": 1, "task_trained": tasks[0], "task_evaluated": task}
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


@pytest.mark.parametrize(
    ("densities", "steps"),
    [
        ([20, 36, 50, 65, 70, 80], [0, 20, 30, 50]),  # 20, 40, 60, 80, or more
        ([20] * 10, [0, 30, 60, 90]),
        ([20, 30], [0, 10]),
    ],
)
def test_birth_and_three_later_times_are_shown(densities, steps):
    layer = {}
    for n, density in enumerate(densities):
        layer[10 * n] = np.arange(100)[None] < density
    assert topology_picture.chosen_steps(layer) == steps


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
    assert panels["dormant neurons (score 0)"]["critics"].tolist() == [1, 2, 3, 4]
    assert panels["experience review"]["ε"].tolist() == [1, 1 / 2, 1 / 3, 1 / 4]
    (returns,) = panels["evaluation return"].values()
    assert returns.tolist() == [5, 10, 15, 20]

    out, gif = tmp_path / "new" / "topology.png", tmp_path / "masks.gif"
    call(monkeypatch, "topology", ne_run, "--out", out, "--gif", gif)
    assert capsys.readouterr().out.splitlines() == [f"wrote {out}", f"wrote {gif}"]
    assert imread(out).shape[1] == 1350  # 900 pixels, one and a half times as sharp
    with Image.open(gif) as animation:
        assert animation.format == "GIF" and animation.n_frames == len(ROUNDS) + 1


def test_the_return_on_each_task_of_a_sequence_is_drawn(ne_run, tmp_path):
    run = write_ne_run(tmp_path / "run", tasks=("Big-v1", "Small-v1"))
    data = drawing.read_run(run / "results.csv", topology_picture.COLUMNS)
    axes = topology_picture.picture(data, topology_picture.read_masks(ne_run), "").axes
    assert [line.get_label() for line in axes[-1].lines] == ["Big-v1", "Small-v1"]


def test_bad_runs_for_topology_are_one_line_and_exit_code_2(ne_run, tmp_path, monkeypatch, capsys):
    dense = write_run(tmp_path / "dense", [1000])
    without = write_ne_run(tmp_path / "without")
    write_masks(without, {"actor": LAYERS["actor"]})
    cases = {
        tmp_path / "absent": "cannot read",
        dense: "has no column ne/review_epsilon, ne/review_share",
        without: "no pictures of the critic's masks",
    }
    out = ("--out", tmp_path / "out.png")
    for run, says in cases.items():
        assert says in refusal(monkeypatch, capsys, "topology", run, *out)
    said = refusal(monkeypatch, capsys, "topology", ne_run, *out, "--gif", "x.mp4")
    assert said == "error: --gif must end in .gif, got x.mp4\n"
    assert not out[1].exists()
