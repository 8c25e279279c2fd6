"""benchmark/figures.py: aggregates, tables, what a figure says is missing, the files it writes."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from scipy import stats

import drawing
import figures
import matrix
from test_plot import texts, write_continual, write_rows

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


def test_an_unfinished_run_is_drawn_but_not_averaged(partial):
    ax = figures.picture(read(partial)).axes[0]
    assert len(ax.lines) == 4 + 3
    means = [line.get_ydata().tolist() for line in ax.lines if line.get_linewidth() == 2]
    assert means == [[0, 15] * 5, [0] * 9 + [30]]


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


# --- tables -------------------------------------------------------------------
def test_a_difference_over_two_tasks_is_the_mean_of_the_normalised_ones(tmp_path):
    returns = {("ne_td3", "A-v1"): (24, 28), ("td3_dense", "A-v1"): (10, 30)}
    returns |= {("ne_td3", "B-v1"): (140, 220), ("td3_dense", "B-v1"): (100, 300)}
    for (name, task), values in returns.items():
        for seed, value in enumerate(values, 1):
            write_run(tmp_path, name, task, seed, [value] * 10)
    page = figures.page_of(read(tmp_path, seeds=2))
    head, _, row = next(t for t in page.split("\n\n") if "Welch" in t).splitlines()
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    # variances of the four means, halves of the normalised: 0.0025, 0.01 and twice 0.0625
    bound = stats.t(0.1375**2 / (0.0025**2 + 0.01**2 + 2 * 0.0625**2)).ppf(0.975) * 0.1375**0.5
    text = f"0.10 [{0.1 - bound:.2f}, {0.1 + bound:.2f}]"
    assert cells["mean of the normalised, minus TD3"] == text
    chosen = ("ne_td3", "td3_dense", "td3_redo")  # the last has no runs
    page = figures.page_of(read(tmp_path, chosen, seeds=2))
    assert "\n| ReDo" + 14 * " | –" + " |\n" in page


def test_active_ratios_are_compared_network_by_network(tmp_path):
    for name, shares in (("ne_td3", (0.9, 0.8)), ("td3_dense", (0.7, 0.85))):
        row = {"step": 1000, "eval/return_mean": 1.0}
        row |= dict(zip(drawing.RATIO.columns, shares, strict=True))
        for seed in (1, 2):
            folder = tmp_path / "A-v1" / f"{name}_seed{seed}"
            write_rows(folder, [row], ["step", *drawing.COLUMNS])
    page = figures.page_of(read(tmp_path, tasks=("A-v1",), seeds=2))
    head, _, row = next(t for t in page.split("\n\n") if "Welch" in t).splitlines()
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert cells["A-v1, critics: active ratio, minus TD3"] == "0.20"
    assert cells["A-v1, actor: active ratio, minus TD3"] == "-0.05"


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
    said = texts(files[1])
    for text in ("A-v1", "B-v1", "NE-TD3", "environment steps", "final return, TD3 = 1"):
        assert text in said
    assert "MISSING: of 3 seeds on A-v1: NE-TD3 2" in " ".join(said)
    assert "MISSING" in files[2].read_text()


def test_the_figure_of_a_sequence_has_a_panel_per_task(tmp_path):
    for name, value in (("ne_td3_continual", 0.7), ("td3_continual", 0.5)):
        write_continual(tmp_path / "continual" / f"{name}_seed1", value=value)
    figures.figure("figure9", (tmp_path,), seeds=1, out=tmp_path / "figure9.png")
    said = texts(tmp_path / "figure9.svg")
    for task in ("Big-v1", "Small-v1"):
        assert said.count(task) == 2  # above its stretch and at its panel
    assert "of 1 seed on Big-v1: Reset 0;" in " ".join(said)


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
    new, old = tmp_path / "new.md", ROOT / f"{out}.md"
    assert new.exists() == old.exists()  # curves of one task have no table
    assert not new.exists() or new.read_text() == old.read_text()


@pytest.mark.parametrize("page", ["docs/results.md", "README.md"])
def test_every_interval_of_a_page_is_in_a_committed_table(page):
    tables = [file.read_text() for file in (ROOT / "results" / "figures").glob("*.md")]
    known = set(re.findall(INTERVAL, "\n".join(tables)))
    said = re.findall(INTERVAL, (ROOT / page).read_text().replace("**", ""))
    assert said
    assert [own for own in said if own not in known] == []
