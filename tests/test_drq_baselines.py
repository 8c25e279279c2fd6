"""The rivals of NE on DrQ-v2: what each changes in the heads, and nothing else."""

import copy

import pytest
import torch
import torch.nn as nn

import baselines.drq_dmc as drq
import ne_drq_dmc as ne
import pixels
import utils_topology as topology
from helpers import (
    assert_moments_forgotten,
    equal,
    fill_moments,
    inputs_and_outputs,
    none_equal,
    values,
)
from pixels import adam_of, assert_captures, assert_reads_no_values, heads, silence_some, train


def make_agent(**changes) -> tuple[drq.Agent, ne.ReplayBuffer]:
    return pixels.make_agent(drq, **changes)


def not_heads(agent: drq.Agent) -> nn.ModuleList:
    """What no method touches."""
    return nn.ModuleList([agent.encoder, agent.actor.trunk, agent.critic.trunk])


def assert_orthogonal(weight: torch.Tensor) -> None:
    rows = weight if len(weight) <= weight.shape[1] else weight.T
    assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)


# --- none and layer-norm ------------------------------------------------------


# --- redo ---------------------------------------------------------------------
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.6])
def test_redo_draws_what_enters_dormant_neurons_and_zeroes_what_leaves_them(tau):
    """Moments of what changed are 0, all else stays, and all stays in its place."""
    agent, buffer = make_agent(method="redo", redo_tau=tau)
    train(agent, buffer, 4)
    silence_some(agent)
    fill_moments(*agent.optimizers)
    batch = buffer.sample(16)
    hidden = agent.hidden(batch)
    before = copy.deepcopy(agent)
    places = [p.data_ptr() for p in agent.parameters()]
    drq.redo(agent, batch)
    assert places == [p.data_ptr() for p in agent.parameters()]
    assert equal(values(before.target_critic), values(agent.target_critic))
    assert equal(values(not_heads(before)), values(not_heads(agent)))
    for state in adam_of(agent, not_heads(agent)):
        assert (state["exp_avg"] == 1).all()
    weak = 0  # with tau > 0, more than those silenced
    for name, network in agent.networks.items():
        old_mlps = before.networks[name].mlps
        for old_mlp, mlp, of_mlp in zip(old_mlps, network.mlps, hidden[name], strict=True):
            dormant = [topology.dormancy_scores(h) <= tau for h in of_mlp]
            for which in dormant:
                assert which[::3].all() and not which.all()
                weak += int(which.sum()) - len(which[::3])
            ends = inputs_and_outputs(mlp.layers, dormant)
            for old, new, (inputs, outputs) in zip(old_mlp.layers, mlp.layers, ends, strict=True):
                assert not new.weight[:, inputs].any()  # 0 wins where both ends are dormant
                drawn = new.weight[outputs][:, ~inputs]
                assert (drawn != old.weight[outputs][:, ~inputs]).all()
                assert not new.bias[outputs].any()
                if not inputs.any() and new.in_features > new.out_features:
                    assert_orthogonal(drawn)
                kept = ~outputs[:, None] & ~inputs
                assert torch.equal(new.weight[kept], old.weight[kept])
                assert torch.equal(new.bias[~outputs], old.bias[~outputs])
                assert_moments_forgotten(network.optimizer, new, inputs, outputs)
    assert (weak > 20) == (tau > 0.5)
    # the optimiser trains what was drawn
    start = [values(head) for head in heads(agent)]
    train(agent, buffer, 2)
    for head, old in zip(heads(agent), start, strict=True):
        assert none_equal(values(head), old)


