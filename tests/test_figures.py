"""benchmark/figures.py: aggregates, tables, what a figure says is missing, the files it writes."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

import drawing
import figures
import matrix
from estimates import estimate
from test_plot import refusal, texts, write_continual, write_rows

ROOT = Path(figures.__file__).parent.parent
INTERVAL = r"-?[\d,.]+ \[-?[\d,.]+, -?[\d,.]+\]"
BOTH = ("ne_td3", "td3_dense")


def write_run(
    out: Path, name: str, task: str, seed: int, returns: list[float], columns=(), value=0.5
) -> Path:
    """A run with rows every 1,000 steps, whose other columns are `value`."""
    columns = ["step", *drawing.COLUMNS, *columns]
    rows = []
    for n, reward in enumerate(returns, 1):
        row = dict.fromkeys(columns, value)
        rows.append(row | {"step": 1000 * n, "eval/return_mean": reward})
    return write_rows(out / task / f"{name}_seed{seed}", rows, columns)


def read(
    out: Path, methods=BOTH, tasks=("A-v1", "B-v1"), seeds=3, name="figure6"
) -> figures.Results:
    chosen = matrix.Choice("full", seeds, tasks, methods)
    return figures.read(name, chosen, matrix.FIGURES[name].reference, (out,))


def bars_of(results: figures.Results):
    (bars,) = (ax for ax in figures.picture(results).axes if "final" in ax.get_xlabel())
    return bars


@pytest.fixture
def partial(tmp_path) -> Path:
    """NE: three seeds on A, one of them unfinished, none on B. TD3: two seeds on both."""
    for seed in (1, 2):
        write_run(tmp_path, "ne_td3", "A-v1", seed, [0, 10 * seed] * 5)
        for task in ("A-v1", "B-v1"):
            run = write_run(tmp_path, "td3_dense", task, seed, [0.0] * 9 + [20 * seed])
            (run / "results.csv").rename(run.with_suffix(".csv"))
    write_run(tmp_path, "ne_td3", "A-v1", 3, [0, 1000])
    write_run(tmp_path, "ne_td3", "B-v1", 1, [])  # has started, without a row it is no result
    return tmp_path


# --- what is drawn ------------------------------------------------------------
def test_scores_are_means_over_the_last_tenth_in_those_of_the_reference(partial):
    results = read(partial)
    final = results.final("A-v1", "eval/return_mean")
    assert final["NE-TD3"].tolist() == [5, 10]  # steps 9,000 and 10,000
    scores = figures.normalised(results)
    assert list(scores) == ["A-v1"]
    assert scores["A-v1"]["NE-TD3"].tolist() == [5 / 15, 10 / 15]
    assert scores["A-v1"]["TD3"].tolist() == [10 / 15, 20 / 15]
    (bar, _) = bars_of(results).patches
    assert bar.get_width() == 0.5


def test_without_a_positive_reference_there_is_no_aggregate(tmp_path):
    write_run(tmp_path, "ne_td3", "A-v1", 1, [1, 2])
    write_run(tmp_path, "td3_dense", "A-v1", 1, [-1, -2])
    results = read(tmp_path, tasks=("A-v1",), seeds=1)
    assert figures.normalised(results) == {}
    assert "No bars: no task has" in figures.caption(results)
    assert len(figures.picture(results).axes) == 5


def test_an_unfinished_run_is_drawn_but_not_averaged(partial):
    ax = figures.picture(read(partial)).axes[0]
    assert len(ax.lines) == 4 + 3
    means = [line.get_ydata().tolist() for line in ax.lines if line.get_linewidth() == 2]
    assert means == [[0, 15] * 5, [0] * 9 + [30]]


def test_where_one_method_has_few_seeds_all_bars_show_their_seeds(tmp_path):
    for seed in range(1, 6):
        write_run(tmp_path, "td3_dense", "A-v1", seed, [seed])
    for seed in (1, 2):
        write_run(tmp_path, "ne_td3", "A-v1", seed, [seed])
    for methods, shown in ((BOTH, [2, 5]), (("td3_dense",), [2])):
        results = read(tmp_path, methods, ("A-v1",), 5)
        lines = [line for line in bars_of(results).lines if line.get_linestyle() != ":"]
        assert [len(line.get_xdata()) for line in lines] == shown
        dots = {line.get_marker() == "o" for line in lines}
        assert dots == {"dots: single seeds" in figures.caption(results)}


def test_figure5_draws_what_reviews_depend_on(tmp_path):
    columns = ("ne/critic/dormant", "ne/review_epsilon")
    for n, name in enumerate(("ne_td3", "ne_td3_no_review"), 1):
        write_run(tmp_path, name, "A-v1", 1, [1, 2], columns, 7 * n)
    results = read(tmp_path, ("ne_td3", "ne_td3_no_review"), ("A-v1",), 1, "figure5")
    axes = {ax.get_ylabel(): ax for ax in figures.picture(results).axes}
    assert len(axes) == 5 and "ε (1 - ε: chance\nthat a batch is a review)" in axes
    dormant = axes["critics: dormant neurons\n(score 0, Eq. 1)"].lines
    assert [line.get_ydata().tolist() for line in dormant] == [[7, 7], [14, 14]]


# --- words --------------------------------------------------------------------
def test_the_caption_says_what_is_missing(partial):
    results = read(partial)
    assert figures.missing(results)[:2] == [
        "of 3 seeds on A-v1: NE-TD3 2 (1 more unfinished), TD3 2",
        "of 3 seeds on B-v1: NE-TD3 0, TD3 2",
    ]
    text = figures.caption(results)
    assert text.startswith("Thick: ") and "fewer than four values" in text
    assert ", on A-v1 only. MISSING: of 3 seeds on A-v1" in text


def test_what_was_not_asked_for_is_said_too(tmp_path):
    write_run(tmp_path, "td3_dense", "HalfCheetah-v5", 1, [1])
    text = figures.caption(read(tmp_path, ("td3_dense",), ("HalfCheetah-v5",), 1))
    assert "left out: Humanoid-v5, Ant-v5, Hopper-v5, NE-TD3, Reset" in text
    assert text.endswith("; 1 seed instead of 7.")


def test_nothing_is_missing_where_all_is_there(tmp_path):
    methods, tasks = matrix.FIGURES["figure2"].methods, matrix.FIGURES["figure2"].tasks
    for seed in range(1, 8):
        for name in methods:
            write_run(tmp_path, name, tasks[0], seed, [seed, 2 * seed])
    text = figures.caption(read(tmp_path, methods, tasks, 7, "figure2"))
    assert text.endswith("Nothing is missing.")
    assert "fewer than four" not in text and "only" not in text


def test_many_methods_have_no_bands_and_the_caption_says_so(tmp_path):
    methods = matrix.FIGURES["figure6"].methods
    for name in methods:
        for seed in (1, 2):
            write_run(tmp_path, name, "A-v1", seed, [seed, 2, 3])
    for count, begins in ((6, "Lines: interquartile mean over seeds."), (4, "Thick: ")):
        results = read(tmp_path, methods[:count], ("A-v1",), 2)
        assert figures.caption(results).startswith(begins)
        first = figures.picture(results).axes[0]
        assert len(first.collections) == (4 if count == 4 else 0)


# --- tables -------------------------------------------------------------------
def test_the_table_has_a_row_for_each_method(partial):
    lines = figures.table(read(partial)).splitlines()
    assert lines[0].startswith("|  | A-v1 | B-v1 | normalised by TD3 |")
    shares = "0.50 / 0.50 | 0.50 / 0.50"
    assert lines[2:] == [
        f"| NE-TD3 | 8 [5, 10] | – | 0.50 [0.33, 0.67] | {shares} | 2, 0 |",
        f"| TD3 | 15 [10, 20] | 15 [10, 20] | 1.00 [0.67, 1.33] | {shares} | 2, 2 |",
    ]


def test_differences_are_of_plain_means_with_welchs_interval(tmp_path):
    for seed, noise in enumerate((-10, 0, 10, 20), 1):
        write_run(tmp_path, "ne_td3", "A-v1", seed, [200 + noise])
        write_run(tmp_path, "td3_dense", "A-v1", seed, [100 + noise])
        write_run(tmp_path, "td3_redo", "A-v1", seed, [100 - noise])
    methods = (*BOTH, "td3_redo", "td3_reset")
    page = figures.page_of(read(tmp_path, methods, ("A-v1",), 4))
    _, differences, spreads, _ = page.split("\n\n")
    head, _, *rows = differences.splitlines()
    assert head.startswith("| 95% interval (Welch) | A-v1, minus TD3 | p |")
    assert head.endswith(" | A-v1, critics' active ratio, minus TD3 | p |")
    # 6 degrees of freedom, standard error sqrt(2 * 166.7 / 4)
    assert rows == [
        "| NE-TD3 | 100 [78, 122] | < 0.001 | 0.00 | – |",
        "| ReDo | -10 [-32, 12] | 0.32 | 0.00 | – |",
        "| Reset | – | – | – | – |",
    ]
    assert spreads.splitlines()[2:4] == [
        "| NE-TD3 | 13 | 1.00 [0.25, 3.93] | 1 |",
        "| TD3 | 13 | – | – |",
    ]
    alone = figures.page_of(read(tmp_path, ("ne_td3",), ("A-v1",), 4))
    assert "Welch" not in alone and "F test" not in alone


# --- files --------------------------------------------------------------------
def test_a_figure_is_png_svg_and_markdown(partial, capsys):
    out, again = partial / "new" / "figure.png", partial / "again.png"
    options = {"seeds": 3, "tasks": ("A-v1", "B-v1"), "methods": BOTH}
    for file in (out, again):
        figures.figure("figure6", (partial,), **options, out=file)
    files = [out.with_suffix(s) for s in (".png", ".svg", ".md")]
    assert capsys.readouterr().out.splitlines()[:3] == [f"wrote {file}" for file in files]
    for file in files:
        assert file.read_bytes() == again.with_suffix(file.suffix).read_bytes()
    height, width = imread(out).shape[:2]
    assert 1000 < width < 3500 and 1000 < height < 3500
    said = texts(files[1])
    for text in ("A-v1", "B-v1", "NE-TD3", "environment steps", "final return, TD3 = 1"):
        assert text in said
    assert "MISSING: of 3 seeds on A-v1: NE-TD3 2" in " ".join(said)
    assert "MISSING" in files[2].read_text()

    figures.figure("figure6", (partial,), **options, reference="ne_td3", out=again)
    page = again.with_suffix(".md").read_text()
    assert "normalised by NE-TD3" in page and "A-v1, minus NE-TD3" in page
    difference = estimate([np.array([10.0, 20])], [np.array([5.0, 10])])
    assert f"| TD3 | {difference:.0f} |" in page


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


def test_the_figure_of_a_sequence_has_a_panel_per_task(tmp_path):
    for name, value in (("ne_td3_continual", 0.7), ("td3_continual", 0.5)):
        write_continual(tmp_path / "continual" / f"{name}_seed1", value=value)
    figures.figure("figure9", (tmp_path,), seeds=1, out=tmp_path / "figure9.png")
    said = texts(tmp_path / "figure9.svg")
    for task in ("Big-v1", "Small-v1"):
        assert said.count(task) == 2  # above its stretch and at its panel
    assert "of 1 seed on Big-v1: Reset 0;" in " ".join(said)


def test_the_figure_from_pixels_counts_frames(tmp_path):
    write_run(tmp_path, "drq", "walker_walk", 1, [1, 2])
    options = {"tasks": ("walker_walk",), "seeds": 1, "out": tmp_path / "figure10.png"}
    figures.figure("figure10", (tmp_path,), **options)
    said = texts(tmp_path / "figure10.svg")
    assert "environment frames" in said and "environment steps" not in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("figure7", "there are no results of figure7 in"),
        ("figure6 --quick --short", "--quick must be left out with --short"),
        ("figure6 --methods drq", "--methods must be of ne_td3, td3_dense"),
        (
            "figure6 --methods td3_redo --reference ne_td3",
            "--reference must be of td3_redo, got ne_td3",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, options, says):
    where = ("--results", tmp_path, "--out", tmp_path / "f.png")
    assert says in refusal(monkeypatch, capsys, *options.split(), *where)


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
