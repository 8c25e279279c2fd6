"""The rivals of NE on TD3: what each changes, and nothing else."""

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from baselines import td3_continuous as td3
from helpers import (
    assert_equal,
    assert_started_anew,
    assert_updates_read_no_values,
    equal,
    fill_moments,
    make_agent,
    mlps_of,
    none_equal,
    run_here,
    silence_some,
    train,
    values,
)

CPU = torch.device("cpu")


def networks(agent) -> list[td3.MLP]:
    return [agent.actor, agent.critic_1, agent.critic_2]


def targets(agent) -> list[td3.MLP]:
    return [agent.target_actor, agent.target_critic_1, agent.target_critic_2]


def learning(mlp: td3.MLP) -> list[torch.Tensor]:
    """Copies of the weights and biases of the layers that learn."""
    return values(mlp.layers)


def adam_states(agent) -> list[dict]:
    return [state for optimizer in agent.optimizers for state in optimizer.state.values()]


# --- none, layer-norm ---------------------------------------------------------


# --- redo, regrama ------------------------------------------------------------
def chosen_neurons(method: str, agent, mlp: td3.MLP, batch, tau: float) -> list[torch.Tensor]:
    """Boolean (n,) of each hidden layer, computed by hand."""
    hidden = mlp.hidden(batch)
    if method == "regrama":
        hidden = gradients_by_hand(agent, mlp, batch)
    sizes = [h.abs().mean(dim=0) for h in hidden]
    return [size / size.mean() <= tau for size in sizes]


@torch.no_grad()
def gradients_by_hand(agent, mlp: td3.MLP, batch) -> list[torch.Tensor]:
    """Backpropagation to what enters each ReLU, [(B, n), ...]; every transition is an end."""
    if mlp is agent.actor:
        actions = agent.actor(batch.obs)
        inputs = torch.cat((batch.obs, actions), dim=1)
        slope = torch.full((len(actions), 1), -1 / len(actions))  # of minus the mean Q1
        first = backwards(agent.critic_1, agent.critic_1.activations(inputs), slope)[0]
        to_inputs = first @ agent.critic_1.layers[0].weight
        to_actions = to_inputs[:, batch.obs.shape[1] :]
        slope = to_actions * (1 - actions**2)
        return backwards(mlp, mlp.activations(batch.obs), slope)
    error = mlp(batch.obs_actions) - batch.rewards
    slope = 2 * error[:, None] / len(error)  # of the mean squared error
    return backwards(mlp, mlp.activations(batch.obs_actions), slope)


def backwards(mlp: td3.MLP, hidden: list[torch.Tensor], slope: torch.Tensor):
    gradients = []
    for layer, h in zip(reversed(mlp.layers[1:]), reversed(hidden), strict=True):
        slope = (slope @ layer.weight) * (h > 0)
        gradients.insert(0, slope)
    return gradients


def ends_only(buffer):
    """A batch in which every transition is an end: the critics' target is the reward."""
    batch = buffer.sample(64)
    batch.terminated.fill_(1.0)
    return batch


@pytest.mark.parametrize("method", ["redo", "regrama"])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.6])
def test_chosen_neurons_start_anew_in_place_and_nothing_else_changes(method, tau):
    agent, buffer = make_agent(td3, method=method, redo_tau=tau, regrama_tau=tau)
    train(agent, buffer, 10)
    batch = ends_only(buffer)
    silence_some(agent)
    fill_moments(*agent.optimizers)
    before = copy.deepcopy(agent)
    addresses = [p.data_ptr() for p in agent.parameters()]
    states = [torch.get_rng_state(), buffer.rng.get_state()]
    getattr(td3, method)(agent, batch)
    assert addresses == [p.data_ptr() for p in agent.parameters()]
    assert equal(states, [torch.get_rng_state(), buffer.rng.get_state()])
    for name, network in agent.networks.items():
        for old, new in zip(mlps_of(before)[name], network.mlps, strict=True):
            chosen = chosen_neurons(method, before, old, batch, tau)
            assert all(which[::3].all() and not which.all() for which in chosen)
            assert_started_anew(old, new, chosen, network.optimizer)
    for old, new in zip(targets(before), targets(agent), strict=True):
        assert equal(values(old), values(new))
    anew = [values(mlp) for mlp in networks(agent)]
    train(agent, buffer, 2)
    for mlp, old in zip(networks(agent), anew, strict=True):
        assert none_equal(values(mlp), old)
        # 0 before; what feeds it is alive again, so it has a gradient
        assert mlp.layers[1].weight[:, ::3].any()


