"""Replay buffer with the review's oldest quarter, and the environment at the agent's boundary."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import ne_td3_continuous as ne


def filled(capacity: int, transitions: int, batch_size: int = 400) -> ne.ReplayBuffer:
    """A buffer whose n-th transition (from 0) holds the number n in every column but the last."""
    buffer = ne.ReplayBuffer(capacity, 3, 2, batch_size, seed=0, device=torch.device("cpu"))
    for n in range(transitions):
        buffer.add(np.full(3, n), np.full(2, n, dtype=np.float32), np.full(3, n), n, n % 2 == 0)
    return buffer


@pytest.mark.parametrize("transitions", [8, 50, 100, 101, 130, 199, 200, 350])
def test_review_samples_only_the_oldest_quarter(transitions):
    buffer = filled(100, transitions)
    kept = range(max(0, transitions - 100), transitions)
    oldest = set(list(kept)[: int(0.25 * len(kept))])
    assert {int(r) for r in buffer.sample(0.25).rewards} == oldest
    everything = {int(r) for _ in range(5) for r in buffer.sample().rewards}
    assert everything <= set(kept) and len(everything) > 0.95 * len(kept)


def test_a_batch_is_whole_transitions_in_their_columns():
    batch = filled(100, 130).sample()
    n = batch.rewards
    assert batch.obs.shape == (400, 3) and batch.obs_actions.shape == (400, 5) and batch.next_obs.shape == (400, 3)
    assert n.shape == batch.terminated.shape == (400,) and batch.noise.shape == (400, 2)
    for columns in (batch.obs, batch.obs_actions, batch.next_obs):
        assert torch.equal(columns, n[:, None].expand_as(columns))
    assert torch.equal(batch.terminated, (n % 2 == 0).float())


def test_batches_are_written_in_place_and_reproducible():
    buffer, same = filled(100, 60), filled(100, 60)
    first = buffer.sample()
    rewards = first.rewards.clone()
    assert torch.equal(same.sample().rewards, rewards)
    second = buffer.sample()
    assert first.rewards.data_ptr() == second.rewards.data_ptr() and not torch.equal(rewards, second.rewards)
    state = buffer.rng.get_state()
    buffer.sample(rng=torch.Generator().manual_seed(5))
    assert torch.equal(buffer.rng.get_state(), state)  # what NE draws does not shift the training batches


@pytest.mark.parametrize("transitions", [60, 100, 130])
def test_the_state_is_the_filled_part_and_restores(transitions):
    buffer = filled(100, transitions)
    buffer.sample()
    state = buffer.state_dict()
    assert len(state["filled"]) == min(transitions, 100)
    assert state["filled"].untyped_storage().nbytes() == state["filled"].numel() * 4  # not the whole ring's
    assert state["filled"].data_ptr() == buffer.data.data_ptr()  # nothing was copied
    other = filled(100, 3)
    other.load_state_dict(state)
    for copy in (buffer, other):
        copy.add(np.full(3, -1), np.full(2, -1, dtype=np.float32), np.full(3, -1), -1, False)
    assert torch.equal(other.sample().obs_actions, buffer.sample().obs_actions)


class Recorder(gym.Env):
    """Asymmetric action bounds; keeps what it was asked to do."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float64)
    action_space = gym.spaces.Box(np.array([-1.0, 0.0, -8.0]), np.array([3.0, 10.0, -2.0]), dtype=np.float64)

    def __init__(self, render_mode=None, obs=None, act=None):
        self.seen = []
        self.observation_space = obs or self.observation_space
        self.action_space = act or self.action_space

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.seen.append(action)
        return self.observation_space.sample(), 0.0, False, False, {}


@pytest.fixture
def register():
    """Registers the recorder under a fresh id with other spaces."""
    ids = []

    def new(**spaces) -> str:
        ids.append(f"Recorder{len(ids)}-v0")
        gym.register(ids[-1], lambda **kwargs: Recorder(**kwargs, **spaces), disable_env_checker=True)
        return ids[-1]

    yield new
    for env_id in ids:
        gym.registry.pop(env_id)


def test_asymmetric_bounds_are_rescaled(register):
    env = ne.make_env(register())
    env.reset(seed=0)
    for action in (-np.ones(3), np.zeros(3), np.ones(3), np.array([0.5, -0.5, 0.0])):
        env.step(action.astype(np.float32))
    expected = [[-1, 0, -8], [1, 5, -5], [3, 10, -2], [2, 2.5, -5]]
    assert np.allclose(env.unwrapped.seen, expected)


BOX = gym.spaces.Box
BAD_SPACES = [
    ({"act": gym.spaces.Discrete(3)}, "flat Box actions"),
    ({"act": BOX(-np.inf, np.inf, (2,))}, "finite bounds"),
    ({"act": BOX(-1, 1, (2, 2))}, "flat Box actions"),
    ({"obs": BOX(0, 255, (64, 64, 3), np.uint8)}, "flat Box observations"),
    ({"obs": gym.spaces.Dict({"a": BOX(-1, 1, (3,))})}, "flat Box observations"),
    ({"obs": gym.spaces.Discrete(5)}, "flat Box observations"),
]


@pytest.mark.parametrize(("spaces", "words"), BAD_SPACES, ids=[str(s) for s, _ in BAD_SPACES])
def test_other_spaces_are_refused(register, capsys, spaces, words):
    with pytest.raises(SystemExit) as stop:
        ne.make_env(register(**spaces))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: --env-id needs") and words in error
    assert all(str(space) in error for space in spaces.values())


def test_evaluation_is_deterministic_and_has_its_own_starts():
    torch.manual_seed(0)
    actor, env = ne.Actor([3, 16, 1], False), ne.make_env("Pendulum-v1")
    returns = ne.evaluate(actor, env, 3, seed=7)
    assert returns == ne.evaluate(actor, env, 3, seed=7) and len(set(returns)) == 3
    obs, _ = env.reset(seed=107)
    total, done = 0.0, False
    while not done:
        with torch.no_grad():
            action = torch.tanh(actor.layers[1](torch.relu(actor.layers[0](torch.tensor(obs).float()[None]))))
        obs, reward, terminated, truncated, _ = env.step(action[0].numpy())
        total, done = total + reward, terminated or truncated
    assert returns[0] == pytest.approx(total)
