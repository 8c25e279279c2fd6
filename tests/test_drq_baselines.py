"""The rivals of NE on DrQ-v2: what each changes in the heads, and nothing else."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import drq_dmc as drq
import ne_drq_dmc as ne
from helpers import (
    PIXELS,
    assert_equal,
    assert_moments_forgotten,
    equal,
    none_equal,
    pixel_agent,
    redone,
    silence_some,
    values,
    walk,
)

torch.set_num_threads(1)  # as the script does


def make_agent(**changes) -> tuple[drq.Agent, drq.ReplayBuffer]:
    """A small agent and a buffer with 60 random frames in episodes of 20."""
    return pixel_agent(drq, drq.Args(**PIXELS | changes))


def train(agent: drq.Agent, buffer: drq.ReplayBuffer, updates: int) -> None:
    for _ in range(updates):
        agent.update(buffer.sample())


def heads(agent: drq.Agent) -> list[nn.Sequential]:
    return [*agent.actor.heads, *agent.critic.heads]


def not_heads(agent: drq.Agent) -> list[torch.Tensor]:
    return values(agent.encoder) + values(agent.actor.trunk) + values(agent.critic.trunk)


def by_hand(head: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    for layer in head[:-1:3]:
        x = torch.relu(F.linear(x, layer.weight, layer.bias))
    return F.linear(x, head[-1].weight, head[-1].bias)


# --- none and layer-norm ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_it_is_the_ne_script_without_ne_bit_for_bit(layer_norm, bf16):
    """Weights, targets, Adam's state and batches; layers and masks have other names there."""
    ours, our_buffer = make_agent(method="layer-norm" if layer_norm else "none", bf16=bf16)
    args = ne.Args(**PIXELS, initial_density=1.0, review_floor=1.0, layer_norm=layer_norm, bf16=bf16)
    theirs, their_buffer = pixel_agent(ne, args, ne_seed=1)
    for update in range(12):
        ours.stddev.fill_(1 - 0.05 * update), theirs.stddev.fill_(1 - 0.05 * update)
        batch, same = our_buffer.sample(), their_buffer.sample()
        assert_equal([*batch], [*same])
        losses = [*theirs.update_critic(same), theirs.update_actor(same)]
        assert_equal([*ours.update(batch)], losses)
    for name, adam in ours.optimizers.items():
        ours_by_size, theirs_by_size = (
            sorted(states.values(), key=lambda state: (state["exp_avg"].numel(), state["exp_avg"].sum().item()))
            for states in (adam.state, theirs.optimizers[name].state)
        )
        assert_equal(ours_by_size, theirs_by_size)
    for part in ("encoder", "actor", "critic", "target_critic"):
        one, two = (
            sorted(values(getattr(agent, part)), key=lambda p: (p.numel(), p.sum())) for agent in (ours, theirs)
        )
        assert equal(one, two)
    for name, hidden in ours.hidden(batch).items():
        assert_equal(hidden, theirs.hidden(same)[name])


@pytest.mark.parametrize("method", ["none", "layer-norm"])
def test_layer_norm_on_the_hidden_layers_of_the_heads_and_none_on_the_output(method):
    agent, _ = make_agent(method=method)
    for head in heads(agent) + [*agent.target_critic.heads]:
        x = torch.randn(8, head[0].in_features)
        y = x
        for layer, norm in zip(head[:-1:3], head[1::3], strict=True):
            y = layer(y)
            if method == "layer-norm":
                y = F.layer_norm(y, (layer.out_features,), norm.weight, norm.bias)
            y = F.relu(y)
        assert torch.equal(head(x), head[-1](y))
        assert sum(isinstance(part, nn.LayerNorm) for part in head) == 2 * (method == "layer-norm")


