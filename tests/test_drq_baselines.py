"""The rivals of NE on DrQ-v2: what each changes in the heads, and nothing else."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import baselines.drq_dmc as drq
import ne_drq_dmc as ne
import pixels
import utils_topology as topology
from helpers import assert_equal, assert_moments_forgotten, equal, none_equal, values
from pixels import heads, sample, silence_some, train

torch.set_num_threads(1)  # as the script does


def make_agent(**changes) -> tuple[drq.Agent, ne.ReplayBuffer]:
    return pixels.make_agent(drq, **changes)


def all_heads(agent: drq.Agent) -> list[drq.Head]:
    return [*agent.actor.heads, *agent.critic.heads]


def not_heads(agent: drq.Agent) -> list[torch.Tensor]:
    return values(agent.encoder) + values(agent.actor.trunk) + values(agent.critic.trunk)


def parts(agent: drq.Agent) -> dict[str, nn.Module]:
    """What no method touches."""
    return {"encoder": agent.encoder, "actor": agent.actor.trunk, "critic": agent.critic.trunk}


def states(optimizer: torch.optim.Adam, module: nn.Module) -> list[dict]:
    return [optimizer.state[p] for p in module.parameters()]


# --- none and layer-norm ------------------------------------------------------
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_it_is_the_ne_script_without_ne_bit_for_bit(layer_norm, bf16):
    """Weights, targets, Adam's state and losses."""
    ours, our_buffer = make_agent(method="layer-norm" if layer_norm else "none", bf16=bf16)
    without_ne = {"initial_density": 1.0, "review_floor": 1.0, "layer_norm": layer_norm}
    theirs, their_buffer = pixels.make_agent(ne, **without_ne, bf16=bf16)
    for update in range(12):
        batch = sample(our_buffer)
        same = sample(their_buffer)
        assert equal([*batch], [*same])
        for agent in (ours, theirs):
            agent.stddev.fill_(1 - 0.05 * update)
        assert_equal(ours.update(batch), theirs.update(same))
    for part in ("encoder", "actor", "critic", "target_critic"):
        assert equal(values(getattr(ours, part)), values(getattr(theirs, part)))
    for name, optimizer in pixels.optimizers(theirs).items():
        module = getattr(ours, name)
        ours_of_it = states(ours.optimizers[name], module)
        assert_equal(ours_of_it, states(optimizer, getattr(theirs, name)))
        assert len(ours_of_it) >= 8
    assert_equal(ours.hidden(batch), theirs.hidden(same))


@pytest.mark.parametrize("method", ["none", "layer-norm"])
def test_layer_norm_on_the_hidden_layers_of_the_heads_and_none_on_the_output(method):
    agent, _ = make_agent(method=method)
    for head in [*all_heads(agent), *agent.target_critic.heads]:
        x = torch.randn(8, head.layers[0].in_features)
        y = x
        for layer, norm in zip(head.layers[:-1], head.norms, strict=True):
            y = layer(y)
            if method == "layer-norm":
                y = F.layer_norm(y, (layer.out_features,), norm.weight, norm.bias)
            y = F.relu(y)
        assert torch.equal(head(x), head.layers[-1](y))
        norms = [part for part in head.modules() if isinstance(part, nn.LayerNorm)]
        assert len(norms) == (2 if method == "layer-norm" else 0)


def test_a_copy_of_an_agent_trains_itself_and_its_targets():
    agent, buffer = make_agent()
    twin = copy.deepcopy(agent)
    original = values(agent)
    batch = sample(buffer)
    twin.update(batch)
    assert equal(values(agent), original)
    agent.update(batch)
    assert equal(values(agent), values(twin))


# --- redo ---------------------------------------------------------------------
def after_redo(tau: float):
    """An agent before and after, and which neurons were dormant, by network and head.

    Adam's moments are 1 and 2 everywhere before.
    """
    agent, buffer = make_agent(method="redo", redo_tau=tau)
    train(agent, buffer, 4)
    silence_some(agent)
    for optimizer in agent.optimizers.values():
        for state in optimizer.state.values():
            state["exp_avg"].fill_(1.0)
            state["exp_avg_sq"].fill_(2.0)
    batch = sample(buffer)
    dormant = {}
    weak = 0  # with tau > 0, more than those silenced
    for name, of_heads in agent.hidden(batch).items():
        dormant[name] = []
        for hidden in of_heads:
            which = [topology.dormancy_scores(h) <= tau for h in hidden]
            dormant[name].append(which)
            for layer in which:
                assert layer[::3].all() and not layer.all()
                weak += int(layer.sum()) - len(layer[::3])
    assert (weak > 20) == (tau > 0.5)
    before = copy.deepcopy(agent)
    drq.redo(agent, batch)
    return before, agent, dormant


