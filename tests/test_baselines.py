"""The rivals of NE on TD3: what each changes, and nothing else."""

import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import ne_td3_continuous as ne
import td3_continuous as td3
import utils_topology as topology
from helpers import (
    assert_moments_forgotten,
    assert_updates_read_no_values,
    equal,
    make_agent,
    redone,
    silence_some,
    train,
    values,
    walk,
)

CPU = torch.device("cpu")


def networks(agent) -> list[td3.MLP]:
    return [agent.actor, *agent.critic]


def targets(agent) -> list[td3.MLP]:
    return [agent.target_actor, *agent.target_critic]


# --- none -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layer_norm", [False, True])
def test_it_is_the_ne_script_without_ne_bit_for_bit(layer_norm):
    ours, our_buffer = make_agent(td3, method="layer-norm" if layer_norm else "none")
    theirs, their_buffer = make_agent(ne, initial_density=1.0, review_floor=1.0, layer_norm=layer_norm)
    for agent, buffer in ((ours, our_buffer), (theirs, their_buffer)):
        train(agent, buffer, 40)
    assert equal(values(ours), values(theirs))
    for name, adam in ours.optimizers.items():
        states = zip(adam.state.values(), theirs.optimizers[name].state.values(), strict=True)
        assert all(torch.equal(one[key], two[key]) for one, two in states for key in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("silent", [False, True])
def test_metrics_are_those_of_the_ne_script(silent):
    agent, buffer = make_agent(td3)
    if silent:
        silence_some(agent)
    for name, hidden in agent.hidden(buffer.sample()).items():
        layers = [ne.MaskedLinear(2, 3)]
        theirs = topology.metrics(f"ne/{name}", layers, sum(hidden, []))
        assert td3.metrics(f"ne/{name}", sum(hidden, [])) == theirs
        assert (theirs[f"ne/{name}/active_ratio"] < 0.7) == silent


# --- layer-norm -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["none", "layer-norm"])
def test_layer_norm_on_every_hidden_layer_and_none_on_the_output(method):
    agent, _ = make_agent(td3, method=method)
    for mlp in networks(agent) + targets(agent):
        x = torch.randn(8, mlp.layers[0].in_features)
        y = x
        for layer, norm in zip(mlp.layers[:-1], mlp.norms, strict=True):
            y = layer(y)
            if method == "layer-norm":
                assert isinstance(norm, nn.LayerNorm)
                y = F.layer_norm(y, (layer.out_features,), norm.weight, norm.bias)
            y = F.relu(y)
        assert torch.equal(td3.MLP.forward(mlp, x), mlp.layers[-1](y))


# --- redo -------------------------------------------------------------------------------------------------------------
def after_redo(tau: float = 0.1):
    agent, buffer = make_agent(td3, method="redo", redo_tau=tau)
    train(agent, buffer, 10)
    return redone(td3.redo, agent, buffer.sample(), tau)


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.6])
def test_redo_draws_incoming_weights_and_biases_anew_and_zeroes_outgoing_weights(tau):
    before, after, dormant = after_redo(tau)
    for _, old, new, outputs, inputs in walk(before, after, dormant):
        assert not new.weight[:, inputs].any()  # 0 wins where a neuron is dormant at both ends
        drawn = new.weight[outputs][:, ~inputs]
        assert (drawn != old.weight[outputs][:, ~inputs]).all()
        limit = new.in_features**-0.5
        assert drawn.numel() == 0 or (drawn.abs() <= limit).all() and drawn.abs().max() > limit / 2
        assert (new.bias[outputs].abs() <= limit).all() and (new.bias[outputs] != old.bias[outputs]).all()
        kept = ~outputs[:, None] & ~inputs
        assert torch.equal(new.weight[kept], old.weight[kept]) and torch.equal(new.bias[~outputs], old.bias[~outputs])


def test_redo_forgets_the_moments_of_what_it_changed_and_no_others():
    before, after, dormant = after_redo()
    for name, _, new, outputs, inputs in walk(before, after, dormant):
        assert_moments_forgotten(after.optimizers[name], new, outputs, inputs)


def test_redo_works_in_place_so_that_the_optimiser_trains_what_it_drew():
    agent, buffer = make_agent(td3, method="redo")
    silence_some(agent)
    addresses = [p.data_ptr() for p in agent.parameters()]
    td3.redo(agent, buffer.sample())
    assert addresses == [p.data_ptr() for p in agent.parameters()]
    before = [values(mlp) for mlp in networks(agent)]
    train(agent, buffer, 2)
    for mlp, old in zip(networks(agent), before, strict=True):
        for p, start in zip(mlp.parameters(), old, strict=True):
            assert not torch.equal(p, start)
        outgoing = mlp.layers[1].weight[:, ::3]  # 0 after ReDo; what feeds it is alive again, so it has a gradient
        assert outgoing.count_nonzero() > outgoing.numel() / 2


def test_redo_leaves_the_targets():
    before, after, _ = after_redo()
    for old, new in zip(targets(before), targets(after), strict=True):
        assert equal(values(old), values(new))