# --- redo -------------------------------------------------------------------------------------------------------------
def after_redo(tau: float = 0.1):
    agent, buffer = make_agent(method="redo", redo_tau=tau)
    train(agent, buffer, 4)
    return redone(drq.redo, agent, buffer.sample(), tau)


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.6])
def test_redo_draws_incoming_weights_anew_and_zeroes_outgoing_ones(tau):
    before, after, dormant = after_redo(tau)
    for _, old, new, outputs, inputs in walk(before, after, dormant):
        assert not new.weight[:, inputs].any()  # 0 wins where a neuron is dormant at both ends
        drawn = new.weight[outputs][:, ~inputs]
        assert (drawn != old.weight[outputs][:, ~inputs]).all() and not new.bias[outputs].any()
        if not inputs.any() and new.in_features > new.out_features:  # whole rows of an orthogonal matrix
            assert torch.allclose(drawn @ drawn.T, torch.eye(len(drawn)), atol=1e-5)
        assert (drawn.norm(dim=1) <= 1 + 1e-5).all()
        kept = ~outputs[:, None] & ~inputs
        assert torch.equal(new.weight[kept], old.weight[kept]) and torch.equal(new.bias[~outputs], old.bias[~outputs])


def test_redo_forgets_the_moments_of_what_it_changed_and_no_others():
    before, after, dormant = after_redo()
    for name, _, new, outputs, inputs in walk(before, after, dormant):
        assert_moments_forgotten(after.optimizers[name], new, outputs, inputs)
    states = [after.optimizers[n].state[p] for n, part in parts(after).items() for p in part.parameters()]
    assert states and all((state["exp_avg"] == 1).all() for state in states)


def parts(agent: drq.Agent) -> dict[str, nn.Module]:
    """What no method touches."""
    return {"encoder": agent.encoder, "actor": agent.actor.trunk, "critic": agent.critic.trunk}


def test_redo_works_in_place_so_that_the_optimiser_trains_what_it_drew():
    agent, buffer = make_agent(method="redo")
    train(agent, buffer, 1)
    silence_some(agent)
    addresses = [p.data_ptr() for p in agent.parameters()]
    drq.redo(agent, buffer.sample())
    assert addresses == [p.data_ptr() for p in agent.parameters()]
    before = [values(head) for head in heads(agent)]
    train(agent, buffer, 2)
    for head, old in zip(heads(agent), before, strict=True):
        assert none_equal(values(head), old)
        outgoing = head[3].weight[:, ::3]  # 0 after ReDo; what feeds it is alive again, so it has a gradient
        assert outgoing.count_nonzero() > outgoing.numel() / 3


def test_redo_leaves_targets_encoder_and_trunks():
    before, after, _ = after_redo()
    assert equal(values(before.target_critic), values(after.target_critic))
    assert equal(not_heads(before), not_heads(after))


# --- reset ------------------------------------------------------------------------------------------------------------
def test_reset_starts_heads_their_targets_and_adam_anew_and_keeps_the_rest():
    agent, buffer = make_agent(method="reset")
    drq.reset(agent)  # also before the first update, where Adam has no state yet
    train(agent, buffer, 6)
    before, rest, target_trunk = [values(head) for head in heads(agent)], not_heads(agent), agent.target_critic.trunk
    old_target, frames = values(target_trunk), buffer.frames.clone()
    addresses = [p.data_ptr() for p in agent.parameters()]
    drq.reset(agent)
    assert addresses == [p.data_ptr() for p in agent.parameters()]
    assert equal(not_heads(agent), rest) and equal(values(target_trunk), old_target)
    assert torch.equal(buffer.frames, frames)
    for head, old in zip(heads(agent), before, strict=True):
        for layer in head[::3]:
            rows = layer.weight if layer.out_features <= layer.in_features else layer.weight.T
            assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5) and not layer.bias.any()
        assert none_equal(values(head), old)
    q1, q2 = agent.critic.heads
    assert not torch.equal(q1[0].weight, q2[0].weight)
    assert equal(values(agent.critic.heads), values(agent.target_critic.heads))
    for name, part in parts(agent).items():
        state = agent.optimizers[name].state
        assert all(x.any() for p in part.parameters() for x in state[p].values())
        cleared = [x for head in agent.mlps.get(name, []) for p in head.parameters() for x in state[p].values()]
        assert len(cleared) == {"encoder": 0, "actor": 18, "critic": 36}[name] and not any(x.any() for x in cleared)
    start = values(agent.critic.heads)
    train(agent, buffer, 2)
    assert none_equal(values(agent.critic.heads), start)