# --- reset --------------------------------------------------------------------
def test_reset_starts_networks_targets_and_adam_anew_and_keeps_the_buffer():
    agent, buffer = make_agent(td3, method="reset")
    train(agent, buffer, 20)
    buffer_before = copy.deepcopy(buffer.state_dict())
    before = values(agent)
    addresses = [p.data_ptr() for p in agent.parameters()]
    td3.reset(agent)
    assert_equal(buffer.state_dict(), buffer_before)
    assert addresses == [p.data_ptr() for p in agent.parameters()]
    assert none_equal(values(agent), before)
    for mlp, target in zip(networks(agent), targets(agent), strict=True):
        assert equal(values(mlp), values(target))
        for layer in mlp.layers:
            limit = layer.in_features**-0.5
            assert limit / 2 < layer.weight.abs().max() <= limit
            assert (layer.bias.abs() <= limit).all()
    assert none_equal(values(agent.critic_1), values(agent.critic_2))
    for state in adam_states(agent):
        assert not any(value.any() for value in state.values())
    start = values(agent.actor)
    train(agent, buffer, 2)
    assert none_equal(values(agent.actor), start)


# --- injection ----------------------------------------------------------------
def outputs(agent, batch) -> list[torch.Tensor]:
    return [
        agent.actor(batch.obs),
        agent.target_actor(batch.obs),
        agent.critic_1(batch.obs_actions),
        agent.critic_2(batch.obs_actions),
        agent.target_critic_1(batch.obs_actions),
        agent.target_critic_2(batch.obs_actions),
    ]


def test_injection_leaves_every_output_and_then_only_the_fresh_networks_learn():
    agent, buffer = make_agent(td3, method="injection")
    train(agent, buffer, 20)
    batch = buffer.sample(64)
    before = outputs(agent, batch)
    theta = [learning(mlp) for mlp in networks(agent) + targets(agent)]
    td3.inject(agent)
    assert equal(outputs(agent, batch), before)
    for mlp, old in zip(networks(agent) + targets(agent), theta, strict=True):
        assert equal(values(mlp.frozen), old)
        assert none_equal(learning(mlp), old)  # new weights
        assert equal(learning(mlp), values(mlp.copied))
    start = copy.deepcopy(agent)
    for state in adam_states(agent):
        assert not any(value.any() for value in state.values())
    train(agent, buffer, 20)
    for mlp, old in zip(networks(agent), networks(start), strict=True):
        assert equal(values(mlp.frozen), values(old.frozen))
        assert equal(values(mlp.copied), values(old.copied))
        assert none_equal(learning(mlp), learning(old))
    # a target's theta goes on towards the frozen one, its theta_1 follows, theta_2 is the same
    for mlp, target, old in zip(networks(agent), targets(agent), targets(start), strict=True):
        for p, now, then in zip(*map(values, (mlp.frozen, target.frozen, old.frozen)), strict=True):
            assert 0 < (p - now).abs().max() < (p - then).abs().max()
        assert none_equal(learning(target), learning(old))
        assert none_equal(learning(target), learning(mlp))
        assert equal(values(mlp.copied), values(target.copied))
    for name, network in agent.networks.items():
        taken = 10 if name == "actor" else 20
        trained = {id(p) for p in network.optimizer.param_groups[0]["params"]}
        fresh = {id(p) for mlp in network.mlps for p in mlp.layers.parameters()}
        assert trained == fresh
        assert all(state["step"] == taken for state in network.optimizer.state.values())


