"""benchmark/figures.py: means, intervals, what a figure says is missing, the files it writes."""

import csv
import importlib
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

import drawing
import figures
import matrix
from test_plot import write_continual

ROOT = Path(figures.__file__).parent.parent
INTERVAL = r"-?[\d,.]+ \[-?[\d,.]+, -?[\d,.]+\]"


def write_run(
    out: Path,
    name: str,
    task: str,
    seed: int,
    returns: list[float],
    as_csv: bool = False,
    columns: tuple[str, ...] = ("step", *drawing.COLUMNS),
    value: float = 0.5,
) -> None:
    """Results of a run with rows every 1,000 steps, whose other columns are `value`."""
    path = out / task / f"{name}_seed{seed}"
    file = path.with_suffix(".csv") if as_csv else path / "results.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="") as target:
        table = csv.DictWriter(target, columns)
        table.writeheader()
        for n, reward in enumerate(returns, 1):
            row = dict.fromkeys(columns, value) | {"step": 1000 * n, "eval/return_mean": reward}
            table.writerow(row)


def read(
    out: Path, methods=("ne_td3", "td3_dense"), tasks=("A-v1", "B-v1"), seeds=3, name="figure6"
) -> figures.Results:
    return figures.read(name, methods, tasks, seeds, (out,))


@pytest.fixture
def partial(tmp_path) -> Path:
    """NE: three seeds on A, one of them unfinished, none on B. TD3: two seeds on both."""
    for seed in (1, 2):
        write_run(tmp_path, "ne_td3", "A-v1", seed, [0, 10 * seed] * 5)
        for task in ("A-v1", "B-v1"):
            write_run(tmp_path, "td3_dense", task, seed, [0.0] * 9 + [20 * seed], as_csv=True)
    write_run(tmp_path, "ne_td3", "A-v1", 3, [0, 1000])
    return tmp_path


# --- statistics ---------------------------------------------------------------
def test_the_interquartile_mean_drops_a_quarter_on_either_side():
    assert figures.iqm(np.array([0, 1, 2, 3, 4, 5, 6, 100.0]), axis=0) == 3.5
    assert figures.iqm(np.array([1, 2, 90.0]), axis=0) == 31
    assert (
        figures.iqm(np.array([-99, 1.0]), np.array([2.0, 99]), axis=0) == 1.5
    )  # all tasks together
    np.testing.assert_array_equal(figures.iqm(np.array([[1, 10], [3, 30.0]]), axis=0), [2, 20])


def test_the_interval_draws_seeds_within_each_task():
    low, high = figures.interval(np.array([1.0, 2, 3]))
    assert (low, high) == (1, 3)  # three equal draws come once in 27: the range
    low, high = figures.interval(np.full(3, 5.0), np.full(3, 7.0))
    assert low == high == 6  # were they drawn from all six, it would vary
    scores = np.random.default_rng(1).normal(10, 2, 200)
    low, high = figures.interval(scores)
    assert (
        low < figures.iqm(scores, axis=0) < high and 0.4 < high - low < 1.0
    )  # about 2 * 1.96 * 1.1 * 2 / sqrt(200)
    assert np.isnan(figures.interval(np.array([1.0]))).all()
    with warnings.catch_warnings(action="error"):  # no word about a column without values
        low, high = figures.interval(np.array([[np.nan, 1.0], [np.nan, 2.0]]))
    assert np.isnan([low[0], high[0]]).all() and (low[1], high[1]) == (1, 2)


def test_scores_are_means_over_the_last_tenth_in_those_of_the_reference(partial):
    results = read(partial)
    assert results.final("ne_td3", "A-v1", "eval/return_mean").tolist() == [
        5,
        10,
    ]  # steps 9,000 and 10,000
    scores, tasks = figures.normalised(results)
    assert tasks == ["A-v1"] and scores["ne_td3"][0].tolist() == [5 / 15, 10 / 15]
    assert scores["td3_dense"][0].tolist() == [10 / 15, 20 / 15]


def test_without_a_positive_reference_there_is_no_aggregate(tmp_path):
    write_run(tmp_path, "ne_td3", "A-v1", 1, [1, 2])
    write_run(tmp_path, "td3_dense", "A-v1", 1, [-1, -2])
    results = read(tmp_path, tasks=("A-v1",), seeds=1)
    assert figures.normalised(results) == ({}, [])
    assert "No bars: no task has" in figures.caption(results, [])


