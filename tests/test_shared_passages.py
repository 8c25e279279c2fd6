"""Each script is copied alone into forks, so they repeat each other. What means the same is the same, line for line."""

import ast
import difflib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NE_WORDS = (
    r"topology|ne_|\bNE\b|Neuroplastic|review|rounds|plan|epsilon|dormant|counts?\b|masks/|layer|oldest|density|grow|prune"
    r"|sparse|clip|params|self.mlps|Agent\(|redo|reset|initial weights|speed:|agent.optimizers:"
)
# script, the one it repeats, the passages that differ because the algorithms do, and the words of these differences:
# of the lines that are new, and of those that are gone
PAIRS = [
    (
        "baselines/td3_continuous.py",
        "ne_td3_continuous.py",
        "Args RANGES ReplayBuffer.sample MLP MLP.__init__ MLP.forward Agent.__init__ Agent.update_critic "
        "Agent.update_actor load_checkpoint parse_args main",
        r"method|rival|redo|reset|inject|by_age|\bage|\brow\b|recency|torch_rng|[^.]metrics|else:|Linear|\by\b|fresh|copied"
        r"|adam|params|self.mlps|\bAgent\(|args: Args, n_obs|optimizers = |returns|td3_continuous|compile|graphed"
        r"|active|\"gamma tau|learning_rate\"",
        NE_WORDS,
    ),
    (  # one update instead of two, plain Adam, MLPs without masks and, for want of room, no --track
        "baselines/drq_dmc.py",
        "ne_drq_dmc.py",
        "Args RANGES ReplayBuffer.sample Network.__init__ Network.forward Agent Agent.__init__ Agent.hidden "
        "load_checkpoint parse_args open_run main",
        r"method|rival|redo|reset|inject|torch_rng|[^.]metrics|Linear|copied|self.params|self.mlps|adam\b|optimizers = "
        r"|heads|orthogonal|[Uu]pdate|Agent\(|args: Args, n_act|drq_dmc|self.online|rng: torch|uniform|whole"
        r"|mlp|self.encode|\"returns\"\]|graphed|active|may_change|noise_clip|gamma tau|learning_rate\"|buffer.sample"
        r"|self.newest|def forward|critic.trunk",
        NE_WORDS
        + r"|[Uu]pdate|critic, then|networks|head|groups|schedules|encode|method|may_change|whole\]|track|wandb"
        r"|ImportError",
    ),
]


# script, the one it repeats, and passages that are the same line for line, given words of the script being replaced
TD3 = "ne_td3_continuous.py"
REPEATED = [
    ("ne_drq_dmc.py", TD3, "die review_threshold save_checkpoint load_checkpoint open_run __main__", {}),
    ("utils_topology.py", TD3, "MaskedLinear MaskedLinear.__init__ MaskedLinear.forward CudaGraph.__init__", {}),
    ("utils_topology.py", TD3, "MLP MLP.__init__ MLP.activations MLP.forward CudaGraph", {"MaskedMLP": "MLP"}),
    ("utils_topology.py", TD3, "CudaGraph.__call__", {"(self, batch)": "(self, batch: Batch)"}),
    (
        "baselines/drq_dmc.py",
        "baselines/td3_continuous.py",
        "die CudaGraph CudaGraph.__init__ CudaGraph.__call__ redo dormancy_scores metrics save_checkpoint __main__",
        {"mlp[::3]": "mlp.layers", "mlp[3::3]": "mlp.layers[1:]", ".apply(orthogonal)": ""},
    ),
]


def passages(script: str) -> dict[str, list[str]]:
    """{name: lines} of every constant, function, class (without its methods) and method of a script."""
    lines = (ROOT / script).read_text().splitlines()
    found = {}

    def add(name: str, node: ast.AST) -> None:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        found[name] = lines[first - 1 : node.end_lineno]

    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.Assign):
            add(node.targets[0].id, node)
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If):
            add(getattr(node, "name", "__main__"), node)
        if isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            for method in methods:
                add(f"{node.name}.{method.name}", method)
            if methods:
                del found[node.name][methods[0].lineno - node.lineno :]
    return found


@pytest.mark.parametrize(("script", "original", "different", "words", "gone"), PAIRS, ids=[pair[0] for pair in PAIRS])
def test_passages_of_the_same_name_are_the_same_lines(script, original, different, words, gone):
    ours, theirs = passages(script), passages(original)
    common = [name for name in theirs if name in ours]
    assert [name for name in ours if name in theirs] == common, "the order of the passages is not the same"
    assert len(common) > 30 and set(different.split()) <= set(common)
    changed = {name for name in common if ours[name] != theirs[name]}
    assert changed == set(different.split())


@pytest.mark.parametrize(("script", "original", "different", "words", "gone"), PAIRS, ids=[pair[0] for pair in PAIRS])
def test_other_passages_differ_by_the_algorithm_only(script, original, different, words, gone):
    ours, theirs = passages(script), passages(original)
    stray = []
    for name in different.split():
        for line in difflib.ndiff(theirs[name], ours[name]):
            allowed = {"- ": gone, "+ ": words}.get(line[:2])
            if allowed and line[2:].strip() and not re.search(allowed, line):
                stray.append(f"{name}: {line}")
    assert not stray, "\n".join(stray)


@pytest.mark.parametrize(("script", "original", "names", "words"), REPEATED, ids=[names for *_, names, _ in REPEATED])
def test_what_pixels_do_not_change_is_repeated(script, original, names, words):
    ours, theirs = passages(script), passages(original)
    words = {"ne_drq_dmc 1": "ne_td3_continuous 1"} | words
    for old, new in words.items():
        ours = {name.replace(old, new): [line.replace(old, new) for line in lines] for name, lines in ours.items()}
    for name in names.split():
        assert ours[name] == theirs[name], name


SCRIPTS = ["ne_td3_continuous.py", "ne_td3_continual.py", "ne_drq_dmc.py", "utils_topology.py"]
SCRIPTS += ["baselines/td3_continuous.py", "baselines/td3_continual.py", "baselines/drq_dmc.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_can_be_read_in_one_sitting(script):
    assert len((ROOT / script).read_text().splitlines()) <= 650
    for name, lines in passages(script).items():
        length = sum(not line.startswith("@") for line in lines)
        assert length < 40 or name in ("main", "Args"), f"{name} has {length} lines"
