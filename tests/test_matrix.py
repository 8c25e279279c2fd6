"""The figures as data: the scripts accept every command, the pages name every figure."""

import math
import re
import shlex

import pytest
import tyro

import matrix
import run


def some_run(name: str, length: str) -> matrix.Run:
    for figure in matrix.FIGURES.values():
        if name in figure.methods:
            return matrix.run_of(length, 1, figure.tasks[0], name)


def values_of(flags: str) -> dict[str, list[float]]:
    """{flag: its numbers}, without flags that have none."""
    values = {}
    for flag, numbers in re.findall(r"--([a-z-]+)((?: [\d.]+)+)", flags):
        values[flag.replace("-", "_")] = [float(number) for number in numbers.split()]
    return values


@pytest.mark.parametrize("length", matrix.LENGTHS)
@pytest.mark.parametrize("script", matrix.FLAGS)
def test_every_command_is_accepted_by_its_script(script, length):
    for name, method in matrix.METHODS.items():
        if method.script != script:
            continue
        flags = some_run(name, length).flags
        wanted, steps = run.parse(script, shlex.split(flags))
        assert wanted["seed"] == 1 and steps >= 10_000
        for flag, numbers in values_of(flags).items():
            value = wanted[flag] if isinstance(wanted[flag], list) else [wanted[flag]]
            assert value == numbers


def test_runs_come_seed_by_seed_and_their_folders_say_what_they_are():
    runs = matrix.runs_of("full", 2, ("A-v1", "B-v1"), ("ne_td3", "td3_reset"))
    assert [r.path for r in runs[:4]] == [
        "A-v1/ne_td3_seed1",
        "A-v1/td3_reset_seed1",
        "B-v1/ne_td3_seed1",
        "B-v1/td3_reset_seed1",
    ]
    assert [r.seed for r in runs] == [1] * 4 + [2] * 4
    assert runs[3].flags == "--env-id B-v1 --seed 1 --method reset --reset-interval 200000"
    (sequence,) = matrix.runs_of("full", 1, matrix.CONTINUAL, ("td3_continual",))
    assert "--env-id" not in sequence.flags


@pytest.mark.parametrize("length", matrix.LENGTHS)
def test_alpha_and_interval_are_halved_and_doubled(length):
    args, steps = run.parse(matrix.NE, shlex.split(some_run("ne_td3", length).flags))
    cosines = 0.0
    for step in range(args["grow_interval"], steps, args["grow_interval"]):
        if step > args["learning_starts"]:
            cosines += 1 + math.cos(math.pi * step / steps)
    alpha = 2 * math.log(0.75 / 0.05) / cosines
    assert args["grow_interval"] == steps // 100
    assert args["grow_rate"] == pytest.approx(alpha)
    words = {"alpha_half": alpha / 2, "alpha_twice": alpha * 2}
    words |= {"interval_quarter": steps // 400, "interval_twice": steps // 50}
    place = matrix.LENGTHS.index(length)
    for word, value in words.items():
        assert matrix.WORDS[word][place] == pytest.approx(value, rel=0.002)


def test_commands_of_the_pages_are_accepted():
    pages = [run.ROOT / "README.md", run.ROOT / "results" / "README.md"]
    pages += sorted((run.ROOT / "docs").glob("*.md"))
    text = "\n".join(page.read_text() for page in pages)
    calls = re.findall(r"python benchmark/run\.py ([^`#\n]*)", text)
    assert len(calls) >= 4
    for call in calls:
        words = shlex.split(call.split(">")[0])
        args = tyro.cli(run.Args, args=words)
        matrix.choose(args.figure, args.quick, args.short, args.seeds, args.tasks, args.methods)
    commands = {"curves", "continual", "topology"}
    drawn = set(re.findall(r"benchmark/plot\.py ([\w-]+)", text)) - commands
    assert drawn and drawn <= set(matrix.FIGURES)
    page = (run.ROOT / "docs" / "benchmark.md").read_text()
    documented = re.findall(r"^\| (`.*?) \|", page, re.M)
    assert set(re.findall(r"`([\w-]+)`", " ".join(documented))) == set(matrix.FIGURES)