def walk(before: drq.Agent, after: drq.Agent, dormant: dict):
    """Yields (network, old layer, layer, dormant outputs (out,), dormant inputs (in,))."""
    for name in dormant:
        old_heads = heads(before)[name]
        new_heads = heads(after)[name]
        for old, new, which in zip(old_heads, new_heads, dormant[name], strict=True):
            outputs = [*which, torch.zeros(new.layers[-1].out_features, dtype=torch.bool)]
            inputs = [torch.zeros(new.layers[0].in_features, dtype=torch.bool), *which]
            for layers in zip(old.layers, new.layers, outputs, inputs, strict=True):
                yield name, *layers


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.6])
def test_redo_draws_incoming_weights_anew_and_zeroes_outgoing_ones(tau):
    for _, old, new, outputs, inputs in walk(*after_redo(tau)):
        assert not new.weight[:, inputs].any()  # 0 wins where a neuron is dormant at both ends
        drawn = new.weight[outputs][:, ~inputs]
        assert (drawn != old.weight[outputs][:, ~inputs]).all()
        assert not new.bias[outputs].any()
        if not inputs.any() and new.in_features > new.out_features:  # whole orthogonal rows
            assert torch.allclose(drawn @ drawn.T, torch.eye(len(drawn)), atol=1e-5)
        assert (drawn.norm(dim=1) <= 1 + 1e-5).all()
        kept = ~outputs[:, None] & ~inputs
        assert torch.equal(new.weight[kept], old.weight[kept])
        assert torch.equal(new.bias[~outputs], old.bias[~outputs])


def test_redo_forgets_the_moments_of_what_it_changed_and_no_others():
    before, after, dormant = after_redo(0.1)
    for name, _, new, outputs, inputs in walk(before, after, dormant):
        assert_moments_forgotten(after.optimizers[name], new, outputs, inputs)
    for name, part in parts(after).items():
        for state in states(after.optimizers[name], part):
            assert (state["exp_avg"] == 1).all()


def test_redo_works_in_place_so_that_the_optimiser_trains_what_it_drew():
    agent, buffer = make_agent(method="redo")
    train(agent, buffer, 1)
    silence_some(agent)
    addresses = [p.data_ptr() for p in agent.parameters()]
    drq.redo(agent, sample(buffer))
    assert addresses == [p.data_ptr() for p in agent.parameters()]
    before = [values(head) for head in all_heads(agent)]
    train(agent, buffer, 2)
    for head, old in zip(all_heads(agent), before, strict=True):
        assert none_equal(values(head), old)
        # 0 after ReDo; what feeds it is alive again, so it has a gradient
        outgoing = head.layers[1].weight[:, ::3]
        assert outgoing.count_nonzero() > outgoing.numel() / 3


def test_redo_leaves_targets_encoder_and_trunks():
    before, after, _ = after_redo(0.1)
    assert equal(values(before.target_critic), values(after.target_critic))
    assert equal(not_heads(before), not_heads(after))


# --- reset --------------------------------------------------------------------
def test_reset_starts_heads_their_targets_and_adam_anew_and_keeps_the_rest():
    agent, buffer = make_agent(method="reset")
    drq.reset(agent)  # also before the first update
    train(agent, buffer, 6)
    before = [values(head) for head in all_heads(agent)]
    rest = not_heads(agent)
    target_trunk = values(agent.target_critic.trunk)
    addresses = [p.data_ptr() for p in agent.parameters()]
    drq.reset(agent)
    assert addresses == [p.data_ptr() for p in agent.parameters()]
    assert equal(not_heads(agent), rest)
    assert equal(values(agent.target_critic.trunk), target_trunk)
    for head, old in zip(all_heads(agent), before, strict=True):
        for layer in head.layers:
            wide = layer.out_features <= layer.in_features
            rows = layer.weight if wide else layer.weight.T
            assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)
            assert not layer.bias.any()
        assert none_equal(values(head), old)
    one, two = agent.critic.heads
    assert not torch.equal(one.layers[0].weight, two.layers[0].weight)
    assert equal(values(agent.critic.heads), values(agent.target_critic.heads))
    for name, part in parts(agent).items():
        for state in states(agent.optimizers[name], part):
            assert all(value.any() for value in state.values())
    for name, of_heads in heads(agent).items():
        for head in of_heads:
            for state in states(agent.optimizers[name], head):
                assert not any(value.any() for value in state.values())
    start = values(agent.critic.heads)
    train(agent, buffer, 2)
    assert none_equal(values(agent.critic.heads), start)


