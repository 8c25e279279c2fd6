"""The documentation against the code: links to lines, flags and their defaults, logged keys, commands."""

import dataclasses
import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch
import tyro

import drq_dmc as drq_baselines
import ne_drq_dmc as drq
import ne_td3_continual as continual
import ne_td3_continuous as ne
import td3_continual
import td3_continuous as td3
import utils_topology as topology

ROOT = Path(ne.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDE = (ROOT / "docs" / "ne_td3.md").read_text()
BASELINES = (ROOT / "docs" / "baselines.md").read_text()
SCRIPT = Path(ne.__file__).read_text()
CONTINUAL = (ROOT / "docs" / "ne_td3_continual.md").read_text()
MODULES = (ne, continual, drq, td3, td3_continual, drq_baselines)
SCRIPTS = {Path(script.__file__).relative_to(ROOT).as_posix(): script for script in MODULES}

# [`file.py:12`](../file.py#L12) `fragment of that line`
LINK = re.compile(r"\[`?([\w/.]+\.py):(\d+)`?\]\(([\w/.]+\.py)#L(\d+)\)\s+`([^`\n]+)`")


def section(title: str, page: str = GUIDE) -> str:
    """The text of a second-level section of a page."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.M | re.S)[1]


def rows(text: str) -> list[list[str]]:
    """The cells of every table row in a Markdown text."""
    lines = [line.strip() for line in text.splitlines()]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def in_backticks(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# --- links ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_to_lines_show_what_they_say(page):
    text = page.read_text()
    links = LINK.findall(text)
    assert links, f"{page.name} has no link to a line"
    assert len(links) == len(re.findall(r"#L\d", text)), f"{page.name}: a link without `fragment` behind it"
    wrong = []
    for shown, number, target, anchor, fragment in links:
        file = (page.parent / target).resolve()
        assert file == ROOT / shown and file.is_file(), f"{page.name}: {shown} and {target} must be the same file"
        if number != anchor:
            wrong.append(f"{shown}:{number} links to #L{anchor}")
        lines = file.read_text().splitlines()
        found = [n for n, line in enumerate(lines, 1) if fragment in line]
        if int(number) not in found:
            now = " or ".join(map(str, found)) or "nowhere"
            wrong.append(f"{shown}:{number}, found now at {now}: {fragment}")
    assert not wrong, f"{page.name}:\n" + "\n".join(wrong)


def test_both_files_are_linked_to():
    assert {shown for shown, *_ in LINK.findall(GUIDE)} == {"ne_td3_continuous.py", "utils_topology.py"}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_inside_the_repository_lead_somewhere(page):
    text = page.read_text()
    for target, anchor in re.findall(r"(?<!!)\[[^\]]*\]\((?!https?:)([^)#\s]*)(?:#([\w-]+))?\)", text):
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name}: there is no {target}"
        if anchor and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.name}: there is no section {anchor} in {file.name}"


# --- flags ------------------------------------------------------------------------------------------------------------
def says(cell: str, value) -> bool:
    """Whether a table's cell gives this default. None stands for something that is worked out, in words."""
    if value is None:
        return bool(re.match("[a-z]", cell))
    if isinstance(value, bool):
        return cell == ("on" if value else "off")
    if isinstance(value, tuple):
        return cell == " ".join(map(str, value))
    if isinstance(value, str):
        return cell == value
    return float(cell.replace(",", "")) == value


@pytest.mark.parametrize("field", dataclasses.fields(ne.Args), ids=lambda field: field.name)
def test_every_flag_is_in_the_tables_with_its_default(field):
    flag = "--" + field.name.replace("_", "-")
    names = [flag, flag.replace("--", "--no-", 1)] if isinstance(field.default, bool) else [flag]
    defaults = [row[1] for row in rows(section("Hyperparameters")) if in_backticks(row[0]) == names]
    assert len(defaults) == 1, f"docs/ne_td3.md must have one row for {', '.join(names)}"
    assert says(defaults[0], field.default), f"{flag}: default {defaults[0]} in the docs, {field.default} in Args"


def test_the_tables_have_no_other_flags():
    documented = {name for row in rows(section("Hyperparameters")) for name in in_backticks(row[0])}
    fields = {field.name: field.default for field in dataclasses.fields(ne.Args)}
    flags = {"--" + name.replace("_", "-") for name in fields}
    flags |= {"--no-" + name.replace("_", "-") for name, default in fields.items() if isinstance(default, bool)}
    assert documented == flags


def test_the_page_of_the_baselines_has_a_row_for_each_flag_of_theirs_alone():
    shared = {field.name: field.default for field in dataclasses.fields(ne.Args)}
    own = {f.name: f.default for f in dataclasses.fields(td3.Args) if f.name not in shared or f.name.startswith("re")}
    own = {name: default for name, default in own.items() if name != "resume"}
    table = BASELINES[BASELINES.index("## Flags of this script alone") :]
    documented = {in_backticks(row[0])[0]: row[1] for row in rows(table) if in_backticks(row[0])}
    assert set(documented) == {"--" + name.replace("_", "-") for name in own} and len(own) == 6
    for name, default in own.items():
        assert says(documented["--" + name.replace("_", "-")], default), name


CONTINUAL_FLAGS = rows(section("What differs from ne_td3_continuous.py", CONTINUAL))


@pytest.mark.parametrize("script", [continual, td3_continual], ids=["ne_td3_continual", "td3_continual"])
def test_flags_of_the_continual_scripts_are_those_of_the_other_page_or_in_the_table(script):
    defaults = {field.name: field.default for field in dataclasses.fields(ne.Args)}
    documented = {name: row[1] for row in CONTINUAL_FLAGS for name in in_backticks(row[0]) if name.startswith("--")}
    for field in dataclasses.fields(script.Args):
        flag = "--" + field.name.replace("_", "-")
        if flag not in documented:
            assert field.name in defaults and field.default == defaults[field.name], f"{flag} is not in the table"
        elif flag == "--exp-name":
            assert field.default in (documented[flag], "td3_continual")
        else:
            assert says(documented[flag], field.default), f"{flag}: default {documented[flag]} in the docs"


def test_the_table_of_the_continual_scripts_has_no_other_flags():
    fields = [field for script in (continual, td3_continual) for field in dataclasses.fields(script.Args)]
    flags = {"--" + field.name.replace("_", "-") for field in fields}
    flags |= {"--no-" + field.name.replace("_", "-") for field in fields if isinstance(field.default, bool)}
    assert {name for row in CONTINUAL_FLAGS for name in in_backticks(row[0])} <= flags
    left_out = re.search(r"All flags of that script are here but (.*?);", CONTINUAL, re.S)[1]
    gone = {field.name for field in dataclasses.fields(ne.Args)} - {f.name for f in dataclasses.fields(continual.Args)}
    assert set(in_backticks(left_out)) == {"--" + name.replace("_", "-") for name in gone}


def test_the_page_of_drq_has_a_row_for_each_flag_that_differs():
    text = (ROOT / "docs" / "ne_drq_dmc.md").read_text()
    documented = {
        in_backticks(row[0])[0]: row[1] for row in rows(text[text.index("## Hyper") :]) if in_backticks(row[0])
    }
    shared = {field.name: field.default for field in dataclasses.fields(ne.Args)}
    fields = {field.name: field.default for field in dataclasses.fields(drq.Args)}
    differ = {name: default for name, default in fields.items() if name not in shared or shared[name] != default}
    assert len(differ) > 20
    for name, default in differ.items():
        assert says(documented.pop("--" + name.replace("_", "-")), default), name
    assert set(documented) <= {"--" + name.replace("_", "-") for name in fields}


def test_the_baselines_on_drq_have_a_row_for_each_flag_that_the_ne_script_has_not():
    table = rows(section("Baselines on DrQ-v2", (ROOT / "docs" / "ne_drq_dmc.md").read_text()))
    documented = {in_backticks(row[0])[0]: row[1] for row in table if in_backticks(row[0]) and row[0][1] == "-"}
    shared = {field.name: field.default for field in dataclasses.fields(drq.Args)}
    fields = {field.name: field.default for field in dataclasses.fields(drq_baselines.Args)}
    differ = {name: default for name, default in fields.items() if name not in shared or shared[name] != default}
    differ |= {name: fields[name] for name in ("redo_interval", "redo_tau")}
    assert set(documented) == {"--" + name.replace("_", "-") for name in differ} and len(differ) == 6
    for name, default in differ.items():
        assert says(documented["--" + name.replace("_", "-")], default), name
    assert {"track", "wandb_project_name", "wandb_entity"} <= shared.keys() - fields.keys()


def commands(text: str) -> list[tuple[str, str]]:
    """Script and arguments of all calls of the training scripts, in code blocks and between backticks."""
    return re.findall(r"python ((?:baselines/)?\w*(?:td3|drq)_\w+\.py)([^`#\n]*)", text)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_commands_are_accepted(page):
    calls = [(script, shlex.split(call)) for script, call in commands(page.read_text())]
    assert calls
    for script, call in calls:
        if "--help" not in call:
            tyro.cli(SCRIPTS[script].Args, args=call)


# --- logged keys ------------------------------------------------------------------------------------------------------
def documented_keys(table: str = section("Logged metrics explained")) -> dict[str, str]:
    """{key: explanation} of a table of metrics, with {actor,critic} written out."""
    keys = {}
    for row in rows(table):
        for key in in_backticks(row[0]):
            parts = [part.split(",") for part in re.split(r"[{}]", key)]
            keys |= {"".join(choice): row[-1] for choice in itertools.product(*parts)}
    return keys


def logged_keys() -> set[str]:
    """What the script logs: the keys in its source, those of `topology.metrics`, and the step."""
    layer, hidden = ne.MaskedLinear(2, 3), torch.ones(4, 3)
    keys = {"step"} | {key for n in ("actor", "critic") for key in topology.metrics(f"ne/{n}", [layer], [hidden])}
    for key in re.findall(r'"([a-z]+/[\w{}/.]+)"', SCRIPT):  # those with {...} are f-strings
        networks = ["actor/N", "critic/N"] if key.startswith("masks/") else ["actor", "critic"]
        values = {"{name}": networks, "{network}": networks, "{change}": ["grown", "pruned"]}
        parts = re.split(r"(\{\w+\})", key)
        keys |= {"".join(choice) for choice in itertools.product(*(values.get(part, [part]) for part in parts))}
    return {key for key in keys if not any(other.startswith(f"{key}/") for other in keys)}  # without mere prefixes


def test_every_logged_key_is_explained_and_no_other():
    logged, documented = logged_keys(), documented_keys()
    assert {"eval/return_mean", "losses/actor_loss", "ne/review_share", "ne/critic/fau", "ne/actor/grown"} <= logged
    assert sorted(logged - set(documented)) == [], "not explained in docs/ne_td3.md"
    assert sorted(set(documented) - logged) == [], "explained, but not logged"
    assert all(len(explanation.split()) > 3 for explanation in documented.values())


@pytest.mark.parametrize("script", [continual, td3_continual], ids=["ne_td3_continual", "td3_continual"])
def test_every_column_of_the_continual_scripts_is_explained(script):
    own = documented_keys(section("Logged columns", CONTINUAL))
    source = Path(script.__file__).read_text()
    written = set(re.findall(r'"((?:[a-z]+/[\w{}/.]+)|cycle|task_trained|task_evaluated)"', source))
    written = {key.replace("{name}/return", "{task}/return") for key in written}
    assert {"eval/{task}/return_mean", "task/id", "cycle", "eval/return_std"} <= written
    assert set(own) - {"step"} <= {key.replace("{", "").replace("}", "") for key in written}
    known = set(documented_keys()) | set(own) | {key.replace("{", "").replace("}", "") for key in own}
    for key in written:
        networks = [key.replace("{name}", name).replace("{change}", "grown") for name in ("actor", "critic", "actor/N")]
        key = key.replace("{", "").replace("}", "")
        assert key in known or set(networks) & known or any(k.startswith(f"{n}/") for k in known for n in networks), key
