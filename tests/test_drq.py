"""NE-DrQ without OpenGL: replay of single frames, augmentation, environment, agent, NE."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ne_drq_dmc as ne
import pixels
import utils_topology as topology
from fake_task import FakeTask
from helpers import equal, none_equal, values
from pixels import SIZES, heads, sample, silence_some, train

torch.set_num_threads(1)  # as the script does
CPU = torch.device("cpu")


def make_args(**changes) -> ne.Args:
    args = ne.Args(**SIZES | changes)
    ne.scale_to_run(args)
    return args


def make_agent(**changes) -> tuple[ne.Agent, ne.ReplayBuffer]:
    return pixels.make_agent(ne, **changes)


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
        frame = {"start": start, "action": action, "reward": reward, "discount": discount}
        self.frames.append(frame)
        obs = np.zeros((3 * self.args.frame_stack, size, size), dtype=np.uint8)
        obs[-3:] = self.pixels(number)
        if first:
            self.buffer.start_episode(obs)
        else:
            self.buffer.add(obs, action, reward, discount)
        obs[:] = 99  # the caller's memory is the caller's
        action[:] = 99

    def pixels(self, number: int) -> np.ndarray:
        return np.array([number % 256, number // 256, 7])[:, None, None]

    def numbers(self, stack: torch.Tensor) -> list[int]:
        """What `pixels` has put into the frames of an observation (C, H, W)."""
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
        next_stack = self.stack(first + self.args.n_step)
        assert self.numbers(batch.next_obs[row]) == next_stack
        reward = 0.0
        discount = 1.0
        for step in range(1, self.args.n_step + 1):
            frame = self.frames[first + step]
            reward += discount * frame["reward"]
            discount *= self.args.gamma * frame["discount"]
        assert batch.rewards[row].item() == pytest.approx(reward, abs=1e-5)
        assert batch.discounts[row].item() == pytest.approx(discount, abs=1e-6)
        assert batch.obs[row].shape == batch.next_obs[row].shape
        assert (batch.obs[row].flatten(1) == batch.obs[row][:, 0, :1]).all()  # all its pixels
        return first


@pytest.mark.parametrize(
    ("n_step", "frame_stack", "capacity"), [(3, 3, 60), (1, 1, 60), (5, 2, 31), (2, 4, 40)]
)
def test_stacks_and_windows_are_those_of_a_brute_force_oracle(n_step, frame_stack, capacity):
    sizes = {"n_step": n_step, "frame_stack": frame_stack, "buffer_size": capacity}
    oracle = Oracle(make_args(**sizes, frame_size=15))
    buffer = oracle.buffer
    actions = []
    lengths = [1, 2, n_step, n_step + 1, 9, 17, capacity + 3, 4, 6, n_step + 2, 30, 11]
    for length in itertools.cycle(lengths):
        if len(oracle.frames) > 3.5 * capacity:
            break
        for i in range(length):
            oracle.add(first=i == 0)
            actions.append(buffer.steps[(buffer.count - 1) % capacity, :2].clone())
            expected = oracle.windows()
            ring = range(buffer.oldest, buffer.newest)
            assert [int(buffer.windows[w % capacity, 0]) for w in ring] == expected
        if expected:
            batch = sample(buffer)
            for row in range(len(batch.rewards)):
                first = oracle.assert_window(batch, row)
                assert first in expected
                assert torch.equal(batch.actions[row], actions[first + 1])


def test_review_samples_the_oldest_quarter_of_the_windows():
    oracle = Oracle(make_args(batch_size=400, buffer_size=400, frame_size=15))
    oracle.buffer.capacity = oracle.args.buffer_size = 60
    for number in range(150):
        oracle.add(first=number % 13 == 0)
        if number in (20, 58, 61, 149):
            expected = oracle.windows()
            oldest = set(expected[: max(1, len(expected) // 4)])
            reviewed = sample(oracle.buffer, 400, oldest=0.25)
            assert set(reviewed.obs[:, -3, 0, 0].tolist()) == oldest
            uniform = sample(oracle.buffer, 400)
            assert set(uniform.obs[:, -3, 0, 0].tolist()) == set(expected)


def test_what_ne_draws_does_not_shift_the_batches():
    _, buffer = make_agent()
    first = sample(buffer)
    state = buffer.rng.get_state()
    sample(buffer, rng=torch.Generator().manual_seed(5))
    assert torch.equal(buffer.rng.get_state(), state)
    second = sample(buffer)
    for name in ("pixels", "actions", "rewards", "noise", "shifts"):
        assert not torch.equal(getattr(first, name), getattr(second, name))
    assert second.shifts.unique().tolist() == list(range(9))


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
    assert equal([*sample(oracle.buffer)], [*sample(other)])


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"capacity": 61}, "must hold 60 frames, got 61"), ({"device": "cuda"}, "was on cuda")],
)
def test_a_buffer_of_another_size_or_device_is_refused(changes, words):
    _, buffer = make_agent()
    with pytest.raises(ValueError, match=words):
        buffer.load_state_dict(buffer.state_dict() | changes)


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
    for action, bounds in (([-1, -1], [-1, -2]), ([1, 0], [1, 1])):
        _, reward, discount, done = env.step(np.array(action, dtype=np.float32))
        expected = sum(twin.step(bounds).reward for _ in range(3))
        assert reward == pytest.approx(expected)
        assert (discount, done) == (1.0, False)
    assert np.allclose(env.task.actions, [[-1, -2]] * 3 + [[1, 1]] * 3)
    # the repetition stops at the episode's end
    _, reward, discount, done = env.step(np.zeros(2, dtype=np.float32))
    assert reward == pytest.approx(twin.step([0, 1]).reward)
    assert (discount, done) == (0.0, True)
    assert len(env.task.actions) == 7


class SameMemory(FakeTask):
    """Draws every frame into the same array, and returns its reward in one, too."""

    image = np.zeros((24, 24, 3), dtype=np.uint8)
    reward = np.zeros(1)

    def render(self, height, width, camera_id):
        self.image[:] = super().render(height, width, camera_id)
        return self.image

    def step(self, action):
        moment = super().step(action)
        self.reward[:] = moment.reward
        return moment._replace(reward=self.reward)


@pytest.mark.parametrize("task", [FakeTask, SameMemory])
def test_observations_are_stacks_with_the_newest_frame_last(monkeypatch, task):
    env = fake_env(monkeypatch, task, frame_stack=3, action_repeat=1)
    obs = env.reset()
    frames = []
    for step in range(5):
        assert obs.shape == (9, 24, 24)
        assert obs.dtype == np.uint8
        newest = FakeTask.render(env.task, 24, 24, 0).transpose(2, 0, 1)
        assert np.array_equal(obs[-3:], newest)
        frames.append(newest)
        wanted = [frames[max(0, step - back)] for back in (2, 1, 0)]
        assert np.array_equal(obs, np.concatenate(wanted))
        obs, reward, _, _ = env.step(np.ones(2, dtype=np.float32))
        assert type(reward) is float


def test_the_same_seed_is_the_same_start(monkeypatch):
    env = fake_env(monkeypatch)
    starts = [env.reset(seed=4), env.reset(), env.reset(seed=4)]
    assert np.array_equal(starts[0], starts[2])
    assert not np.array_equal(starts[0], starts[1])


def test_an_episode_that_does_not_end_is_cut_off(monkeypatch):
    env = fake_env(monkeypatch, max_episode_steps=8)
    for _ in range(2):
        env.reset()
        ends = [env.step(np.zeros(2, dtype=np.float32)) for _ in range(4)]
        assert [done for *_, done in ends] == [False] * 3 + [True]
        assert ends[-1][2] == 1.0  # nothing has terminated


@pytest.mark.parametrize(("env_id", "camera"), [("quadruped_walk", 2), ("walker_walk", 0)])
def test_the_quadruped_is_seen_by_another_camera(monkeypatch, env_id, camera):
    class Seen(FakeTask):
        def render(self, height, width, camera_id):
            assert camera_id == camera
            return super().render(height, width, 0)

    env = fake_env(monkeypatch, Seen, env_id=env_id)
    env.reset()
    env.step(np.zeros(2, dtype=np.float32))


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (math.nan, "the reward is nan"),
        (-math.inf, "the reward is -inf"),
        (np.zeros(2), "ValueError in step"),
        (None, "the reward is nan"),
    ],
)
def test_what_is_no_reward_is_a_fault_of_the_environment(monkeypatch, reward, words):
    class Faulty(FakeTask):
        def step(self, action):
            return super().step(action)._replace(reward=reward)

    env = fake_env(monkeypatch, Faulty)
    env.reset()
    with pytest.raises(ne.EnvironmentFault, match=f"walker_walk: {words}"):
        env.step(np.zeros(2, dtype=np.float32))


@pytest.mark.parametrize("name", ["reset", "step", "render"])
def test_an_exception_of_the_environment_is_one_line(monkeypatch, name):
    env = fake_env(monkeypatch)
    env.reset()

    def explode(*args, **kwargs):
        raise ArithmeticError("the simulation\nexploded")

    monkeypatch.setattr(FakeTask, name, explode)
    with pytest.raises(ne.EnvironmentFault) as fault:
        if name == "reset":
            env.reset()
        else:
            env.step(np.zeros(2, dtype=np.float32))
    where = "reset" if name == "reset" else "step"
    expected = f"walker_walk: ArithmeticError in {where}: the simulation exploded"
    assert str(fault.value) == expected


# --- agent --------------------------------------------------------------------
@pytest.mark.parametrize(("size", "features"), [(15, 4), (24, 100), (84, 4 * 35 * 35)])
def test_the_encoders_output_size_is_inferred(size, features):
    agent = ne.Agent(make_args(frame_size=size), 2, ne_seed=0, device=CPU)
    for trunk in (agent.actor.trunk, agent.critic.trunk):
        assert trunk.layers[0].in_features == features
    assert agent.act(np.zeros((9, size, size), dtype=np.uint8)).shape == (2,)


def test_the_default_sizes_are_those_of_drq_v2():
    args = ne.Args(initial_density=1.0)
    agent = ne.Agent(args, 6, ne_seed=0, device=CPU)
    convolutions = list(agent.encoder.convolutions)
    assert [m.in_channels for m in convolutions] == [9, 32, 32, 32]
    assert [m.out_channels for m in convolutions] == [32] * 4
    assert [m.stride[0] for m in convolutions] == [2, 1, 1, 1]
    for trunk in (agent.actor.trunk, agent.critic.trunk):
        assert trunk.layers[0].weight.shape == (50, 32 * 35 * 35)
    (head,) = agent.actor.heads
    assert [x.weight.shape for x in head.layers] == [(1024, 50), (1024, 1024), (6, 1024)]
    for head in agent.critic.heads:
        assert [x.weight.shape for x in head.layers] == [(1024, 56), (1024, 1024), (1, 1024)]
    weight = head.layers[1].weight
    assert torch.allclose(weight @ weight.T, torch.eye(1024), atol=1e-4)
    convolution = convolutions[1].weight.flatten(1)
    assert torch.allclose(convolution @ convolution.T, 2 * torch.eye(32), atol=1e-4)


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

    The encoder learns from the critic alone, the targets follow at every update.
    """
    agent, buffer = make_agent(initial_density=1.0)
    twin = copy.deepcopy(agent)
    by_hand = ByHand(twin)
    adams = {}
    for name in ("encoder", "actor", "critic"):
        adams[name] = torch.optim.Adam(getattr(twin, name).parameters(), lr=1e-4)
    for update in range(4):
        for net in (agent, twin):
            net.stddev.fill_(1.0 - 0.2 * update)
        batch = sample(buffer)
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