# --- injection ----------------------------------------------------------------
def test_injection_leaves_every_output_as_it_was():
    agent, buffer = make_agent(method="injection")
    train(agent, buffer, 6)
    old = [values(head.layers) for head in agent.critic.heads]
    actions = sample(buffer).actions
    features = torch.randn(16, agent.encoder.n_features)

    def outputs() -> list[torch.Tensor]:
        q = [*agent.critic(features, actions), *agent.target_critic(features, actions)]
        return [agent.actor(features), *q]

    before = outputs()
    drq.inject(agent)
    assert equal(outputs(), before)
    for head, values_before in zip(agent.critic.heads, old, strict=True):
        assert equal(values(head.frozen), values_before)
        weight = head.layers[1].weight
        assert torch.allclose(weight @ weight.T, torch.eye(32), atol=1e-5)
        assert not torch.allclose(weight, head.frozen[1].weight, atol=1e-2)


def test_before_injection_it_is_drq_v2_bit_for_bit():
    ours, our_buffer = make_agent(method="injection")
    theirs, their_buffer = make_agent(method="none")
    train(ours, our_buffer, 10)
    train(theirs, their_buffer, 10)
    state = ours.state_dict()
    for name, value in theirs.state_dict().items():
        assert_equal(state.pop(name), value)
    assert {name.split(".")[3] for name in state} == {"frozen", "copied"}
    for name, optimizer in theirs.optimizers.items():
        for p, q in zip(theirs.params[name], ours.params[name], strict=True):
            assert_equal(ours.optimizers[name].state[q], optimizer.state[p])


def lags(agent: drq.Agent) -> list[float]:
    """How far the targets' old heads are from the critic's."""
    found = []
    for head, target in zip(agent.critic.heads, agent.target_critic.heads, strict=True):
        for p, q in zip(head.frozen.parameters(), target.frozen.parameters(), strict=True):
            found.append((p - q).abs().max().item())
    return found


def of_each(critic: drq.Critic, name: str) -> list[torch.Tensor]:
    found = []
    for head in critic.heads:
        found += values(getattr(head, name))
    return found


def test_after_injection_the_fresh_heads_learn_and_the_old_ones_do_not():
    agent, buffer = make_agent(method="injection")
    train(agent, buffer, 6)
    drq.inject(agent)
    critic = agent.critic
    target = agent.target_critic
    frozen = of_each(critic, "frozen") + of_each(critic, "copied")
    start = of_each(critic, "layers")
    rest = not_heads(agent)
    actor = values(agent.actor.heads)
    lag = lags(agent)
    assert equal(of_each(target, "layers"), start)
    assert equal(of_each(target, "copied"), start)
    train(agent, buffer, 6)
    assert equal(of_each(critic, "frozen") + of_each(critic, "copied"), frozen)
    assert equal(of_each(target, "copied"), start)
    assert none_equal(of_each(critic, "layers"), start)
    assert none_equal(of_each(target, "layers"), start)
    assert none_equal(not_heads(agent), rest)
    assert none_equal(values(agent.actor.heads), actor)
    # the target's old head goes on towards the critic's
    for now, before in zip(lags(agent), lag, strict=True):
        assert 0 < now < before
    # Adam starts anew for what is new and goes on for the rest
    optimizer = agent.optimizers["critic"]
    for head in critic.heads:
        assert all(state["step"] == 6 for state in states(optimizer, head.layers))
    assert all(state["step"] == 12 for state in states(optimizer, critic.trunk))


