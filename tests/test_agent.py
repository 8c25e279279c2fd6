"""Invariants of the agent (SPEC, section 1): masks, gradients, moments, budget, plain TD3."""

import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import helpers
import ne_td3_continuous as ne
import utils_topology as topology
from helpers import make_agent, mlps_of, silence_some


def make(grow_rate: float = 0.3, **changes):
    return make_agent(grow_rate=grow_rate, **changes)


def train(agent: ne.Agent, buffer: ne.ReplayBuffer, updates: int, rounds: int) -> None:
    """Rounds are spread over the first half of growth."""

    def topology_round(agent, batch, update):
        ne.topology_round(agent, batch, step=500 * update // updates)

    helpers.train(agent, buffer, updates, topology_round, rounds)


def do_round(agent: ne.Agent, buffer: ne.ReplayBuffer, step: int = 100) -> ne.Batch:
    batch = buffer.sample(64)
    ne.topology_round(agent, batch, step)
    return batch


def mlps(agent: ne.Agent) -> list[ne.MLP]:
    return [agent.actor, agent.critic_1, agent.critic_2]


def all_layers(agent: ne.Agent) -> list[ne.MaskedLinear]:
    return [module for module in agent.modules() if isinstance(module, ne.MaskedLinear)]


def online_layers(agent: ne.Agent) -> list[ne.MaskedLinear]:
    return agent.networks["actor"].layers + agent.networks["critic"].layers


def target_layers(agent: ne.Agent) -> list[ne.MaskedLinear]:
    return agent.networks["actor"].target_layers + agent.networks["critic"].target_layers


def adam_of(agent: ne.Agent, parameter: torch.Tensor) -> dict:
    """Adam's state of a parameter."""
    [state] = [o.state[parameter] for o in agent.optimizers if parameter in o.state]
    return state


def active_connections(mlp: ne.MLP) -> int:
    return sum(int(layer.mask.sum()) for layer in mlp.layers)


def outputs(agent: ne.Agent, batch: ne.Batch) -> list[torch.Tensor]:
    with torch.no_grad():
        critics = [agent.critic_1(batch.obs_actions), agent.critic_2(batch.obs_actions)]
        return [agent.actor(batch.obs), *critics]


def assert_same_outputs(before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    for was, now in zip(before, after, strict=True):
        assert torch.allclose(was, now, atol=1e-6)


# --- invariants 1 and 3: what is masked is 0, in online and target networks and in Adam
@pytest.mark.parametrize("growth", ["gradient", "random", "none"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_what_is_masked_is_zero_at_any_time(growth, layer_norm):
    agent, buffer = make(growth=growth, layer_norm=layer_norm)
    for part in range(6):
        if part == 3:
            silence_some(agent)
        train(agent, buffer, updates=20, rounds=2)
        assert len(all_layers(agent)) == 18
        for layer in all_layers(agent):
            assert torch.equal(layer.weight, layer.weight * layer.mask)
            assert set(layer.mask.flatten().tolist()) <= {0.0, 1.0}
            assert layer.bias.count_nonzero() == layer.bias.numel()
        for layer, target in zip(online_layers(agent), target_layers(agent), strict=True):
            assert torch.equal(layer.mask, target.mask)
            state = adam_of(agent, layer.weight)
            for moment in ("exp_avg", "exp_avg_sq"):
                assert not state[moment][layer.mask == 0].any()
                assert state[moment][layer.mask == 1].any()
    if growth != "none":
        assert all(mlp.counts["pruned"] > 0 for mlp in mlps(agent))
    for optimizer, steps in zip(agent.optimizers, (60, 120), strict=True):
        assert all(state["step"] == steps for state in optimizer.state.values())


# --- invariant 2: growth sees the dense gradient ------------------------------
def q_target_by_hand(agent: ne.Agent, batch: ne.Batch) -> torch.Tensor:
    with torch.no_grad():
        noise = torch.clamp(0.2 * batch.noise, -0.5, 0.5)
        actions = torch.clamp(agent.target_actor(batch.next_obs) + noise, -1, 1)
        x = torch.cat((batch.next_obs, actions), 1)
        next_q = torch.min(agent.target_critic_1(x), agent.target_critic_2(x))
        return batch.rewards + 0.99 * (1 - batch.terminated) * next_q


def as_plain(mlp: ne.MLP) -> nn.Sequential:
    """A copy with plain nn.Linear layers."""
    plain = nn.Sequential()
    for layer in mlp.layers:
        linear = nn.Linear(layer.in_features, layer.out_features)
        linear.load_state_dict({"weight": layer.weight, "bias": layer.bias})
        plain.extend([linear, nn.ReLU()])
    return plain[:-1]


def test_growth_gets_the_gradient_a_masked_weight_would_have(monkeypatch):
    """That of plain layers with the same values, by autograd."""
    agent, buffer = make()
    helpers.train(agent, buffer, 20)
    batch = buffer.sample(64)
    seen = []
    grow = topology.grow

    def noted(layers, scores, *rest):
        seen.append((scores, [layer.mask == 0 for layer in layers]))
        return grow(layers, scores, *rest)

    monkeypatch.setattr(topology, "grow", noted)
    actor, *critics = [as_plain(mlp) for mlp in mlps(agent)]
    target_q = q_target_by_hand(agent, batch)
    for critic in critics:
        F.mse_loss(critic(batch.obs_actions)[:, 0], target_q).backward()
    actions = torch.tanh(actor(batch.obs))
    (-agent.critic_1(torch.cat((batch.obs, actions), 1)).mean()).backward()

    ne.topology_round(agent, batch, 100)

    assert len(seen) == 3
    for (scores, masked), plain in zip(seen, (actor, *critics), strict=True):
        for score, where, linear in zip(scores, masked, plain[::2], strict=True):
            assert torch.allclose(score, linear.weight.grad, atol=1e-7)
            assert not where.any() or score[where].any()


# --- births (SPEC, section 3) -------------------------------------------------
def test_nothing_is_born_where_the_gradient_is_zero():
    """An input that is always 0, as padding is, gets no connection; planned says how many."""
    agent, buffer = make(grow_rate=0.9, prune=False)
    buffer.data[:, 1] = 0.0  # in obs
    buffer.data[:, 7] = 0.0  # in next obs
    silence_some(agent)  # no gradient into these neurons, nor out of them
    batch = buffer.sample(64)
    gradients = [*agent.actor_gradients(batch)[-1], *agent.critic_gradients(batch)[-1]]
    params = agent.networks["actor"].params + agent.networks["critic"].params
    gradient_of = dict(zip(params, gradients, strict=True))
    before = {layer: layer.mask.clone() for layer in online_layers(agent)}
    ne.topology_round(agent, batch, step=50)
    fraction = 0.9 / 2 * (1 + math.cos(math.pi * 50 / 1_000))
    for mlp in mlps(agent):
        planned = 0
        grown = 0
        for layer in mlp.layers:
            inactive = before[layer] == 0
            gradient = gradient_of[layer.weight]
            born = (layer.mask == 1) & inactive
            assert not born[gradient == 0].any()
            assert int(born.sum()) == math.ceil(fraction * int((inactive & (gradient != 0)).sum()))
            planned += math.ceil(fraction * int(inactive.sum()))
            grown += int(born.sum())
        first = mlp.layers[0]
        assert torch.equal(first.mask[:, 1], before[first][:, 1])
        assert torch.equal(first.mask[::3], before[first][::3])
        assert mlp.counts == {"planned": planned, "grown": grown, "pruned": 0}
        assert 0 < grown < planned


def test_random_growth_does_not_follow_the_gradient():
    """Other gradients, same draws: the same births, also where the gradient is 0."""
    born = []
    for scale in (1.0, 3.0):
        agent, buffer = make(grow_rate=0.9, growth="random", prune=False)
        buffer.data[:, 1] = 0.0
        agent.critic_1.layers[-1].weight.data.mul_(scale)
        before = agent.critic_1.layers[0].mask.clone()
        do_round(agent, buffer)
        born.append(agent.critic_1.layers[0].mask - before)
    assert torch.equal(*born)
    assert born[0][:, 1].any()


# --- invariants 3, 4 and 5: what a round changes, and what not ----------------
def test_births_start_at_the_mean_and_change_neither_weights_nor_outputs():
    agent, buffer = make(prune=False)
    helpers.train(agent, buffer, 20)
    another = buffer.sample(64)
    outputs_before = outputs(agent, another)
    before = copy.deepcopy(agent)
    do_round(agent, buffer)
    assert helpers.equal(helpers.values(agent), helpers.values(before))
    assert_same_outputs(outputs_before, outputs(agent, another))
    for old, layer in zip(online_layers(before), online_layers(agent), strict=True):
        born = layer.mask != old.mask
        assert born.any() or old.mask.all()
        was = adam_of(before, old.weight)
        now = adam_of(agent, layer.weight)
        assert now["step"] == was["step"]
        assert not now["exp_avg"][born].any()
        assert torch.allclose(now["exp_avg_sq"][born], was["exp_avg_sq"][old.mask == 1].mean())
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(now[moment][old.mask == 1], was[moment][old.mask == 1])


@pytest.mark.parametrize("ne_actor", [True, False])
def test_pruning_leaves_the_outputs_on_its_batch(ne_actor):
    agent, buffer = make(grow_rate=0.5, ne_actor=ne_actor)
    train(agent, buffer, updates=20, rounds=2)
    silence_some(agent)
    batch = buffer.sample(64)
    before = outputs(agent, batch)
    pruned = [mlp.counts["pruned"] for mlp in mlps(agent)]
    ne.topology_round(agent, batch, step=200)
    for mlp, earlier in zip(mlps(agent), pruned, strict=True):
        assert mlp.counts["pruned"] > earlier or mlp is agent.actor and not ne_actor
    assert_same_outputs(before, outputs(agent, batch))


def test_nothing_happens_when_the_cosine_is_zero():
    agent, buffer = make()
    silence_some(agent)
    before = copy.deepcopy(agent.state_dict())
    do_round(agent, buffer, step=1_000)
    helpers.assert_equal(dict(agent.state_dict()), dict(before))


# --- invariant 6: the budget of pruning is kept over the run ------------------
@pytest.mark.parametrize(
    ("omega", "prune"), [(0.0, True), (0.4, True), (0.99, True), (0.99, False)]
)
def test_an_mlp_never_prunes_more_than_its_share_of_what_it_has_grown(omega, prune):
    agent, buffer = make(prune_ratio=omega, prune=prune)
    birth = {mlp: active_connections(mlp) for mlp in mlps(agent)}
    for _ in range(10):
        silence_some(agent)
        train(agent, buffer, updates=4, rounds=1)
        for mlp in mlps(agent):
            grown = mlp.counts["grown"]
            pruned = mlp.counts["pruned"]
            assert 0 <= pruned <= omega * grown
            assert active_connections(mlp) == birth[mlp] + grown - pruned >= birth[mlp]
            assert (pruned > 0) == (omega > 0 and prune)


def test_what_a_round_leaves_of_the_budget_is_there_for_the_next():
    """A round that grows next to nothing prunes what earlier rounds would have allowed."""
    agent, buffer = make()
    train(agent, buffer, updates=20, rounds=4)
    before = [dict(mlp.counts) for mlp in mlps(agent)]
    assert before[1]["grown"] > 300
    silence_some(agent)
    do_round(agent, buffer, step=990)  # the cosine is 0.0005
    for mlp, earlier in zip(mlps(agent), before, strict=True):
        of_this_round = 0.4 * (mlp.counts["grown"] - earlier["grown"])
        assert mlp.counts["pruned"] - earlier["pruned"] > 10 * of_this_round
        assert mlp.counts["pruned"] <= 0.4 * mlp.counts["grown"]


# --- weight clipping, NE on one network only, LayerNorm -----------------------
@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_only_reset_neurons_are_clipped(kappa):
    agent, buffer = make(grow_rate=0.5, weight_clip=kappa)
    helpers.train(agent, buffer, 10)
    silence_some(agent)
    do_round(agent, buffer)
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


@pytest.mark.parametrize(("actor", "critic"), [(True, False), (False, True), (False, False)])
def test_a_network_without_ne_is_dense_from_the_start(actor, critic):
    agent, buffer = make(ne_actor=actor, ne_critic=critic)
    assert agent.networks["critic"].density() == pytest.approx(0.25 if critic else 1, abs=0.01)
    train(agent, buffer, updates=10, rounds=1)
    for name, sparse in (("actor", actor), ("critic", critic)):
        for mlp in mlps_of(agent)[name]:
            density = topology.network_density(mlp.layers)
            assert density < 0.6 if sparse else density == 1
            assert (mlp.counts["grown"] > 0) == sparse


def test_layer_norm_on_hidden_layers_only():
    agent, _ = make(layer_norm=True)
    for mlp in mlps(agent):
        assert [type(norm) for norm in mlp.norms] == [nn.LayerNorm, nn.LayerNorm]
        x = torch.randn(8, mlp.layers[0].in_features)
        h = x
        for layer, norm in zip(mlp.layers[:-1], mlp.norms, strict=True):
            h = F.layer_norm(layer(h), (layer.out_features,), norm.weight, norm.bias)
            h = F.relu(h)
        assert torch.allclose(ne.MLP.forward(mlp, x), mlp.layers[-1](h))


@pytest.mark.parametrize("method", ["prune", "redo"])
def test_a_neuron_that_its_layer_norm_silenced_starts_anew(method):
    """With gain 1 and bias 0; Adam's squares: of a pruned one the mean, of ReDo's 0."""
    agent, buffer = make(grow_rate=1.0, prune_ratio=0.999, layer_norm=True, redo_tau=0.0)
    silence_some(agent)
    norms = [norm for mlp in mlps(agent) for norm in mlp.norms]
    for norm in norms:
        norm.weight.data.fill_(0.7)
    helpers.fill_moments(*agent.optimizers)
    batch = buffer.sample(64)

    def hidden() -> list[torch.Tensor]:
        return [h for mlp in mlps(agent) for h in mlp.hidden(batch)]

    dormant = [h.count_nonzero(dim=0) == 0 for h in hidden()]
    if method == "prune":
        ne.topology_round(agent, batch, 1)
    else:
        ne.redo(agent, batch)
    for norm, which, h in zip(norms, dormant, hidden(), strict=True):
        anew = norm.weight == 1
        assert torch.equal(anew, which) if method == "redo" else anew[which].any()
        assert not anew[~which].any()
        assert (h[:, anew] > 0).any()
        assert not norm.bias[anew].any()
        for p in norm.parameters():
            state = adam_of(agent, p)
            assert not state["exp_avg"][anew].any()
            assert (state["exp_avg"][~anew] == 1).all()
            assert (state["exp_avg_sq"][anew] == (2 if method == "prune" else 0)).all()


# --- experience review --------------------------------------------------------
def threshold(epsilon, before, now, fau=0.5, **changes) -> float:
    options = {"review_decay": 0.005, "review_floor": 0.65, "critic_hidden": (60, 40)}
    args = ne.Args(**options | changes)
    return ne.review_threshold(args, ne.Progress(epsilon=epsilon, dormant=before), now, fau)


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


@pytest.mark.parametrize(
    ("fau", "expected"), [(0.0, 0.427), (0.3, 0.501), (0.399, 0.526), (0.4, 1.0), (0.9, 1.0)]
)
def test_review_by_the_share_of_positive_activations(fau, expected):
    epsilon = threshold(0.7, 10, 100, fau, review_rule="fau")
    assert epsilon == pytest.approx(expected, abs=0.001)


@pytest.mark.parametrize("rule", ["slope", "level", "fau"])
def test_review_floor_1_is_no_review(rule):
    assert threshold(1.0, 100, 100, 0.2, review_rule=rule, review_floor=1.0) == 1.0


# --- invariant 7: without NE it is TD3, bit for bit ---------------------------
def test_dense_is_bit_equal_to_plain_td3():
    """Plain TD3 on nn.Linear, from Fujimoto et al. 2018, same weights, same batches."""
    agent, buffer = make(initial_density=1.0, review_floor=1.0)
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
    train(agent, buffer, updates=60, rounds=3)
    targets = [agent.target_actor, agent.target_critic_1, agent.target_critic_2]
    plain = (pi, q1, q2, pi_target, q1_target, q2_target)
    for mlp, network in zip(mlps(agent) + targets, plain, strict=True):
        assert helpers.equal(helpers.values(mlp), helpers.values(network))


def test_the_default_start_does_not_depend_on_ne():
    """The weights, before masking, are those of a dense agent; masks are each network's own."""
    sparse, _ = make()
    assert not torch.equal(sparse.critic_1.layers[0].mask, sparse.critic_2.layers[0].mask)
    dense, _ = make(initial_density=1.0)
    for layer, other in zip(online_layers(sparse), online_layers(dense), strict=True):
        assert torch.equal(layer.weight, other.weight * layer.mask)
        assert torch.equal(layer.bias, other.bias)


# --- combinations with ReDo and Reset -----------------------------------------
@pytest.mark.parametrize("tau", [0.0, 0.8])
def test_redo_resets_dormant_neurons_inside_the_masks(tau):
    agent, buffer = make(redo_tau=tau)
    train(agent, buffer, updates=20, rounds=2)
    silence_some(agent)
    helpers.fill_moments(*agent.optimizers)
    batch = buffer.sample(256)
    before = copy.deepcopy(agent)
    ne.redo(agent, batch)
    for name, network in agent.networks.items():
        for old, new in zip(mlps_of(before)[name], network.mlps, strict=True):
            dormant = [topology.dormancy_scores(h) <= tau for h in old.hidden(batch)]
            assert all(which[::3].all() and not which.all() for which in dormant)
            helpers.assert_started_anew(old, new, dormant, network.optimizer)
    for old, new in zip(all_layers(before), all_layers(agent), strict=True):
        assert torch.equal(old.mask, new.mask)
    for old, new in zip(target_layers(before), target_layers(agent), strict=True):
        assert torch.equal(old.weight, new.weight)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_reset_starts_anew_inside_the_masks(layer_norm):
    agent, buffer = make(layer_norm=layer_norm)
    silence_some(agent)
    train(agent, buffer, updates=40, rounds=4)
    before = copy.deepcopy(agent)
    ne.reset(agent)
    for layer, old in zip(online_layers(agent), online_layers(before), strict=True):
        assert torch.equal(layer.mask, old.mask)
        assert torch.equal(layer.weight, layer.weight * layer.mask)
        assert (layer.weight != old.weight)[layer.mask == 1].float().mean() > 0.99
        limit = layer.in_features**-0.5
        drawn = layer.weight[layer.mask == 1]
        assert drawn.abs().max() <= limit
        assert layer.bias.abs().max() <= limit
        if len(drawn) > 100:  # uniform, as at birth
            assert drawn.std().item() == pytest.approx(limit * 3**-0.5, rel=0.1)
        assert layer.bound.isinf().all()
    assert not torch.equal(agent.critic_1.layers[0].bias, agent.critic_2.layers[0].bias)
    for norm in agent.modules():
        if isinstance(norm, nn.LayerNorm):
            assert (norm.weight == 1).all() and (norm.bias == 0).all()
    for network in agent.networks.values():
        assert helpers.equal(network.params, network.target_params)
        for state in network.optimizer.state.values():
            assert not any(value.any() for value in state.values())


# --- CUDA ---------------------------------------------------------------------
def test_updates_read_no_values_and_stay_on_their_device():
    meta = torch.device("meta")
    batch = ne.Batch(*[part.to(meta) for part in make()[1].sample(8)])
    with meta:
        args = ne.Args(ne_actor=False, ne_critic=False)
        agent = ne.Agent(args, 4, 2, ne_seed=1, device=meta)
    helpers.assert_updates_read_no_values(agent, batch, reads="noise")


def test_what_a_graph_reads_and_writes_stays_where_it_is():
    agent, buffer = make()

    def addresses() -> list[int]:
        tensors = [t for t in agent.state_dict().values() if torch.is_tensor(t)]
        for optimizer in agent.optimizers:
            for state in optimizer.state.values():
                tensors += state.values()
        return [t.data_ptr() for t in tensors]

    before = addresses()
    silence_some(agent)
    train(agent, buffer, updates=40, rounds=4)
    ne.redo(agent, buffer.sample(64))
    ne.reset(agent)
    agent.load_state_dict(copy.deepcopy(agent.state_dict()))
    assert addresses() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_agree_with_eager_over_200_updates_with_rounds_in_between():
    torch.cuda.set_stream(torch.cuda.Stream())
    agents = []
    for graphs in (False, True):
        agent, buffer = make(device="cuda", cudagraphs=graphs)
        update_critic, update_actor = ne.fast_updates(agent.args, agent, buffer)
        for update in range(1, 201):
            batch = buffer.sample(64)
            update_critic(batch)
            if update % 2 == 0:
                update_actor(batch)
            if update % 50 == 0:
                do_round(agent, buffer, step=update)
        agents.append(agent)
    graph = agents[1].state_dict()
    for name, eager in agents[0].state_dict().items():
        if torch.is_tensor(eager):
            assert torch.allclose(eager.float(), graph[name].float(), atol=1e-4), name