def test_the_actors_gradients_are_its_own_and_the_critics_pass_has_none_to_it():
    agent, buffer = make_agent()
    batch = sample(buffer)
    _, _, features, of_encoder, of_critic = agent.critic_gradients(batch)
    _, of_actor = agent.actor_gradients(batch, features)
    assert not features.requires_grad
    for gradients, module in (
        (of_encoder, agent.encoder),
        (of_actor, agent.actor),
        (of_critic, agent.critic),
    ):
        shapes = [p.shape for p in module.parameters()]
        assert [g.shape for g in gradients] == shapes
        assert all(g.any() for g in gradients)
    assert all(p.grad is None for p in agent.parameters())


def test_losses_leave_nothing_behind():
    """Another batch in between changes nothing."""
    agent, buffer = make_agent()
    batch = sample(buffer)
    features = agent.critic_gradients(batch)[2]
    expected = agent.actor_gradients(batch, features)
    before = set(vars(agent))
    agent.critic_gradients(sample(buffer))
    again = agent.actor_gradients(batch, features)
    assert torch.equal(again[0], expected[0])
    assert equal([*again[1]], [*expected[1]])
    assert set(vars(agent)) == before


def test_a_copy_of_an_agent_trains_itself_and_its_targets():
    agent, buffer = make_agent()
    train(agent, buffer, 2)
    twin = copy.deepcopy(agent)
    original = values(agent)
    targets = values(twin.target_critic)
    batch = sample(buffer)
    twin.update(batch)
    assert equal(values(agent), original)
    biases = [p for p in targets if p.dim() == 1]
    moved = [p for p in values(twin.target_critic) if p.dim() == 1]
    assert none_equal(moved, biases)
    agent.update(batch)
    assert equal(values(agent), values(twin))


