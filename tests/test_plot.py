"""benchmark/plot.py: means over seeds, the pictures it writes, what it says about bad input."""

import csv
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

import drawing
import plot
import topology_picture

SCRIPT = Path(plot.__file__)
COLUMNS = ["step", *drawing.COLUMNS]


def write_run(
    folder: Path, steps: list[int], value: float = 0.5, columns: list[str] = COLUMNS
) -> Path:
    """A run's folder whose columns all hold `value`; the return is value * step."""
    folder.mkdir()
    with open(folder / "results.csv", "w", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        for step in steps:
            table.writerow(
                dict.fromkeys(COLUMNS, value) | {"step": step, "eval/return_mean": value * step}
            )
    return folder


def write_changed(folder: Path, changes: list[dict]) -> Path:
    """A run's folder with a row for each of `changes`, which says what is not 0.5 in it."""
    folder.mkdir()
    with open(folder / "results.csv", "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for n, change in enumerate(changes, 1):
            table.writerow(dict.fromkeys(COLUMNS, 0.5) | {"step": n} | change)
    return folder


def run_plot(*args: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, "curves", *map(str, args)], capture_output=True, text=True
    )


def test_curves_writes_png_and_svg(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"ne_{seed}", [5000, 10000, 15000][: seed + 1], value=seed / 2)
    dense = write_run(tmp_path / "dense", [5000])  # a single point must be visible too
    out = tmp_path / "new" / "curves.png"
    done = run_plot(
        f"NE={tmp_path}/ne_*",
        f"dense={dense}/results.csv",
        "--out",
        out,
        "--title",
        "Task-v5",
        "--svg",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"wrote {out}", f"wrote {out.with_suffix('.svg')}"]
    height, width = imread(out).shape[:2]
    assert 600 < width < 3000 and 600 < height < 3000
    colours = {tuple(c) for c in (imread(out)[..., :3].reshape(-1, 3) * 255).round().astype(int)}
    for colour in drawing.COLOURS[:2]:
        assert tuple(bytes.fromhex(colour[1:])) in colours
    svg = out.with_suffix(".svg").read_text()
    assert svg.count("<!-- NE -->") == 1 and svg.count("<!-- environment steps -->") == 1


def test_mean_is_over_the_steps_that_all_seeds_have(tmp_path):
    a = write_run(tmp_path / "a", [1000, 2000, 3000, 4000], value=1)
    b = write_run(tmp_path / "b", [2000, 3000], value=3)
    seeds = drawing.read_runs([f"NE={a},{b}"], COLUMNS[1:])["NE"]
    steps, values = drawing.on_common_steps(seeds, "eval/return_mean")
    assert steps.tolist() == [2000, 3000]
    assert values.tolist() == [[2000, 3000], [6000, 9000]]

    ax = drawing.Figure().subplots()
    plot.draw(ax, seeds, "eval/return_mean", drawing.Pen("black"))
    mean = max(ax.lines, key=lambda line: line.get_linewidth())
    np.testing.assert_array_equal(mean.get_xydata(), [[2000, 4000], [3000, 6000]])
    assert len(ax.lines) == 3 and len(ax.collections) == 1  # each seed, the mean, the range


def test_label_given_twice_collects_seeds(tmp_path):
    a, b = write_run(tmp_path / "a", [1]), write_run(tmp_path / "b", [1])
    assert len(drawing.read_runs([f"NE={a}", f"NE={b}"], COLUMNS)["NE"]) == 2


@pytest.mark.parametrize(
    ("run", "label", "paths"),
    [
        ("NE=a", "NE", ["a"]),
        ("NE=a, lr=0.1", "NE", ["a", "lr=0.1"]),  # the first = after which all paths exist
        ("lr=0.1=a", "lr=0.1", ["a"]),
        ("x=y=z=lr=*", "x=y=z", ["lr=*"]),
        ("lr=0.1=absent", "lr=0.1", ["absent"]),  # else the last
    ],
)
def test_a_label_may_have_equals_signs(tmp_path, monkeypatch, run, label, paths):
    for name in ("a", "lr=0.1"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert drawing.split_label(run) == (label, paths)


def test_dollars_are_drawn_as_they_are(tmp_path):
    run = write_run(tmp_path / "run", [5000, 10000])
    out = tmp_path / "dollars.png"
    plot.curves((f"5 $ and $\\nope$={run}",), out=out, title="$\\neither$", svg=True)
    svg = out.with_suffix(".svg").read_text()
    assert svg.count("<!-- 5 $ and $\\nope$ -->") == 1


def test_a_note_stands_below_the_picture(tmp_path):
    run = write_run(tmp_path / "run", [5000, 10000])
    sizes = []
    for note in ("", "one seed: shows that it runs, not which is better"):
        plot.curves((f"NE={run}",), out=tmp_path / "curves.png", note=note, svg=True)
        sizes.append(imread(tmp_path / "curves.png").shape)
    svg = (tmp_path / "curves.svg").read_text()
    assert svg.count("<!-- one seed: shows that it runs, not which is better -->") == 1
    assert sizes[1][0] > sizes[0][0] and sizes[1][1] == sizes[0][1]


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


def test_lines_of_many_methods_are_thin_and_without_bands(tmp_path):
    few = drawing.pen_of(0, 4, "eval/return_mean", "-")
    many = drawing.pen_of(0, 5, "eval/return_mean", "-")
    assert few.bands and not many.bands and many.width < few.width
    a = write_run(tmp_path / "a", [1000, 2000])
    b = write_run(tmp_path / "b", [1000, 2000], value=2)
    ax = drawing.Figure().subplots()
    plot.draw(ax, drawing.read_runs([f"NE={a},{b}"], COLUMNS)["NE"], "eval/return_mean", many)
    assert len(ax.lines) == 1 and not ax.collections


def test_lines_of_equal_density_all_show():
    widths = [drawing.pen_of(place, 6, "ne/actor/density", "-").width for place in range(6)]
    for below, above in itertools.pairwise(widths):  # drawn one after the other
        assert below >= above + 0.99  # a pixel on each side


@pytest.mark.parametrize(
    ("step", "label"),
    [
        (0, "0"),
        (500, "500"),
        (2500, "2.5k"),
        (50_000, "50k"),
        (1_000_000, "1M"),
        (1_250_000, "1.25M"),
    ],
)
def test_step_labels(step, label):
    assert drawing.step_label(step) == label


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
        ("NE={tmp}/nul", "damaged: it holds NUL bytes"),
        ("NE={tmp}/nan", "holds nan in eval/return_mean, row 2"),
        ("NE={tmp}/infinite", "holds inf in ne/critic/density, row 1"),
        ("NE={tmp}/gap", "holds nan in ne/critic/active_ratio_0.1, row 2"),
        ("NE={tmp}/latin", "cannot read"),
        ("NE={tmp}/cut", "damaged: a row of it is not complete"),
        ("NE={tmp}/fewer", "damaged: a row of it is not complete"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, run, says):
    write_run(tmp_path / "good", [1000, 2000])
    write_run(tmp_path / "other", [1500])
    write_run(tmp_path / "short", [1000], columns=COLUMNS[:-1])
    write_run(tmp_path / "empty", [])
    write_run(tmp_path / "text", [1000], value="many")
    write_run(tmp_path / "backwards", [2000, 1000])
    changes = {"nul": [{}, {}], "latin": [{}], "cut": [{}, {}], "fewer": [{}, {}]}
    changes["nan"] = [{}, {"eval/return_mean": "nan"}]
    changes["infinite"] = [{"ne/critic/density": "inf"}]
    changes["gap"] = [{}, {"ne/critic/active_ratio_0.1": "nan"}, {}]
    for name, rows in changes.items():
        write_changed(tmp_path / name, rows)
    with open(tmp_path / "nul" / "results.csv", "a") as file:
        file.truncate(file.tell() + 100)
    with open(tmp_path / "latin" / "results.csv", "ab") as file:
        file.write(b"\xe9")
    cut = tmp_path / "cut" / "results.csv"
    cut.write_bytes(cut.read_bytes()[:-3])
    fewer = tmp_path / "fewer" / "results.csv"
    fewer.write_text(fewer.read_text().rstrip().rpartition(",")[0] + "\n")
    with pytest.raises(SystemExit) as stop:
        plot.curves((run.format(tmp=tmp_path),), out=tmp_path / "curves.png")
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "curves.png").exists()


def test_what_is_not_measured_yet_may_be_nan(tmp_path):
    before = {"ne/critic/active_ratio_0.1": "nan", "ne/actor/active_ratio_0.1": "nan"}
    for changes in ([before, before, {}], [before]):
        run = write_changed(tmp_path / str(len(changes)), changes)
        plot.curves((f"NE={run}",), out=tmp_path / "curves.png")
    columns = ["charts/episodic_return", "losses/qf_loss", "ne/critic/density"]
    seen = np.array([np.nan, 1.0, np.nan])
    refused = [drawing.refused_values(column, seen, gaps=False).tolist() for column in columns]
    assert refused == [[False] * 3, [False, False, True], [True, False, True]]
    assert not drawing.refused_values("losses/qf_loss", seen, gaps=True).any()
    infinite = np.array([np.inf])
    for column in columns:
        assert drawing.refused_values(column, infinite, gaps=True).all()


@pytest.mark.parametrize("arguments", ["curves NE=x", "continual NE=x", "figure6", "topology x"])
def test_an_unknown_picture_format_is_refused(capsys, monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["plot.py", *arguments.split(), "--out", "x.txt"])
    with pytest.raises(SystemExit) as stop:
        plot.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --out must end in .png, got x.txt\n"


def test_a_name_that_cannot_be_printed(tmp_path):
    run = write_run(tmp_path / "run", [1000, 2000])
    out = tmp_path / "läufe.png"
    command = [sys.executable, SCRIPT, "curves", f"NE={run}", "--out", out]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    subprocess.run(command, env=environment, check=True)
    assert out.exists()


def test_help_may_be_cut_off():
    for reader in ("head -n 1", "true"):  # the second reads nothing
        command = f"{sys.executable} {SCRIPT} curves --help | {reader}"
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert done.stderr == ""


def test_bad_input_from_the_shell(tmp_path):
    for args in (
        (),
        ("NE=absent",),
        (f"NE={write_run(tmp_path / 'a', [1])}", "--out", tmp_path / "curves.pdf"),
    ):
        done = run_plot(*args)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_split_gives_critics_and_actor_panels_of_their_own(tmp_path):
    run = write_run(tmp_path / "run", [5000, 10000])
    done = run_plot(f"NE={run}", "--out", tmp_path / "split.png", "--split", "--svg")
    assert done.returncode == 0, done.stderr
    svg = (tmp_path / "split.svg").read_text()
    assert [svg.count(f'<g id="axes_{n}">') for n in range(1, 7)] == [1, 1, 1, 1, 1, 0]
    for label in ("critics: active ratio", "actor: active ratio", "critics: density"):
        assert svg.count(label) == 1
    columns = []
    for panel in drawing.panels(split=True):
        columns += panel.columns
    assert columns == drawing.COLUMNS


# --- continual ----------------------------------------------------------------
CONTINUAL = ["cycle", "task_trained", "task_evaluated"]


def write_continual(
    folder: Path, steps=(0, 100, 200, 300, 400), tasks=("Big-v1", "Small-v1"), value=0.5
) -> Path:
    """Tasks are trained in turn, 200 steps each.

    The return is value * step on the first task, minus that on others.
    """
    folder.mkdir()
    with open(folder / "results.csv", "w", newline="") as file:
        table = csv.DictWriter(file, [*COLUMNS, *CONTINUAL])
        table.writeheader()
        for step in steps:
            stretch = max(step - 1, 0) // 200
            trained = {
                "cycle": 1 + stretch // len(tasks),
                "task_trained": tasks[stretch % len(tasks)],
            }
            for task in tasks:
                row = (
                    dict.fromkeys(COLUMNS, value) | trained | {"step": step, "task_evaluated": task}
                )
                table.writerow(
                    row | {"eval/return_mean": value * step * (1 if task == tasks[0] else -1)}
                )
    return folder


def test_continual_reads_returns_per_task_and_the_boundaries(tmp_path):
    run = drawing.read_continual(
        write_continual(tmp_path / "a", (0, 100, 200, 300, 400, 500)) / "results.csv", COLUMNS
    )
    assert run.stretches == [(0, 200, "Big-v1"), (200, 400, "Small-v1"), (400, 500, "Big-v1")]
    assert list(run.tasks) == ["Big-v1", "Small-v1"]
    assert run.tasks["Small-v1"]["step"].tolist() == [0, 100, 200, 300, 400, 500]
    assert run.tasks["Small-v1"]["eval/return_mean"].tolist() == [0, -50, -100, -150, -200, -250]


def test_continual_shades_where_a_task_is_trained():
    ax = drawing.Figure().subplots()
    drawing.draw_stretches(
        ax, [(0, 200, "Big-v1"), (200, 400, "Small-v1"), (400, 500, "Big-v1")], "Big-v1", named=True
    )
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
    done = subprocess.run(
        [sys.executable, SCRIPT, "continual", *map(str, args)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    files = [out, out.with_suffix(".svg"), out.with_suffix(".md")]
    assert done.stdout.splitlines() == [f"wrote {file}" for file in files]
    colours = {tuple(c) for c in (imread(out)[..., :3].reshape(-1, 3) * 255).round().astype(int)}
    for colour in drawing.COLOURS[:2]:
        assert tuple(bytes.fromhex(colour[1:])) in colours
    svg = out.with_suffix(".svg").read_text()
    for text, times in (
        ("NE", 1),
        ("TD3", 1),
        ("Big-v1", 2),
        ("Small-v1", 2),
        ("environment steps", 1),
        ("the task is trained", 1),
    ):
        assert svg.count(f"<!-- {text} -->") == times, (
            text
        )  # a task: above its stretch and at its panel


def test_the_table_of_continual_has_the_metrics_of_runs_that_are_at_the_end(tmp_path):
    for label, values in (("ne", (0.4, 0.5, 0.6)), ("td3", (0.3, 0.2, 0.1))):
        for seed, value in enumerate(values):
            write_continual(tmp_path / f"{label}_{seed}", value=value)
    write_continual(tmp_path / "ne_late", (0, 100, 200, 300), value=9)
    runs = [f"{label}={tmp_path}/{label.lower()}_*" for label in ("NE", "TD3")]
    plot.continual(tuple(runs), out=tmp_path / "continual.png")
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
    plot.continual((f"NE={tmp_path}/ne_late",), out=tmp_path / "one.png")
    assert "| NE | 2,700 | -2,700 | 0 |" in (tmp_path / "one.md").read_text()
    write_continual(tmp_path / "first", (0, 100, 200))
    plot.continual((f"NE={tmp_path}/first",), out=tmp_path / "first.png")
    assert not (tmp_path / "first.md").exists()


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ("no-equals-sign", "LABEL=PATH"),
        ("NE={tmp}/absent", "no results at"),
        ("NE={tmp}/single", "no column cycle, task_trained, task_evaluated"),
        (
            "NE={tmp}/good,{tmp}/foreign",
            "all runs must have the same tasks, got Big-v1, Small-v1 and Big-v1, Other-v1",
        ),
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


# --- topology -----------------------------------------------------------------
ROUNDS = [100, 200, 300, 400]
LAYERS = {"actor": [(6, 4), (5, 6), (2, 5)], "critic": [(6, 5), (8, 6), (1, 8)] * 2}


def synthetic_mask(shape: tuple[int, int], n: int) -> np.ndarray:
    """The first n + 1 of 6 columns of each row, repeated: a density that grows with n."""
    n_out, n_in = shape
    columns = np.arange(n_in) % 6
    return np.tile(columns <= n, (n_out, 1)).astype(np.float32)


def write_masks(folder: Path, tags: dict = LAYERS) -> None:
    writer = SummaryWriter(str(folder))
    for n, step in enumerate([0, *ROUNDS]):
        for network, shapes in tags.items():
            for layer, shape in enumerate(shapes):
                tag = f"masks/{network}/{layer}"
                writer.add_image(tag, torch.from_numpy(synthetic_mask(shape, n))[None], step)
    writer.close()


def write_ne_run(folder: Path, tasks: tuple[str, ...] = ()) -> Path:
    """Rows at 150, 250, 300 and 450; the actor has grown 10 n, pruned n at the n-th of them."""
    folder.mkdir()
    rows = []
    for n, step in enumerate((150, 250, 300, 450), 1):
        row = {"step": step, "eval/return_mean": 5 * n, "ne/review_epsilon": 1 / n}
        row["ne/review_share"] = 0.1 * n
        for network in ("actor", "critic"):
            row |= {f"ne/{network}/grown": 10 * n, f"ne/{network}/pruned": n}
            row |= {f"ne/{network}/density": 0.2 * n, f"ne/{network}/dormant": n}
        for task in tasks or ("",):
            more = {"cycle": 1, "task_trained": tasks[0], "task_evaluated": task} if tasks else {}
            rows.append(row | more)
    with open(folder / "results.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def ne_run(tmp_path_factory) -> Path:
    run = write_ne_run(tmp_path_factory.mktemp("ne") / "run")
    write_masks(run)
    return run


def test_masks_are_read_from_the_events(ne_run):
    data = topology_picture.read_run(ne_run)
    assert [len(data.masks[network]) for network in ("actor", "critic")] == [3, 6]
    for network, shapes in LAYERS.items():
        for layer, shape in zip(data.masks[network], shapes, strict=True):
            assert list(layer) == [0, *ROUNDS]
            for n, mask in enumerate(layer.values()):
                np.testing.assert_array_equal(mask, synthetic_mask(shape, n))
    assert len(data.critic()) == 3 and data.middle()[0].shape == (8, 6)


def test_births_are_counted_per_round():
    steps = np.array([50.0, 150, 250, 300, 350])
    changes = topology_picture.per_round(
        steps, np.array([0.0, 10, 20, 26, 26]), [100, 160, 170, 300]
    )
    np.testing.assert_array_equal(changes, [np.nan, 10, 5, 6, np.nan])


def test_birth_and_three_later_times_are_shown():
    def chosen(densities: list[int]) -> list[int]:
        layer = {}
        for n, density in enumerate(densities):
            layer[10 * n] = np.arange(100)[None] < density
        return topology_picture.chosen_steps(layer)

    assert chosen([20, 45, 50, 65, 70, 80]) == [0, 10, 30, 50]  # 20, 40, 60, 80, or more
    assert chosen([20] * 10) == [0, 30, 60, 90]
    assert chosen([20, 30]) == [0, 10]


def test_topology_draws_what_the_run_holds(ne_run, tmp_path, capsys):
    data = topology_picture.read_run(ne_run)
    axes = topology_picture.picture(data, "a $ run", "environment steps").axes
    panels = {ax.get_title(): ax for ax in axes}
    assert list(panels)[:4] == ["birth: 17%", "step 200: 50%", "step 300: 67%", "step 400: 83%"]
    density = {line.get_label(): line.get_ydata() for line in panels["density per layer"].lines}
    np.testing.assert_allclose(density["critic 1, layer 2"], np.arange(1, 6) / 6)
    assert len(density) == 6
    changes = panels["connections born and pruned per round"].lines
    changes = {line.get_label(): line.get_ydata() for line in changes}
    np.testing.assert_array_equal(changes["actor: born"], [10, 10, 10, 10])
    np.testing.assert_array_equal(changes["critic: pruned"], [1, 1, 1, 1])
    (returns,) = panels["evaluation return"].lines
    assert returns.get_ydata().tolist() == [5, 10, 15, 20]

    out, gif = tmp_path / "new" / "topology.png", tmp_path / "masks.gif"
    plot.topology_picture.topology(ne_run, out=out, gif=gif)
    assert capsys.readouterr().out.splitlines() == [f"wrote {out}", f"wrote {gif}"]
    assert imread(out).shape[1] == 1350  # 900 pixels, one and a half times as sharp
    with Image.open(gif) as animation:
        assert animation.format == "GIF" and animation.n_frames == len(ROUNDS) + 1


def test_the_return_on_each_task_of_a_sequence_is_drawn(tmp_path):
    run = write_ne_run(tmp_path / "run", tasks=("Big-v1", "Small-v1"))
    write_masks(run)
    data = topology_picture.read_run(run)
    assert list(data.returns) == ["Big-v1", "Small-v1"] and len(data.rows["step"]) == 4
    topology_picture.picture(data, "", "environment steps")


def test_a_picture_that_was_logged_twice_counts_once(tmp_path):
    run = write_ne_run(tmp_path / "run")
    write_masks(run)
    write_masks(run)  # by a resumed run
    assert list(topology_picture.read_run(run).middle()) == [0, *ROUNDS]


def test_bad_runs_for_topology_are_one_line_and_exit_code_2(ne_run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    dense = write_run(tmp_path / "dense", [1000])
    without = write_ne_run(tmp_path / "without")
    lacking = write_ne_run(tmp_path / "lacking")
    write_masks(lacking, {"actor": LAYERS["actor"]})
    cut = write_ne_run(tmp_path / "cut")
    garbage = write_ne_run(tmp_path / "garbage")
    for events in ne_run.glob("events*"):
        content = bytearray(events.read_bytes())
        middle = content.index(b"\x89PNG", len(content) // 2)
        content[middle : middle + 40] = bytes(40)
        (cut / events.name).write_bytes(content)
        (garbage / events.name).write_bytes(b"no events at all")
    no_picture = write_ne_run(tmp_path / "no_picture")
    writer = SummaryWriter(str(no_picture))
    image = Summary.Image(height=8, width=6, colorspace=1, encoded_image_string=b"none")
    value = Summary.Value(tag="masks/critic/0", image=image)
    writer.file_writer.add_summary(Summary(value=[value]), 100)
    writer.close()
    cases = {
        tmp_path / "absent": "there is no run folder",
        tmp_path / "file": "there is no run folder",
        dense: "has no column ne/review_epsilon, ne/review_share",
        without: "no pictures of the critic's masks",
        lacking: "no pictures of the critic's masks",
        cut: "different steps: it is being written just now, or damaged",
        no_picture: "masks/critic/0 of step 100",
        garbage: "no pictures of the critic's masks",
    }
    for run, says in cases.items():
        with pytest.raises(SystemExit) as stop:
            topology_picture.topology(run, out=tmp_path / "out.png")
        error = capsys.readouterr().err
        assert stop.value.code == 2 and says in error, (run, error)
        assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out.png").exists()
    with pytest.raises(SystemExit):
        topology_picture.topology(ne_run, out=tmp_path / "out.png", gif=tmp_path / "x.mp4")
    assert "error: --gif must end in .gif" in capsys.readouterr().err