def test_the_injected_actor_adds_before_the_tanh():
    agent, buffer = make_agent(td3, method="injection")
    td3.inject(agent)
    train(agent, buffer, 20)
    obs = buffer.sample(64).obs

    def by_hand(layers: nn.ModuleList) -> torch.Tensor:
        x = obs
        for layer in layers[:-1]:
            x = F.relu(F.linear(x, layer.weight, layer.bias))
        return F.linear(x, layers[-1].weight, layers[-1].bias)

    for actor in (agent.actor, agent.target_actor):
        theta = by_hand(actor.frozen)
        expected = torch.tanh(theta + by_hand(actor.layers) - by_hand(actor.copied))
        assert torch.allclose(actor(obs), expected, atol=1e-6)
        assert not torch.allclose(actor(obs), torch.tanh(theta), atol=1e-6)
    assert not torch.allclose(agent.actor(obs), agent.target_actor(obs), atol=1e-6)


# --- recency ------------------------------------------------------------------
@pytest.mark.parametrize(("capacity", "added"), [(1000, 400), (300, 300), (300, 740)])
def test_rows_are_drawn_by_their_age(capacity, added):
    """Also when the ring is full and has wrapped. A row's observation is when it was added."""
    buffer = td3.ReplayBuffer(capacity, 1, 1, 0, CPU)
    for step in range(added):
        buffer.add(np.float32([step]), np.float32([0]), np.float32([0]), 0.0, False)
    weights = np.maximum(0.1, 1 - np.arange(capacity) / 200)
    batch = td3.sample_recent(buffer, 100_000, torch.from_numpy(weights).cumsum(0))
    ages = added - 1 - batch.obs[:, 0].numpy().astype(int)
    size = min(added, capacity)
    assert ages.min() == 0
    assert ages.max() == size - 1
    share = np.bincount(ages, minlength=size) / len(ages)
    expected = weights[:size] / weights[:size].sum()
    assert (np.abs(share - expected) < 5.5 * np.sqrt(expected / len(ages))).all()
    assert abs(float(batch.noise.mean())) < 0.02
    assert abs(float(batch.noise.std()) - 1) < 0.02


def test_the_weights_of_ages():
    """max(0.1, 1 - age / 80,000) by default."""
    args = td3.Args(method="recency", buffer_size=100_000)
    weights = np.diff(td3.recency_weights(args, CPU).numpy(), prepend=0.0)
    ages = [0, 1, 8_000, 40_000, 72_000, 72_001, 99_999]
    assert np.allclose(weights[ages], [1, 1 - 1 / 80_000, 0.9, 0.5, 0.1, 0.1, 0.1])


def test_training_batches_are_recent_and_those_for_logging_uniform(monkeypatch, tmp_path):
    drawn = []
    sample_recent = td3.sample_recent
    uniform = td3.ReplayBuffer.sample

    def noted_recent(*args):
        drawn.append("recent")
        return sample_recent(*args)

    def noted_uniform(*args, **options):
        drawn.append("uniform")
        return uniform(*args, **options)

    monkeypatch.setattr(td3, "sample_recent", noted_recent)
    monkeypatch.setattr(td3.ReplayBuffer, "sample", noted_uniform)
    flags = (
        "--env-id fake_task:Plain-v0 --method recency --total-timesteps 400 --learning-starts 390 "
        "--eval-frequency 200 --eval-episodes 1 --no-cuda --buffer-size 1000"
    )
    assert run_here(f"{flags} --run-dir {tmp_path / 'run'}", td3) == 0
    assert drawn.count("recent") == 10
    assert drawn.count("uniform") == 2  # two rows


# --- CUDA graphs --------------------------------------------------------------
@pytest.mark.parametrize("method", ["none", "layer-norm", "injection"])
def test_updates_read_no_values_and_stay_on_their_device(method):
    meta = torch.device("meta")
    batch = td3.Batch(*[part.to(meta) for part in make_agent(td3)[1].sample(8)])
    with meta:
        agent = td3.Agent(td3.Args(method=method), 4, 2, 1, device=meta)
    for mlp in networks(agent) + targets(agent):
        mlp.injected = method == "injection"
    assert_updates_read_no_values(agent, batch, reads="noise")