# --- reset ------------------------------------------------------------------------------------------------------------
def test_reset_starts_networks_targets_and_adam_anew_and_keeps_the_buffer():
    agent, buffer = make_agent(td3, method="reset")
    train(agent, buffer, 20)
    data, position, size = buffer.data.clone(), buffer.position, buffer.size
    before, addresses = values(agent), [p.data_ptr() for p in agent.parameters()]
    td3.reset(agent)
    assert torch.equal(buffer.data, data) and (buffer.position, buffer.size) == (position, size)
    assert addresses == [p.data_ptr() for p in agent.parameters()]
    assert not any(torch.equal(p, old) for p, old in zip(agent.parameters(), before, strict=True))
    for mlp, target in zip(networks(agent), targets(agent), strict=True):
        assert equal(values(mlp), values(target))
        for layer in mlp.layers:
            limit = layer.in_features**-0.5
            assert limit / 2 < layer.weight.abs().max() <= limit and (layer.bias.abs() <= limit).all()
    q1, q2 = agent.critic
    assert not torch.equal(q1.layers[0].weight, q2.layers[0].weight)
    for state in (state for adam in agent.optimizers.values() for state in adam.state.values()):
        assert not any(x.any() for x in state.values())
    start = values(agent.actor)
    train(agent, buffer, 2)
    assert not equal(values(agent.actor), start)


# --- injection --------------------------------------------------------------------------------------------------------
def test_injection_leaves_every_output_as_it_was():
    agent, buffer = make_agent(td3, method="injection")
    for mlp in networks(agent):  # new weights, not those the network itself started from
        assert not any(torch.equal(a.weight, b.weight) for a, b in zip(mlp.fresh.layers, mlp.layers, strict=True))
    train(agent, buffer, 20)
    batch = buffer.sample()
    actions, q = agent.actor(batch.obs), [critic(batch.obs_actions) for critic in agent.critic]
    target_actions = agent.target_actor(batch.obs)
    td3.inject(agent)
    assert torch.equal(agent.actor(batch.obs), actions) and torch.equal(agent.target_actor(batch.obs), target_actions)
    assert all(torch.equal(critic(batch.obs_actions), old) for critic, old in zip(agent.critic, q, strict=True))


def test_before_injection_it_is_td3_bit_for_bit():
    ours, our_buffer = make_agent(td3, method="injection")
    theirs, their_buffer = make_agent(td3, method="none")
    for agent, buffer in ((ours, our_buffer), (theirs, their_buffer)):
        train(agent, buffer, 40)
    for one, two in zip(networks(ours) + targets(ours), networks(theirs) + targets(theirs), strict=True):
        assert equal(values(one.layers), values(two))


def test_after_injection_only_the_fresh_networks_learn():
    agent, buffer = make_agent(td3, method="injection")
    train(agent, buffer, 20)
    lag = [abs(a - b).max() for a, b in zip(agent.online, agent.targets, strict=True)]
    td3.inject(agent)
    steps = {name: [float(state["step"]) for state in adam.state.values()] for name, adam in agent.optimizers.items()}
    start = [(values(mlp.layers), values(mlp.fresh), values(mlp.copied)) for mlp in networks(agent)]
    train(agent, buffer, 20)
    for mlp, (theta, fresh, copied) in zip(networks(agent), start, strict=True):
        assert equal(values(mlp.layers), theta) and equal(values(mlp.copied), copied)
        assert not any(torch.equal(p, old) for p, old in zip(mlp.fresh.parameters(), fresh, strict=True))
    for name, adam in agent.optimizers.items():  # Adam keeps what it had, and starts anew for what is new
        taken = 10 if name == "actor" else 20
        fresh = {id(p) for mlp in agent.mlps[name] for p in mlp.parameters()}
        for (p, state), before in zip(adam.state.items(), steps[name], strict=True):
            assert (before, float(state["step"])) == ((0, taken) if id(p) in fresh else (before, before))
        assert sorted(set(steps[name])) == [0, taken]
    now = [abs(a - b).max() for a, b in zip(agent.online, agent.targets, strict=True)]
    theta = [
        i
        for i, p in enumerate(agent.online)
        if any(p.data_ptr() == q.data_ptr() for m in networks(agent) for q in m.layers.parameters())
    ]
    assert theta and all(0 < now[i] < lag[i] for i in theta)  # the targets' theta goes on towards the frozen one


def test_the_injected_actor_adds_before_the_tanh():
    agent, buffer = make_agent(td3, method="injection")
    td3.inject(agent)
    train(agent, buffer, 20)
    obs = buffer.sample().obs

    def by_hand(mlp: td3.MLP, x: torch.Tensor) -> torch.Tensor:
        for layer in mlp.layers[:-1]:
            x = F.relu(F.linear(x, layer.weight, layer.bias))
        return F.linear(x, mlp.layers[-1].weight, mlp.layers[-1].bias)

    for actor in (agent.actor, agent.target_actor):
        expected = torch.tanh(by_hand(actor, obs) + by_hand(actor.fresh, obs) - by_hand(actor.copied, obs))
        assert torch.allclose(actor(obs), expected, atol=1e-6)
        assert not torch.allclose(actor(obs), torch.tanh(by_hand(actor, obs)), atol=1e-6)
    assert not torch.allclose(agent.actor(obs), agent.target_actor(obs), atol=1e-6)


