"""Continual learning: padding, action masks, growth, schedule, metrics."""

import functools

import gymnasium as gym
import numpy as np
import pytest
import torch

import fake_task
import ne_td3_continual as ne
from baselines import td3_continual as td3
from helpers import assert_updates_read_no_values, train

CPU = torch.device("cpu")
SCRIPTS = pytest.mark.parametrize("script", [ne, td3], ids=["ne", "td3"])


# --- padding ------------------------------------------------------------------
class Recorder(gym.Env):
    """Observations count up from 1, from 10 after a step; keeps its actions."""

    def __init__(self, n_obs: int, low: list[float], high: list[float]):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (n_obs,), np.float64)
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high))
        self.seen = []

    def reset(self, seed=None, options=None):
        return np.arange(1.0, 1 + len(self.observation_space.low)), {}

    def step(self, action):
        self.seen.append(action)
        obs, _ = self.reset()
        return obs * 10, 0.5, False, True, {"own": True}


def test_every_task_is_as_large_as_the_largest_and_reads_its_own_part():
    sizes = {"Wide-v0": (5, [-2], [2]), "Strong-v0": (2, [-1, 0, -8], [3, 10, -2])}
    for name, size in sizes.items():
        gym.register(name, functools.partial(Recorder, *size), disable_env_checker=True)
    try:
        envs = ne.make_envs(tuple(sizes))
    finally:
        for name in sizes:
            gym.registry.pop(name)
    assert [env.action_mask.tolist() for env in envs] == [[1, 0, 0], [1, 1, 1]]
    for env, expected in zip(envs, ([1, 2, 3, 4, 5], [1, 2, 0, 0, 0]), strict=True):
        assert env.observation_space.shape == (5,) and env.action_space.shape == (3,)
        assert env.action_mask.dtype == np.float32  # else actions would be float64
        obs, _ = env.reset(seed=0)
        assert obs.tolist() == expected
        for action in ([1.0, 1.0, 1.0], [-0.5, -1.0, 0.5]):
            after, reward, terminated, truncated, info = env.step(np.array(action, np.float32))
            assert after.tolist() == [10 * x for x in expected]
            assert (reward, terminated, truncated) == (0.5, False, True)
            assert info["own"] and info["episode"]["r"] == 0.5
            env.reset()
    assert np.allclose(envs[0].unwrapped.seen, [[2], [-1]])
    assert np.allclose(envs[1].unwrapped.seen, [[3, 10, -2], [0, 0, -3.5]])


# --- agents on transitions of two tasks ---------------------------------------
def make_agent(script, **changes):
    """A small agent (5 observations, 3 actions) and a buffer of 600 random rows of two tasks.

    The even rows are of a task with 2 observations and 1 action, the odd ones of a task
    with 5 and 3.
    """
    options = {"actor_hidden": (32, 24), "critic_hidden": (32, 24), "batch_size": 64}
    options |= {"tasks": ("Pendulum-v1", "Reacher-v5"), "cycles": 1, "steps_per_task": 500}
    args = script.Args(**options | {"learning_starts": 100} | changes)
    if script is ne:
        ne.scale_to_run(args)
    torch.manual_seed(0)
    agent = script.Agent(args, 5, 3, 1, CPU)
    buffer = script.ReplayBuffer(600, 5, 3, 2, CPU)
    data = torch.randn(600, 5 + 3 + 5 + 2 + 3, generator=torch.Generator().manual_seed(3))
    data[:, 5:8].clamp_(-1, 1)
    data[:, 14] = (data[:, 14] > 1).float()
    data[:, 15:] = 1.0
    data[::2, [2, 3, 4, 6, 7, 10, 11, 12, 16, 17]] = 0.0  # what the smaller task does not have
    buffer.data.copy_(data)
    buffer.size = 600
    return agent, buffer


def rows_of(batch: ne.Batch, actions: int) -> ne.Batch:
    """The transitions of the task with so many actions, and nothing else."""
    own = batch.action_mask.sum(1) == actions
    assert 10 < own.sum() < 60
    return ne.Batch(*(column[own] for column in batch))


