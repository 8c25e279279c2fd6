"""NE-DrQ without OpenGL: replay of single frames, augmentation, environment, agent, NE."""

import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ne_drq_dmc as ne
from fake_task import FakeTask
from helpers import assert_equal, equal, values
from pixels import (
    SIZES,
    adam_of,
    assert_captures,
    assert_reads_no_values,
    heads,
    make_agent,
    silence_some,
    train,
)

CPU = torch.device("cpu")


def make_args(**changes) -> ne.Args:
    args = ne.Args(**SIZES | changes)
    ne.scale_to_run(args)
    return args


# --- replay -------------------------------------------------------------------
class Oracle:
    """All episodes as lists, against which the ring is compared.

    The pixels of a frame hold its number in the run.
    """

    def __init__(self, args: ne.Args):
        self.args = args
        self.rng = np.random.default_rng(0)
        self.frames = []
        self.buffer = ne.ReplayBuffer(args, 2, seed=0, device=CPU)

    def add(self, first: bool) -> None:
        number = len(self.frames)
        size = self.args.frame_size
        action = self.rng.uniform(-1, 1, 2).astype(np.float32)
        reward = float(self.rng.normal())
        discount = float(self.rng.choice([1.0, 1.0, 0.5, 0.0]))
        start = number if first else self.frames[-1]["start"]
        frame = {"start": start, "action": torch.tensor(action), "reward": reward}
        self.frames.append(frame | {"discount": discount})
        obs = np.zeros((3 * self.args.frame_stack, size, size), dtype=np.uint8)
        obs[-3:] = np.array([number % 256, number // 256, 7])[:, None, None]
        if first:
            self.buffer.start_episode(obs)
        else:
            self.buffer.add(obs, action, reward, discount)
        obs[:] = 99  # the caller's memory is the caller's
        action[:] = 99

    def numbers(self, stack: torch.Tensor) -> list[int]:
        """The numbers in the frames of an observation (C, H, W)."""
        assert (stack.flatten(1) == stack[:, 0, :1]).all()  # all its pixels
        corner = stack[:, 0, 0].view(-1, 3).int()  # (stack, 3)
        return (corner[:, 0] + 256 * corner[:, 1]).tolist()

    def windows(self) -> list[int]:
        """First frames of windows of one episode whose stacks are all there, oldest first."""
        n = self.args.n_step
        kept = range(max(0, len(self.frames) - self.args.buffer_size), len(self.frames))
        found = []
        for i in kept:
            whole = i + n in kept and self.frames[i]["start"] == self.frames[i + n]["start"]
            if whole and all(j in kept for j in self.stack(i)):
                found.append(i)
        return found

    def stack(self, number: int) -> list[int]:
        start = self.frames[number]["start"]
        backs = range(self.args.frame_stack - 1, -1, -1)
        return [max(start, number - back) for back in backs]

    def assert_window(self, batch: ne.Batch, row: int) -> int:
        """Compares a row of a batch with the episode it is from. Returns its first frame."""
        first = self.numbers(batch.obs[row])[-1]
        assert self.numbers(batch.obs[row]) == self.stack(first)
        assert self.numbers(batch.next_obs[row]) == self.stack(first + self.args.n_step)
        assert torch.equal(batch.actions[row], self.frames[first + 1]["action"])
        reward = 0.0
        discount = 1.0
        for step in range(1, self.args.n_step + 1):
            frame = self.frames[first + step]
            reward += discount * frame["reward"]
            discount *= self.args.gamma * frame["discount"]
        assert batch.rewards[row].item() == pytest.approx(reward, abs=1e-5)
        assert batch.discounts[row].item() == pytest.approx(discount, abs=1e-6)
        return first


@pytest.mark.parametrize(
    ("n_step", "frame_stack", "capacity"), [(3, 3, 60), (1, 1, 60), (5, 2, 31), (2, 4, 40)]
)
def test_stacks_and_windows_are_those_of_a_brute_force_oracle(n_step, frame_stack, capacity):
    """Reviews are of the oldest quarter of the windows."""
    sizes = {"n_step": n_step, "frame_stack": frame_stack, "buffer_size": capacity}
    oracle = Oracle(make_args(**sizes, frame_size=15))
    buffer = oracle.buffer
    lengths = [1, 2, n_step, n_step + 1, 9, 17, capacity + 3, 4, 6, n_step + 2, 30, 11]
    for length in itertools.cycle(lengths):
        if len(oracle.frames) > 3.5 * capacity:
            break
        for i in range(length):
            oracle.add(first=i == 0)
            expected = oracle.windows()
            ring = range(buffer.oldest, buffer.newest)
            assert [int(buffer.windows[w % capacity, 0]) for w in ring] == expected
        if expected:
            batch = buffer.sample(16)
            found = {oracle.assert_window(batch, row) for row in range(16)}
            assert found <= set(expected)
            oldest = expected[: max(1, len(expected) // 4)]
            review = buffer.sample(200, oldest=0.25)
            assert {oracle.assert_window(review, row) for row in range(200)} == set(oldest)


@pytest.mark.parametrize("frames", [40, 60, 95])
def test_the_buffer_restores(frames):
    args = make_args(frame_size=15)
    oracle = Oracle(args)
    other = ne.ReplayBuffer(args, 2, seed=9, device=CPU)
    for number in range(frames):
        oracle.add(first=number % 25 == 0)
    state = oracle.buffer.state_dict()
    saved = state["frames"]
    assert len(saved) == min(frames, 60)
    assert saved.untyped_storage().nbytes() == saved.numel()  # not the whole ring's
    assert saved.data_ptr() == oracle.buffer.frames.data_ptr()  # nothing was copied
    other.load_state_dict(copy.deepcopy(state))
    obs = np.full((9, 15, 15), 77, dtype=np.uint8)
    for buffer in (oracle.buffer, other):
        buffer.add(obs, np.ones(2, dtype=np.float32), 1.0, 1.0)
    assert_equal([*oracle.buffer.sample(16)], [*other.sample(16)])
    with pytest.raises(ValueError, match="was on cuda"):
        other.load_state_dict(state | {"device": "cuda"})


# --- augmentation -------------------------------------------------------------
def test_random_shift_is_padding_by_the_border_and_cropping():
    rng = torch.Generator().manual_seed(0)
    obs = torch.randint(256, (32, 9, 20, 20), generator=rng).to(torch.uint8)
    shifts = torch.randint(9, (32, 2), generator=rng)
    shifted = ne.random_shift(obs, shifts)
    padded = F.pad(obs.float(), (4,) * 4, mode="replicate")
    for image, (down, right), result in zip(padded, shifts.tolist(), shifted, strict=True):
        assert torch.equal(result.float(), image[:, down : down + 20, right : right + 20])
    assert shifted.dtype == torch.uint8
    assert shifted.is_contiguous(memory_format=torch.channels_last)


# --- environment --------------------------------------------------------------
def fake_env(monkeypatch, task=FakeTask, **changes) -> ne.PixelEnv:
    monkeypatch.setattr(ne, "load_task", lambda env_id, rng: (task(rng), "none"))
    return ne.PixelEnv(make_args(**changes))


class Terminates(FakeTask):
    """Ends after seven steps, by itself and not by a time limit."""

    def __init__(self, rng):
        super().__init__(rng, length=7, ends=0.0)


def test_actions_are_rescaled_and_repeated_and_rewards_summed(monkeypatch):
    env = fake_env(monkeypatch, Terminates, action_repeat=3)
    env.reset()
    twin = Terminates(np.random.RandomState(env.args.seed))
    twin.reset()
    total = 0.0
    for action, bounds in (([-1, -1], [-1, -2]), ([1, 0], [1, 1])):
        _, reward, discount, ended = env.step(np.array(action, dtype=np.float32))
        expected = sum(twin.step(bounds).reward for _ in range(3))
        assert reward == pytest.approx(expected)
        assert (discount, ended) == (1.0, False)
        total += reward
    assert np.allclose(env.task.actions, [[-1, -2]] * 3 + [[1, 1]] * 3)
    # the repetition stops at the episode's end
    _, reward, discount, ended = env.step(np.zeros(2, dtype=np.float32))
    assert reward == pytest.approx(twin.step([0, 1]).reward)
    assert (discount, ended) == (0.0, True)
    assert (env.episodic_return, env.episodic_length) == (total + reward, 7)
    env.reset()
    assert (env.episodic_return, env.episodic_length) == (0.0, 0)


def test_actions_stay_within_the_bounds_to_the_last_bit(monkeypatch):
    class Narrow(FakeTask):  # rescaling passes 0.2 by the last bit
        def action_spec(self):
            bounds = {"minimum": np.full(2, -0.1), "maximum": np.full(2, 0.2)}
            return SimpleNamespace(shape=(2,), **bounds)

    env = fake_env(monkeypatch, Narrow)
    env.reset()
    env.step(np.ones(2, dtype=np.float32))
    assert env.task.actions[0].max() <= 0.2


def test_observations_are_stacks_with_the_newest_frame_last(monkeypatch):
    env = fake_env(monkeypatch, frame_stack=3, action_repeat=1)
    obs = env.reset()
    frames = []
    for step in range(5):
        assert (obs.shape, obs.dtype) == ((9, 24, 24), np.uint8)
        assert obs.flags["C_CONTIGUOUS"]
        frames.append(env.task.render(24, 24, 0).transpose(2, 0, 1))
        wanted = [frames[max(0, step - back)] for back in (2, 1, 0)]
        assert np.array_equal(obs, np.concatenate(wanted))
        obs, reward, _, _ = env.step(np.ones(2, dtype=np.float32))
        assert type(reward) is float


def test_the_same_seed_is_the_same_start(monkeypatch):
    assert fake_env(monkeypatch, env_id="quadruped_walk").camera == 2
    env = fake_env(monkeypatch)
    starts = [env.reset(seed=4), env.reset(), env.reset(seed=4)]
    assert np.array_equal(starts[0], starts[2])
    assert not np.array_equal(starts[0], starts[1])


# --- agent --------------------------------------------------------------------
def test_the_default_sizes_are_those_of_drq_v2():
    agent = ne.Agent(ne.Args(initial_density=1.0), 6, ne_seed=0, device=CPU)
    convolutions = list(agent.encoder.convolutions)
    shapes = [(m.in_channels, m.out_channels, m.stride[0]) for m in convolutions]
    assert shapes == [(9, 32, 2), (32, 32, 1), (32, 32, 1), (32, 32, 1)]
    for module, n_in, n_out in ((agent.actor, 50, 6), (agent.critic, 56, 1)):
        assert module.trunk.layers[0].weight.shape == (50, 32 * 35 * 35)
        for head in module.heads:
            shapes = [layer.weight.shape for layer in head.layers]
            assert shapes == [(1024, n_in), (1024, 1024), (n_out, 1024)]
    weight = head.layers[1].weight
    assert torch.allclose(weight @ weight.T, torch.eye(1024), atol=1e-4)
    convolution = convolutions[1].weight.flatten(1)
    assert torch.allclose(convolution @ convolution.T, 2 * torch.eye(32), atol=1e-4)
    assert agent.act(np.zeros((9, 84, 84), dtype=np.uint8)).shape == (6,)


class ByHand:
    """Both losses of DrQ-v2 on a copy of an agent, with a graph through everything."""

    def __init__(self, agent: ne.Agent):
        self.agent = agent

    def features(self, obs, shifts):
        padded = F.pad(obs.float(), (4,) * 4, mode="replicate")
        crops = []
        for image, (down, right) in zip(padded, shifts.tolist(), strict=True):
            crops.append(image[:, down : down + 24, right : right + 24])
        return self.agent.encoder(torch.stack(crops))

    def mlp(self, net, x):
        for layer in net.layers[:-1]:
            x = torch.relu(F.linear(x, layer.weight, layer.bias))
        return F.linear(x, net.layers[-1].weight, net.layers[-1].bias)

    def trunk(self, trunk, h):
        linear = trunk.layers[0]
        x = F.linear(h, linear.weight, linear.bias)
        return torch.tanh(F.layer_norm(x, (50,), trunk.norm.weight, trunk.norm.bias))

    def q(self, critic, h, actions):
        x = torch.cat((self.trunk(critic.trunk, h), actions), dim=1)
        return [self.mlp(head, x)[:, 0] for head in critic.heads]

    def policy(self, h):
        actor = self.agent.actor
        return torch.tanh(self.mlp(actor.heads[0], self.trunk(actor.trunk, h)))

    def noise(self, batch, which):
        return (self.agent.stddev.item() * batch.noise[:, which]).clamp(-0.3, 0.3)

    def critic_loss(self, batch):
        h = self.features(batch.obs, batch.shifts[:, 0])
        next_h = self.features(batch.next_obs, batch.shifts[:, 1])
        next_actions = (self.policy(next_h) + self.noise(batch, 0)).clamp(-1, 1)
        next_q = torch.min(*self.q(self.agent.target_critic, next_h, next_actions))
        y = (batch.rewards + batch.discounts * next_q).detach()
        return sum(((q - y) ** 2).mean() for q in self.q(self.agent.critic, h, batch.actions))

    def actor_loss(self, batch):
        h = self.features(batch.obs, batch.shifts[:, 0]).detach()
        actions = self.policy(h) + self.noise(batch, 1)
        actions.data.clamp_(-1, 1)  # the values, not the gradient
        return -torch.min(*self.q(self.agent.critic, h, actions)).mean()


def test_updates_are_those_of_drq_v2():
    """Dense, against Adam on losses written from the paper.

    The encoder learns from the critic alone, the targets follow at every update, and the
    gradient passes the bounds of the actions.
    """
    agent, buffer = make_agent(initial_density=1.0)
    agent.actor.heads[0].layers[-1].bias.data.fill_(2.0)  # tanh 0.96: much noise leads out
    twin = copy.deepcopy(agent)
    by_hand = ByHand(twin)
    adams = {}
    for name in ("encoder", "actor", "critic"):
        adams[name] = torch.optim.Adam(getattr(twin, name).parameters(), lr=1e-4)
    for update in range(4):
        for net in (agent, twin):
            net.stddev.fill_(1.0 - 0.2 * update)
        batch = buffer.sample(16)
        old_targets = values(twin.target_critic)
        losses = agent.update(batch)

        critic_loss = by_hand.critic_loss(batch)
        before = copy.deepcopy(twin.encoder)
        critic_loss.backward()
        adams["critic"].step()
        adams["encoder"].step()
        # the policy learns from the features before the encoder's step
        after = twin.encoder
        twin.encoder = before
        adams["actor"].zero_grad()
        actor_loss = by_hand.actor_loss(batch)
        actor_loss.backward()
        adams["actor"].step()
        twin.encoder = after
        for adam in adams.values():
            adam.zero_grad()
        targets = twin.target_critic.parameters()
        online = twin.critic.parameters()
        for p, old, new in zip(targets, old_targets, online, strict=True):
            p.data = 0.99 * old + 0.01 * new.data

        assert losses["qf_loss"].item() == pytest.approx(critic_loss.item(), rel=1e-4)
        expected = pytest.approx(actor_loss.item(), rel=1e-4, abs=1e-5)
        assert losses["actor_loss"].item() == expected
        for (name, ours), theirs in zip(agent.named_parameters(), twin.parameters(), strict=True):
            assert torch.allclose(ours, theirs, atol=2e-6), name


def test_bf16_is_close_and_keeps_the_parameters_in_float32():
    losses = []
    for bf16 in (False, True):
        agent, buffer = make_agent(bf16=bf16)
        losses.append([value.item() for value in agent.update(buffer.sample(16)).values()])
        assert all(p.dtype == torch.float32 for p in agent.parameters())
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05, abs=0.02)


# --- masks --------------------------------------------------------------------
def topology_round(agent, buffer, step: int = 250) -> None:
    ne.topology_round(agent, buffer.sample(16, rng=agent.rng), step)


def masked_layers(agent) -> list[ne.MaskedLinear]:
    return [m for m in agent.modules() if isinstance(m, ne.MaskedLinear)]


def counted(agent) -> dict[str, list[dict]]:
    return {name: [dict(mlp.counts) for mlp in net.mlps] for name, net in agent.networks.items()}


@pytest.mark.parametrize("sparse_trunk", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_masks_hold_at_any_time_and_rounds_grow_on_net(sparse_trunk, layer_norm):
    rates = {"actor_grow_rate": 0.15, "critic_grow_rate": 0.3}
    agent, buffer = make_agent(sparse_trunk=sparse_trunk, layer_norm=layer_norm, **rates)
    layers = masked_layers(agent)
    assert len(layers) == 4 + 7 + 7  # trunk and head(s) of the policy, the critic, its target
    for name, network in agent.networks.items():
        assert network.density() == pytest.approx(0.25, abs=0.01)
        assert len(network.layers) == {"actor": 3, "critic": 6}[name] + sparse_trunk
    for part in range(4):
        if part == 2:
            silence_some(agent)
        before = counted(agent)
        train(agent, buffer, 4)
        topology_round(agent, buffer)
        for name, network in agent.networks.items():
            for now, then in zip(counted(agent)[name], before[name], strict=True):
                assert 0 <= now["pruned"] <= 0.4 * now["grown"]
                assert then["grown"] < now["grown"] <= now["planned"]
            for layer in network.layers:
                for moment in ("exp_avg", "exp_avg_sq"):
                    of_weight = network.optimizer.state[layer.weight][moment]
                    assert not of_weight[layer.mask == 0].any()
        for layer in layers:
            assert torch.equal(layer.weight, layer.weight * layer.mask)
    assert sum(counts["pruned"] for counts in counted(agent)["critic"]) > 0
    for module in (agent.actor, agent.critic, agent.target_critic):
        assert bool(module.trunk.layers[0].mask.all()) != sparse_trunk
    critic = agent.networks["critic"]
    for layer, target in zip(critic.layers, critic.target_layers, strict=True):
        assert torch.equal(layer.mask, target.mask)
        assert layer is not target
    one, two = agent.critic.heads
    assert not torch.equal(one.layers[1].mask, two.layers[1].mask)
    # what has grown and gone is state of the agent
    twin, _ = make_agent(sparse_trunk=sparse_trunk, layer_norm=layer_norm)
    twin.load_state_dict(agent.state_dict())
    assert counted(twin) == counted(agent)


def outputs(agent, batch) -> list[torch.Tensor]:
    features = agent.encoder(ne.random_shift(batch.obs, batch.shifts[:, 0]))
    return [agent.actor(features), *agent.critic(features, batch.actions)]


def total(agent, name: str, key: str) -> int:
    return sum(counts[key] for counts in counted(agent)[name])


def test_a_round_leaves_the_outputs_on_its_batch():
    agent, buffer = make_agent(actor_grow_rate=0.25, critic_grow_rate=0.5)
    for _ in range(2):
        train(agent, buffer, 3)
        topology_round(agent, buffer)
    silence_some(agent)
    batch = buffer.sample(16, rng=agent.rng)
    before = outputs(agent, batch)
    already = total(agent, "critic", "pruned")
    ne.topology_round(agent, batch, 250)
    assert total(agent, "critic", "pruned") > already
    assert total(agent, "critic", "grown") > 2 * total(agent, "actor", "grown") > 0
    for a, b in zip(before, outputs(agent, batch), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("growth", ["gradient", "random", "none"])
def test_births_are_among_connections_with_a_gradient(growth):
    """Into a silent neuron no gradient flows: only naive growth gives it connections."""
    rate = {} if growth == "none" else {"critic_grow_rate": 0.9}
    agent, buffer = make_agent(growth=growth, prune=False, **rate)
    silence_some(agent)
    masks = [head.layers[0].mask.clone() for head in agent.critic.heads]
    topology_round(agent, buffer, step=2)
    born_at_silent = 0
    for head, mask in zip(agent.critic.heads, masks, strict=True):
        born = head.layers[0].mask - mask
        born_at_silent += int(born[::3].sum())
    planned = total(agent, "critic", "planned")
    grown = total(agent, "critic", "grown")
    assert (born_at_silent > 0) == (growth == "random")
    assert (planned > grown) == (growth == "gradient")
    assert (grown > 0) == (growth != "none")


@pytest.mark.parametrize(("actor", "critic"), [(True, False), (False, True)])
def test_a_network_without_ne_is_dense_from_the_start(actor, critic):
    agent, buffer = make_agent(ne_actor=actor, ne_critic=critic)
    train(agent, buffer, 2)
    topology_round(agent, buffer)
    for name, on in (("actor", actor), ("critic", critic)):
        grown = total(agent, name, "grown")
        density = agent.networks[name].density()
        assert density < 0.5 and grown > 0 if on else density == 1 and grown == 0


# --- schedules ----------------------------------------------------------------
def scaled(**changes) -> ne.Args:
    args = ne.Args(**changes)
    ne.scale_to_task(args)
    ne.scale_to_run(args)
    return args


def test_what_is_not_given_scales_with_task_and_run():
    """Frames for rounds, updates for counts; two frames a step, two steps an update."""
    args = scaled()
    assert (args.total_timesteps, args.growth_end) == (1_100_000, 1_100_000)
    assert args.stddev_duration == 100_000
    assert args.grow_interval == 11_000
    assert args.review_interval == 274  # of 274,000 updates
    counts = (550_000 - 4_000) // 4 // 274 - 1
    assert (1 - args.review_decay) ** counts == pytest.approx(args.review_floor)
    assert ne.growth_rounds(args) == range(11_000, 1_100_000, 11_000)
    # with more updates, counts are as often in time
    more = scaled(replay_ratio=3)
    assert (more.review_interval, more.review_decay) == (822, args.review_decay)
    other = scaled(env_id="reacher_hard")
    assert (other.total_timesteps, other.stddev_duration) == (3_100_000, 500_000)


# --- combinations -------------------------------------------------------------
def test_reset_is_for_the_heads_only():
    agent, buffer = make_agent()
    for _ in range(2):
        train(agent, buffer, 3)
        topology_round(agent, buffer)
    before = copy.deepcopy(agent.state_dict())
    ne.reset(agent)
    for key, value in agent.state_dict().items():
        if key.endswith(("weight", "mask")):
            kept = "heads" not in key or key.endswith("mask")
            assert torch.equal(value, before[key]) == kept, key
    assert equal(values(agent.critic.heads), values(agent.target_critic.heads))
    for module in (agent.actor, agent.critic):
        for state in adam_of(agent, module.heads):
            assert not any(value.any() for value in state.values())
        for state in adam_of(agent, module.trunk):
            assert all(value.any() for value in state.values())
    for head in heads(agent):
        for layer in head.layers:
            assert not layer.bias.any()
            assert torch.equal(layer.weight, layer.weight * layer.mask)
    for state in adam_of(agent, agent.encoder):
        assert state["exp_avg"].any()


def test_redo_is_for_the_heads_only_and_stays_inside_the_masks():
    agent, buffer = make_agent(sparse_trunk=True)
    train(agent, buffer, 3)
    silence_some(agent)
    before = copy.deepcopy(agent)
    ne.redo(agent, buffer.sample(16))
    for name in ("encoder", "target_critic", "actor.trunk", "critic.trunk"):
        assert equal(values(agent.get_submodule(name)), values(before.get_submodule(name)))
    for head, old in zip(heads(agent), heads(before), strict=True):
        for layer, old_layer in zip(head.layers[:-1], old.layers[:-1], strict=True):
            assert torch.equal(layer.mask, old_layer.mask)
            assert torch.equal(layer.weight, layer.weight * layer.mask)
            assert not layer.bias[::3].any()
            assert not torch.equal(layer.weight[::3], old_layer.weight[::3])
        for layer in head.layers[1:]:
            assert not layer.weight[:, ::3].any()


def test_what_is_redrawn_is_as_at_birth():
    layer = ne.MaskedLinear(24, 40)
    rng = torch.Generator().manual_seed(0)
    weights, biases = layer.draw(40, rng)
    assert torch.allclose(weights.T @ weights, torch.eye(24), atol=1e-5)
    assert not biases.any()
    weights, biases = layer.draw(1, rng)
    assert weights.shape == (1, 24)
    assert weights.norm().item() == pytest.approx(math.sqrt(24 / 40))
    assert biases.tolist() == [0.0]


# --- CUDA and compilation -----------------------------------------------------
def test_updates_read_no_values(monkeypatch):
    assert_reads_no_values(monkeypatch, ne, ne_actor=False, ne_critic=False)


def test_what_a_graph_reads_and_writes_stays_where_it_is():
    agent, buffer = make_agent()

    def between():
        topology_round(agent, buffer)
        ne.redo(agent, buffer.sample(16))
        ne.reset(agent)

    assert_captures(agent, buffer, between)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FAST = [
    pytest.param({"compile": True}, "cpu", marks=pytest.mark.slow),
    pytest.param({}, "cuda", marks=needs_cuda),
    pytest.param({"buffer_device": "cuda"}, "cuda", marks=needs_cuda),
]


@pytest.mark.parametrize(("flags", "device"), FAST)
def test_fast_updates_agree_with_eager_ones(flags, device):
    if device == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())
    agents = []
    for fast in (False, True):
        agent, buffer = make_agent(device=device, **flags)
        update = ne.fast_update(agent.args, agent, buffer) if fast else agent.update
        for number in range(1, 11):
            update(buffer.sample(16))
            if number % 4 == 0:
                topology_round(agent, buffer)
        agents.append(agent)
    for one, two in zip(values(agents[0]), values(agents[1]), strict=True):
        assert torch.allclose(one, two, atol=1e-4)