# --- injection --------------------------------------------------------------------------------------------------------
def test_injection_leaves_every_output_as_it_was():
    agent, buffer = make_agent(method="injection")
    for head, fresh in zip(agent.critic.heads, agent.critic.fresh, strict=True):  # not what the head started from
        assert none_equal([layer.weight for layer in head[::3]], [layer.weight for layer in fresh[::3]])
        assert torch.allclose(fresh[3].weight @ fresh[3].weight.T, torch.eye(32), atol=1e-5)
    train(agent, buffer, 6)
    batch, features = buffer.sample(), torch.randn(16, agent.features.shape[1])
    outputs = [
        agent.actor(features),
        agent.critic(features, batch.actions),
        agent.target_critic(features, batch.actions),
    ]
    drq.inject(agent)
    after = [agent.actor(features), agent.critic(features, batch.actions), agent.target_critic(features, batch.actions)]
    assert_equal(after, outputs)


def test_before_injection_it_is_drq_v2_bit_for_bit():
    ours, our_buffer = make_agent(method="injection")
    theirs, their_buffer = make_agent(method="none")
    train(ours, our_buffer, 10), train(theirs, their_buffer, 10)
    state = ours.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())
    assert {name.split(".")[1] for name in state.keys() - theirs.state_dict().keys()} == {"fresh", "copied"}
    for name, adam in theirs.optimizers.items():
        for p, q in zip(theirs.params[name], ours.params[name], strict=True):
            assert_equal(ours.optimizers[name].state[q], adam.state[p])


def test_after_injection_the_fresh_heads_learn_and_the_old_ones_do_not():
    agent, buffer = make_agent(method="injection")
    train(agent, buffer, 6)
    drq.inject(agent)
    critic, target, state = agent.critic, agent.target_critic, agent.optimizers["critic"].state
    frozen, start, rest = values(critic.heads) + values(critic.copied), values(critic.fresh), not_heads(agent)
    assert equal(values(target.fresh), start) and equal(values(target.copied), start)
    assert not equal(values(target.heads), values(critic.heads))  # it keeps its own, which lags
    lag = [(a - b).abs().max() for a, b in zip(critic.heads.parameters(), target.heads.parameters(), strict=True)]
    of_heads = copy.deepcopy([state[p] for p in critic.heads.parameters()])
    actor = values(agent.actor.heads)
    train(agent, buffer, 6)
    assert equal(values(critic.heads) + values(critic.copied), frozen) and equal(values(target.copied), start)
    assert none_equal(values(critic.fresh), start) and none_equal(values(target.fresh), start)
    assert none_equal(not_heads(agent), rest) and none_equal(values(agent.actor.heads), actor)
    now = [(a - b).abs().max() for a, b in zip(critic.heads.parameters(), target.heads.parameters(), strict=True)]
    assert all(0 < new < old for new, old in zip(now, lag, strict=True))  # the target's old head goes on towards it
    assert_equal([state[p] for p in critic.heads.parameters()], of_heads)  # Adam keeps what it had
    assert all(state[p]["step"] == 6 for p in critic.fresh.parameters())  # and starts anew for what is new
    assert all(state[p]["step"] == 12 for p in critic.trunk.parameters())


def test_the_encoder_gets_its_gradient_through_all_three_heads():
    """Against a loss by hand, some updates after the injection."""
    agent, buffer = make_agent(method="injection")
    train(agent, buffer, 4)
    drq.inject(agent)
    train(agent, buffer, 4)
    batch = buffer.sample()
    critic, encoder = agent.critic, [*agent.encoder.parameters()]

    def gradient(through) -> list[torch.Tensor]:
        """Of the sum of squared errors, with the value of each head as `through` puts it together from h, h1, h2."""
        h = agent.encode(batch.obs, batch.shifts[:, 0])
        x = torch.cat((critic.trunk(h), batch.actions), dim=1)
        with torch.no_grad():
            h2 = agent.encode(batch.next_obs, batch.shifts[:, 1])
            actions = agent.noisy_actions(h2, batch.noise[:, 0])
            y = torch.cat((agent.target_critic.trunk(h2), actions), dim=1)
            target = [by_hand(a, y) + by_hand(b, y) - by_hand(c, y) for a, b, c in triples(agent.target_critic)]
            target = batch.rewards + batch.discounts * torch.minimum(*target)[:, 0]
        q = [through(by_hand(a, x), by_hand(b, x), by_hand(c, x))[:, 0] for a, b, c in triples(critic)]
        return torch.autograd.grad(sum(((value - target) ** 2).mean() for value in q), encoder)

    ours = torch.autograd.grad(agent.critic_loss(batch)[0], encoder)
    whole = gradient(lambda old, fresh, copied: old + fresh - copied)
    cut = gradient(lambda old, fresh, copied: old.detach() + fresh - copied.detach())
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(ours, whole, strict=True))
    assert not any(torch.allclose(a, b, rtol=1e-1, atol=1e-6) for a, b in zip(ours, cut, strict=True))