# --- partial data -------------------------------------------------------------
def test_the_caption_says_what_is_missing(partial):
    results = read(partial)
    assert figures.missing(results) == [
        "NE-TD3: 2 of 3 seeds, 1 more up to step 2k on A-v1",
        "TD3: 2 of 3 seeds on A-v1, B-v1",
        "NE-TD3: none of 3 seeds on B-v1",
    ]
    text = figures.caption(results, ["A-v1"])
    assert (
        "on A-v1 only" in text
        and "MISSING: NE-TD3: 2 of 3 seeds" in text
        and "fewer than four values" in text
    )


def test_where_one_method_has_few_seeds_all_bars_show_their_seeds(tmp_path):
    for seed in range(1, 6):
        write_run(tmp_path, "td3_dense", "A-v1", seed, [seed])
    for seed in (1, 2):
        write_run(tmp_path, "ne_td3", "A-v1", seed, [seed])
    for methods, shown in ((("ne_td3", "td3_dense"), [2, 5]), (("td3_dense",), [2])):
        results = read(tmp_path, methods, ("A-v1",), 5)
        axes = figures.picture(results, "").axes
        (bars,) = (ax for ax in axes if ax.get_xlabel().startswith("final return"))
        lines = [line for line in bars.lines if line.get_linestyle() != ":"]
        assert [len(line.get_xdata()) for line in lines] == shown
        dots = {line.get_marker() == "o" for line in lines}
        assert dots == {"dots: single seeds" in figures.caption(results, ["A-v1"])}


def test_nothing_is_missing_where_all_is_there(tmp_path):
    methods, tasks = matrix.FIGURES["figure2"].methods, matrix.FIGURES["figure2"].tasks
    for seed in range(1, 8):
        for name in methods:
            write_run(tmp_path, name, tasks[0], seed, [seed, 2 * seed])
    results = figures.read("figure2", methods, tasks, 7, (tmp_path,))
    text = figures.caption(results, figures.normalised(results)[1])
    assert (
        text.endswith("Nothing is missing.")
        and "fewer than four" not in text
        and "only" not in text
    )


def test_what_was_not_asked_for_is_said_too(tmp_path):
    write_run(tmp_path, "td3_dense", "HalfCheetah-v5", 1, [1])
    text = figures.caption(
        read(tmp_path, methods=("td3_dense",), tasks=("HalfCheetah-v5",), seeds=1), []
    )
    assert "left out: Humanoid-v5, Ant-v5, Hopper-v5, NE-TD3, Reset" in text
    assert text.endswith(" 1 seed instead of 7.")


def test_a_started_run_without_rows_is_no_result(tmp_path):
    write_run(tmp_path, "td3_dense", "A-v1", 1, [1])
    write_run(tmp_path, "ne_td3", "A-v1", 1, [])
    assert read(tmp_path).runs["ne_td3"]["A-v1"] == []


def test_an_unfinished_run_is_drawn_but_not_averaged(partial):
    ax = drawing.Figure().subplots()
    results = read(partial)
    runs = results.runs["ne_td3"]["A-v1"]
    finished = results.finished("ne_td3", "A-v1")
    figures.draw(ax, runs, finished, "eval/return_mean", drawing.Pen("red"))
    assert len(ax.lines) == 4
    mean = max(ax.lines, key=lambda line: line.get_linewidth())
    assert mean.get_ydata().tolist() == [0, 15] * 5


def test_the_table_has_a_row_for_each_method(partial):
    lines = figures.table(read(partial)).splitlines()
    assert len(lines) == 4 and all(line.count("|") == lines[0].count("|") for line in lines)
    assert (
        lines[2]
        == "| NE-TD3 | 8 [5, 10] | – | 0.50 [0.33, 0.67] | 0.50 / 0.50 | 0.50 / 0.50 | 2, 0 |"
    )
    assert lines[3].startswith("| TD3 | 15 [10, 20] | 15 [10, 20] | 1.00 [0.67, 1.33] |")


def test_differences_are_of_plain_means_with_welchs_interval(tmp_path):
    for seed, noise in enumerate((-10, 0, 10, 20), 1):
        write_run(tmp_path, "ne_td3", "A-v1", seed, [200 + noise])
        write_run(tmp_path, "td3_dense", "A-v1", seed, [100 + noise])
        write_run(tmp_path, "td3_redo", "A-v1", seed, [100 - noise])
    methods = ("ne_td3", "td3_dense", "td3_redo", "td3_reset")
    lines = figures.differences(read(tmp_path, methods, ("A-v1",), 4)).splitlines()
    assert lines[0].startswith("| 95% interval (Welch) | A-v1, minus TD3 | p |")
    assert lines[0].endswith(" | A-v1, critics' active ratio, minus TD3 | p |")
    # 6 degrees of freedom, standard error sqrt(2 * 166.7 / 4)
    assert lines[2:] == [
        "| NE-TD3 | 100 [78, 122] | < 0.001 | 0.00 | – |",
        "| ReDo | -10 [-32, 12] | 0.32 | 0.00 | – |",
        "| Reset | – | – | – | – |",
    ]
    assert figures.differences(read(tmp_path, ("ne_td3",), ("A-v1",), 4)) == ""


