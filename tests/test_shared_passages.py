"""Each product script is copied alone into forks, so they repeat each other word for word."""

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORIGINAL = "ne_td3_continuous.py"
SCRIPTS = [ORIGINAL, "ne_td3_continual.py", "ne_drq_dmc.py"]
DIVIDER = "# " + "=" * 78 + "\n# Part two"

# what means the same in all three
EVERYWHERE = (
    "MLP MaskedLinear.__init__ Network.step Network.update_targets Network.density "
    "growth_rounds growth_fraction review_threshold"
).split()
# and what TD3 is, and NE on it
TD3 = (
    "TD3Args NEArgs Args Batch.copy_ ReplayBuffer.sample ReplayBuffer.state_dict "
    "ReplayBuffer.load_state_dict MaskedLinear Actor Critic Network Agent.__init__ "
    "Agent.update_critic Agent.update_actor scale_to_run solve_grow_rate growth_plan "
    "topology_round redo reset make_env evaluate log_masks fast_updates"
).split()


def passages(script: str) -> dict[str, str]:
    """{name: text} of the functions, classes and methods of a script."""
    text = (ROOT / script).read_text()
    lines = text.splitlines()
    found = {}

    def add(name: str, node) -> None:
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        found[name] = "\n".join(lines[first - 1 : node.end_lineno])

    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            add(node.name, node)
        if isinstance(node, ast.ClassDef):
            for child in node.body:
                if isinstance(child, ast.FunctionDef):
                    add(f"{node.name}.{child.name}", child)
    return found


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_part_two_is_the_same_text(script):
    texts = []
    for name in (ORIGINAL, script):
        text = (ROOT / name).read_text()
        assert text.count(DIVIDER) == 1
        texts.append(text.split(DIVIDER)[1])
    assert texts[0] == texts[1]
    assert texts[0].count("\ndef ") > 10


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_what_means_the_same_is_the_same_text(script, name):
    assert passages(script)[name] == passages(ORIGINAL)[name]


@pytest.mark.parametrize("name", TD3)
def test_the_continual_script_repeats_td3_and_ne(name):
    assert passages("ne_td3_continual.py")[name] == passages(ORIGINAL)[name]


@pytest.mark.parametrize("script", [*SCRIPTS, "utils_topology.py"])
def test_lines_are_short(script):
    """As in CleanRL, sfujim/TD3, drqv2 and nanoGPT; but no number is worth a crammed line."""
    lengths = []
    for line in (ROOT / script).read_text().splitlines():
        if line.strip():
            lengths.append(len(line))
    assert statistics.median(lengths) <= 54
    assert sum(length > 90 for length in lengths) < 0.03 * len(lengths)