def triples(network: drq.Network) -> zip:
    return zip(network.heads, network.fresh, network.copied, strict=True)


def test_active_ratios_after_injection_are_those_of_what_learns():
    agent, buffer = make_agent(method="injection")
    batch = buffer.sample()
    drq.inject(agent)
    features = agent.encode(batch.obs, batch.shifts[:, 0])
    x = torch.cat((agent.critic.trunk(features), batch.actions), dim=1)
    hidden = agent.hidden(batch)
    assert torch.equal(hidden["critic"][1][1], agent.critic.fresh[1][:6](x))
    assert torch.equal(hidden["actor"][0][0], agent.actor.heads[0][:3](agent.actor.trunk(features)))


# --- CUDA -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["none", "layer-norm", "injection"])
def test_updates_read_no_values_and_stay_on_their_device(method, monkeypatch):
    """What a capture needs, seen on tensors without values: reading one raises, so does a tensor from elsewhere."""
    meta, (_, buffer) = torch.device("meta"), make_agent()
    sizes = [(x.shape, x.dtype) for x in buffer.batch]
    monkeypatch.setattr(drq, "orthogonal", lambda module: None)
    with meta:
        agent = drq.Agent(drq.Args(**PIXELS, method=method), 2, device=meta)
        batch = drq.Batch(*(torch.empty(shape, dtype=dtype) for shape, dtype in sizes))
    agent.optimizers = {name: torch.optim.SGD(p) for name, p in agent.params.items()}  # torch's fused Adam has no meta
    if method == "injection":
        drq.inject(agent)
    losses = agent.update(batch)
    assert [loss.device for loss in losses] == [meta] * 3
    with pytest.raises(RuntimeError):
        losses[0].item()
    with pytest.raises(RuntimeError, match="device"):
        agent.update(batch._replace(noise=torch.zeros(16, 2, 2, device="cpu")))


@pytest.mark.parametrize("method", ["none", "reset", "redo"])
def test_what_a_graph_reads_and_writes_stays_where_it_is(method):
    agent, buffer = make_agent(method=method)
    train(agent, buffer, 1)

    def addresses() -> list[int]:
        moments = [t for adam in agent.optimizers.values() for state in adam.state.values() for t in state.values()]
        return [t.data_ptr() for t in (*agent.state_dict().values(), *moments, *buffer.batch, agent.features)]

    before = addresses()
    {"none": lambda: None, "reset": lambda: drq.reset(agent), "redo": lambda: drq.redo(agent, buffer.sample())}[
        method
    ]()
    agent.stddev.fill_(0.5)
    train(agent, buffer, 2)
    assert addresses() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["reset", "redo", "injection"])
def test_cuda_graphs_agree_with_eager_before_and_after_an_event(method):
    torch.cuda.set_stream(torch.cuda.Stream())
    agents = []
    for graphed in (lambda update: update, drq.CudaGraph):
        agent, buffer = pixel_agent(drq, drq.Args(**PIXELS, method=method), device="cuda")
        update = graphed(agent.update)
        for number in range(1, 31):
            batch = buffer.sample()
            update(batch)
            if number == 15 and method == "redo":
                drq.redo(agent, batch)
            elif number == 15:
                {"reset": drq.reset, "injection": drq.inject}[method](agent)
                update = graphed(agent.update)
        agents.append(agent)
    for one, two in zip(*(values(agent) for agent in agents), strict=True):
        assert torch.allclose(one, two, atol=1e-4)