def test_another_reference(tmp_path):
    for seed, noise in enumerate((-10, 0, 10), 1):
        write_run(tmp_path, "ne_td3", "A-v1", seed, [200 + noise])
        write_run(tmp_path, "td3_dense", "A-v1", seed, [100 + noise])
    figures.figure(
        "figure6",
        (tmp_path,),
        seeds=3,
        tasks=("A-v1",),
        methods=("ne_td3", "td3_dense"),
        reference="ne_td3",
        out=tmp_path / "f.png",
    )
    page = (tmp_path / "f.md").read_text()
    assert "normalised by NE-TD3" in page
    assert "| TD3 | -100 [-123, -77] |" in page
    assert "| NE-TD3 | 10 | – | – |" in page
    assert "| TD3 | 10 | 1.00 [0.16, 6.24] | – |" in page  # of 2 and 2 degrees of freedom


# --- files --------------------------------------------------------------------
def texts(svg: Path) -> str:
    return " ".join(re.findall(r"<!-- (.*?) -->", svg.read_text()))


def test_a_figure_is_png_svg_and_markdown(partial, capsys):
    out, again = partial / "new" / "figure.png", partial / "again.png"
    figures.figure(
        "figure6",
        (partial,),
        seeds=3,
        tasks=("A-v1", "B-v1"),
        methods=("ne_td3", "td3_dense"),
        out=out,
    )
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {out.with_suffix(s)}" for s in (".png", ".svg", ".md")
    ]
    height, width = imread(out).shape[:2]
    assert 1000 < width < 3500 and 1000 < height < 3500
    said = texts(out.with_suffix(".svg"))
    for text in (
        "A-v1",
        "B-v1",
        "NE-TD3",
        "environment steps",
        "final return, TD3 = 1",
        "MISSING: NE-TD3: 2 of 3",
    ):
        assert text in said
    figures.figure(
        "figure6",
        (partial,),
        seeds=3,
        tasks=("A-v1", "B-v1"),
        methods=("ne_td3", "td3_dense"),
        out=again,
    )
    for suffix in (".png", ".svg", ".md"):
        assert out.with_suffix(suffix).read_bytes() == again.with_suffix(suffix).read_bytes()
    page = out.with_suffix(".md").read_text()
    assert page.startswith("|  | A-v1 | B-v1 |") and "MISSING" in page


def test_the_last_bits_of_the_layout_do_not_show(tmp_path, monkeypatch):
    """matplotlib's solver gives others from time to time, and ids in an SVG depend on them."""
    drawn = Figure.draw_without_rendering
    for name, shift in (("one.svg", 0), ("two.svg", 1e-12)):

        def nudged(figure, shift=shift):
            drawn(figure)
            for part in figure.subfigs:
                part.bbox_relative.set_points(part.bbox_relative.get_points() + shift)
            for ax in figure.get_axes():
                ax.set_position(np.add(ax.get_position().bounds, shift))

        monkeypatch.setattr(Figure, "draw_without_rendering", nudged)
        figure, part = drawing.canvas(4, 2, "below")
        part.subplots().plot([0, 1], [0, 1])
        drawing.save(figure, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_the_figure_of_a_sequence_has_a_panel_per_task(tmp_path, capsys):
    (tmp_path / "continual").mkdir()
    for name, value in (("ne_td3_continual", 0.7), ("td3_continual", 0.5)):
        write_continual(tmp_path / "continual" / f"{name}_seed1", value=value)
    figures.figure("figure9", (tmp_path,), seeds=1, out=tmp_path / "figure9.png")
    said = texts(tmp_path / "figure9.svg")
    assert (
        "Big-v1" in said
        and "Small-v1" in said
        and "Reset: none of 1 seed on Big-v1, Small-v1" in said
    )


def test_the_figure_from_pixels_counts_frames(tmp_path):
    write_run(tmp_path, "drq", "walker_walk", 1, [1, 2])
    figures.figure(
        "figure10", (tmp_path,), tasks=("walker_walk",), seeds=1, out=tmp_path / "figure10.png"
    )
    said = texts(tmp_path / "figure10.svg")
    assert "environment frames" in said and "environment steps" not in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "figure7"}, "there are no results of figure7 in"),
        (
            {"name": "figure6", "quick": True, "short": True},
            "--quick must be left out with --short",
        ),
        ({"name": "figure6", "methods": ("drq",)}, "--methods must be of ne_td3, td3_dense"),
        (
            {"name": "figure6", "methods": ("td3_redo",), "reference": "ne_td3"},
            "--reference must be of td3_redo, got ne_td3",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys, options, says):
    if "reference" in options:
        write_run(tmp_path, "td3_redo", "Ant-v5", 1, [1])
    with pytest.raises(SystemExit) as stop:
        figures.figure(results=(tmp_path,), out=tmp_path / "f.png", **options)
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and error.startswith("error: ")
        and says in error
        and error.count("\n") == 1
    )


