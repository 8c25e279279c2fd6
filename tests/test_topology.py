"""The primitives of utils_topology.py and the schedule, against hand calculations."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ne_td3_continuous as ne
import utils_topology as topology


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained_mlp(sizes: list[int], density: float, seed: int = 0):
    """A sparse MLP and its Adam after 7 steps.

    exp_avg is 1 and exp_avg_sq is random in [1, 2) for all active weights and all biases.
    """
    torch.manual_seed(seed)
    mlp = ne.MLP(sizes, layer_norm=False)
    topology.sparsify(mlp.layers, density, "erdos-renyi", generator(seed))
    adam = topology.Adam(list(mlp.parameters()), 3e-4)
    for layer in mlp.layers:
        for p, active in ((layer.weight, layer.mask), (layer.bias, torch.ones_like(layer.bias))):
            adam.state[p]["step"].fill_(7)
            adam.state[p]["exp_avg"].copy_(active)
            adam.state[p]["exp_avg_sq"].copy_((1 + torch.rand_like(p)) * active)
    return mlp, adam


def silence(mlp: ne.MLP, depth: int, neuron: int) -> None:
    """Makes a hidden neuron dormant for any input that is not huge."""
    with torch.no_grad():
        mlp.layers[depth].weight[neuron] = 0.0
        mlp.layers[depth].bias[neuron] = -1.0


def active_connections(mlp: ne.MLP) -> int:
    return sum(int(layer.mask.sum()) for layer in mlp.layers)


# --- the sparse start ---------------------------------------------------------
@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=2, max_size=6), st.floats(0.001, 1.0))
def test_erdos_renyi_meets_its_budget_with_densities_in_range(sizes, density):
    shapes = list(zip(sizes[1:], sizes[:-1], strict=True))
    densities = topology.erdos_renyi_densities(shapes, density)
    counts = [n_out * n_in for n_out, n_in in shapes]
    active = 0
    eps = []  # the same in every layer that is not dense
    for layer_density, count, shape in zip(densities, counts, shapes, strict=True):
        assert 0 < layer_density <= 1
        active += layer_density * count
        if layer_density < 1:
            eps.append(layer_density * count / sum(shape))
    assert active == pytest.approx(density * sum(counts))
    assert not eps or eps == pytest.approx([eps[0]] * len(eps))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.001, 1.0), st.integers(0, 10))
def test_masks_have_the_exact_count(n_out, n_in, density, seed):
    mask = topology.sample_mask((n_out, n_in), density, generator(seed))
    assert mask.shape == (n_out, n_in)
    assert set(mask.flatten().tolist()) <= {0.0, 1.0}
    assert int(mask.sum()) == max(1, round(density * n_out * n_in))


def test_masks_are_uniformly_random():
    rng = generator()
    total = torch.zeros(5, 8)
    for _ in range(4000):
        total += topology.sample_mask((5, 8), 0.25, rng)
    # five standard deviations of a frequency over 4000 draws
    assert (total / 4000 - 0.25).abs().max() < 0.035


@pytest.mark.parametrize("sparse_init", ["erdos-renyi", "uniform"])
def test_sparse_start_has_the_density_and_zero_weights(sparse_init):
    mlp = ne.MLP([23, 256, 128, 1], layer_norm=False)
    topology.sparsify(mlp.layers, 0.25, sparse_init, generator())
    assert topology.network_density(mlp.layers) == pytest.approx(0.25, abs=1e-4)
    for layer in mlp.layers:
        assert torch.equal(layer.weight, layer.weight * layer.mask)
        assert layer.mask.mean() == pytest.approx(layer.initial_density, abs=0.01)
        if sparse_init == "uniform":
            assert layer.initial_density == 0.25


# --- the schedule -------------------------------------------------------------
def scaled(**changes) -> ne.Args:
    args = ne.Args(**changes)
    ne.scale_to_run(args)
    return args


def test_the_default_schedule_is_97_rounds_with_alpha_0_057():
    args = scaled()
    rounds = ne.growth_rounds(args)
    assert (len(rounds), rounds[0], rounds[-1]) == (97, 30_000, 990_000)
    annealing = sum(1 + math.cos(math.pi * step / 1_000_000) for step in rounds)
    assert args.grow_rate == pytest.approx(2 * math.log(0.75 / 0.05) / annealing)
    assert args.grow_rate == pytest.approx(0.057, abs=5e-4)


@pytest.mark.parametrize("total", [50_000, 200_000, 1_000_000])
def test_the_schedule_scales_with_the_run(total):
    args = scaled(total_timesteps=total)
    assert args.grow_interval == total // 100
    assert args.review_interval == max(1, (total - 25_000) // 1_000)
    assert args.growth_end == total


@pytest.mark.parametrize("floor", [0.0, 0.3, 0.65])
@pytest.mark.parametrize(
    ("total", "first"), [(1_000_000, 25_000), (200_000, 25_000), (9_000, 1_000)]
)
@pytest.mark.parametrize("ratio", [1, 2])
def test_the_decay_meets_the_floor_at_half_of_the_run(floor, total, first, ratio):
    """With no reduction in any count; a floor of 0 is never met, 0.01 is."""
    args = scaled(
        total_timesteps=total, learning_starts=first, review_floor=floor, replay_ratio=ratio
    )
    progress = ne.Progress()
    updates = range(args.review_interval, ratio * (total - first) + 1, args.review_interval)
    assert len(updates) == pytest.approx(1_000, rel=0.01)
    epsilons = []
    for _ in updates:
        progress.epsilon = ne.review_threshold(args, progress, 10, 0.5)
        progress.dormant = 10
        epsilons.append(progress.epsilon)
    above = sum(epsilon > max(0.01, floor) * (1 + 1e-9) for epsilon in epsilons)
    assert epsilons == sorted(epsilons, reverse=True)
    assert first + updates[above] / ratio == pytest.approx(total / 2, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "25% -> 95% in 97 rounds"),
        ({"initial_density": 0.05, "final_density": 0.8}, "5% -> 80% in 97 rounds"),
        ({"ne_actor": False, "ne_critic": False}, "100% -> 100% in 97 rounds"),
        ({"growth": "none"}, "25% -> 25% in 97 rounds"),
        ({"total_timesteps": 20_000}, "25% -> 25% in 0 rounds"),  # before the first update
        # alpha is at most 1: 0.25 + 0.75 / 2 * (1 + cos(0.6 pi))
        ({"grow_interval": 600_000}, "25% -> 51% in 1 rounds"),
        # the run ends at half of the cosine
        ({"growth_end": 2_000_000, "grow_interval": 10_000}, "25% -> 92% in 98 rounds"),
    ],
)
def test_the_plan_says_what_will_happen(changes, words):
    assert f"topology: {words}" in ne.growth_plan(scaled(**changes))


def test_the_plan_is_what_grows():
    """Without pruning and with gradients everywhere, a network has the planned density."""
    args = scaled(total_timesteps=20_000, learning_starts=1_000)
    mlp, adam = trained_mlp([40, 80, 60, 20], args.initial_density)
    scores = [torch.rand_like(layer.weight) + 0.1 for layer in mlp.layers]
    planned = 0
    grown = 0
    for step in ne.growth_rounds(args):
        fraction = ne.growth_fraction(args, step, args.grow_rate)
        planned += topology.planned_births(mlp.layers, fraction)
        grown += topology.grow(mlp.layers, scores, fraction, adam)
    assert grown == planned
    assert topology.network_density(mlp.layers) == pytest.approx(0.95, abs=0.02)  # ceil
    assert f"-> 95% in {len(ne.growth_rounds(args))} rounds" in ne.growth_plan(args)


# --- growth -------------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.integers(0, 1000),
)
def test_growth_picks_the_top_k_of_those_with_a_gradient(
    n_out, n_in, density, zeros, fraction, seed
):
    rng = generator(seed)
    layer = ne.MaskedLinear(n_in, n_out)
    adam = topology.Adam([layer.weight, layer.bias], 3e-4)
    layer.mask.copy_(torch.rand(n_out, n_in, generator=rng) < density)
    score = torch.randperm(n_out * n_in, generator=rng).view(n_out, n_in) + 1.0  # no ties
    score[torch.rand(n_out, n_in, generator=rng) < zeros] = 0.0
    score[torch.rand(n_out, n_in, generator=rng) < 0.5] *= -1.0
    candidates = []
    for i in range(n_out):
        for j in range(n_in):
            if layer.mask[i, j] == 0 and score[i, j] != 0:
                candidates.append((i, j))
    candidates.sort(key=lambda ij: -abs(score[ij].item()))
    count = math.ceil(fraction * len(candidates))
    before = layer.mask.clone()
    assert topology.grow([layer], [score], fraction, adam) == count
    born = (layer.mask - before).nonzero().tolist()
    assert sorted(map(tuple, born)) == sorted(candidates[:count])


# --- dormancy -----------------------------------------------------------------
def test_scores_and_metrics_by_hand():
    hidden = torch.tensor([[0.0, 1.0, 3.0, 0.0], [0.0, 3.0, 1.0, 0.4]])
    # mean |h|: 0, 2, 2, 0.2; their mean: 1.05
    expected = [0, 2 / 1.05, 2 / 1.05, 0.2 / 1.05]
    assert topology.dormancy_scores(hidden).tolist() == pytest.approx(expected)
    assert topology.dormant_neurons([hidden], 0.0) == [(0, 0)]
    assert topology.dormant_neurons([hidden, hidden], 0.2) == [(0, 0), (0, 3), (1, 0), (1, 3)]
    row = topology.activity([hidden])
    assert (row["dormant"], row["active_ratio"], row["active_ratio_0.1"]) == (1, 0.75, 0.75)
    assert row["fau"] == pytest.approx(5 / 8)
    # of a sequence, (T, B, n): a neuron that is active at any time is not dormant
    sequence = torch.stack((hidden, torch.zeros_like(hidden)))
    assert topology.dormant_neurons([sequence], 0.0) == [(0, 0)]
    assert topology.dormancy_scores(sequence).tolist() == pytest.approx(expected)


# --- prune and reset ----------------------------------------------------------
def test_a_dormant_neuron_is_reset_as_specified():
    mlp, adam = trained_mlp([6, 16, 8, 2], 0.5)
    silence(mlp, 0, 3)
    others = torch.arange(16) != 3
    with torch.no_grad():  # so that neuron 3 of the first layer is the only dormant one
        mlp.layers[0].bias += 5.0 * others
        mlp.layers[1].bias += 5.0
    x = torch.rand(64, 6)
    hidden = mlp.activations(x)
    output = mlp(x)
    assert topology.dormant_neurons(hidden, 0.0) == [(0, 3)]
    first, second, _ = mlp.layers
    had = int(first.mask[3].sum())
    outgoing = int(second.mask[:, 3].sum())
    weights = [layer.weight.clone() for layer in mlp.layers]
    moments = {p: adam.state[p]["exp_avg_sq"].clone() for p in mlp.parameters()}
    weight_mean = moments[first.weight][first.mask == 1].mean()
    bias_mean = moments[first.bias].mean()

    gone = topology.prune(mlp.layers, hidden, 1000, 2.0, adam, generator())

    fan_in = min(had, round(first.initial_density * 6))
    assert gone == outgoing + had - fan_in
    assert int(first.mask[3].sum()) == fan_in
    assert not second.mask[:, 3].any()
    assert not second.weight[:, 3].any()
    assert torch.equal(first.weight[3] != 0, first.mask[3] == 1)
    assert first.weight[3].abs().max() <= 1 / math.sqrt(6)
    assert 0 < first.bias[3].abs() <= 1 / math.sqrt(6)
    assert torch.equal(first.bound[3], torch.full((6,), 2 / math.sqrt(6)))
    assert torch.isinf(first.bound[others]).all()
    # Adam's state: incoming weights and the bias start at the layer's mean
    state = adam.state[first.weight]
    assert not state["exp_avg"][3].any()
    assert torch.allclose(state["exp_avg_sq"][3], weight_mean * first.mask[3])
    assert torch.equal(state["exp_avg_sq"][others], moments[first.weight][others])
    assert adam.state[first.bias]["exp_avg"][3] == 0
    assert adam.state[first.bias]["exp_avg_sq"][3] == pytest.approx(bias_mean)
    assert torch.equal(adam.state[first.bias]["exp_avg_sq"][others], moments[first.bias][others])
    # what was pruned has none
    for moment in ("exp_avg", "exp_avg_sq"):
        assert not adam.state[second.weight][moment][:, 3].any()
    kept = adam.state[second.weight]["exp_avg_sq"][:, others]
    assert torch.equal(kept, moments[second.weight][:, others])
    assert all(state["step"] == 7 for state in adam.state.values())
    # nothing else has changed
    assert torch.equal(first.weight[others], weights[0][others])
    assert torch.equal(second.weight[:, others], weights[1][:, others])
    assert torch.equal(mlp(x), output)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 400), st.floats(0.1, 0.9))
def test_pruning_keeps_to_its_budget_and_to_the_output(seed, budget, density):
    mlp, adam = trained_mlp([6, 24, 16, 2], density, seed)
    rng = generator(seed)
    for depth, width in ((0, 24), (1, 16)):
        for neuron in torch.randperm(width, generator=rng)[: width // 2].tolist():
            silence(mlp, depth, neuron)
    x = 0.1 * torch.randn(32, 6, generator=rng)
    hidden = mlp.activations(x)
    output = mlp(x)
    active = active_connections(mlp)
    gone = topology.prune(mlp.layers, hidden, budget, 2.0, adam, rng)
    assert 0 <= gone <= budget
    assert active - active_connections(mlp) == gone
    assert torch.allclose(mlp(x), output, atol=1e-6)
    for layer in mlp.layers:
        assert torch.equal(layer.weight, layer.weight * layer.mask)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not adam.state[layer.weight][moment][layer.mask == 0].any()
    if budget == 400:  # more than there is
        for depth in (0, 1):
            dead = topology.dormancy_scores(hidden[depth]) == 0
            assert not mlp.layers[depth + 1].mask[:, dead].any()


@pytest.mark.parametrize("seed", range(10))
def test_a_reset_neuron_keeps_its_fan_in_whatever_else_is_reset(seed):
    """It is connected to no dormant neuron: what leaves that one may go in the same call."""
    mlp, adam = trained_mlp([6, 40, 30, 2], 0.5, seed)
    with torch.no_grad():  # the first 12 neurons of each hidden layer are dormant, no others
        for layer, width in zip(mlp.layers, (40, 30), strict=False):
            layer.bias.copy_(torch.where(torch.arange(width) < 12, -100.0, 100.0))
    hidden = mlp.activations(torch.rand(16, 6))
    second = mlp.layers[1]
    at_birth = round(second.initial_density * 40)
    had = second.mask[:12].sum(dim=1)  # (12,)
    topology.prune(mlp.layers, hidden, 100_000, 2.0, adam, generator(seed))
    assert not second.mask[:, :12].any()
    assert second.mask[:12].sum(dim=1).tolist() == had.clamp(max=at_birth).tolist()


def test_a_neuron_that_costs_more_than_is_left_is_skipped_for_a_cheaper_one():
    mlp, adam = trained_mlp([6, 16, 8, 2], 1.0)
    with torch.no_grad():
        mlp.layers[0].bias.copy_(torch.where(torch.arange(16) < 8, -10.0, 10.0))
        mlp.layers[1].bias += 100.0
        mlp.layers[1].mask[2:, 0] = 0.0  # neuron 0 costs 2, the other dormant ones 8
        mlp.layers[1].weight.mul_(mlp.layers[1].mask)
    hidden = mlp.activations(torch.rand(8, 6))
    assert topology.prune(mlp.layers, hidden, 7, 0.0, adam, generator()) == 2
    assert not mlp.layers[1].mask[:, 0].any()
    assert torch.isinf(mlp.layers[0].bound).all()  # kappa 0: no clipping


def test_dormant_neurons_go_in_random_order():
    gone = set()
    for seed in range(30):
        mlp, adam = trained_mlp([6, 16, 8, 2], 1.0)
        with torch.no_grad():  # the first half of the first layer is dormant, nothing else
            mlp.layers[0].bias.copy_(torch.where(torch.arange(16) < 8, -10.0, 10.0))
            mlp.layers[1].bias += 100.0
        hidden = mlp.activations(torch.rand(8, 6))
        topology.prune(mlp.layers, hidden, 8, 0.0, adam, generator(seed))  # room for one
        pruned = [n for n in range(16) if not mlp.layers[1].mask[:, n].any()]
        assert len(pruned) == 1
        gone |= set(pruned)
    assert len(gone) > 3
    assert gone <= set(range(8))


# --- Adam ---------------------------------------------------------------------
LAYOUTS = {
    "in order": torch.randn_like,
    "transposed": lambda p: torch.randn(p.shape[::-1]).permute(*reversed(range(p.dim()))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_that_of_torch_to_the_last_bit(layout):
    """With a rate that falls and any layout of gradients; also after loading another rate."""
    torch.manual_seed(0)
    shapes = [(5, 4), (4,), (3, 2, 5, 5)]
    ours = [torch.randn(shape, requires_grad=True) for shape in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    adam = topology.Adam(ours, 1e-3)
    reference = torch.optim.Adam(theirs, 1e-3, fused=True)
    for step in range(20):
        if step == 10:
            state = copy.deepcopy(reference.state_dict())
            state["param_groups"][0]["lr"] = 0.02
            reference.load_state_dict(state)
            adam = topology.Adam(ours, 1e-3)
            adam.load_state_dict(copy.deepcopy(state))
        gradients = [LAYOUTS[layout](p) for p in ours]
        adam.apply(gradients)
        for p, gradient in zip(theirs, gradients, strict=True):
            p.grad = gradient.contiguous()
        reference.step()
        for optimizer in (adam, reference):
            optimizer.param_groups[0]["lr"] *= 0.9
        for p, other in zip(ours, theirs, strict=True):
            assert torch.equal(p, other)
    assert {int(state["step"]) for state in adam.state.values()} == {20}
