"""Invariants of the agent: masks, dense gradients, moments, targets, weight clipping, and equality with plain TD3."""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import helpers
import ne_td3_continuous as ne
import utils_topology as topology
from helpers import make_agent, silence_some

CPU = torch.device("cpu")


def train(agent: ne.Agent, buffer: ne.ReplayBuffer, updates: int, rounds: int = 0, alpha: float = 0.3) -> dict:
    """Updates with topology rounds among them in the first half of growth. Returns connections changed."""

    def topology_round(agent: ne.Agent, batch: ne.Batch, update: int) -> dict:
        step = agent.args.total_timesteps * update // (2 * updates)
        return ne.topology_round(agent, batch, step, alpha)

    return helpers.train(agent, buffer, updates, topology_round, rounds)


def all_layers(agent: ne.Agent) -> list[ne.MaskedLinear]:
    return [module for module in agent.modules() if isinstance(module, ne.MaskedLinear)]


# --- invariant 1: W == W * M, in online and target networks; biases are never masked ----------------------------------
@pytest.mark.parametrize("growth", ["gradient", "random", "none"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_weights_are_zero_where_masked_at_any_time(growth, layer_norm):
    agent, buffer = make_agent(growth=growth, layer_norm=layer_norm)
    for part in range(6):
        if part == 3:
            silence_some(agent)
        train(agent, buffer, 10, rounds=1, alpha=0.0 if growth == "none" else 0.3)
        assert len(all_layers(agent)) == 18
        for layer in all_layers(agent):
            assert torch.equal(layer.weight, layer.weight * layer.mask)
            assert torch.equal(layer.keep, layer.mask.float())
    for layer, target in zip(agent.layers["actor"] + agent.layers["critic"], agent.target_layers, strict=True):
        assert torch.equal(layer.mask, target.mask)
    assert all(layer.bias.count_nonzero() == layer.bias.numel() for layer in all_layers(agent))


def test_every_network_has_masks_of_its_own():
    agent, _ = make_agent()
    q1, q2 = agent.critic
    assert not torch.equal(q1.layers[0].mask, q2.layers[0].mask)


# --- invariant 2: growth sees the dense gradient ----------------------------------------------------------------------
def test_growth_gets_the_gradient_a_masked_weight_would_have(monkeypatch):
    agent, buffer = make_agent()
    train(agent, buffer, 20)
    batch = buffer.sample()
    seen = []
    grow = topology.grow
    monkeypatch.setattr(
        topology, "grow", lambda layers, scores, *rest: seen.append(scores) or grow(layers, scores, *rest)
    )
    actor, critic = copy.deepcopy(agent.actor), copy.deepcopy(agent.critic)
    target_q = q_target_by_hand(agent, batch)
    critic_loss = sum(F.mse_loss(q(batch.obs_actions), target_q) for q in critic)
    actor_loss = -agent.critic[0](torch.cat((batch.obs, actor(batch.obs)), 1)).mean()
    expected = []
    for loss, mlps in ((actor_loss, [actor]), (critic_loss, critic)):
        loss.backward()
        expected += [[layer.weight.grad.abs() for layer in mlp.layers] for mlp in mlps]
    masks = [[layer.mask.clone() for layer in mlp.layers] for mlp in (agent.actor, *agent.critic)]
    ne.topology_round(agent, batch, 100, 0.3)
    assert len(seen) == 3
    for scores, gradients, layer_masks in zip(seen, expected, masks, strict=True):
        for score, gradient, mask in zip(scores, gradients, layer_masks, strict=True):
            assert torch.allclose(score.abs(), gradient, atol=1e-7)
            assert score[~mask].count_nonzero() > 0 or mask.all()


def q_target_by_hand(agent: ne.Agent, batch: ne.Batch) -> torch.Tensor:
    args = agent.args
    with torch.no_grad():
        noise = torch.clamp(args.policy_noise * batch.noise, -args.noise_clip, args.noise_clip)
        x = torch.cat((batch.next_obs, torch.clamp(agent.target_actor(batch.next_obs) + noise, -1, 1)), 1)
        next_q = torch.min(agent.target_critic[0](x), agent.target_critic[1](x))
        return batch.rewards + args.gamma * (1 - batch.terminated) * next_q


def test_a_round_takes_no_optimiser_step():
    agent, buffer = make_agent(prune=False)
    train(agent, buffer, 10)
    before = [p.clone() for p in agent.parameters()]
    steps = [state["step"].item() for adam in agent.optimizers.values() for state in adam.state.values()]
    ne.topology_round(agent, buffer.sample(), 100, 0.3)
    assert all(torch.equal(p, old) for p, old in zip(agent.parameters(), before, strict=True))
    assert steps == [state["step"].item() for adam in agent.optimizers.values() for state in adam.state.values()]


# --- invariant 3: moments are zero for every connection that is not active, or was just born, pruned or reset ---------
def test_moments_are_zero_where_masked():
    agent, buffer = make_agent()
    train(agent, buffer, 20, rounds=2)
    silence_some(agent)
    counts = train(agent, buffer, 20, rounds=2)
    assert counts["ne/actor/pruned"] > 0 and counts["ne/critic/pruned"] > 0
    for name, adam in agent.optimizers.items():
        for layer in agent.layers[name]:
            for moment in ("exp_avg", "exp_avg_sq"):
                assert not adam.state[layer.weight][moment][~layer.mask].any()
                assert adam.state[layer.weight][moment][layer.mask].any()


def test_connections_born_in_a_round_start_without_momentum():
    agent, buffer = make_agent(prune=False)
    train(agent, buffer, 20)
    for adam in agent.optimizers.values():  # as if dead weights had drifted
        for state in adam.state.values():
            state["exp_avg"].fill_(1.0)
    masks = {name: [layer.mask.clone() for layer in layers] for name, layers in agent.layers.items()}
    ne.topology_round(agent, buffer.sample(), 100, 0.3)
    for name, adam in agent.optimizers.items():
        for layer, mask in zip(agent.layers[name], masks[name], strict=True):
            born = layer.mask & ~mask
            assert not adam.state[layer.weight]["exp_avg"][born].any()
            assert (adam.state[layer.weight]["exp_avg"][mask] == 1).all()


# --- invariants 4 and 5: a round does not change the output on its batch ----------------------------------------------
def test_a_round_leaves_the_outputs_on_its_batch():
    agent, buffer = make_agent()
    train(agent, buffer, 20, rounds=2)
    silence_some(agent)
    batch = buffer.sample()
    q = [mlp(batch.obs_actions) for mlp in agent.critic]
    actions = agent.actor(batch.obs)
    counts = ne.topology_round(agent, batch, 200, 0.5)
    assert counts["ne/critic/pruned"] > 0 and counts["ne/actor/pruned"] > 0
    assert torch.allclose(agent.actor(batch.obs), actions, atol=1e-6)
    for mlp, before in zip(agent.critic, q, strict=True):
        assert torch.allclose(mlp(batch.obs_actions), before, atol=1e-6)


# --- invariant 6: a round never leaves fewer connections --------------------------------------------------------------
@pytest.mark.parametrize("omega", [0.0, 0.4, 0.99])
def test_every_round_grows_on_net(omega):
    agent, buffer = make_agent(prune_ratio=omega)
    for _ in range(8):
        silence_some(agent)
        before = {name: sum(int(layer.mask.sum()) for layer in layers) for name, layers in agent.layers.items()}
        counts = train(agent, buffer, 4, rounds=1)
        for name, layers in agent.layers.items():
            grown, pruned = counts[f"ne/{name}/grown"], counts[f"ne/{name}/pruned"]
            assert 0 <= pruned <= omega * grown
            assert sum(int(layer.mask.sum()) for layer in layers) == before[name] + grown - pruned


def test_no_prune_prunes_nothing():
    agent, buffer = make_agent(prune=False)
    silence_some(agent)
    counts = train(agent, buffer, 4, rounds=1)
    assert counts["ne/actor/pruned"] == counts["ne/critic/pruned"] == 0 < counts["ne/actor/grown"]


def test_nothing_happens_in_the_last_round():
    agent, buffer = make_agent()
    silence_some(agent)
    assert set(ne.topology_round(agent, buffer.sample(), 1_000, 0.3).values()) == {0}


def test_targets_lose_what_is_pruned_and_get_zero_for_what_is_born():
    agent, buffer = make_agent()
    train(agent, buffer, 20, rounds=2)
    silence_some(agent)
    before = [(target.mask.clone(), target.weight.clone()) for target in agent.target_layers]
    ne.topology_round(agent, buffer.sample(), 100, 0.3)
    for (mask, weight), target in zip(before, agent.target_layers, strict=True):
        assert torch.equal(target.weight, weight * target.mask)
        assert not target.weight[target.mask & ~mask].any()


def test_random_growth_does_not_follow_the_gradient():
    agent, buffer = make_agent(growth="random", prune=False)
    layer = agent.critic[0].layers[1]
    before = layer.mask.clone()
    state = agent.ne_rng.get_state()
    ne.topology_round(agent, buffer.sample(), 100, 0.3)
    first = layer.mask & ~before
    other, buffer = make_agent(growth="random", prune=False)
    other.ne_rng.set_state(state)
    for q in other.critic:
        q.layers[-1].weight.data.mul_(3.0)  # other gradients, same draws
    ne.topology_round(other, buffer.sample(), 100, 0.3)
    assert torch.equal(other.critic[0].layers[1].mask & ~before, first)


# --- weight clipping --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_only_reset_neurons_are_clipped(kappa):
    agent, buffer = make_agent(weight_clip=kappa)
    train(agent, buffer, 10)
    silence_some(agent)
    ne.topology_round(agent, buffer.sample(), 100, 0.5)
    reset = [(layer, torch.isfinite(layer.bound).any(1)) for layer in agent.layers["actor"] + agent.layers["critic"]]
    assert sum(int(rows.sum()) for _, rows in reset) > 0 or kappa == 0
    for layer in agent.layers["actor"] + agent.layers["critic"]:
        layer.weight.data = 3.0 * layer.mask  # far outside
    train(agent, buffer, 2)
    for layer, rows in reset:
        limit = kappa / math.sqrt(layer.in_features)
        assert (layer.weight[rows].abs() <= limit + 1e-7).all()
        assert (layer.weight[~rows][layer.mask[~rows]] > 2.9).all()


# --- NE on one network only, scale-up, LayerNorm ----------------------------------------------------------------------
@pytest.mark.parametrize(("actor", "critic"), [(True, False), (False, True), (False, False)])
def test_a_network_without_ne_is_dense_from_the_start(actor, critic):
    agent, buffer = make_agent(ne_actor=actor, ne_critic=critic)
    assert topology.network_density(agent.layers["actor"]) == pytest.approx(0.25 if actor else 1.0, abs=0.01)
    assert topology.network_density(agent.layers["critic"]) == pytest.approx(0.25 if critic else 1.0, abs=0.01)
    counts = train(agent, buffer, 10, rounds=1)
    assert (counts["ne/actor/grown"] > 0, counts["ne/critic/grown"] > 0) == (actor, critic)


@pytest.mark.parametrize(("scale", "widths"), [(1, [256, 128]), (2, [256] * 3), (4, [256] * 5)])
def test_scale_up(scale, widths):
    agent = ne.Agent(ne.Args(scale=scale), 17, 6, ne_seed=0, device=CPU)
    assert [layer.out_features for layer in agent.actor.layers] == [*widths, 6]
    for q in agent.critic:
        assert [layer.out_features for layer in q.layers] == [*widths, 1]


def test_layer_norm_on_hidden_layers_only():
    agent, buffer = make_agent(layer_norm=True)
    for mlp in (agent.actor, *agent.critic):
        assert [type(norm) for norm in mlp.norms] == [nn.LayerNorm, nn.LayerNorm]
        x = torch.randn(8, mlp.layers[0].in_features)
        by_hand = x
        for layer, norm in zip(mlp.layers[:-1], mlp.norms, strict=True):
            by_hand = F.relu(F.layer_norm(layer(by_hand), (layer.out_features,), norm.weight, norm.bias))
        assert torch.allclose(nn.Module.__call__(mlp.layers[-1], by_hand), mlp.layers[-1](mlp.activations(x)[-1]))
    train(agent, buffer, 10, rounds=2)


# --- experience review ------------------------------------------------------------------------------------------------
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
def test_review_threshold(epsilon, before, now, expected):
    assert ne.review_threshold(epsilon, before, now, ne.Args()) == pytest.approx(expected)


def test_review_floor_1_is_no_review():
    assert ne.review_threshold(1.0, 100, 100, ne.Args(review_floor=1.0)) == 1.0


# --- invariant 7: without NE it is TD3, bit for bit -------------------------------------------------------------------
def test_dense_is_bit_equal_to_plain_td3():
    """A plain TD3 on nn.Linear, written from Fujimoto et al. 2018, from the same weights on the same batches."""
    agent, buffer = make_agent(initial_density=1.0, review_floor=1.0)
    torch.manual_seed(0)

    def network(n_in: int, n_out: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(n_in, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, n_out))

    pi, q1, q2 = network(4, 2), network(6, 1), network(6, 1)
    pi_target, q1_target, q2_target = copy.deepcopy(pi), copy.deepcopy(q1), copy.deepcopy(q2)
    q_parameters = [*q1.parameters(), *q2.parameters()]
    pi_adam = torch.optim.Adam(pi.parameters(), lr=3e-4, fused=True)
    q_adam = torch.optim.Adam(q_parameters, lr=3e-4, fused=True)
    rng = torch.Generator().manual_seed(2)
    for update in range(1, 61):
        index = torch.randint(500, (64,), generator=rng)
        s, a, s2 = buffer.data[index, :4], buffer.data[index, 4:6], buffer.data[index, 6:10]
        r, done = buffer.data[index, 10:11], buffer.data[index, 11:12]
        with torch.no_grad():
            a2 = (torch.tanh(pi_target(s2)) + (torch.randn(64, 2, generator=rng) * 0.2).clamp(-0.5, 0.5)).clamp(-1, 1)
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
    train(agent, buffer, 60, rounds=3)
    ours = [agent.actor, *agent.critic, agent.target_actor, *agent.target_critic]
    for mlp, plain in zip(ours, [pi, q1, q2, pi_target, q1_target, q2_target], strict=True):
        weights = [p for layer in mlp.layers for p in (layer.weight, layer.bias)]
        for p, expected in zip(weights, plain.parameters(), strict=True):
            assert torch.equal(p, expected)


# --- combinations with ReDo and Reset ---------------------------------------------------------------------------------
def test_redo_resets_dormant_neurons_inside_the_masks():
    agent, buffer = make_agent()
    train(agent, buffer, 20, rounds=2)
    silence_some(agent)
    batch = buffer.sample()
    hidden = agent.hidden(batch)
    before, targets = copy.deepcopy(agent.mlps), [p.clone() for p in agent.targets]
    for state in (state for adam in agent.optimizers.values() for state in adam.state.values()):
        state["exp_avg"].fill_(1.0)
        state["exp_avg_sq"].fill_(1.0)
    count = topology.redo(agent.mlps, hidden, 0.1, agent.optimizers, agent.ne_rng)
    assert count == sum(topology.count_dormant(h, 0.1) for mlps in hidden.values() for h in mlps) > 20
    for name, mlps in agent.mlps.items():
        for mlp, old, activations in zip(mlps, before[name], hidden[name], strict=True):
            dormant = [topology.dormant(h, 0.1) for h in activations] + [torch.zeros_like(mlp.layers[-1].bias).bool()]
            silenced = [torch.zeros(mlp.layers[0].in_features, dtype=torch.bool), *dormant]
            for layer, was, rows, columns in zip(mlp.layers, old.layers, dormant, silenced, strict=False):
                assert torch.equal(layer.mask, was.mask) and torch.equal(layer.weight, layer.weight * layer.mask)
                assert not layer.weight[:, columns].any()  # 0 wins where a redrawn neuron follows a dormant one
                assert torch.equal(layer.weight[~rows][:, ~columns], was.weight[~rows][:, ~columns])
                assert torch.equal(layer.bias[~rows], was.bias[~rows]) and (layer.bias[rows] != was.bias[rows]).all()
                assert (layer.bias[rows].abs() <= layer.in_features**-0.5).all()
                touched = rows[:, None] | columns[None]
                for moment in ("exp_avg", "exp_avg_sq"):
                    state = agent.optimizers[name].state
                    assert (
                        not state[layer.weight][moment][touched].any() and state[layer.weight][moment][~touched].all()
                    )
                    assert not state[layer.bias][moment][rows].any() and state[layer.bias][moment][~rows].all()
    assert all(torch.equal(a, b) for a, b in zip(agent.targets, targets, strict=True))


@pytest.mark.parametrize("layer_norm", [False, True])
def test_reset_starts_anew_inside_the_masks(layer_norm):
    agent, buffer = make_agent(layer_norm=layer_norm)
    silence_some(agent)
    train(agent, buffer, 40, rounds=4)
    masks = [layer.mask.clone() for layer in agent.online_layers]
    weights = [layer.weight.clone() for layer in agent.online_layers]
    data, density = buffer.data.clone(), topology.network_density(agent.layers["critic"])
    topology.reset(agent.mlps, agent.targets, agent.optimizers, agent.ne_rng)
    for layer, mask, was in zip(agent.online_layers, masks, weights, strict=True):
        assert torch.equal(layer.mask, mask) and (layer.weight != was)[mask].float().mean() > 0.99
        assert torch.equal(layer.weight, layer.weight * mask)
        scaled = layer.weight[mask] * layer.in_features**0.5
        assert scaled.abs().max() <= 1 and layer.bias.abs().max() <= layer.in_features**-0.5
        assert len(scaled) < 100 or scaled.std().item() == pytest.approx(3**-0.5, rel=0.1)  # uniform, as at birth
        assert layer.bound.isinf().all() and not layer.clipped
    assert not torch.equal(agent.critic[0].layers[0].weight, agent.critic[1].layers[0].weight)
    for norm in (norm for mlps in agent.mlps.values() for mlp in mlps for norm in mlp.norms if layer_norm):
        assert (norm.weight == 1).all() and (norm.bias == 0).all()
    online = agent.params["actor"] + agent.params["critic"]
    assert all(torch.equal(p, target) for p, target in zip(online, agent.targets, strict=True))
    assert not any(
        t.any() for adam in agent.optimizers.values() for state in adam.state.values() for t in state.values()
    )
    assert torch.equal(buffer.data, data) and topology.network_density(agent.layers["critic"]) == density


# --- torch.compile ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layer_norm", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_gradients_are_those_of_the_eager_agent(monkeypatch, layer_norm):
    monkeypatch.setattr(torch.compiler, "set_stance", lambda **_: None)  # it would stay set for the tests to come
    agent, buffer = make_agent(layer_norm=layer_norm)
    train(agent, buffer, 20, rounds=2)
    eager = copy.deepcopy(agent)
    ne.compile_gradients(agent, buffer.batch)
    assert all(torch.equal(a, b) for a, b in zip(agent.parameters(), eager.parameters(), strict=True))
    for _ in range(3):
        batch = buffer.sample()
        for gradients, expected in (
            (agent.critic_gradients(batch), eager.critic_gradients(batch)),
            (agent.actor_gradients(batch), eager.actor_gradients(batch)),
        ):
            assert [len(gradients), len(gradients[-1])] == [len(expected), len(expected[-1])]
            for ours, theirs in zip([*gradients[:-1], *gradients[-1]], [*expected[:-1], *expected[-1]], strict=True):
                assert torch.allclose(ours, theirs, atol=1e-5)
        agent.update_critic(batch)
        agent.update_actor(batch)
        eager.load_state_dict(agent.state_dict())
    for layer in agent.online_layers:
        assert torch.equal(layer.weight, layer.weight * layer.mask)


# --- CUDA -------------------------------------------------------------------------------------------------------------
def test_updates_read_no_values_and_stay_on_their_device(monkeypatch):
    monkeypatch.setattr(topology, "apply_masks", lambda layers, targets: None)  # only between updates, may read
    meta = torch.device("meta")
    with meta:
        agent = ne.Agent(ne.Args(ne_actor=False, ne_critic=False), 4, 2, ne_seed=1, device=meta)
        obs, obs_actions, noise, column = torch.empty(8, 4), torch.empty(8, 6), torch.empty(8, 2), torch.empty(8)
    batch = ne.Batch(obs, obs_actions, obs, column, column, noise)
    for clipped in (False, True):
        for layer in agent.online_layers:
            layer.clipped = clipped
        helpers.assert_updates_read_no_values(agent, batch, reads="noise")


def test_what_a_graph_reads_and_writes_stays_where_it_is():
    agent, buffer = make_agent()

    def addresses() -> list[int]:
        moments = [t for adam in agent.optimizers.values() for state in adam.state.values() for t in state.values()]
        return [t.data_ptr() for t in (*agent.state_dict().values(), *moments, *buffer.batch)]

    before = addresses()
    silence_some(agent)
    train(agent, buffer, 40, rounds=4)
    topology.redo(agent.mlps, agent.hidden(buffer.sample()), 0.1, agent.optimizers, agent.ne_rng)
    topology.reset(agent.mlps, agent.targets, agent.optimizers, agent.ne_rng)
    train(agent, buffer, 10, rounds=1)
    assert addresses() == before


def test_a_graph_is_captured_once_after_three_plain_updates(monkeypatch):
    """The order of calls, with stand-ins for CUDA: what is recorded runs again at every replay."""
    calls = []

    class Graph:
        def replay(self):
            calls.append("replay")

    @contextlib.contextmanager
    def capture(graph, stream):
        calls.append("capture")
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    update = ne.CudaGraph(lambda batch: calls.append("update") or len(calls))
    losses = [update(None) for _ in range(6)]
    assert calls == ["update"] * 3 + ["capture", "update", "replay", "replay", "replay"]
    assert losses == [1, 2, 3, 5, 5, 5]  # the captured update's own tensors from then on


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_agree_with_eager_over_200_updates_with_rounds_in_between():
    torch.cuda.set_stream(torch.cuda.Stream())
    agents = []
    for graphs in (False, True):
        agent, buffer = make_agent(device="cuda")
        if graphs:
            agent.update_critic, agent.update_actor = (
                ne.CudaGraph(agent.update_critic),
                ne.CudaGraph(agent.update_actor),
            )
        train(agent, buffer, 200, rounds=4)
        agents.append(agent)
    for (name, eager), graph in zip(agents[0].state_dict().items(), agents[1].state_dict().values(), strict=True):
        if torch.is_tensor(eager):
            assert torch.allclose(eager.float(), graph.float(), atol=1e-4), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_follows_the_cpu():
    results = []
    for device in ("cpu", "cuda"):
        agent, buffer = make_agent(device=device, prune=False)
        buffer.rng = torch.Generator().manual_seed(2)  # the same batches
        train(agent, buffer, 20)
        results.append(agent.actor.act([0.1, 0.2, 0.3, 0.4]))
    assert results[0] == pytest.approx(results[1], abs=1e-3)