# --- the page -----------------------------------------------------------------
TABLES = re.findall(
    r"python benchmark/(plot|plasticity|shifts)\.py (\w+ .*)--out (results/figures/\S+)\.png",
    (ROOT / "results" / "README.md").read_text(),
)


@pytest.mark.parametrize(("script", "options", "out"), TABLES, ids=[out for *_, out in TABLES])
def test_committed_tables_are_those_of_the_committed_runs(
    script, options, out, monkeypatch, tmp_path
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(drawing, "save", lambda figure, file: file.touch())
    argv = [f"{script}.py", *shlex.split(options), "--out", str(tmp_path / "new.png")]
    monkeypatch.setattr(sys, "argv", argv)
    importlib.import_module(script).main()
    assert (tmp_path / "new.md").read_text() == (ROOT / f"{out}.md").read_text()


@pytest.mark.parametrize("page", ["docs/results.md", "README.md"])
def test_every_interval_of_a_page_is_in_a_committed_table(page):
    tables = [file.read_text() for file in (ROOT / "results" / "figures").glob("*.md")]
    known = set(re.findall(INTERVAL, "\n".join(tables)))
    said = re.findall(INTERVAL, (ROOT / page).read_text().replace("**", ""))
    assert said
    assert [own for own in said if own not in known] == []


# --- more ways to draw --------------------------------------------------------
def test_figures_know_nothing_of_the_command_line():
    code = "import sys, figures; assert 'plot' not in sys.modules"
    folder = Path(figures.__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


def test_figure5_draws_what_reviews_depend_on(tmp_path):
    methods = matrix.FIGURES["figure5"].methods
    columns = figures.columns_of(matrix.FIGURES["figure5"])
    assert {"ne/critic/dormant", "ne/review_epsilon"} <= set(columns)
    for n, name in enumerate(methods, 1):
        write_run(tmp_path, name, "A-v1", 1, [1, 2], columns=columns, value=7 * n)
    results = read(tmp_path, methods, ("A-v1",), 1, "figure5")
    panels = [panel.columns for ((_, panel),) in figures.grid_of(results)]
    assert panels[0] == ("eval/return_mean",)
    assert ("ne/critic/dormant",) in panels and ("ne/review_epsilon",) in panels
    picture = figures.picture(results, "")
    axes = {ax.get_ylabel(): ax for ax in picture.axes}
    dormant = axes["critics: dormant neurons\n(score 0, Eq. 1)"]
    thick = [line for line in dormant.lines if line.get_linewidth() == 2]
    assert [line.get_ydata().tolist() for line in thick] == [[7, 7], [14, 14]]


def test_many_methods_have_no_bands_and_the_caption_says_so(tmp_path):
    methods = matrix.FIGURES["figure6"].methods
    for name in methods:
        for seed in (1, 2):
            write_run(tmp_path, name, "A-v1", seed, [seed, 2, 3])
    results = read(tmp_path, methods, ("A-v1",), 2)
    axes = figures.picture(results, "").axes
    assert len(methods) > 4 and [len(axes[0].lines), len(axes[0].collections)] == [len(methods), 0]
    assert figures.caption(results, ["A-v1"]).startswith("Lines: interquartile mean over seeds.")
    few = read(tmp_path, methods[:4], ("A-v1",), 2)
    axes = figures.picture(few, "").axes
    assert [len(axes[0].lines), len(axes[0].collections)] == [4 * 3, 4]
    assert figures.caption(few, ["A-v1"]).startswith("Thick: ")
