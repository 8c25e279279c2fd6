"""DrQ-v2 with NE: the replay of single frames, the augmentation, the environment and the agent, all without OpenGL."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ne_drq_dmc as ne
import utils_topology as topology
from fake_task import FakeTask
from helpers import PIXELS, pixel_agent, silence_some

torch.set_num_threads(1)  # as the script does
CPU = torch.device("cpu")


def make_args(**changes) -> ne.Args:
    return ne.Args(**PIXELS | changes)


# --- replay -----------------------------------------------------------------------------------------------------------
class Oracle:
    """All episodes as lists, against which the ring is compared. The pixels of a frame hold its number in the run."""

    def __init__(self, args: ne.Args):
        self.args, self.rng, self.frames = args, np.random.default_rng(0), []
        self.buffer = ne.ReplayBuffer(args, 2, seed=0, device=CPU)

    def add(self, first: bool) -> None:
        number, args = len(self.frames), self.args
        action, reward = self.rng.uniform(-1, 1, 2).astype(np.float32), float(self.rng.normal())
        discount = float(self.rng.choice([1.0, 1.0, 0.5, 0.0]))
        start = number if first else self.frames[-1]["start"]
        self.frames.append({"start": start, "action": action, "reward": reward, "discount": discount})
        obs = np.zeros((3 * args.frame_stack, args.frame_size, args.frame_size), dtype=np.uint8)
        obs[-3:] = self.pixels(number)
        self.buffer.add(obs) if first else self.buffer.add(obs, action, reward, discount)

    def pixels(self, number: int) -> np.ndarray:
        return np.array([number % 256, number // 256, 7])[:, None, None]

    def windows(self) -> list[int]:
        """First frames of the windows of n + 1 frames of one episode whose stacks are all there, oldest first."""
        n, kept = self.args.n_step, range(max(0, len(self.frames) - self.args.buffer_size), len(self.frames))
        starts = [frame["start"] for frame in self.frames]
        whole = [i for i in kept if i + n in kept and starts[i] == starts[i + n]]
        return [i for i in whole if all(j in kept for j in self.stack(i))]

    def stack(self, number: int) -> list[int]:
        start = self.frames[number]["start"]
        return [max(start, number - back) for back in range(self.args.frame_stack - 1, -1, -1)]

    def window(self, first: int) -> tuple[list[int], list[int], np.ndarray, float, float]:
        reward, discount = 0.0, 1.0
        for step in range(1, self.args.n_step + 1):
            reward += discount * self.frames[first + step]["reward"]
            discount *= self.args.gamma * self.frames[first + step]["discount"]
        next_stack = self.stack(first + self.args.n_step)
        return self.stack(first), next_stack, self.frames[first + 1]["action"], reward, discount


@pytest.mark.parametrize(("n_step", "frame_stack", "capacity"), [(3, 3, 60), (1, 1, 60), (5, 2, 31), (2, 4, 40)])
def test_stacks_and_windows_are_those_of_a_brute_force_oracle(n_step, frame_stack, capacity):
    oracle = Oracle(make_args(n_step=n_step, frame_stack=frame_stack, buffer_size=capacity, frame_size=15))
    lengths = itertools.cycle([1, 2, n_step, n_step + 1, 9, 17, capacity + 3, 4, 6, n_step + 2, 30, 11])
    while len(oracle.frames) < 3.5 * capacity:
        for i in range(next(lengths)):
            oracle.add(first=i == 0)
            buffer, expected = oracle.buffer, oracle.windows()
            ring = [int(buffer.windows[w % capacity, 0]) for w in range(buffer.oldest, buffer.newest)]
            assert ring == expected
        if not expected:
            continue
        batch, seen = buffer.sample(), set()
        for row in range(len(batch.rewards)):
            stack, next_stack = (
                [int(p[3 * i, 0, 0]) + 256 * int(p[3 * i + 1, 0, 0]) for i in range(frame_stack)]
                for p in (batch.obs[row], batch.next_obs[row])
            )
            seen.add(stack[-1])
            want = oracle.window(stack[-1])
            assert (stack, next_stack) == want[:2]
            assert np.array_equal(batch.actions[row].numpy(), want[2])
            assert batch.rewards[row].item() == pytest.approx(want[3], abs=1e-5)
            assert batch.discounts[row].item() == pytest.approx(want[4], abs=1e-6)
            for p, numbers in ((batch.obs[row], stack), (batch.next_obs[row], next_stack)):
                assert np.array_equal(
                    p.numpy(), np.concatenate([oracle.pixels(i) + np.zeros((3, 15, 15)) for i in numbers])
                )
        assert seen <= set(expected)


def test_review_samples_the_oldest_quarter_of_the_windows():
    oracle = Oracle(make_args(batch_size=400, frame_size=15))
    for number in range(150):
        oracle.add(first=number % 13 == 0)
        if number in (20, 58, 61, 149):
            expected = oracle.windows()
            oldest = set(expected[: max(1, len(expected) // 4)])
            assert {int(x) for x in oracle.buffer.sample(0.25).obs[:, -3, 0, 0]} == oldest
            assert {int(x) for x in oracle.buffer.sample().obs[:, -3, 0, 0]} == set(expected)


def test_what_ne_draws_does_not_shift_the_batches():
    oracle = Oracle(make_args(frame_size=15))
    for number in range(50):
        oracle.add(first=number % 20 == 0)
    first = [x.clone() for x in oracle.buffer.sample()]
    state = oracle.buffer.rng.get_state()
    oracle.buffer.sample(rng=torch.Generator().manual_seed(5))
    assert torch.equal(oracle.buffer.rng.get_state(), state)
    second = oracle.buffer.sample()
    assert not any(
        torch.equal(a, b) for a, b in zip(first, second, strict=True) if a.dtype != torch.float32 or a.dim() > 1
    )
    assert second.shifts.min() == 0 and second.shifts.max() == 8 and second.shifts.unique().numel() == 9


@pytest.mark.parametrize("frames", [40, 60, 95])
def test_the_buffer_restores(frames):
    oracle, other = Oracle(make_args(frame_size=15)), ne.ReplayBuffer(make_args(frame_size=15), 2, 9, CPU)
    for number in range(frames):
        oracle.add(first=number % 25 == 0)
    state = oracle.buffer.state_dict()
    assert len(state["frames"]) == min(frames, 60)
    assert state["frames"].untyped_storage().nbytes() == state["frames"].numel()  # not the whole ring's
    assert state["frames"].data_ptr() == oracle.buffer.frames.data_ptr()  # nothing was copied
    other.load_state_dict(copy.deepcopy(state))
    obs = np.full((9, 15, 15), 77, dtype=np.uint8)
    for buffer in (oracle.buffer, other):
        buffer.add(obs, np.ones(2), 1.0, 1.0)
    for ours, theirs in zip(oracle.buffer.sample(), other.sample(), strict=True):
        assert torch.equal(ours, theirs)


# --- augmentation -----------------------------------------------------------------------------------------------------
def test_random_shift_is_padding_by_the_border_and_cropping():
    rng = torch.Generator().manual_seed(0)
    obs = torch.randint(256, (32, 9, 20, 20), generator=rng).to(torch.uint8)
    shifts = torch.randint(9, (32, 2), generator=rng)
    shifted = ne.random_shift(obs, shifts)
    padded = F.pad(obs.float(), (4,) * 4, mode="replicate")
    for image, (down, right), result in zip(padded, shifts.tolist(), shifted, strict=True):
        assert torch.equal(result.float(), image[:, down : down + 20, right : right + 20])
    assert shifted.dtype == torch.uint8 and shifted.is_contiguous(memory_format=torch.channels_last)


# --- environment ------------------------------------------------------------------------------------------------------
def fake_env(monkeypatch, args: ne.Args, **options) -> ne.PixelEnv:
    monkeypatch.setattr(ne, "load_task", lambda env_id, rng: (FakeTask(rng, **options), "none"))
    return ne.PixelEnv(args)


def test_actions_are_rescaled_and_repeated_and_rewards_summed(monkeypatch):
    env = fake_env(monkeypatch, make_args(action_repeat=3), length=7, ends=0.0)
    env.reset()
    twin = FakeTask(np.random.RandomState(env.args.seed), length=7, ends=0.0)
    twin.reset()
    for action, bounds in (([-1, -1], [-1, -2]), ([1, 0], [1, 1])):
        _, reward, discount, done = env.step(np.array(action, dtype=np.float32))
        expected = sum(twin.step(bounds).reward for _ in range(3))
        assert reward == pytest.approx(expected) and (discount, done) == (1.0, False)
    assert np.allclose(env.task.actions, [[-1, -2]] * 3 + [[1, 1]] * 3)
    _, reward, discount, done = env.step(np.zeros(2, dtype=np.float32))  # the repetition stops at the episode's end
    assert reward == pytest.approx(twin.step([0, 1]).reward) and (discount, done) == (0.0, True)
    assert len(env.task.actions) == 7


def test_observations_are_stacks_with_the_newest_frame_last(monkeypatch):
    env = fake_env(monkeypatch, make_args(frame_stack=3, action_repeat=1))
    obs, frames = env.reset(), []
    for step in range(5):
        assert obs.shape == (9, 24, 24) and obs.dtype == np.uint8
        assert np.array_equal(obs[-3:], env.task.render(24, 24, 0).transpose(2, 0, 1))
        frames.append(obs[-3:])
        wanted = [frames[max(0, step - back)] for back in (2, 1, 0)]
        assert np.array_equal(obs, np.concatenate(wanted))
        obs, *_ = env.step(np.ones(2, dtype=np.float32))
    starts = []
    for seed in (4, None, 4):
        if seed is not None:
            env.rng.seed(seed)
        starts.append(env.reset())
    assert np.array_equal(starts[0], starts[2]) and not np.array_equal(starts[0], starts[1])


# --- agent ------------------------------------------------------------------------------------------------------------
def make_agent(**changes) -> tuple[ne.Agent, ne.ReplayBuffer]:
    """A small agent and a buffer with 60 random frames in episodes of 20."""
    return pixel_agent(ne, make_args(**changes), ne_seed=1)


def train(agent: ne.Agent, buffer: ne.ReplayBuffer, updates: int, rounds: int = 0, alpha: float = 0.3) -> dict:
    """`updates` updates with a round after every updates // rounds of them. Returns the last round's counts."""
    counts = {}
    for update in range(1, updates + 1):
        batch = buffer.sample()
        agent.update_critic(batch)
        agent.update_actor(batch)
        if rounds and update % (updates // rounds) == 0:
            counts = topology_round(agent, buffer, 250, alpha)
    return counts


def topology_round(agent: ne.Agent, buffer: ne.ReplayBuffer, step: int, alpha: float) -> dict[str, int]:
    return ne.topology_round(
        agent, buffer.sample(rng=agent.ne_rng), step, {"actor": (None, alpha / 2), "critic": (None, alpha)}
    )


@pytest.mark.parametrize(("size", "features"), [(15, 4), (24, 100), (84, 4 * 35 * 35)])
def test_the_encoders_output_size_is_inferred(size, features):
    agent = ne.Agent(make_args(frame_size=size), 2, ne_seed=0, device=CPU)
    assert agent.actor.trunk[0].in_features == agent.critic.trunk[0].in_features == features
    assert agent.act(np.zeros((9, size, size), dtype=np.uint8)).shape == (2,)


def test_the_default_sizes_are_those_of_drq_v2():
    agent = ne.Agent(ne.Args(batch_size=1, initial_density=1.0), 6, ne_seed=0, device=CPU)
    convolutions = [m for m in agent.encoder if isinstance(m, torch.nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.stride[0]) for m in convolutions] == [(9, 32, 2)] + [(32, 32, 1)] * 3
    assert agent.actor.trunk[0].weight.shape == agent.critic.trunk[0].weight.shape == (50, 32 * 35 * 35)
    assert [tuple(x.weight.shape) for x in agent.mlps["actor"][0].layers] == [(1024, 50), (1024, 1024), (6, 1024)]
    for mlp in agent.mlps["critic"]:
        assert [tuple(x.weight.shape) for x in mlp.layers] == [(1024, 56), (1024, 1024), (1, 1024)]
    weight, convolution = agent.mlps["actor"][0].layers[1].weight, convolutions[1].weight.flatten(1)
    assert torch.allclose(weight @ weight.T, torch.eye(1024), atol=1e-4)
    assert torch.allclose(convolution @ convolution.T, 2 * torch.eye(32), atol=1e-4)


def drq_by_hand(agent: ne.Agent, batch: ne.Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Both losses of DrQ-v2 on a copy of the agent, with a graph through everything."""

    def features(obs, shifts):
        padded = F.pad(obs.float(), (4,) * 4, mode="replicate")
        crops = [x[:, y : y + 24, c : c + 24] for x, (y, c) in zip(padded, shifts.tolist(), strict=True)]
        return agent.encoder(torch.stack(crops) / 255 - 0.5)

    def mlp(net, x):
        for layer in net.layers[:-1]:
            x = torch.relu(F.linear(x, layer.weight, layer.bias))
        return F.linear(x, net.layers[-1].weight, net.layers[-1].bias)

    def q(network, h, actions):
        return [mlp(net, torch.cat((network.trunk(h), actions), 1))[:, 0] for net in network.heads]

    h, h2 = features(batch.obs, batch.shifts[:, 0]), features(batch.next_obs, batch.shifts[:, 1])
    std = agent.stddev.item()
    mean = torch.tanh(mlp(agent.actor.heads[0], agent.actor.trunk(h2)))
    next_actions = (mean + torch.clamp(std * batch.noise[:, 0], -0.3, 0.3)).clamp(-1, 1)
    y = (batch.rewards + batch.discounts * torch.min(*q(agent.target_critic, h2, next_actions))).detach()
    critic_loss = sum(((value - y) ** 2).mean() for value in q(agent.critic, h, batch.actions))
    h = h.detach()
    mean = torch.tanh(mlp(agent.actor.heads[0], agent.actor.trunk(h)))
    actions = mean + torch.clamp(std * batch.noise[:, 1], -0.3, 0.3)
    actions.data.clamp_(-1, 1)  # the values, not the gradient
    return critic_loss, -torch.min(*q(agent.critic, h, actions)).mean()


def test_updates_are_those_of_drq_v2():
    """Dense, against Adam on losses written from the paper: encoder by the critic alone, targets at every update."""
    agent, buffer = make_agent(initial_density=1.0)
    twin = copy.deepcopy(agent)
    adams = {name: torch.optim.Adam(p, lr=1e-4) for name, p in twin_params(twin).items()}
    for update in range(4):
        for net in (agent, twin):
            net.stddev.fill_(1.0 - 0.2 * update)
        batch = buffer.sample()
        targets = copy.deepcopy(twin.target_critic)
        losses = [*agent.update_critic(batch), agent.update_actor(batch)]
        critic_loss, _ = drq_by_hand(twin, batch)
        before = copy.deepcopy(twin.encoder)
        for adam in adams.values():
            adam.zero_grad()
        critic_loss.backward()
        adams["critic"].step(), adams["encoder"].step()
        after, twin.encoder = twin.encoder, before  # the policy learns from the features before the encoder's step
        _, actor_loss = drq_by_hand(twin, batch)
        twin.encoder = after
        adams["actor"].zero_grad()
        actor_loss.backward()
        adams["actor"].step()
        for p, old, online in zip(
            twin.target_critic.parameters(), targets.parameters(), twin.critic.parameters(), strict=True
        ):
            p.data = 0.99 * old.data + 0.01 * online.data
        assert losses[0].item() == pytest.approx(critic_loss.item(), rel=1e-4)
        assert losses[2].item() == pytest.approx(actor_loss.item(), rel=1e-4, abs=1e-5)
        for (name, ours), theirs in zip(agent.named_parameters(), twin.parameters(), strict=True):
            assert torch.allclose(ours, theirs, atol=2e-6), name


def twin_params(agent: ne.Agent) -> dict[str, list[torch.Tensor]]:
    return {name: [*getattr(agent, name).parameters()] for name in ("encoder", "actor", "critic")}


def test_the_actors_loss_does_not_reach_the_encoder_or_the_critic():
    agent, buffer = make_agent()
    batch = buffer.sample()
    agent.critic_loss(batch)
    loss = agent.actor_loss(batch)
    for name in ("encoder", "critic"):
        gradients = torch.autograd.grad(loss, agent.params["encoder"], retain_graph=True, allow_unused=True)
        assert all(g is None for g in gradients), name
    before = {name: [p.clone() for p in params] for name, params in agent.params.items()}
    agent.update_actor(batch)
    changed = {
        name: any(not torch.equal(p, q) for p, q in zip(agent.params[name], before[name], strict=True))
        for name in before
    }
    assert changed == {"encoder": False, "actor": True, "critic": False}


def test_the_gradient_passes_the_bounds_of_the_actions():
    agent, buffer = make_agent()
    agent.actor.heads[0].layers[-1].bias.data.fill_(2.0)  # tanh 0.96, so that much of the noise leads out
    features, noise = torch.randn(64, agent.features.shape[1]), torch.randn(64, 2)
    actions = agent.noisy_actions(features, noise)
    mean = torch.tanh(agent.actor(features)[0])
    assert torch.allclose(actions, (mean + noise.clamp(-0.3, 0.3)).clamp(-1, 1), atol=1e-6)
    assert (actions == 1).float().mean() > 0.2
    ours, expected = (torch.autograd.grad(x.sum(), agent.params["actor"]) for x in (actions, mean))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, expected, strict=True))


# --- masks ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sparse_trunk", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_masks_hold_at_any_time_and_rounds_grow_on_net(sparse_trunk, layer_norm):
    agent, buffer = make_agent(sparse_trunk=sparse_trunk, layer_norm=layer_norm)
    layers = [m for m in agent.modules() if isinstance(m, topology.MaskedLinear)]
    assert len(layers) == 4 + 7 + 7  # trunk and head(s) of the policy, the critic and its target
    trunks = [agent.actor.trunk[0], agent.critic.trunk[0], agent.target_critic.trunk[0]]
    for name in agent.layers:
        assert topology.network_density(agent.layers[name]) == pytest.approx(0.25, abs=0.01)
        assert len(agent.layers[name]) == {"actor": 3, "critic": 6}[name] + sparse_trunk
    counts = {}
    for part in range(4):
        if part == 2:
            silence_some(agent)
        before = {name: topology.network_density(layers) for name, layers in agent.layers.items()}
        counts = train(agent, buffer, 4, rounds=1)
        for name in before:
            assert topology.network_density(agent.layers[name]) > before[name]
            assert 0 <= counts[f"ne/{name}/pruned"] <= 0.4 * counts[f"ne/{name}/grown"]
        for layer in layers:
            assert torch.equal(layer.weight, layer.weight * layer.mask)
            assert torch.equal(layer.keep, layer.mask.float())
        for name, masked in (("actor", agent.actor.masked), ("critic", agent.critic.masked)):
            for layer in masked:
                for moment in ("exp_avg", "exp_avg_sq"):
                    assert not agent.optimizers[name].state[layer.weight][moment][~layer.mask].any()
    assert counts["ne/critic/pruned"] > 0 or layer_norm
    assert all(bool(trunk.mask.all()) != sparse_trunk for trunk in trunks)
    for layer, target in zip(agent.critic.masked, agent.target_critic.masked, strict=True):
        assert torch.equal(layer.mask, target.mask) and layer is not target
    assert not torch.equal(agent.mlps["critic"][0].layers[1].mask, agent.mlps["critic"][1].layers[1].mask)


def test_a_round_leaves_the_outputs_on_its_batch():
    agent, buffer = make_agent()
    train(agent, buffer, 6, rounds=2)
    silence_some(agent)
    state = agent.ne_rng.get_state()
    batch = buffer.sample(rng=agent.ne_rng)
    agent.critic_loss(batch)
    features = agent.features.clone()
    before = [agent.actor(features)[0], *agent.critic(features, batch.actions)]
    agent.ne_rng.set_state(state)
    counts = topology_round(agent, buffer, 250, 0.5)
    after = [agent.actor(features)[0], *agent.critic(features, batch.actions)]
    assert counts["ne/critic/pruned"] > 0 and counts["ne/critic/grown"] > 2 * counts["ne/actor/grown"] > 0
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(("actor", "critic"), [(True, False), (False, True)])
def test_a_network_without_ne_is_dense_from_the_start(actor, critic):
    agent, buffer = make_agent(ne_actor=actor, ne_critic=critic)
    assert topology.network_density(agent.layers["actor"]) == pytest.approx(0.25 if actor else 1.0, abs=0.01)
    assert topology.network_density(agent.layers["critic"]) == pytest.approx(0.25 if critic else 1.0, abs=0.01)
    counts = train(agent, buffer, 2, rounds=1)
    assert (counts["ne/actor/grown"] > 0, counts["ne/critic/grown"] > 0) == (actor, critic)


def test_growth_rates_of_their_own():
    args = make_args(learning_starts=100, grow_interval=50, actor_grow_rate=0.01, critic_final_density=0.9)
    (rounds, actor, plan), (same, critic, other) = (topology.growth_schedule(args, n) for n in ("actor", "critic"))
    assert rounds == same == range(150, 1000, 50)
    assert actor == 0.01 and critic == pytest.approx(2 / 17 * math.log(0.75 / 0.1))
    assert "actor 25%" in plan and "critics 25% -> 89%" in other
    args.ne_actor = False
    assert topology.growth_schedule(args, "actor")[1:] == (0.0, "topology: dense, nothing to grow")


# --- combinations -----------------------------------------------------------------------------------------------------
def test_reset_is_for_the_heads_only():
    agent, buffer = make_agent()
    train(agent, buffer, 6, rounds=2)
    before, masks = copy.deepcopy(agent.state_dict()), [layer.mask.clone() for layer in agent.online_layers]
    topology.reset(agent.mlps, agent.head_targets, agent.optimizers, agent.ne_rng)
    for key, value in agent.state_dict().items():
        if key.endswith("weight"):
            assert torch.equal(value, before[key]) == ("heads" not in key), key
    assert all(torch.equal(layer.mask, mask) for layer, mask in zip(agent.online_layers, masks, strict=True))
    for online, target in zip(agent.critic.heads.parameters(), agent.target_critic.heads.parameters(), strict=True):
        assert torch.equal(online, target)
    for name, network in (("actor", agent.actor), ("critic", agent.critic)):
        state = agent.optimizers[name].state
        assert not any(t.any() for p in network.heads.parameters() for t in state[p].values())
        assert all(t.any() for p in network.trunk.parameters() for t in state[p].values())
    assert all(state["exp_avg"].any() for state in agent.optimizers["encoder"].state.values())
    for layer in agent.online_layers:
        assert (layer.bias == 0).all() or layer in (agent.actor.trunk[0], agent.critic.trunk[0])


def test_what_is_redrawn_is_as_at_birth():
    layer, rng = topology.MaskedLinear(24, 40), torch.Generator().manual_seed(0)
    topology.orthogonal(layer)
    values = topology.initial_values(layer, 40, rng)
    assert torch.allclose(values[:, :-1].T @ values[:, :-1], torch.eye(24), atol=1e-5) and not values[:, -1].any()
    row = topology.initial_values(layer, 1, rng)
    assert row[:, :-1].norm().item() == pytest.approx(math.sqrt(24 / 40)) and row[0, -1] == 0


# --- CUDA -------------------------------------------------------------------------------------------------------------
def test_updates_read_no_values_and_stay_on_their_device(monkeypatch):
    """What a capture needs, seen on tensors without values: reading one raises."""
    monkeypatch.setattr(topology, "apply_masks", lambda layers, targets: None)  # only between updates, may read
    agent, buffer = make_agent(ne_actor=False, ne_critic=False)
    meta, sizes = torch.device("meta"), [(x.shape, x.dtype) for x in buffer.batch]
    with meta:
        monkeypatch.setattr(topology, "orthogonal", lambda module: None)
        agent = ne.Agent(agent.args, 2, ne_seed=1, device=meta)
        batch = ne.Batch(*(torch.empty(shape, dtype=dtype) for shape, dtype in sizes))
    for clipped in (False, True):
        for layer in agent.online_layers:
            layer.clipped = clipped
        losses = [*agent.update_critic(batch), agent.update_actor(batch)]
        assert [loss.device for loss in losses] == [meta] * 3
    with pytest.raises(RuntimeError):
        losses[0].item()


def test_what_a_graph_reads_and_writes_stays_where_it_is():
    agent, buffer = make_agent()

    def addresses() -> list[int]:
        moments = [t for adam in agent.optimizers.values() for state in adam.state.values() for t in state.values()]
        return [t.data_ptr() for t in (*agent.state_dict().values(), *moments, *buffer.batch, agent.features)]

    before = addresses()
    train(agent, buffer, 2, rounds=1)
    topology.redo(agent.mlps, agent.hidden(buffer.sample()), 0.1, agent.optimizers, agent.ne_rng)
    topology.reset(agent.mlps, agent.head_targets, agent.optimizers, agent.ne_rng)
    agent.stddev.fill_(0.5)
    train(agent, buffer, 2, rounds=1)
    assert addresses() == before


def test_bf16_is_close_and_keeps_the_parameters_in_float32():
    losses = []
    for bf16 in (False, True):
        agent, buffer = make_agent(bf16=bf16)
        batch = buffer.sample()
        losses.append([agent.update_critic(batch)[0].item(), agent.update_actor(batch).item()])
        assert all(p.dtype == torch.float32 for p in agent.parameters())
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05, abs=0.02)
