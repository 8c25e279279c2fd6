"""The code of docs/own_agent.md runs as it stands, and is NE."""

import re

import pytest
import torch

from helpers import ROOT

PAGE = ROOT / "docs" / "own_agent.md"


@pytest.fixture(scope="module")
def page():
    """Names that the page's code has defined, and the code itself."""
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    printed = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    names = {"print": printed.append}
    exec(compile(code, str(PAGE), "exec"), names)
    torch.set_num_threads(threads)
    return names | {"printed": printed, "code": code}


def test_masked_weights_are_0_and_active_ones_learn(page):
    for layer in page["layers"]:
        active = layer.mask == 1
        assert (layer.mask[~active] == 0).all()
        assert (layer.weight[~active] == 0).all()
        moments = page["optimizer"].state[layer.weight]
        assert (moments["exp_avg"][~active] == 0).all()
        assert (layer.weight[active] != 0).float().mean() > 0.95
    assert not (page["layers"][1].mask == 1).all()


def test_density_grows_by_what_is_born_less_what_is_pruned(page):
    layers = page["layers"]
    size = sum(layer.mask.numel() for layer in layers)
    active = sum(int(layer.mask.sum()) for layer in layers)
    started = sum(round(layer.initial_density * layer.mask.numel()) for layer in layers)
    assert started == pytest.approx(0.25 * size, rel=0.01)
    assert active == started + page["grown"] - page["pruned"]
    assert active > 2 * started
    assert 0 < page["pruned"] <= 0.4 * page["grown"]


def test_loss_falls_after_each_change_of_the_target(page):
    lines = [re.match(r"step +([\d,]+): loss ([\d.]+), density (\d+)%", s) for s in page["printed"]]
    loss = {int(line[1].replace(",", "")): float(line[2]) for line in lines}
    density = [int(line[3]) for line in lines]
    assert density[0] == 25 and max(density) > 60
    for changed, later in ((1, 251), (501, 751), (1001, 1251), (1501, 1751)):
        assert loss[changed] > 0.1
        assert loss[later] < 0.1 * loss[changed]
    assert page["loss"].item() < 0.02