def by_hand(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for layer in layers[:-1]:
        x = torch.relu(F.linear(x, layer.weight, layer.bias))
    return F.linear(x, layers[-1].weight, layers[-1].bias)[:, 0]


def test_the_encoder_gets_its_gradient_through_all_three_heads():
    """Against a loss by hand, some updates after the injection."""
    agent, buffer = make_agent(method="injection")
    train(agent, buffer, 4)
    drq.inject(agent)
    train(agent, buffer, 4)
    batch = sample(buffer)
    encoder = list(agent.encoder.parameters())

    def gradient(through) -> tuple[torch.Tensor, ...]:
        """With the value of each head as `through` puts it together from h, h_1, h_2."""
        h = agent.encoder.augmented(batch.obs, batch.shifts[:, 0])
        x = torch.cat((agent.critic.trunk(h), batch.actions), dim=1)
        with torch.no_grad():
            next_h = agent.encoder.augmented(batch.next_obs, batch.shifts[:, 1])
            next_actions = agent.noisy_actions(next_h, batch.noise[:, 0])
            next_x = torch.cat((agent.target_critic.trunk(next_h), next_actions), dim=1)
            next_q = []
            for t in agent.target_critic.heads:
                fresh = by_hand(t.layers, next_x) - by_hand(t.copied, next_x)
                next_q.append(by_hand(t.frozen, next_x) + fresh)
            y = batch.rewards + batch.discounts * torch.minimum(*next_q)
        loss = 0.0
        for head in agent.critic.heads:
            old, fresh, copied = head.frozen, head.layers, head.copied
            q = through(by_hand(old, x), by_hand(fresh, x), by_hand(copied, x))
            loss = loss + ((q - y) ** 2).mean()
        return torch.autograd.grad(loss, encoder)

    ours = agent.critic_gradients(batch)[3]
    whole = gradient(lambda old, fresh, copied: old + fresh - copied)
    cut = gradient(lambda old, fresh, copied: old.detach() + fresh - copied.detach())
    for a, b, c in zip(ours, whole, cut, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)
        assert not torch.allclose(a, c, rtol=1e-1, atol=1e-6)


def test_active_ratios_after_injection_are_those_of_what_learns():
    agent, buffer = make_agent(method="injection")
    batch = sample(buffer)
    drq.inject(agent)
    features = agent.encoder.augmented(batch.obs, batch.shifts[:, 0])
    x = torch.cat((agent.critic.trunk(features), batch.actions), dim=1)
    hidden = agent.hidden(batch)
    fresh = agent.critic.heads[1].layers
    first = F.relu(fresh[0](x))
    assert torch.equal(hidden["critic"][1][0], first)
    assert torch.equal(hidden["critic"][1][1], F.relu(fresh[1](first)))


# --- CUDA ---------------------------------------------------------------------
@pytest.mark.parametrize("method", ["none", "layer-norm", "injection"])
def test_updates_read_no_values_and_stay_on_their_device(method, monkeypatch):
    """What a capture needs, seen on tensors without values: reading one raises."""
    agent, buffer = make_agent(method=method)
    shapes = [(x.shape, x.dtype) for x in sample(buffer)]
    monkeypatch.setattr(drq, "orthogonal", lambda module: None)
    monkeypatch.setattr(drq, "draw", lambda layer, rng: layer.weight.clone())
    with torch.device("meta"):
        agent = drq.Agent(agent.args, 2, 1, device=torch.device("meta"))
        batch = ne.Batch(*[torch.empty(shape, dtype=dtype) for shape, dtype in shapes])
    if method == "injection":
        drq.inject(agent)
    losses = list(agent.update(batch).values())
    assert [loss.device.type for loss in losses] == ["meta"] * 3
    with pytest.raises(RuntimeError):
        losses[0].item()
    with pytest.raises(RuntimeError, match="device"):
        agent.update(batch._replace(noise=torch.zeros(16, 2, 2, device="cpu")))


@pytest.mark.parametrize("method", ["none", "reset", "redo", "injection"])
def test_what_a_graph_reads_and_writes_stays_where_it_is(method):
    agent, buffer = make_agent(method=method)
    train(agent, buffer, 1)
    batch = sample(buffer)
    before = pixels.addresses(agent, batch)
    if method == "reset":
        drq.reset(agent)
    elif method == "redo":
        drq.redo(agent, batch)
    elif method == "injection":
        drq.inject(agent)
    agent.stddev.fill_(0.5)
    train(agent, buffer, 2)
    assert pixels.addresses(agent, batch) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["reset", "redo", "injection"])
def test_cuda_graphs_agree_with_eager_before_and_after_an_event(method):
    torch.cuda.set_stream(torch.cuda.Stream())
    agents = []
    for cudagraphs in (False, True):
        agent, buffer = pixels.make_agent(drq, "cuda", method=method, cudagraphs=cudagraphs)
        batch = sample(buffer)
        update = ne.fast_update(agent.args, agent, batch)
        for number in range(1, 31):
            buffer.sample(batch)
            update(batch)
            if number == 15 and method == "redo":
                drq.redo(agent, batch)
            elif number == 15 and method == "reset":
                drq.reset(agent)
            elif number == 15:
                drq.inject(agent)
                update = ne.fast_update(agent.args, agent, batch)
        agents.append(agent)
    for one, two in zip(values(agents[0]), values(agents[1]), strict=True):
        assert torch.allclose(one, two, atol=1e-4)