def gradients(agent, name: str, batch) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Gradient of each parameter of "actor" or "critic"."""
    function = {"actor": agent.actor_gradients, "critic": agent.critic_gradients}[name]
    return dict(zip(agent.networks[name].params, function(batch)[-1], strict=True))


def test_a_transition_keeps_the_mask_of_its_task():
    _, buffer = make_agent(ne)
    batch = buffer.sample(64)
    small = batch.action_mask.sum(1) == 1
    assert 0 < small.sum() < 64 and (batch.action_mask[~small] == 1).all()
    for inputs in (batch.obs, batch.next_obs):
        assert not inputs[small][:, 2:].any() and inputs[~small].all()
    assert not batch.obs_actions[small][:, 6:].any() and batch.obs_actions[~small].all()

    buffer.position = 5
    buffer.clear()
    buffer.add(np.arange(5.0), np.arange(5.0, 8), np.arange(8.0, 13), 13, True, np.eye(3)[0])
    assert (buffer.size, buffer.position) == (1, 1)
    # obs | action | next obs | reward | terminated | mask
    assert buffer.data[0].tolist() == [*range(14), 1, 1, 0, 0]
    own = buffer.sample(64)
    assert (own.rows == buffer.data[0]).all()
    batch.copy_(own)  # as into a CUDA graph's
    for ours, theirs in zip(batch, own, strict=True):
        assert torch.equal(ours, theirs)


@SCRIPTS
def test_unused_action_outputs_get_no_gradient(script):
    agent, buffer = make_agent(script)
    train(agent, buffer, 20)
    batch = buffer.sample(64)
    small = rows_of(batch, 1)
    large = rows_of(batch, 3)
    head = agent.actor.layers[-1]
    for p in (head.weight, head.bias):
        gradient = gradients(agent, "actor", small)[p]
        assert gradient[0].any() and not gradient[1:].any()
        # of a mixed batch, the rows of the large task alone move outputs 1 and 2
        mixed = gradients(agent, "actor", batch)[p] * len(batch.obs)
        alone = gradients(agent, "actor", large)[p] * len(large.obs)
        assert torch.allclose(mixed[1:], alone[1:], atol=1e-5)
        assert alone[1].any() and alone[2].any()


@SCRIPTS
def test_targets_see_only_the_actions_of_the_transition_s_task(script):
    agent, buffer = make_agent(script)
    train(agent, buffer, 20)
    batch = buffer.sample(64)
    seen = []
    for critic in (agent.target_critic_1, agent.target_critic_2):
        critic.register_forward_pre_hook(lambda module, inputs: seen.append(*inputs))
    agent.critic_gradients(batch)
    assert len(seen) == 2
    noise = (batch.noise * 0.2).clamp(-0.5, 0.5)
    expected = (agent.target_actor(batch.next_obs) + noise).clamp(-1, 1)
    has = batch.action_mask == 1
    for x in seen:
        assert torch.equal(x[:, :5], batch.next_obs)
        assert torch.equal(x[:, 5:][has], expected[has])
        assert not x[:, 5:][~has].any()


@SCRIPTS
def test_updates_read_no_values_and_stay_on_their_device(script):
    with torch.device("meta"):
        dense = {"ne_actor": False, "ne_critic": False} if script is ne else {}
        agent = script.Agent(script.Args(**dense), 4, 2, 1, torch.device("meta"))
        rows, obs, obs_actions, action = (torch.empty(8, n) for n in (14, 4, 6, 2))
        column = torch.empty(8)
    batch = ne.Batch(rows, obs, obs_actions, obs, column, column, action, action)
    assert_updates_read_no_values(agent, batch, reads="action_mask")


# --- schedule -----------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "lengths"),
    [
        ({}, [250_000, 250_000, 250_000]),
        ({"steps_per_task": 700}, [700, 700, 700]),
        # time limits of Pendulum and Reacher, then a task that has none
        ({"episodes_per_task": 4}, [4 * 200, 4 * 50, 4 * 10_000]),
    ],
)
def test_the_length_of_a_run(changes, lengths):
    tasks = ("Pendulum-v1", "Reacher-v5", f"{fake_task.__name__}:Never-v0")
    args = ne.Args(tasks=tasks, cycles=3, **changes)
    assert args.task_lengths == lengths
    assert args.total_timesteps == 3 * sum(lengths)


def test_the_schedule_covers_the_whole_sequence():
    args = ne.Args(tasks=("Pendulum-v1", "Reacher-v5"), cycles=2, steps_per_task=5_000)
    args.learning_starts = 1_000
    ne.scale_to_run(args)
    assert args.growth_end == 20_000 and args.grow_interval == 200
    assert args.review_interval == 19
    rounds = [1_200 + 200 * n for n in range(94)]
    assert list(ne.growth_rounds(args)) == rounds
    assert ne.growth_plan(args) == "topology: 25% -> 95% in 94 rounds, less what is pruned"


# --- metrics ------------------------------------------------------------------
# return on A and on B: untrained, after A, after B, after A, after B
BY_HAND = [[-5.0, 10.0], [50.0, 14.0], [20.0, 80.0], [60.0, 30.0], [45.0, 90.0]]


def results(matrix: list[list[float]], tasks: list[str]) -> list[dict]:
    """Rows as in results.csv, with another evaluation in the middle of each stretch."""
    evaluations = [(0, 0, matrix[0])]  # (step, stretch, returns)
    for n, returns in enumerate(matrix[1:]):
        evaluations.append((100 * n + 50, n, [r - 1000 for r in returns]))
        evaluations.append((100 * n + 100, n, returns))
    rows = []
    for step, stretch, returns in evaluations:
        for task, value in zip(tasks, returns, strict=True):
            row = {"step": str(step), "cycle": str(1 + stretch // len(tasks))}
            row["task_trained"] = tasks[stretch % len(tasks)]
            row["task_evaluated"] = task
            row["eval/return_mean"] = str(value)
            rows.append(row)
    return rows


def test_metrics_by_hand():
    assert ne.continual_metrics(results(BY_HAND, ["A", "B"])) == {
        "average performance": {"A": 45, "B": 90, "mean": 67.5},
        # 60 after the second A, 45 at the end
        "forgetting": {"A": 15, "mean": 15},
        # 14 after the first A, 10 untrained
        "forward transfer": {"B": 4, "mean": 4},
    }