def test_the_gradient_passes_the_bounds_of_the_actions():
    agent, _ = make_agent()
    agent.actor.heads[0].layers[-1].bias.data.fill_(2.0)  # tanh 0.96: much noise leads out
    features = torch.randn(64, agent.encoder.n_features)
    noise = torch.randn(64, 2)
    actions = agent.noisy_actions(features, noise)
    mean = agent.actor(features)
    assert torch.allclose(actions, (mean + noise.clamp(-0.3, 0.3)).clamp(-1, 1), atol=1e-6)
    assert (actions == 1).float().mean() > 0.2
    params = list(agent.actor.parameters())
    ours = torch.autograd.grad(actions.sum(), params)
    expected = torch.autograd.grad(mean.sum(), params)
    for a, b in zip(ours, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


# --- masks --------------------------------------------------------------------
def topology_round(agent, buffer, progress, step: int = 250) -> None:
    batch = sample(buffer, rng=agent.ne_rng)
    ne.topology_round(agent.args, agent, batch, progress, step)


def masked_layers(agent) -> list[ne.MaskedLinear]:
    return [m for m in agent.modules() if isinstance(m, ne.MaskedLinear)]


@pytest.mark.parametrize("sparse_trunk", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_masks_hold_at_any_time_and_rounds_grow_on_net(sparse_trunk, layer_norm):
    rates = {"actor_grow_rate": 0.15, "critic_grow_rate": 0.3}
    agent, buffer = make_agent(sparse_trunk=sparse_trunk, layer_norm=layer_norm, **rates)
    layers = masked_layers(agent)
    assert len(layers) == 4 + 7 + 7  # trunk and head(s) of the policy, the critic, its target
    progress = ne.Progress.of(agent)
    for name, network in agent.networks.items():
        assert topology.network_density(network.layers) == pytest.approx(0.25, abs=0.01)
        assert len(network.layers) == {"actor": 3, "critic": 6}[name] + sparse_trunk
    for part in range(4):
        if part == 2:
            silence_some(agent)
        before = copy.deepcopy(progress)
        train(agent, buffer, 4)
        topology_round(agent, buffer, progress)
        for name, network in agent.networks.items():
            for grown, pruned in zip(progress.grown[name], progress.pruned[name], strict=True):
                assert 0 <= pruned <= 0.4 * grown
            assert progress.grown[name] > before.grown[name]
            assert sum(progress.planned[name]) >= sum(progress.grown[name])
            for layer in network.layers:
                for moment in ("exp_avg", "exp_avg_sq"):
                    values = network.optimizer.state[layer.weight][moment]
                    assert not values[layer.mask == 0].any()
        for layer in layers:
            assert torch.equal(layer.weight, layer.weight * layer.mask)
    assert sum(progress.pruned["critic"]) > 0 or layer_norm
    for module in (agent.actor, agent.critic, agent.target_critic):
        assert bool(module.trunk.layers[0].mask.all()) != sparse_trunk
    critic = agent.networks["critic"]
    for layer, target in zip(critic.layers, critic.target_layers, strict=True):
        assert torch.equal(layer.mask, target.mask)
        assert layer is not target
    one, two = agent.critic.heads
    assert not torch.equal(one.layers[1].mask, two.layers[1].mask)


def outputs(agent, batch) -> list[torch.Tensor]:
    features = agent.encoder.augmented(batch.obs, batch.shifts[:, 0])
    return [agent.actor(features), *agent.critic(features, batch.actions)]


def test_a_round_leaves_the_outputs_on_its_batch():
    agent, buffer = make_agent(actor_grow_rate=0.25, critic_grow_rate=0.5)
    progress = ne.Progress.of(agent)
    for _ in range(2):
        train(agent, buffer, 3)
        topology_round(agent, buffer, progress)
    silence_some(agent)
    batch = sample(buffer, rng=agent.ne_rng)
    before = outputs(agent, batch)
    already = sum(progress.pruned["critic"])
    ne.topology_round(agent.args, agent, batch, progress, 250)
    assert sum(progress.pruned["critic"]) > already
    assert sum(progress.grown["critic"]) > 2 * sum(progress.grown["actor"]) > 0
    for a, b in zip(before, outputs(agent, batch), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("growth", ["gradient", "random", "none"])
def test_births_are_among_connections_with_a_gradient(growth):
    """Into a silent neuron no gradient flows: only naive growth gives it connections."""
    agent, buffer = make_agent(growth=growth, critic_grow_rate=0.9, prune=False)
    silence_some(agent)
    masks = [head.layers[0].mask.clone() for head in agent.critic.heads]
    progress = ne.Progress.of(agent)
    topology_round(agent, buffer, progress, step=2)
    born_at_silent = 0
    for head, mask in zip(agent.critic.heads, masks, strict=True):
        born = head.layers[0].mask - mask
        born_at_silent += int(born[::3].sum())
    planned = sum(progress.planned["critic"])
    grown = sum(progress.grown["critic"])
    assert (born_at_silent > 0) == (growth == "random")
    assert (planned > grown) == (growth == "gradient")
    assert (grown > 0) == (growth != "none")


def test_the_budget_of_pruning_is_kept_over_the_rounds():
    agent, buffer = make_agent(critic_grow_rate=0.2)
    progress = ne.Progress.of(agent)
    for _ in range(3):
        topology_round(agent, buffer, progress)
    before = copy.deepcopy(progress)
    silence_some(agent)
    topology_round(agent, buffer, progress, step=999)  # grows next to nothing
    for i in range(2):
        grown = progress.grown["critic"][i]
        spent = progress.pruned["critic"][i] - before.pruned["critic"][i]
        assert spent > 0.4 * (grown - before.grown["critic"][i]) + 10
        assert progress.pruned["critic"][i] <= 0.4 * grown


@pytest.mark.parametrize(("actor", "critic"), [(True, False), (False, True)])
def test_a_network_without_ne_is_dense_from_the_start(actor, critic):
    agent, buffer = make_agent(ne_actor=actor, ne_critic=critic)
    progress = ne.Progress.of(agent)
    for name, on in (("actor", actor), ("critic", critic)):
        density = topology.network_density(agent.networks[name].layers)
        assert density == pytest.approx(0.25 if on else 1.0, abs=0.01)
    train(agent, buffer, 2)
    topology_round(agent, buffer, progress)
    assert (sum(progress.grown["actor"]) > 0) == actor
    assert (sum(progress.grown["critic"]) > 0) == critic


# --- schedules ----------------------------------------------------------------
def test_what_is_not_given_scales_with_the_run():
    """Frames for rounds, updates for counts; two frames a step, two steps an update."""
    args = ne.Args()
    ne.scale_to_task(args)
    ne.scale_to_run(args)
    assert (args.total_timesteps, args.growth_end) == (1_100_000, 1_100_000)
    assert args.grow_interval == 11_000
    assert args.review_interval == 274  # of 274,000 updates
    counts = (550_000 - 4_000) // 4 // 274 - 1
    assert (1 - args.review_decay) ** counts == pytest.approx(args.review_floor)
    rounds = ne.growth_rounds(args)
    assert rounds == range(11_000, 1_100_000, 11_000)
    for rate, final in ((args.actor_grow_rate, 0.75), (args.critic_grow_rate, 0.95)):
        assert ne.planned_density(args, rate, 1_100_000) == pytest.approx(final, abs=0.01)


@pytest.mark.parametrize("what", [{"growth": "none"}, {"ne_actor": False}])
def test_nothing_is_solved_where_nothing_grows(what):
    args = make_args(initial_density=0.8, **what)
    ne.scale_to_run(args)
    assert args.actor_grow_rate == 0  # actor_final_density is 0.75
    assert (args.critic_grow_rate > 0) == (args.growth != "none")


def test_given_values_win():
    given = {"grow_interval": 50, "actor_grow_rate": 0.01, "critic_grow_rate": 0.02}
    given |= {"growth_end": 900, "review_interval": 7, "review_decay": 0.3}
    args = make_args(**given)
    for name, value in given.items():
        assert getattr(args, name) == value
    assert ne.growth_rounds(args) == range(150, 900, 50)


@pytest.mark.parametrize("repeat", [1, 3, 8])
def test_rounds_are_at_whole_agent_steps(repeat):
    args = make_args(total_timesteps=2_400, action_repeat=repeat)
    assert args.grow_interval % repeat == 0
    steps = range(repeat, 2_401, repeat)
    assert set(ne.growth_rounds(args)) <= set(steps)


@pytest.mark.parametrize(
    ("changes", "plan"),
    [
        ({}, "topology: actor 25% -> 75%, critic 25% -> 95% in 89 rounds, less what is pruned"),
        ({"ne_actor": False}, "topology: critic 25% -> 95% in 89 rounds, less what is pruned"),
        ({"growth": "none"}, "topology: stays at 25%"),
        ({"initial_density": 1.0}, "topology: dense, nothing to grow"),
        ({"ne_actor": False, "ne_critic": False}, "topology: dense, nothing to grow"),
        ({"grow_interval": 2_000}, "topology: stays at 25%"),
    ],
)
def test_the_plan_is_one_right_line(changes, plan):
    assert ne.growth_plan(make_args(**changes)) == plan


# --- review -------------------------------------------------------------------
@pytest.mark.parametrize("size", [16, 1_000, 1_024])
def test_the_review_counts_on_1024_transitions_by_nes_generator(size):
    agent, buffer = make_agent(batch_size=16)
    state = buffer.rng.get_state()
    ne_state = agent.ne_rng.get_state()
    hidden = ne.review_hidden(agent, buffer, buffer.new_batch(size))
    assert [h.shape[1] for h in hidden] == [32] * 4
    assert {len(h) for h in hidden} == {math.ceil(1_024 / size) * size}
    assert torch.equal(buffer.rng.get_state(), state)
    assert not torch.equal(agent.ne_rng.get_state(), ne_state)


def test_the_reviews_threshold():
    args = make_args(review_decay=0.1)
    progress = ne.Progress()
    assert ne.review_threshold(args, progress, 50, 100) == 1.0  # the first count
    progress.dormant = 50
    assert ne.review_threshold(args, progress, 50, 100) == pytest.approx(0.9)
    assert ne.review_threshold(args, progress, 60, 100) == pytest.approx(0.9)
    assert ne.review_threshold(args, progress, 25, 100) == pytest.approx(0.95)
    progress.epsilon = 0.66
    assert ne.review_threshold(args, progress, 50, 100) == 0.65
    args.review_rule = "level"
    assert ne.review_threshold(args, progress, 60, 100) == pytest.approx(0.4)
    args.review_floor = 1.0
    assert ne.review_threshold(args, progress, 60, 100) == 1.0


# --- combinations -------------------------------------------------------------
def test_reset_is_for_the_heads_only():
    agent, buffer = make_agent()
    progress = ne.Progress.of(agent)
    for _ in range(2):
        train(agent, buffer, 3)
        topology_round(agent, buffer, progress)
    before = copy.deepcopy(agent.state_dict())
    ne.reset(agent)
    for key, value in agent.state_dict().items():
        if key.endswith("weight"):
            assert torch.equal(value, before[key]) == ("heads" not in key), key
        if key.endswith("mask"):
            assert torch.equal(value, before[key]), key
    assert equal(values(agent.critic.heads), values(agent.target_critic.heads))
    for name, module in (("actor", agent.actor), ("critic", agent.critic)):
        state = agent.networks[name].optimizer.state
        for p in module.heads.parameters():
            assert not any(value.any() for value in state[p].values())
        for p in module.trunk.parameters():
            assert all(value.any() for value in state[p].values())
        for head in module.heads:
            for layer in head.layers:
                assert not layer.bias.any()
                assert torch.equal(layer.weight, layer.weight * layer.mask)
    for state in agent.encoder_optimizer.state.values():
        assert state["exp_avg"].any()


def test_redo_is_for_the_heads_only_and_stays_inside_the_masks():
    agent, buffer = make_agent(sparse_trunk=True)
    train(agent, buffer, 3)
    silence_some(agent)
    before = copy.deepcopy(agent)
    ne.redo(agent.args, agent, sample(buffer))
    for name in ("encoder", "target_critic"):
        assert equal(values(getattr(agent, name)), values(getattr(before, name)))
    for name in heads(agent):
        old_trunk = getattr(before, name).trunk
        assert equal(values(getattr(agent, name).trunk), values(old_trunk))
        for head, old in zip(heads(agent)[name], heads(before)[name], strict=True):
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


# --- CUDA ---------------------------------------------------------------------
def test_updates_read_no_values_and_stay_on_their_device(monkeypatch):
    """What a capture needs, seen on tensors without values: reading one raises."""
    args, buffer = make_agent(ne_actor=False, ne_critic=False)[0].args, make_agent()[1]
    shapes = [(x.shape, x.dtype) for x in buffer.new_batch(16)]
    monkeypatch.setattr(ne, "orthogonal", lambda module: None)
    with torch.device("meta"):
        agent = ne.Agent(args, 2, ne_seed=1, device=torch.device("meta"))
        batch = ne.Batch(*[torch.empty(shape, dtype=dtype) for shape, dtype in shapes])
    for clipped in (False, True):
        for layer in masked_layers(agent):
            layer.clipped = clipped
        losses = list(agent.update(batch).values())
        assert [loss.device.type for loss in losses] == ["meta"] * 3
    with pytest.raises(RuntimeError):
        losses[0].item()
    with pytest.raises(RuntimeError, match="device"):
        agent.update(batch._replace(noise=torch.zeros(16, 2, 2, device="cpu")))


def test_what_a_graph_reads_and_writes_stays_where_it_is():
    agent, buffer = make_agent()
    batch = sample(buffer)
    before = pixels.addresses(agent, batch)
    agent.update(batch)
    topology_round(agent, buffer, ne.Progress.of(agent))
    ne.redo(agent.args, agent, batch)
    ne.reset(agent)
    agent.stddev.fill_(0.5)
    buffer.sample(batch)
    agent.update(batch)
    assert pixels.addresses(agent, batch) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_agrees_with_eager_updates():
    torch.cuda.set_stream(torch.cuda.Stream())
    agents = []
    for cudagraphs in (False, True):
        agent, buffer = pixels.make_agent(ne, device="cuda", cudagraphs=cudagraphs)
        batch = sample(buffer)
        update = ne.fast_update(agent.args, agent, batch)
        progress = ne.Progress.of(agent)
        for number in range(1, 31):
            buffer.sample(batch)
            update(batch)
            if number % 10 == 0:
                topology_round(agent, buffer, progress)
        agents.append(agent)
    for one, two in zip(values(agents[0]), values(agents[1]), strict=True):
        assert torch.allclose(one, two, atol=1e-4)


def test_bf16_is_close_and_keeps_the_parameters_in_float32():
    losses = []
    for bf16 in (False, True):
        agent, buffer = make_agent(bf16=bf16)
        batch = sample(buffer)
        losses.append([value.item() for value in agent.update(batch).values()])
        assert all(p.dtype == torch.float32 for p in agent.parameters())
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05, abs=0.02)


@pytest.mark.slow
def test_compiled_updates_agree_with_eager_ones():
    agents = []
    for compiled in (False, True):
        agent, buffer = make_agent(compile=compiled)
        batch = buffer.new_batch(16)
        update = ne.fast_update(agent.args, agent, batch)
        progress = ne.Progress.of(agent)
        for number in range(1, 7):
            buffer.sample(batch)
            update(batch)
            if number == 3:
                topology_round(agent, buffer, progress)
        agents.append(agent)
    for one, two in zip(values(agents[0]), values(agents[1]), strict=True):
        assert torch.allclose(one, two, atol=1e-4)