# --- reset --------------------------------------------------------------------
def test_reset_starts_heads_their_targets_and_adam_anew_and_keeps_the_rest():
    agent, buffer = make_agent(method="reset")
    train(agent, buffer, 6)
    before = values(nn.ModuleList(heads(agent)))
    rest = values(not_heads(agent)) + values(agent.target_critic.trunk)
    drq.reset(agent)
    assert equal(values(not_heads(agent)) + values(agent.target_critic.trunk), rest)
    assert none_equal(values(nn.ModuleList(heads(agent))), before)
    for head in heads(agent):
        for layer in head.layers:
            assert_orthogonal(layer.weight)
            assert not layer.bias.any()
        for state in adam_of(agent, head):
            assert not any(value.any() for value in state.values())
    one, two = agent.critic.heads
    assert not torch.equal(one.layers[0].weight, two.layers[0].weight)
    assert equal(values(agent.critic.heads), values(agent.target_critic.heads))
    for state in adam_of(agent, not_heads(agent)):
        assert all(value.any() for value in state.values())


# --- injection ----------------------------------------------------------------
def test_injection_leaves_every_output_as_it_was():
    """And what the encoder learns from it: the gradient passes all three heads."""
    agent, buffer = make_agent(method="injection")
    train(agent, buffer, 6)
    old = [values(head.layers) for head in agent.critic.heads]
    batch = buffer.sample(16)
    actions = batch.actions
    features = torch.randn(16, agent.encoder.n_features)
    gradients = agent.critic_gradients(batch)[3]

    def outputs() -> list[torch.Tensor]:
        q = [*agent.critic(features, actions), *agent.target_critic(features, actions)]
        return [agent.actor(features), *q]

    before = outputs()
    drq.inject(agent)
    assert equal(outputs(), before)
    for now, then in zip(agent.critic_gradients(batch)[3], gradients, strict=True):
        assert torch.allclose(now, then, atol=1e-3 * then.abs().max())
    for head, values_before in zip(agent.critic.heads, old, strict=True):
        assert equal(values(head.frozen), values_before)
        assert_orthogonal(head.layers[1].weight)
        assert not torch.allclose(head.layers[1].weight, head.frozen[1].weight, atol=1e-2)


def of_each(critic: drq.Critic, name: str) -> list[torch.Tensor]:
    return [p for head in critic.heads for p in values(getattr(head, name))]


def test_after_injection_the_fresh_heads_learn_and_the_old_ones_do_not():
    agent, buffer = make_agent(method="injection")
    train(agent, buffer, 6)
    drq.inject(agent)
    critic, target = agent.critic, agent.target_critic
    frozen = of_each(critic, "frozen") + of_each(critic, "copied")
    start = of_each(critic, "layers")
    rest = values(not_heads(agent)) + values(agent.actor.heads)
    before = of_each(target, "frozen")
    assert equal(of_each(target, "layers"), start)
    assert equal(of_each(target, "copied"), start)
    train(agent, buffer, 6)
    assert equal(of_each(critic, "frozen") + of_each(critic, "copied"), frozen)
    assert equal(of_each(target, "copied"), start)
    assert none_equal(of_each(critic, "layers"), start)
    assert none_equal(of_each(target, "layers"), start)
    assert none_equal(values(not_heads(agent)) + values(agent.actor.heads), rest)
    # the target's old head goes on towards the critic's
    now = of_each(target, "frozen")
    for p, then, later in zip(of_each(critic, "frozen"), before, now, strict=True):
        assert 0 < (p - later).abs().max() < (p - then).abs().max()
    # Adam starts anew for what is new and goes on for the rest
    assert all(state["step"] == 6 for head in critic.heads for state in adam_of(agent, head.layers))
    assert all(state["step"] == 12 for state in adam_of(agent, critic.trunk))


# --- CUDA ---------------------------------------------------------------------
METHODS = {"none": None, "reset": drq.reset, "redo": None, "injection": drq.inject}


@pytest.mark.parametrize("method", METHODS)
def test_updates_can_be_captured(method, monkeypatch):
    agent, buffer = make_agent(method=method)

    def between():
        if method == "redo":
            drq.redo(agent, buffer.sample(16))
        elif METHODS[method]:
            METHODS[method](agent)

    assert_captures(agent, buffer, between)
    assert_reads_no_values(monkeypatch, drq, method=method)
