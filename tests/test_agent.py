"""Invariants of the agent (SPEC, section 1): masks, gradients, moments, budget, plain TD3."""

import contextlib
import copy
import math
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import helpers
import ne_td3_continuous as ne
import utils_topology as topology
from helpers import make_agent, mlps_of, sample, silence_some

CPU = torch.device("cpu")


class Rounds:
    """Topology rounds of an agent, in the first half of growth, and their counts."""

    def __init__(self, agent: ne.Agent, grow_rate: float = 0.3):
        agent.args.grow_rate = grow_rate
        agent.args.growth_end = agent.args.total_timesteps
        self.progress = ne.Progress.of(agent)

    def __call__(self, agent: ne.Agent, batch: ne.Batch, step: int = 100) -> None:
        ne.topology_round(agent.args, agent, batch, self.progress, step)

    def train(self, agent: ne.Agent, buffer: ne.ReplayBuffer, updates: int, rounds: int) -> None:
        def topology_round(agent, batch, update):
            self(agent, batch, agent.args.total_timesteps * update // (2 * updates))

        helpers.train(agent, buffer, updates, topology_round, rounds)


def all_layers(agent: ne.Agent) -> list[ne.MaskedLinear]:
    return [module for module in agent.modules() if isinstance(module, ne.MaskedLinear)]


def online_layers(agent: ne.Agent) -> list[ne.MaskedLinear]:
    return agent.networks["actor"].layers + agent.networks["critic"].layers


def target_layers(agent: ne.Agent) -> list[ne.MaskedLinear]:
    return agent.networks["actor"].target_layers + agent.networks["critic"].target_layers


def active_connections(mlp: ne.MLP) -> int:
    return sum(int(layer.mask.sum()) for layer in mlp.layers)


# --- invariant 1: W == W * M, online and target; biases are never masked ------
@pytest.mark.parametrize("growth", ["gradient", "random", "none"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_weights_are_zero_where_masked_at_any_time(growth, layer_norm):
    agent, buffer = make_agent(growth=growth, layer_norm=layer_norm)
    rounds = Rounds(agent)
    for part in range(6):
        if part == 3:
            silence_some(agent)
        rounds.train(agent, buffer, updates=20, rounds=2)
        assert len(all_layers(agent)) == 18
        for layer in all_layers(agent):
            assert torch.equal(layer.weight, layer.weight * layer.mask)
            assert set(layer.mask.flatten().tolist()) <= {0.0, 1.0}
            assert layer.bias.count_nonzero() == layer.bias.numel()
        for layer, target in zip(online_layers(agent), target_layers(agent), strict=True):
            assert torch.equal(layer.mask, target.mask)


def test_every_network_has_masks_of_its_own():
    agent, _ = make_agent()
    first = agent.critic_1.layers[0].mask
    assert not torch.equal(first, agent.critic_2.layers[0].mask)


# --- invariant 2: growth sees the dense gradient ------------------------------
def q_target_by_hand(agent: ne.Agent, batch: ne.Batch) -> torch.Tensor:
    args = agent.args
    with torch.no_grad():
        noise = torch.clamp(args.policy_noise * batch.noise, -args.noise_clip, args.noise_clip)
        actions = torch.clamp(agent.target_actor(batch.next_obs) + noise, -1, 1)
        x = torch.cat((batch.next_obs, actions), 1)
        next_q = torch.min(agent.target_critic_1(x), agent.target_critic_2(x))
        return batch.rewards + args.gamma * (1 - batch.terminated) * next_q


def test_growth_gets_the_gradient_a_masked_weight_would_have(monkeypatch):
    """That of a copy of plain nn.Linear layers with the same values, by autograd."""
    agent, buffer = make_agent()
    helpers.train(agent, buffer, 20)
    batch = sample(buffer)
    seen = []
    grow = topology.grow

    def noted(layers, scores, *rest):
        seen.append(scores)
        return grow(layers, scores, *rest)

    monkeypatch.setattr(topology, "grow", noted)
    plain = {}
    for name, mlp in (("actor", agent.actor), ("1", agent.critic_1), ("2", agent.critic_2)):
        plain[name] = nn.Sequential()
        for layer in mlp.layers:
            linear = nn.Linear(layer.in_features, layer.out_features)
            linear.load_state_dict({"weight": layer.weight, "bias": layer.bias})
            plain[name].extend([linear, nn.ReLU()])
        plain[name].pop(-1)
    target_q = q_target_by_hand(agent, batch)
    critic_loss = 0
    for name in ("1", "2"):
        critic_loss += F.mse_loss(plain[name](batch.obs_actions)[:, 0], target_q)
    critic_loss.backward()
    actions = torch.tanh(plain["actor"](batch.obs))
    actor_loss = -agent.critic_1(torch.cat((batch.obs, actions), 1)).mean()
    actor_loss.backward()
    masks = [
        [layer.mask.clone() for layer in mlp.layers]
        for mlps in mlps_of(agent).values()
        for mlp in mlps
    ]

    Rounds(agent)(agent, batch)

    assert len(seen) == 3
    for scores, network, layer_masks in zip(seen, plain.values(), masks, strict=True):
        for score, linear, mask in zip(scores, network[::2], layer_masks, strict=True):
            assert torch.allclose(score, linear.weight.grad, atol=1e-7)
            assert mask.all() or score[mask == 0].count_nonzero() > 0


def test_a_round_takes_no_optimiser_step():
    agent, buffer = make_agent(prune=False)
    helpers.train(agent, buffer, 10)
    before = helpers.values(agent)
    Rounds(agent)(agent, sample(buffer))
    assert helpers.equal(helpers.values(agent), before)
    for name, steps in (("actor", 5), ("critic", 10)):
        for state in agent.networks[name].optimizer.state.values():
            assert state["step"] == steps


# --- births only where there is a gradient (SPEC, section 3) ------------------
def test_nothing_is_born_where_the_gradient_is_zero():
    """An input that is always 0, as padding is, gets no connection; planned says how many."""
    agent, buffer = make_agent(prune=False)
    buffer.data[:, 1] = 0.0  # in obs
    buffer.data[:, 7] = 0.0  # in next obs
    silence_some(agent)  # no gradient into these neurons, nor out of them
    before = {layer: layer.mask.clone() for layer in online_layers(agent)}
    rounds = Rounds(agent, grow_rate=0.9)
    batch = sample(buffer)
    gradients = [*agent.actor_gradients(batch)[-1], *agent.critic_gradients(batch)[-1]]
    params = agent.networks["actor"].params + agent.networks["critic"].params
    gradient_of = dict(zip(params, gradients, strict=True))
    rounds(agent, batch, step=50)
    fraction = ne.growth_fraction(agent.args, 50)
    for name, mlps in mlps_of(agent).items():
        for i, mlp in enumerate(mlps):
            planned = 0
            grown = 0
            for layer in mlp.layers:
                mask = before[layer]
                gradient = gradient_of[layer.weight]
                born = (layer.mask == 1) & (mask == 0)
                candidates = (mask == 0) & (gradient != 0)
                assert not born[gradient == 0].any()
                assert int(born.sum()) == math.ceil(fraction * int(candidates.sum()))
                planned += math.ceil(fraction * int((mask == 0).sum()))
                grown += int(born.sum())
            first = mlp.layers[0]
            assert torch.equal(first.mask[:, 1], before[first][:, 1])
            assert torch.equal(first.mask[::3], before[first][::3])
            assert rounds.progress.planned[name][i] == planned
            assert rounds.progress.grown[name][i] == grown
            assert 0 < grown < planned


def test_random_growth_does_not_follow_the_gradient():
    """Other gradients, same draws: the same births, also where the gradient is 0."""
    born = []
    for scale in (1.0, 3.0):
        agent, buffer = make_agent(growth="random", prune=False)
        buffer.data[:, 1] = 0.0
        agent.critic_1.layers[-1].weight.data.mul_(scale)
        before = agent.critic_1.layers[0].mask.clone()
        Rounds(agent, grow_rate=0.9)(agent, sample(buffer))
        born.append(agent.critic_1.layers[0].mask - before)
    assert torch.equal(*born)
    assert born[0][:, 1].any()


# --- invariant 3: Adam's state ------------------------------------------------
def test_moments_are_zero_where_masked():
    agent, buffer = make_agent()
    rounds = Rounds(agent)
    rounds.train(agent, buffer, updates=20, rounds=2)
    silence_some(agent)
    rounds.train(agent, buffer, updates=20, rounds=2)
    assert min(rounds.progress.pruned["actor"] + rounds.progress.pruned["critic"]) > 0
    for name, network in agent.networks.items():
        steps = {"actor": 20, "critic": 40}[name]
        for state in network.optimizer.state.values():
            assert state["step"] == steps
        for layer in network.layers:
            state = network.optimizer.state[layer.weight]
            for moment in ("exp_avg", "exp_avg_sq"):
                assert not state[moment][layer.mask == 0].any()
                assert state[moment][layer.mask == 1].any()


def test_connections_born_in_a_round_start_at_the_mean():
    agent, buffer = make_agent(prune=False)
    helpers.train(agent, buffer, 20)
    before = {}
    for network in agent.networks.values():
        for layer in network.layers:
            state = network.optimizer.state[layer.weight]
            squares = state["exp_avg_sq"][layer.mask == 1]
            before[layer] = (layer.mask.clone(), state["exp_avg"].clone(), squares.mean())
    Rounds(agent)(agent, sample(buffer))
    for network in agent.networks.values():
        for layer in network.layers:
            mask, average, mean_square = before[layer]
            born = layer.mask != mask
            assert born.any() or mask.all()
            state = network.optimizer.state[layer.weight]
            assert not state["exp_avg"][born].any()
            assert torch.equal(state["exp_avg"][mask == 1], average[mask == 1])
            assert torch.allclose(state["exp_avg_sq"][born], mean_square)


# --- invariants 4 and 5: a round does not change the output on its batch ------
def outputs(agent: ne.Agent, batch: ne.Batch) -> list[torch.Tensor]:
    with torch.no_grad():
        critics = [agent.critic_1(batch.obs_actions), agent.critic_2(batch.obs_actions)]
        return [agent.actor(batch.obs), *critics]


def test_growth_leaves_all_outputs():
    agent, buffer = make_agent(prune=False)
    helpers.train(agent, buffer, 20)
    batch = sample(buffer)
    another = sample(buffer)
    before = outputs(agent, batch) + outputs(agent, another)
    rounds = Rounds(agent)
    rounds(agent, batch)
    assert min(rounds.progress.grown["actor"] + rounds.progress.grown["critic"]) > 0
    after = outputs(agent, batch) + outputs(agent, another)
    for was, now in zip(before, after, strict=True):
        assert torch.allclose(was, now, atol=1e-7)


def test_pruning_leaves_the_outputs_on_its_batch():
    agent, buffer = make_agent()
    rounds = Rounds(agent, grow_rate=0.5)
    rounds.train(agent, buffer, updates=20, rounds=2)
    silence_some(agent)
    batch = sample(buffer)
    before = outputs(agent, batch)
    pruned = copy.deepcopy(rounds.progress.pruned)
    rounds(agent, batch, step=200)
    for name in ("actor", "critic"):
        for was, now in zip(pruned[name], rounds.progress.pruned[name], strict=True):
            assert now > was
    for was, now in zip(before, outputs(agent, batch), strict=True):
        assert torch.allclose(was, now, atol=1e-6)


# --- invariant 6: the budget of pruning is kept over the run ------------------
@pytest.mark.parametrize("omega", [0.0, 0.4, 0.99])
def test_an_mlp_never_prunes_more_than_its_share_of_what_it_has_grown(omega):
    agent, buffer = make_agent(prune_ratio=omega)
    rounds = Rounds(agent)
    birth = {}
    for mlps in mlps_of(agent).values():
        for mlp in mlps:
            birth[mlp] = active_connections(mlp)
    for _ in range(10):
        silence_some(agent)
        rounds.train(agent, buffer, updates=4, rounds=1)
        for name, mlps in mlps_of(agent).items():
            for i, mlp in enumerate(mlps):
                grown = rounds.progress.grown[name][i]
                pruned = rounds.progress.pruned[name][i]
                assert 0 <= pruned <= omega * grown
                assert active_connections(mlp) == birth[mlp] + grown - pruned >= birth[mlp]
    total = sum(rounds.progress.pruned["actor"] + rounds.progress.pruned["critic"])
    assert (total > 0) == (omega > 0)


def test_what_a_round_leaves_of_the_budget_is_there_for_the_next():
    """A round that grows next to nothing prunes what earlier rounds would have allowed."""
    agent, buffer = make_agent()
    rounds = Rounds(agent)
    rounds.train(agent, buffer, updates=20, rounds=4)
    before = copy.deepcopy(rounds.progress)
    assert min(before.grown["critic"]) > 300
    silence_some(agent)
    rounds(agent, sample(buffer), step=990)  # the cosine is 0.0005
    for name in ("actor", "critic"):
        for i, grown in enumerate(rounds.progress.grown[name]):
            of_this_round = agent.args.prune_ratio * (grown - before.grown[name][i])
            pruned = rounds.progress.pruned[name][i] - before.pruned[name][i]
            assert pruned > 10 * of_this_round
            assert rounds.progress.pruned[name][i] <= agent.args.prune_ratio * grown


def test_no_prune_prunes_nothing():
    agent, buffer = make_agent(prune=False)
    silence_some(agent)
    rounds = Rounds(agent)
    rounds.train(agent, buffer, updates=4, rounds=1)
    assert rounds.progress.pruned == {"actor": [0], "critic": [0, 0]}
    assert rounds.progress.grown["actor"][0] > 0


def test_nothing_happens_in_the_last_round():
    agent, buffer = make_agent()
    silence_some(agent)
    rounds = Rounds(agent)
    before = copy.deepcopy(agent.state_dict())
    rounds(agent, sample(buffer), step=1_000)
    helpers.assert_equal(dict(agent.state_dict()), dict(before))
    assert rounds.progress == ne.Progress.of(agent)


def test_targets_lose_what_is_pruned_and_get_zero_for_what_is_born():
    agent, buffer = make_agent()
    rounds = Rounds(agent)
    rounds.train(agent, buffer, updates=20, rounds=2)
    silence_some(agent)
    before = [(layer.mask.clone(), layer.weight.clone()) for layer in target_layers(agent)]
    rounds(agent, sample(buffer))
    gone = 0
    for (mask, weight), target in zip(before, target_layers(agent), strict=True):
        assert torch.equal(target.weight, weight * target.mask)
        assert not target.weight[(target.mask == 1) & (mask == 0)].any()
        gone += int(((target.mask == 0) & (mask == 1)).sum())
    assert gone > 0


# --- weight clipping ----------------------------------------------------------
@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_only_reset_neurons_are_clipped(kappa):
    agent, buffer = make_agent(weight_clip=kappa)
    helpers.train(agent, buffer, 10)
    silence_some(agent)
    Rounds(agent, grow_rate=0.5)(agent, sample(buffer))
    reset = {layer: torch.isfinite(layer.bound).any(1) for layer in online_layers(agent)}
    assert (sum(int(rows.sum()) for rows in reset.values()) > 0) == (kappa > 0)
    for layer in online_layers(agent):
        layer.weight.data = 3.0 * layer.mask  # far outside
    helpers.train(agent, buffer, 2)
    for layer, rows in reset.items():
        limit = kappa / math.sqrt(layer.in_features)
        assert (layer.weight[rows].abs() <= limit + 1e-7).all()
        others = layer.weight[~rows][layer.mask[~rows] == 1]
        assert (others > 2.9).all()


# --- NE on one network only, LayerNorm ----------------------------------------
@pytest.mark.parametrize(("actor", "critic"), [(True, False), (False, True), (False, False)])
def test_a_network_without_ne_is_dense_from_the_start(actor, critic):
    agent, buffer = make_agent(ne_actor=actor, ne_critic=critic)
    rounds = Rounds(agent)
    rounds.train(agent, buffer, updates=10, rounds=1)
    for name, sparse in (("actor", actor), ("critic", critic)):
        for mlp in mlps_of(agent)[name]:
            assert (topology.network_density(mlp.layers) < 0.6) == sparse
            assert sparse or active_connections(mlp) == sum(
                layer.mask.numel() for layer in mlp.layers
            )
        assert (min(rounds.progress.grown[name]) > 0) == sparse
    fresh, _ = make_agent(ne_actor=actor, ne_critic=critic)
    density = topology.network_density(fresh.networks["critic"].layers)
    assert density == pytest.approx(0.25 if critic else 1.0, abs=0.01)


def test_layer_norm_on_hidden_layers_only():
    agent, buffer = make_agent(layer_norm=True)
    for mlp in (agent.actor, agent.critic_1, agent.critic_2):
        assert [type(norm) for norm in mlp.norms] == [nn.LayerNorm, nn.LayerNorm]
        x = torch.randn(8, mlp.layers[0].in_features)
        h = x
        for layer, norm in zip(mlp.layers[:-1], mlp.norms, strict=True):
            h = F.layer_norm(layer(h), (layer.out_features,), norm.weight, norm.bias)
            h = F.relu(h)
        assert torch.allclose(ne.MLP.forward(mlp, x), mlp.layers[-1](h))
    Rounds(agent).train(agent, buffer, updates=10, rounds=2)


# --- copies -------------------------------------------------------------------
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda agent: pickle.loads(pickle.dumps(agent))])
def test_a_copy_trains_its_own_networks_and_targets(copied):
    agent, buffer = make_agent()
    helpers.train(agent, buffer, 4)
    rng = buffer.rng.get_state()
    other = copied(agent)
    before = helpers.values(agent)
    helpers.assert_equal(dict(other.state_dict()), dict(agent.state_dict()))
    rounds = Rounds(other)
    rounds.train(other, buffer, updates=10, rounds=2)
    assert helpers.equal(helpers.values(agent), before)
    for name in ("actor", "critic_1", "critic_2"):
        for part in (name, f"target_{name}"):
            was = helpers.values(getattr(agent, part))
            assert helpers.none_equal(helpers.values(getattr(other, part)), was)
    # and it is trained as the original is
    buffer.rng.set_state(rng)
    Rounds(agent).train(agent, buffer, updates=10, rounds=2)
    helpers.assert_equal(dict(other.state_dict()), dict(agent.state_dict()))


# --- experience review --------------------------------------------------------
def threshold(epsilon, before, now, neurons=200, **changes) -> float:
    options = {"review_decay": 0.005, "review_floor": 0.65}
    args = ne.Args(**options | changes)
    progress = ne.Progress(epsilon=epsilon, dormant=before)
    return ne.review_threshold(args, progress, now, neurons)


@pytest.mark.parametrize(
    ("epsilon", "before", "now", "expected"),
    [
        (1.0, None, 40, 1.0),  # the first count
        (1.0, 100, 100, 0.995),  # no reduction: epsilon falls by the decay
        (1.0, 100, 40, 0.995 + 0.005 * 0.6),  # 60% fewer dormant neurons
        (0.9, 40, 100, 0.995 * 0.9),  # more dormant ones count as no reduction
        (0.9, 0, 0, 0.995 * 0.9),
        (0.651, 10, 10, 0.65),  # the floor
    ],
)
def test_review_by_the_slope(epsilon, before, now, expected):
    assert threshold(epsilon, before, now) == pytest.approx(expected)


@pytest.mark.parametrize(("now", "expected"), [(0, 1.0), (50, 0.75), (200, 0.0)])
@pytest.mark.parametrize("floor", [0.0, 0.65])
def test_review_by_the_level(now, expected, floor):
    """No floor, no decay, nothing of before."""
    for before in (None, 0, 100):
        epsilon = threshold(0.7, before, now, review_rule="level", review_floor=floor)
        assert epsilon == pytest.approx(expected)


@pytest.mark.parametrize("rule", ["slope", "level"])
def test_review_floor_1_is_no_review(rule):
    assert threshold(1.0, 100, 100, review_rule=rule, review_floor=1.0) == 1.0


# --- invariant 7: without NE it is TD3, bit for bit ---------------------------
def test_dense_is_bit_equal_to_plain_td3():
    """Plain TD3 on nn.Linear, from Fujimoto et al. 2018, same weights, same batches."""
    agent, buffer = make_agent(initial_density=1.0, review_floor=1.0)
    torch.manual_seed(0)

    def network(n_in: int, n_out: int) -> nn.Sequential:
        hidden = [nn.Linear(n_in, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(24, n_out))

    pi = network(4, 2)
    q1 = network(6, 1)
    q2 = network(6, 1)
    pi_target = copy.deepcopy(pi)
    q1_target = copy.deepcopy(q1)
    q2_target = copy.deepcopy(q2)
    pi_adam = torch.optim.Adam(pi.parameters(), lr=3e-4, fused=True)
    q_adam = torch.optim.Adam([*q1.parameters(), *q2.parameters()], lr=3e-4, fused=True)
    rng = torch.Generator().manual_seed(2)
    for update in range(1, 61):
        index = torch.randint(500, (64,), generator=rng)
        s, a, s2, r, done = buffer.data[index].split([4, 2, 4, 1, 1], dim=1)
        with torch.no_grad():
            noise = (torch.randn(64, 2, generator=rng) * 0.2).clamp(-0.5, 0.5)
            a2 = (torch.tanh(pi_target(s2)) + noise).clamp(-1, 1)
            x2 = torch.cat((s2, a2), 1)
            y = r + 0.99 * (1 - done) * torch.minimum(q1_target(x2), q2_target(x2))
        x = torch.cat((s, a), 1)
        q_adam.zero_grad()
        (F.mse_loss(q1(x), y) + F.mse_loss(q2(x), y)).backward()
        q_adam.step()
        if update % 2 == 0:
            pi_adam.zero_grad()
            (-q1(torch.cat((s, torch.tanh(pi(s))), 1)).mean()).backward()
            pi_adam.step()
            for online, target in ((pi, pi_target), (q1, q1_target), (q2, q2_target)):
                for p, p_target in zip(online.parameters(), target.parameters(), strict=True):
                    p_target.data.lerp_(p.data, 0.005)
    Rounds(agent).train(agent, buffer, updates=60, rounds=3)
    pairs = [(agent.actor, pi), (agent.critic_1, q1), (agent.critic_2, q2)]
    pairs += [(agent.target_actor, pi_target)]
    pairs += [(agent.target_critic_1, q1_target), (agent.target_critic_2, q2_target)]
    for mlp, plain in pairs:
        assert helpers.equal(helpers.values(mlp), helpers.values(plain))


def test_the_default_start_does_not_depend_on_ne():
    """The weights, before masking, are those of a dense agent."""
    agents = []
    for density in (0.25, 1.0):
        torch.manual_seed(3)
        agents.append(ne.Agent(ne.Args(initial_density=density), 17, 6, ne_seed=0, device=CPU))
    for sparse, dense in zip(online_layers(agents[0]), online_layers(agents[1]), strict=True):
        assert torch.equal(sparse.weight, dense.weight * sparse.mask)
        assert torch.equal(sparse.bias, dense.bias)


# --- combinations with ReDo and Reset -----------------------------------------
@pytest.mark.parametrize("tau", [0.0, 0.8])
def test_redo_resets_dormant_neurons_inside_the_masks(tau):
    agent, buffer = make_agent(redo_tau=tau)
    Rounds(agent).train(agent, buffer, updates=20, rounds=2)

    def redo(agent, batch):
        ne.redo(agent.args, agent, batch)

    before, after, dormant = helpers.redone(redo, agent, sample(buffer, 256), tau)
    for name, was, layer, rows, columns in helpers.walk(before, after, dormant):
        assert torch.equal(layer.mask, was.mask)
        assert torch.equal(layer.weight, layer.weight * layer.mask)
        # 0 wins where a redrawn neuron follows a dormant one
        assert not layer.weight[:, columns].any()
        kept = ~rows[:, None] & ~columns
        assert torch.equal(layer.weight[kept], was.weight[kept])
        assert torch.equal(layer.bias[~rows], was.bias[~rows])
        assert (layer.bias[rows] != was.bias[rows]).all()
        limit = layer.in_features**-0.5
        assert (layer.bias[rows].abs() <= limit).all()
        drawn = rows[:, None] & ~columns & (layer.mask == 1)
        assert (layer.weight[drawn] != 0).all()
        assert not drawn.any() or 0 < layer.weight[drawn].abs().max() <= limit
        optimizer = after.networks[name].optimizer
        helpers.assert_moments_forgotten(optimizer, layer, rows, columns)
    for old, new in zip(target_layers(before), target_layers(after), strict=True):
        assert torch.equal(old.weight, new.weight)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_reset_starts_anew_inside_the_masks(layer_norm):
    agent, buffer = make_agent(layer_norm=layer_norm)
    silence_some(agent)
    Rounds(agent).train(agent, buffer, updates=40, rounds=4)
    before = {layer: (layer.mask.clone(), layer.weight.clone()) for layer in online_layers(agent)}
    data = buffer.data.clone()
    ne.reset(agent)
    for layer, (mask, was) in before.items():
        assert torch.equal(layer.mask, mask)
        assert torch.equal(layer.weight, layer.weight * mask)
        assert (layer.weight != was)[mask == 1].float().mean() > 0.99
        limit = layer.in_features**-0.5
        drawn = layer.weight[mask == 1]
        assert drawn.abs().max() <= limit
        assert layer.bias.abs().max() <= limit
        if len(drawn) > 100:  # uniform, as at birth
            assert drawn.std().item() == pytest.approx(limit * 3**-0.5, rel=0.1)
        assert layer.bound.isinf().all()
    first = agent.critic_1.layers[0].weight
    assert not torch.equal(first, agent.critic_2.layers[0].weight)
    for mlp in (agent.actor, agent.critic_1, agent.critic_2):
        for norm in mlp.norms:
            if layer_norm:
                assert (norm.weight == 1).all()
                assert (norm.bias == 0).all()
    for network in agent.networks.values():
        assert helpers.equal(network.params, network.target_params)
        for state in network.optimizer.state.values():
            assert not any(value.any() for value in state.values())
    assert torch.equal(buffer.data, data)


# --- torch.compile ------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("layer_norm", [False, True])
def test_compiled_gradients_are_those_of_the_eager_agent(layer_norm):
    agent, buffer = make_agent(layer_norm=layer_norm)
    Rounds(agent).train(agent, buffer, updates=20, rounds=2)
    eager = copy.deepcopy(agent)
    batch = buffer.new_batch(64)
    buffer.sample(batch)
    critic_gradients = ne.compiled(agent.critic_gradients, batch)
    actor_gradients = ne.compiled(agent.actor_gradients, batch)
    assert helpers.equal(helpers.values(agent), helpers.values(eager))
    for _ in range(3):
        buffer.sample(batch)
        pairs = [(critic_gradients(batch), eager.critic_gradients(batch))]
        pairs += [(actor_gradients(batch), eager.actor_gradients(batch))]
        for ours, theirs in pairs:
            flat = [*ours[:-1], *ours[-1]]
            expected = [*theirs[:-1], *theirs[-1]]
            for one, two in zip(flat, expected, strict=True):
                assert torch.allclose(one, two, atol=1e-5)
        agent.update_critic(batch)
        agent.update_actor(batch)
        eager.load_state_dict(agent.state_dict())


# --- CUDA ---------------------------------------------------------------------
def test_updates_read_no_values_and_stay_on_their_device():
    meta = torch.device("meta")
    with meta:
        args = ne.Args(ne_actor=False, ne_critic=False)
        agent = ne.Agent(args, 4, 2, ne_seed=1, device=meta)
        obs = torch.empty(8, 4)
        column = torch.empty(8)
        rows = torch.empty(8, 12)
        batch = ne.Batch(rows, obs, torch.empty(8, 6), obs, column, column, torch.empty(8, 2))
    for clipped in (False, True):
        for layer in online_layers(agent):
            layer.clipped = clipped
        helpers.assert_updates_read_no_values(agent, batch, reads="noise")


def test_what_a_graph_reads_and_writes_stays_where_it_is():
    agent, buffer = make_agent()
    batch = buffer.new_batch(64)

    def addresses() -> list[int]:
        tensors = [t for t in agent.state_dict().values() if torch.is_tensor(t)]
        for network in agent.networks.values():
            for state in network.optimizer.state.values():
                tensors += state.values()
        return [t.data_ptr() for t in (*tensors, *batch)]

    before = addresses()
    silence_some(agent)
    rounds = Rounds(agent)
    rounds.train(agent, buffer, updates=40, rounds=4)
    buffer.sample(batch)
    ne.redo(agent.args, agent, batch)
    ne.reset(agent)
    rounds.train(agent, buffer, updates=10, rounds=1)
    agent.load_state_dict(copy.deepcopy(agent.state_dict()))
    assert addresses() == before


def test_a_graph_is_captured_once_after_three_plain_updates(monkeypatch):
    """The order of calls, with stand-ins for CUDA: what is recorded runs at every replay."""
    calls = []

    class Graph:
        def replay(self):
            calls.append("replay")

    @contextlib.contextmanager
    def capture(graph, stream):
        calls.append("capture")
        yield

    def update(batch):
        calls.append("update")
        return len(calls)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    graph = ne.CudaGraph(update)
    losses = [graph(None) for _ in range(6)]
    assert calls == ["update"] * 3 + ["capture", "update", "replay", "replay", "replay"]
    assert losses == [1, 2, 3, 5, 5, 5]  # the captured update's own tensors from then on


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_agree_with_eager_over_200_updates_with_rounds_in_between():
    torch.cuda.set_stream(torch.cuda.Stream())
    agents = []
    for graphs in (False, True):
        agent, buffer = make_agent(device="cuda")
        batch = buffer.new_batch(64)
        update_critic = agent.update_critic
        update_actor = agent.update_actor
        if graphs:
            update_critic = ne.CudaGraph(update_critic)
            update_actor = ne.CudaGraph(update_actor)
        rounds = Rounds(agent)
        for update in range(1, 201):
            buffer.sample(batch)
            update_critic(batch)
            if update % 2 == 0:
                update_actor(batch)
            if update % 50 == 0:
                rounds(agent, sample(buffer, rng=agent.ne_rng), step=update)
        agents.append(agent)
    graph = agents[1].state_dict()
    for name, eager in agents[0].state_dict().items():
        if torch.is_tensor(eager):
            assert torch.allclose(eager.float(), graph[name].float(), atol=1e-4), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_follows_the_cpu():
    results = []
    for device in ("cpu", "cuda"):
        agent, buffer = make_agent(device=device, prune=False)
        buffer.rng = torch.Generator().manual_seed(2)  # the same batches
        helpers.train(agent, buffer, 20)
        results.append(agent.actor.act([0.1, 0.2, 0.3, 0.4]))
    assert results[0] == pytest.approx(results[1], abs=1e-3)