def test_active_ratios_after_injection_are_those_of_what_learns():
    agent, buffer = make_agent(td3, method="injection")
    batch = buffer.sample()
    td3.inject(agent)
    hidden = agent.hidden(batch)
    assert torch.equal(hidden["actor"][0][0], agent.actor.fresh.activations(batch.obs)[0])
    assert torch.equal(hidden["critic"][1][1], agent.critic[1].fresh.activations(batch.obs_actions)[1])


# --- recency ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("capacity", "added"), [(1000, 400), (300, 300), (300, 740)])
def test_rows_are_drawn_by_their_age(capacity, added):
    """Also when the ring is full and has wrapped. Row i was added at step i; its observation says so."""
    buffer = td3.ReplayBuffer(capacity, 1, 1, 100_000, seed=0, device=CPU)
    for step in range(added):
        buffer.add(np.float32([step]), np.float32([0]), np.float32([0]), 0.0, False)
    weights = np.maximum(0.1, 1 - np.arange(capacity) / 200)
    batch = buffer.sample(torch.from_numpy(weights).cumsum(0))
    ages = added - 1 - batch.obs[:, 0].numpy().astype(int)
    size = min(added, capacity)
    assert ages.min() == 0 and ages.max() == size - 1
    share = np.bincount(ages, minlength=size) / len(ages)
    expected = weights[:size] / weights[:size].sum()
    assert (np.abs(share - expected) < 5.5 * np.sqrt(expected / len(ages))).all()


def test_the_weights_of_a_run(monkeypatch, tmp_path):
    """max(0.1, 1 - age / 80,000) by default, for training batches; those for logging stay uniform."""
    seen, sample = [], td3.ReplayBuffer.sample
    monkeypatch.setattr(td3.ReplayBuffer, "sample", lambda *a, **k: seen.append((a[1:], k)) or sample(*a, **k))
    command = "--env-id Pendulum-v1 --method recency --total-timesteps 400 --learning-starts 390 --eval-frequency 200 "
    command += f"--eval-episodes 1 --no-cuda --buffer-size 100000 --run-dir {tmp_path / 'run'}"
    monkeypatch.setattr(sys, "argv", [td3.__file__, *command.split()])
    td3.main()
    training = [args[0] for args, _ in seen if args]
    assert len(training) == 10 and all(not args for args, options in seen if options)
    weights = np.diff(training[-1].numpy(), prepend=0.0)
    assert np.allclose(
        weights[[0, 1, 8_000, 40_000, 72_000, 72_001, 99_999]], [1, 1 - 1 / 80_000, 0.9, 0.5, 0.1, 0.1, 0.1]
    )
    assert [set(options) for args, options in seen if not args] == [{"rng"}] * 2


def test_other_methods_draw_uniformly():
    agent, buffer = make_agent(td3, method="redo")
    theirs, their_buffer = make_agent(ne)
    for _ in range(3):
        ours = buffer.sample()
        assert all(torch.equal(one, two) for one, two in zip(ours, their_buffer.sample(), strict=True))


# --- CUDA graphs ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["none", "layer-norm", "injection"])
def test_updates_read_no_values_and_stay_on_their_device(method):
    meta = torch.device("meta")
    with meta:
        agent = td3.Agent(td3.Args(method=method), 4, 2, device=meta)
        obs, obs_actions, noise, column = torch.empty(8, 4), torch.empty(8, 6), torch.empty(8, 2), torch.empty(8)
    if method == "injection":
        td3.inject(agent)
    batch = td3.Batch(obs, obs_actions, obs, column, column, noise)
    assert_updates_read_no_values(agent, batch, reads="noise")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["reset", "redo", "injection"])
def test_cuda_graphs_agree_with_eager_before_and_after_an_event(method):
    torch.cuda.set_stream(torch.cuda.Stream())
    agents = []
    for graphed in (lambda update: update, td3.CudaGraph):
        agent, buffer = make_agent(td3, method=method, device="cuda")
        update_critic, update_actor = graphed(agent.update_critic), graphed(agent.update_actor)
        for update in range(1, 101):
            batch = buffer.sample()
            update_critic(batch)
            if update % 2 == 0:
                update_actor(batch)
            if update == 50 and method == "injection":
                td3.inject(agent)
                update_critic, update_actor = graphed(agent.update_critic), graphed(agent.update_actor)
            if update == 50 and method != "injection":
                td3.reset(agent) if method == "reset" else td3.redo(agent, batch)
        agents.append(agent)
    for one, two in zip(*(values(agent) for agent in agents), strict=True):
        assert torch.allclose(one, two, atol=1e-5)
