"""The documentation against the code: links, references to definitions, commands, logged keys."""

import ast
import csv
import importlib
import itertools
import re
import shlex
from pathlib import Path

import pytest
import tyro

from helpers import run_here

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "results" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDE = (ROOT / "docs" / "ne_td3.md").read_text()
page_names = [page.parent.name + "-" + page.name for page in PAGES]


def section(title: str, page: str) -> str:
    """The text of a second-level section of a page."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.M | re.S)[1]


def rows(text: str) -> list[list[str]]:
    """The cells of every table row in a Markdown text."""
    table = []
    for line in text.splitlines():
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return table


# --- links and references -----------------------------------------------------
@pytest.mark.parametrize("page", PAGES, ids=page_names)
def test_links_inside_the_repository_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)  # code has brackets, too
    links = re.findall(r"\[[^\]]*\]\((?!https?:)([^)#\s]*)(?:#([\w-]+))?\)", text)
    for target, anchor in links:
        file = page.parent / target if target else page
        assert file.exists(), f"there is no {target}"
        if anchor and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            anchors = set()
            for title in titles:
                anchors.add(re.sub(r"[^\w -]", "", title).lower().replace(" ", "-"))
            assert anchor in anchors, f"there is no section {anchor} in {file.name}"


def definitions(file: Path) -> set[str]:
    """Names of functions and classes, and of methods as Class.method and method."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if hasattr(part, "name")}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    return names


def test_the_map_from_the_paper_to_the_code_names_definitions():
    table = rows(section("From the paper to the code", GUIDE))[2:]
    assert len(table) > 8
    for _, _, where in table:
        file, *names = re.findall(r"`([^`]+)`", where)
        assert names and set(names) <= definitions(ROOT / file), where


# --- commands -----------------------------------------------------------------
def commands(text: str) -> list[tuple[str, list[str]]]:
    """Module and arguments of all calls of the training scripts."""
    pattern = r"python (?:-m (baselines\.\w+)|(ne_\w+)\.py)([^`#\n|]*)"
    calls = []
    for baseline, script, arguments in re.findall(pattern, text):
        calls.append((baseline or script, shlex.split(arguments)))
    return calls


@pytest.mark.parametrize("page", PAGES, ids=page_names)
def test_commands_are_accepted(page):
    for name, arguments in commands(page.read_text()):
        if "--help" in arguments or "--resume" in arguments:
            continue
        tyro.cli(importlib.import_module(name).Args, args=arguments)


SCRIPTS = [path.stem for path in ROOT.glob("ne_*.py")]
SCRIPTS += [f"baselines.{path.stem}" for path in (ROOT / "baselines").glob("[!_]*.py")]


def test_the_pages_have_commands_of_every_script():
    called = set()
    for page in PAGES:
        called |= {name for name, _ in commands(page.read_text())}
    assert called == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_a_line_of_help(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        tyro.cli(importlib.import_module(name).Args, args=["--help"])
    text = re.sub(r"\x1b\[[0-9;]*m|│", "", capsys.readouterr().out)
    assert text.count("(default: ") > 10
    assert not re.search(r"\s\s\(default: ", text)  # behind the help, not behind a gap


# --- logged keys --------------------------------------------------------------
def documented_keys(table: str) -> set[str]:
    """Keys of a table of metrics, with {actor,critic} written out."""
    keys = set()
    for row in rows(table):
        for key in re.findall(r"`([^`]+)`", row[0]):
            parts = [part.split(",") for part in re.split(r"[{}]", key)]
            keys |= {"".join(choice) for choice in itertools.product(*parts)}
    return keys


SMALL = "--total-timesteps 240 --learning-starts 60 --eval-frequency 120 --eval-episodes 1"
SMALL += " --batch-size 8 --actor-hidden 8 --critic-hidden 8"


def test_every_column_is_explained_and_no_other(tmp_path):
    run_here(f"--env-id Pendulum-v1 {SMALL} --run-dir {tmp_path / 'run'}")
    with open(tmp_path / "run" / "results.csv") as file:
        columns = set(next(csv.reader(file)))
    documented = documented_keys(section("Logged metrics explained", GUIDE))
    board_only = {"charts/episodic_length", "charts/SPS", "losses/actor_loss"}
    assert columns == {k for k in documented - board_only if not k.startswith("masks/")}
