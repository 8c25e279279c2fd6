"""The primitives of utils_topology.py against hand calculations, brute force and properties."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ne_td3_continuous as ne
import utils_topology as topology


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained_mlp(sizes: list[int], density: float, seed: int = 0) -> tuple[ne.MLP, torch.optim.Adam]:
    """A sparse MLP and its Adam, with moments that are not 0 anywhere."""
    torch.manual_seed(seed)
    mlp = ne.MLP(sizes, layer_norm=False)
    topology.sparsify(mlp.layers, density, "erdos-renyi", generator(seed))
    adam = torch.optim.Adam(mlp.parameters(), fused=True)
    for p in mlp.parameters():
        adam.state[p] = {"step": torch.tensor(7.0), "exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p)}
    return mlp, adam


def silence(mlp: ne.MLP, depth: int, neuron: int) -> None:
    """Makes a hidden neuron dormant for any input that is not huge."""
    with torch.no_grad():
        mlp.layers[depth].weight[neuron] = 0.0
        mlp.layers[depth].bias[neuron] = -1.0


# --- the sparse start -------------------------------------------------------------------------------------------------
def test_erdos_renyi_matches_a_hand_calculation():
    # HalfCheetah's critic, (17 + 6)-256-128-1, D = 0.25: 5888 + 32768 + 128 weights, 9696 of them active.
    # eps = 9696 / (279 + 384 + 129) = 12.24 would give the last layer 12.24 * 129 / 128 > 1, so it is dense, and
    # eps = (9696 - 128) / (279 + 384) = 14.4314 for the other two.
    eps = 9568 / 663
    expected = [eps * 279 / 5888, eps * 384 / 32768, 1.0]
    assert topology.erdos_renyi_densities([(256, 23), (128, 256), (1, 128)], 0.25) == pytest.approx(expected)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=2, max_size=6), st.floats(0.001, 1.0))
def test_erdos_renyi_meets_its_budget_with_densities_in_range(sizes, density):
    shapes = list(zip(sizes[1:], sizes[:-1], strict=True))
    densities = topology.erdos_renyi_densities(shapes, density)
    counts = [n_out * n_in for n_out, n_in in shapes]
    assert all(0 < d <= 1 for d in densities)
    assert sum(d * n for d, n in zip(densities, counts, strict=True)) == pytest.approx(density * sum(counts))
    ratios = [d * n / sum(shape) for d, n, shape in zip(densities, counts, shapes, strict=True) if d < 1]
    assert not ratios or ratios == pytest.approx([ratios[0]] * len(ratios))  # one eps for every layer that is not dense


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, math.nan])
def test_erdos_renyi_refuses_densities_out_of_range(density):
    with pytest.raises(ValueError, match="density"):
        topology.erdos_renyi_densities([(4, 3)], density)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.001, 1.0), st.integers(0, 10))
def test_masks_have_the_exact_count(n_out, n_in, density, seed):
    mask = topology.sample_mask((n_out, n_in), density, generator(seed))
    assert mask.dtype == torch.bool and mask.shape == (n_out, n_in)
    assert int(mask.sum()) == max(1, round(density * n_out * n_in))


def test_masks_are_uniformly_random():
    rng = generator()
    frequency = sum(topology.sample_mask((5, 8), 0.25, rng).float() for _ in range(4000)) / 4000
    assert (frequency - 0.25).abs().max() < 0.035  # five standard deviations of a frequency over 4000 draws


@pytest.mark.parametrize("sparse_init", ["erdos-renyi", "uniform"])
def test_sparse_start_has_the_density_and_zero_weights(sparse_init):
    mlp = ne.MLP([23, 256, 128, 1], layer_norm=False)
    topology.sparsify(mlp.layers, 0.25, sparse_init, generator())
    assert topology.network_density(mlp.layers) == pytest.approx(0.25, abs=1e-4)
    for layer in mlp.layers:
        assert torch.equal(layer.weight, layer.weight * layer.mask)
        if sparse_init == "uniform":
            assert layer.mask.float().mean() == pytest.approx(0.25, abs=0.01)


# --- the schedule -----------------------------------------------------------------------------------------------------
def test_default_schedule_is_97_rounds_with_alpha_0_056():
    rounds, alpha, plan = topology.growth_schedule(ne.Args())
    assert (len(rounds), rounds[0], rounds[-1]) == (97, 30_000, 990_000)
    assert alpha == pytest.approx(2 / 97 * math.log(0.75 / 0.05))
    assert alpha == pytest.approx(0.056, abs=5e-4)
    assert "25% -> 95% in 97 rounds" in plan


def test_growth_count_is_the_cosine_of_the_paper():
    for step in (1, 300_000, 999_999):
        expected = math.ceil(0.05 / 2 * (1 + math.cos(math.pi * step / 1_000_000)) * 1234)
        assert math.ceil(topology.growth_fraction(0.05, step, 1_000_000) * 1234) == expected
    assert topology.growth_fraction(0.05, 1_000_000, 1_000_000) == 0.0


@settings(max_examples=50, deadline=None)
@given(st.floats(0.05, 0.9), st.integers(50_000, 1_000_000), st.integers(1_000, 20_000))
def test_solved_alpha_comes_near_the_final_density(start, total, interval):
    args = ne.Args(initial_density=start, total_timesteps=total, grow_interval=interval, learning_starts=1_000)
    rounds, alpha, _ = topology.growth_schedule(args)
    if len(rounds) < 20:
        return
    inactive = 1 - start
    for step in rounds:
        inactive *= 1 - topology.growth_fraction(alpha, step, total)
    assert 1 - inactive == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"initial_density": 1.0}, "dense, nothing to grow"),
        ({"ne_actor": False, "ne_critic": False}, "dense, nothing to grow"),
        ({"growth": "none"}, "stay at 25%"),
        ({"total_timesteps": 20_000}, "stay at 25%"),
        ({"ne_actor": False}, "topology: critics 25% -> 95%"),
        ({"growth_end": 2_000_000}, "25% -> 92% in 98 rounds"),  # the run ends at half of the cosine
    ],
)
def test_the_plan_says_what_will_happen(changes, words):
    assert words in topology.growth_schedule(ne.Args(**changes))[2]


# --- growth -----------------------------------------------------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(0, 1000))
def test_growth_picks_exactly_the_top_k_of_the_inactive(n_out, n_in, density, fraction, seed):
    rng = generator(seed)
    mask = torch.rand(n_out, n_in, generator=rng) < density
    score = torch.randperm(n_out * n_in, generator=rng).view(n_out, n_in).float()  # no ties
    count = int(fraction * int((~mask).sum()))
    inactive = [(i, j) for i in range(n_out) for j in range(n_in) if not mask[i, j]]
    expected = set(sorted(inactive, key=lambda ij: -score[ij].item())[:count])
    before = mask.clone()
    born = topology.grow_mask(mask, score, count)
    assert {tuple(ij) for ij in born.nonzero().tolist()} == expected
    assert torch.equal(mask, before | born)


def test_growth_leaves_the_output_alone_and_forgets_moments():
    mlp, adam = trained_mlp([5, 16, 8, 2], 0.3)
    x = torch.randn(32, 5)
    before, weights = mlp(x), [layer.weight.clone() for layer in mlp.layers]
    masks = [layer.mask.clone() for layer in mlp.layers]
    grown = topology.grow(mlp.layers, [torch.rand_like(w) for w in weights], 0.5, adam)
    assert grown == sum(math.ceil(0.5 * int((~mask).sum())) for mask in masks)
    assert torch.equal(mlp(x), before)
    for layer, mask in zip(mlp.layers, masks, strict=True):
        born = layer.mask & ~mask
        for moment in ("exp_avg", "exp_avg_sq"):
            assert (adam.state[layer.weight][moment][born] == 0).all()
            assert (adam.state[layer.weight][moment][~born] == 1).all()
        assert adam.state[layer.weight]["step"] == 7


# --- dormancy ---------------------------------------------------------------------------------------------------------
def test_dormancy_scores_by_hand():
    hidden = torch.tensor([[0.0, 1.0, 3.0, 0.0], [0.0, 3.0, 1.0, 0.4]])
    # mean |h|: 0, 2, 2, 0.2; their mean: 1.05
    assert topology.dormancy_scores(hidden).tolist() == pytest.approx([0, 2 / 1.05, 2 / 1.05, 0.2 / 1.05])
    assert topology.dormant(hidden, 0.0).tolist() == [True, False, False, False]
    assert topology.dormant(hidden, 0.2).tolist() == [True, False, False, True]
    assert topology.count_dormant([hidden, hidden], 0.2) == 4


def test_a_silent_layer_is_all_dormant():
    assert topology.dormant(torch.zeros(4, 3), 0.0).all()


def test_metrics_by_hand():
    mlp = ne.MLP([2, 4, 1], layer_norm=False)
    mlp.layers[0].mask[0, 0] = False
    hidden = [torch.tensor([[0.0, 1.0, 3.0, 0.0], [0.0, 3.0, 1.0, 0.4]])]
    row = topology.metrics("ne/actor", mlp.layers, hidden)
    assert row["ne/actor/density"] == pytest.approx(11 / 12)
    assert (row["ne/actor/dormant"], row["ne/actor/active_ratio"]) == (1, 0.75)
    assert (row["ne/actor/active_ratio_0.025"], row["ne/actor/active_ratio_0.1"]) == (0.75, 0.75)
    assert row["ne/actor/fau"] == pytest.approx(5 / 8)


# --- prune and reset --------------------------------------------------------------------------------------------------
def test_a_dormant_neuron_is_reset_as_specified():
    mlp, adam = trained_mlp([6, 16, 8, 2], 0.5)
    silence(mlp, 0, 3)
    with torch.no_grad():
        mlp.layers[0].bias += 5.0 * (
            torch.arange(16) != 3
        )  # so that neuron 3 of the first layer is the only dormant one
        mlp.layers[1].bias += 5.0
    x = torch.rand(64, 6)
    hidden, before = mlp.activations(x), mlp(x)
    assert [topology.dormant(h, 0.0).nonzero().flatten().tolist() for h in hidden] == [[3], []]
    first, second = mlp.layers[0], mlp.layers[1]
    had, outgoing = int(first.mask[3].sum()), int(second.mask[:, 3].sum())
    others = [layer.weight.clone() for layer in mlp.layers]
    gone = topology.prune(mlp.layers, hidden, 1000, adam, 2.0, generator())
    fan_in = min(had, round(first.initial_density * 6))
    assert gone == outgoing + had - fan_in
    assert int(first.mask[3].sum()) == fan_in
    assert not second.mask[:, 3].any() and not second.weight[:, 3].any()
    assert torch.equal(first.weight[3] != 0, first.mask[3])
    assert first.weight[3].abs().max() <= 1 / math.sqrt(6) and first.bias[3].abs() <= 1 / math.sqrt(6)
    assert torch.equal(first.bound[3], torch.full((6,), 2 / math.sqrt(6)))
    assert torch.isinf(first.bound[torch.arange(16) != 3]).all()
    for moment in ("exp_avg", "exp_avg_sq"):
        assert not adam.state[first.weight][moment][3].any() and adam.state[first.bias][moment][3] == 0
        assert not adam.state[second.weight][moment][:, 3].any()
        assert adam.state[first.weight][moment].sum() == 15 * 6 and adam.state[first.bias][moment].sum() == 15
        assert adam.state[second.weight][moment].sum() == 8 * 15
    kept = torch.arange(16) != 3
    assert torch.equal(first.weight[kept], others[0][kept]) and torch.equal(second.weight[:, kept], others[1][:, kept])
    assert torch.equal(mlp(x), before)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 400), st.floats(0.1, 0.9))
def test_pruning_keeps_to_its_budget_and_to_the_output(seed, budget, density):
    mlp, adam = trained_mlp([6, 24, 16, 2], density, seed)
    rng = generator(seed)
    for depth, width in ((0, 24), (1, 16)):
        for neuron in torch.randperm(width, generator=rng)[: width // 2].tolist():
            silence(mlp, depth, neuron)
            topology.apply_mask(mlp.layers[depth])
    x = 0.1 * torch.randn(32, 6, generator=rng)
    hidden, before = mlp.activations(x), mlp(x)
    active = [int(layer.mask.sum()) for layer in mlp.layers]
    gone = topology.prune(mlp.layers, hidden, budget, adam, 2.0, rng)
    assert 0 <= gone <= budget
    assert sum(active) - sum(int(layer.mask.sum()) for layer in mlp.layers) == gone
    assert torch.allclose(mlp(x), before, atol=1e-6)
    for layer in mlp.layers:
        assert torch.equal(layer.weight, layer.weight * layer.mask)
    if budget >= 400:  # more than there is
        for depth in (0, 1):
            dead = topology.dormant(hidden[depth], 0.0)
            assert not mlp.layers[depth + 1].mask[:, dead].any()


def test_dormant_neurons_go_in_random_order():
    gone = set()
    for seed in range(30):
        mlp, adam = trained_mlp([6, 16, 8, 2], 1.0)
        mlp.layers[0].bias.data = torch.where(torch.arange(16) < 8, -10.0, 10.0)  # the first half is dormant
        mlp.layers[1].bias.data += 100.0  # nothing else is
        topology.prune(mlp.layers, mlp.activations(torch.rand(8, 6)), 8, adam, 0.0, generator(seed))  # room for one
        pruned = [n for n in range(16) if not mlp.layers[1].mask[:, n].any()]
        assert len(pruned) == 1
        gone |= set(pruned)
    assert len(gone) > 3 and gone <= set(range(8))


def test_without_moments_nothing_breaks():
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    adam = torch.optim.Adam([parameter])
    topology.zero_moments(adam, parameter, 0)
    parameter.grad = torch.ones(2, 2)
    adam.step()  # the empty state is still taken for "not started"
    assert adam.state[parameter]["step"] == 1


def test_redraw_is_uniform_like_the_initialiser():
    layer = SimpleNamespace(
        in_features=400, weight=torch.zeros(1, 400), bias=torch.zeros(1), mask=torch.ones(1, 400) > 0
    )
    adam = SimpleNamespace(state={layer.weight: {}, layer.bias: {}})
    topology.redraw_neuron(layer, 0, adam, generator())
    assert 0.045 < layer.weight.abs().max() <= 0.05
    assert layer.weight.mean().abs() < 0.006  # four standard errors of U(-0.05, 0.05) over 400 draws
