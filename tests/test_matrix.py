"""The figures as data: every command is one its script accepts, and the quick versions take about an hour."""

import re
import shlex

import pytest
import tyro

import matrix
import run

ALL = {name for figure in matrix.FIGURES.values() for name in figure.methods}


def some_run(name: str, length: str) -> matrix.Run:
    task = next(figure.tasks[0] for figure in matrix.FIGURES.values() if name in figure.methods)
    return matrix.runs_of(length, 1, (task,), (name,))[0]


@pytest.mark.parametrize("length", matrix.LENGTHS)
@pytest.mark.parametrize("script", sorted({method.script for method in matrix.METHODS.values()}))
def test_every_command_is_accepted_by_its_script(script, length):
    if not (run.ROOT / script).exists():
        pytest.skip(f"there is no {script} yet")
    for name in [name for name, method in matrix.METHODS.items() if method.script == script]:
        flags = some_run(name, length).flags
        assert "{" not in flags
        wanted, steps = run.parse(script, shlex.split(flags))
        assert wanted["seed"] == 1 and steps >= 10_000
        for flag, value in re.findall(r"--([a-z-]+) ([\d.]+)", matrix.METHODS[name].flags):
            assert wanted[flag.replace("-", "_")] == float(value)


def test_every_method_is_in_a_figure_and_every_reference_is_drawn():
    assert set(matrix.METHODS) == ALL
    for figure in matrix.FIGURES.values():
        assert figure.reference in figure.methods and len(set(figure.methods)) == len(figure.methods)
        labels = [matrix.METHODS[name].label for name in figure.methods]
        assert len(set(labels)) == len(labels)


def test_the_figures_of_the_paper_and_those_its_reviewers_asked_for_are_there():
    paper = {f"figure{n}" for n in (2, 3, 6, 7, 8, 9, 10, 11)} | {"scale-up"}
    assert set(matrix.FIGURES) == paper | {"components", "alpha", "interval", "omega", "density", "replay"}
    assert set(matrix.FIGURES["figure6"].tasks) == {"HalfCheetah-v5", "Humanoid-v5", "Ant-v5", "Hopper-v5"}


@pytest.mark.parametrize("name", matrix.FIGURES)
def test_quick_versions_take_about_an_hour_on_two_cores(name):
    figure, cost = matrix.FIGURES[name], 0.0
    tasks = figure.tasks[: figure.quick_tasks]
    for r in matrix.runs_of("quick", figure.quick_seeds, tasks, figure.methods):
        steps = {"total-timesteps": 1, "steps-per-task": 12}
        steps = sum(
            int(n) * steps[flag] for flag, n in re.findall(r"--(total-timesteps|steps-per-task) (\d+)", r.flags)
        )
        cost += matrix.METHODS[r.name].cost * steps / matrix.QUICK_SPEED[r.script]
    assert 20 < cost / 2 / 60 < 70


def test_runs_come_seed_by_seed_and_their_folders_say_what_they_are():
    runs = matrix.runs_of("full", 2, ("A-v1", "B-v1"), ("ne_td3", "td3_reset"))
    assert [r.path for r in runs[:4]] == [f"{t}/{m}_seed1" for t in ("A-v1", "B-v1") for m in ("ne_td3", "td3_reset")]
    assert [r.seed for r in runs] == [1] * 4 + [2] * 4
    assert runs[3].flags == "--env-id B-v1 --seed 1 --method reset --reset-interval 200000"
    assert "--env-id" not in matrix.runs_of("full", 1, matrix.CONTINUAL, ("td3_continual",))[0].flags


def test_alpha_halved_and_doubled_are_those_of_the_schedule():
    for length in matrix.LENGTHS:
        args, _ = run.parse(matrix.NE, shlex.split(some_run("ne_td3", length).flags))
        first = (args["learning_starts"] // args["grow_interval"] + 1) * args["grow_interval"]
        rounds = len(range(first, args["total_timesteps"], args["grow_interval"]))
        alpha = run.importlib.import_module("utils_topology").solve_growth_rate(0.25, 0.95, rounds)
        words = matrix.LENGTHS[length].words
        assert words["alpha_half"] == pytest.approx(alpha / 2, rel=0.02)
        assert words["alpha_twice"] == pytest.approx(alpha * 2, rel=0.02)


def test_commands_of_the_pages_are_accepted():
    pages = [run.ROOT / "README.md", run.ROOT / "results" / "README.md", *sorted((run.ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    calls = [shlex.split(call.split(">")[0]) for call in re.findall(r"python benchmark/run\.py ([^`#\n]*)", text)]
    assert len(calls) >= 8
    for call in calls:
        args = tyro.cli(run.Args, args=call)
        matrix.choose(args.figure, args.quick, args.short, args.seeds, args.tasks, args.methods)
    drawn = {name for name in re.findall(r"benchmark/plot\.py ([\w-]+)", text)} - {"curves", "continual"}
    assert drawn and drawn <= set(matrix.FIGURES)
    documented = re.findall(r"^\| (`.*?) \|", (run.ROOT / "docs" / "benchmark.md").read_text(), re.M)
    assert set(re.findall(r"`([\w-]+)`", " ".join(documented))) == set(matrix.FIGURES)
