"""Continual learning: padding, action masks, metrics and the passages that both scripts share with the others."""

import copy
import inspect
import math

import gymnasium as gym
import numpy as np
import pytest
import torch

import ne_td3_continual as ne
import ne_td3_continuous
import td3_continual as td3
import td3_continuous
import utils_topology as topology
from helpers import assert_updates_read_no_values, train

CPU = torch.device("cpu")
SCRIPTS = pytest.mark.parametrize("script", [ne, td3], ids=["ne", "td3"])


# --- padding ----------------------------------------------------------------------------------------------------------
class Recorder(gym.Env):
    """Observations count up from 1; keeps what it was asked to do."""

    def __init__(self, n_obs: int, low: list[float], high: list[float], dtype=np.float64, render_mode=None):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (n_obs,), dtype)
        self.action_space = gym.spaces.Box(np.array(low, np.float32), np.array(high, np.float32), dtype=np.float32)
        self.seen = []

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.arange(1, 1 + len(self.observation_space.low), dtype=self.observation_space.dtype), {}

    def step(self, action):
        self.seen.append(action)
        return self.reset()[0] * 10, 0.5, False, True, {"own": True}


@pytest.fixture
def register():
    """Registers an environment under a fresh id."""
    ids = []

    def new(make) -> str:
        ids.append(f"Recorder{len(ids)}-v0")
        gym.register(ids[-1], make, disable_env_checker=True)
        return ids[-1]

    yield new
    for env_id in ids:
        gym.registry.pop(env_id)


@SCRIPTS
def test_every_task_is_as_large_as_the_largest_and_reads_its_own_part(script, register):
    wide = register(lambda **kwargs: Recorder(5, [-2.0], [2.0], np.float32, **kwargs))
    strong = register(lambda **kwargs: Recorder(2, [-1.0, 0.0, -8.0], [3.0, 10.0, -2.0], **kwargs))
    envs, masks = script.make_tasks((wide, strong))
    assert [env.observation_space.shape for env in envs] == [(5,), (5,)]
    assert [env.action_space.shape for env in envs] == [(3,), (3,)]
    assert masks.dtype == np.float32 and masks.tolist() == [[1, 0, 0], [1, 1, 1]]
    for env, obs in zip(envs, ([1, 2, 3, 4, 5], [1, 2, 0, 0, 0]), strict=True):
        assert env.reset(seed=0)[0].tolist() == obs
        for action in ([1.0, 1.0, 1.0], [-0.5, -1.0, 0.5]):
            after, reward, terminated, truncated, info = env.step(np.array(action, dtype=np.float32))
            assert after.tolist() == [10 * x for x in obs]
            assert (reward, terminated, truncated) == (0.5, False, True) and info == {"own": True}
    assert np.allclose(envs[0].unwrapped.seen, [[2], [-1]])
    assert np.allclose(envs[1].unwrapped.seen, [[3, 10, -2], [0, 0, -3.5]])


BOX = gym.spaces.Box
BAD_SPACES = [
    {"action_space": gym.spaces.Discrete(3)},
    {"action_space": BOX(-np.inf, np.inf, (2,))},
    {"action_space": BOX(-1, 1, (2, 2))},
    {"observation_space": BOX(0, 255, (64, 64, 3), np.uint8)},
    {"observation_space": gym.spaces.Dict({"a": BOX(-1, 1, (3,))})},
    {"observation_space": gym.spaces.Discrete(5)},
]


@SCRIPTS
@pytest.mark.parametrize("spaces", BAD_SPACES, ids=str)
def test_other_spaces_are_refused_anywhere_in_the_sequence(script, register, capsys, spaces):
    def make(**kwargs) -> Recorder:
        env = Recorder(3, [-1.0], [1.0], **kwargs)
        vars(env).update(spaces)
        return env

    with pytest.raises(SystemExit) as stop:
        script.make_tasks(("Pendulum-v1", register(make)))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: --tasks needs flat Box") and error.count("\n") == 1
    assert all(str(space) in error for space in spaces.values())


# --- action masks -----------------------------------------------------------------------------------------------------
def make_agent(script, device: torch.device = CPU, **changes):
    """A small agent (5 observations, 3 actions) and a buffer with 600 random transitions of two tasks.

    The even rows are of a task with 2 observations and 1 action, the odd ones of a task with 5 and 3.
    """
    options = {"actor_hidden": (32, 24), "critic_hidden": (32, 24), "batch_size": 64, "steps_per_task": 100}
    args = script.Args(**options | changes)
    torch.manual_seed(0)
    agent = script.Agent(args, 5, 3, *([1] if script is ne else []), device=device)
    buffer = script.ReplayBuffer(600, 5, 3, args.batch_size, seed=2, device=device)
    data = torch.randn(600, 5 + 3 + 5 + 2 + 3, generator=torch.Generator().manual_seed(3))
    data[:, 5:8].clamp_(-1, 1)
    data[:, 14] = (data[:, 14] > 1).float()
    data[:, 15:] = 1.0
    data[::2, [2, 3, 4, 6, 7, 10, 11, 12, 16, 17]] = 0.0  # what the smaller task does not have
    buffer.data.copy_(data)
    buffer.size = 600
    return agent, buffer


def topology_round(agent: ne.Agent, batch: ne.Batch, update: int) -> dict:
    return ne.topology_round(agent, batch, 100, 0.3)


def rows_of(batch, actions: int):
    """The transitions of the task with so many actions, and nothing else."""
    own = batch.mask.sum(1) == actions
    assert 10 < own.sum() < 60
    return type(batch)(*(column[own] for column in batch))


@SCRIPTS
def test_a_transition_keeps_the_mask_of_its_task(script):
    _, buffer = make_agent(script)
    obs, action, next_obs, mask = np.arange(5.0), np.arange(5.0, 8), np.arange(8.0, 13), np.array([1.0, 0.0, 0.0])
    buffer.add(obs, action, next_obs, 13.0, True, mask)
    assert buffer.data[0].tolist() == [*range(14), 1, 1, 0, 0]  # obs | action | next obs | reward | terminated | mask
    buffer.add(obs, action, next_obs, 13.0, False, np.ones(3))
    assert buffer.data[1].tolist() == [*range(14), 0, 1, 1, 1]
    _, buffer = make_agent(script)
    batch = buffer.sample()
    small = batch.mask.sum(1) == 1
    assert set(batch.mask.sum(1).tolist()) == {1, 3} and (batch.mask[:, 0] == 1).all()
    for inputs in (batch.obs, batch.next_obs):
        assert not inputs[small][:, 2:].any() and inputs[~small].all()
    assert not batch.obs_actions[small][:, 6:].any() and batch.obs_actions[~small].all()


@SCRIPTS
def test_unused_action_outputs_get_no_gradient(script):
    agent, buffer = make_agent(script)
    train(agent, buffer, 20)
    batch = buffer.sample()
    head = [agent.actor.layers[-1].weight, agent.actor.layers[-1].bias]
    small, large = rows_of(batch, 1), rows_of(batch, 3)
    for gradient in torch.autograd.grad(agent.actor_loss(small), head):
        assert gradient[0].any() and not gradient[1:].any()
    mixed = torch.autograd.grad(agent.actor_loss(batch), head)
    alone = torch.autograd.grad(agent.actor_loss(large), head)
    for ours, theirs in zip(mixed, alone, strict=True):  # the rows of the large task alone move outputs 1 and 2
        assert torch.allclose(ours[1:] * len(batch.obs), theirs[1:] * len(large.obs), atol=1e-5)
        assert theirs[1].any() and theirs[2].any()


@SCRIPTS
def test_padded_inputs_get_no_gradient(script):
    agent, buffer = make_agent(script, **({"initial_density": 1.0} if script is ne else {}))
    small = rows_of(buffer.sample(), 1)
    actor = torch.autograd.grad(agent.actor_loss(small), agent.actor.layers[0].weight)[0]
    assert actor[:, :2].any() and not actor[:, 2:].any()
    for gradient in torch.autograd.grad(agent.critic_loss(small)[0], [q.layers[0].weight for q in agent.critic]):
        assert gradient[:, [0, 1, 5]].any() and not gradient[:, [2, 3, 4, 6, 7]].any()


@SCRIPTS
def test_targets_see_only_the_actions_of_the_transition_s_task(script):
    agent, buffer = make_agent(script)
    train(agent, buffer, 20)
    batch = buffer.sample()
    seen = []
    for critic in agent.target_critic:
        critic.forward = lambda x, forward=critic.forward: seen.append(x) or forward(x)
    agent.critic_loss(batch)
    assert len(seen) == 2
    noise = (batch.noise * 0.2).clamp(-0.5, 0.5)
    expected = (agent.target_actor(batch.next_obs) + noise).clamp(-1, 1)
    for x in seen:
        assert torch.equal(x[:, :5], batch.next_obs)
        assert torch.equal(x[:, 5:][batch.mask == 1], expected[batch.mask == 1])
        assert not x[:, 5:][batch.mask == 0].any()


# --- Reset ------------------------------------------------------------------------------------------------------------
def test_reset_starts_everything_anew_but_the_buffer():
    agent, buffer = make_agent(td3)
    train(agent, buffer, 40)
    weights, data = [p.clone() for p in agent.online], buffer.data.clone()
    td3.reset(agent)
    for p, target, was in zip(agent.online, agent.targets, weights, strict=True):
        assert torch.equal(p, target) and (p != was).all()
    for layer in (layer for mlp in (agent.actor, *agent.critic) for layer in mlp.layers):
        assert max(layer.weight.abs().max(), layer.bias.abs().max()) <= layer.in_features**-0.5
    assert not torch.equal(agent.critic[0].layers[0].weight, agent.critic[1].layers[0].weight)
    moments = [t for adam in agent.optimizers.values() for state in adam.state.values() for t in state.values()]
    assert len(moments) == 3 * len(agent.online) and not any(t.any() for t in moments)
    assert torch.equal(buffer.data, data) and buffer.size == 600


# --- schedule and metrics ---------------------------------------------------------------------------------------------
@SCRIPTS
def test_the_length_of_a_run(script):
    args = script.Args(tasks=("Pendulum-v1", "Reacher-v5"), cycles=3, steps_per_task=700)
    assert args.total_timesteps == 2 * 3 * 700
    args = script.Args(tasks=("Pendulum-v1", "Reacher-v5"), cycles=3, episodes_per_task=4)
    assert args.total_timesteps == 3 * 4 * (200 + 50)  # Pendulum's and Reacher's time limits


def test_planned_densities_are_those_of_the_schedule():
    args = ne.Args(cycles=2, tasks=("Pendulum-v1", "Reacher-v5"), steps_per_task=50_000)
    rounds, alpha, _ = topology.growth_schedule(args)
    line = topology.planned_densities(args, rounds, alpha, ("A", "B", "A", "B"))
    inactive, expected = 0.75, {0: 0.25}
    for step in range(30_000, 200_000, 10_000):
        inactive *= 1 - alpha / 2 * (1 + math.cos(math.pi * step / 200_000))
        expected[step] = 1 - inactive
    numbers = (expected[0], expected[50_000], expected[100_000], expected[150_000])
    assert line == "\ndensity at the start: " + ", ".join(f"{n} {x:.0%}" for n, x in zip("ABAB", numbers, strict=True))
    assert 0.25 < numbers[1] < numbers[2] < numbers[3] < 0.95
    assert topology.planned_densities(args, rounds, 0.0, ("A", "B")) == ""


# return on A and on B: untrained, after A, after B, after A, after B
BY_HAND = [[-5.0, 10.0], [50.0, 14.0], [20.0, 80.0], [60.0, 30.0], [45.0, 90.0]]


def results(matrix: list[list[float]], tasks: str) -> list[dict]:
    """Rows as in results.csv: strings, one per task, with another evaluation in the middle of each stretch."""
    rows = []
    for n, returns in enumerate(matrix):
        stretch = max(n - 1, 0)
        middle = [(100 * n - 50, [r - 1000 for r in returns])] if n else []
        for step, values in [*middle, (100 * n, returns)]:
            for task, value in zip(tasks, values, strict=True):
                trained = {"cycle": str(1 + stretch // len(tasks)), "task_trained": tasks[stretch % len(tasks)]}
                rows.append({"step": str(step), "task_evaluated": task, "eval/return_mean": str(value)} | trained)
    return rows


@SCRIPTS
def test_metrics_by_hand(script):
    assert script.continual_metrics(results(BY_HAND, "AB")) == {
        "average performance": {"A": 45, "B": 90, "mean": 67.5},
        "forgetting": {"A": 15, "mean": 15},  # 60 after the second A, 45 at the end
        "forward transfer": {"B": 4, "mean": 4},  # 14 after the first A, 10 untrained
    }
    three = [[20.0, 1.0, 2.0], [9.0, 4.0, 3.0], [7.0, 8.0, 12.0], [5.0, 9.0, 30.0]]
    assert script.continual_metrics(results(three, "ABC")) == {
        "average performance": {"A": 5, "B": 9, "C": 30, "mean": pytest.approx(44 / 3)},
        "forgetting": {"A": 4, "B": -1, "mean": 1.5},
        "forward transfer": {"B": 3, "C": 10, "mean": 6.5},
    }


@SCRIPTS
def test_metrics_of_a_single_task(script):
    table = script.continual_metrics(results([[1.0], [2.0]], "A"))
    assert table["average performance"] == {"A": 2, "mean": 2}
    for name in ("forgetting", "forward transfer"):
        assert list(table[name]) == ["mean"] and math.isnan(table[name]["mean"])


# --- memory -----------------------------------------------------------------------------------------------------------
@SCRIPTS
def test_a_buffer_that_does_not_fit_is_refused(script, monkeypatch, capsys):
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**18}  # 1 GiB
    monkeypatch.setattr(script.os, "sysconf", pages.__getitem__)
    with pytest.raises(SystemExit) as stop:
        script.ReplayBuffer(1_000_000, 348, 17, 256, 0, CPU)
    assert stop.value.code == 2
    needed = 1_000_000 * (2 * 348 + 2 * 17 + 2) * 4 / 2**30
    expected = f"error: --buffer-size must fit in memory (1.0 GiB), got 1000000 ({needed:.1f} GiB)\n"
    assert capsys.readouterr().err == expected and "(2.7 GiB)" in expected
    assert script.ReplayBuffer(300_000, 348, 17, 256, 0, CPU).data.shape == (300_000, 732)


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_scaled_networks_are_those_of_the_other_ne_script(scale):
    ours = ne.Agent(ne.Args(scale=scale), 17, 6, 0, CPU)
    theirs = ne_td3_continuous.Agent(ne_td3_continuous.Args(scale=scale), 17, 6, 0, CPU)
    shapes = [{name: value.shape for name, value in agent.state_dict().items()} for agent in (ours, theirs)]
    assert shapes[0] == shapes[1] and len(ours.actor.layers) == 3 + max(scale - 2, 0) + (scale > 1)


# --- what the scripts share -------------------------------------------------------------------------------------------
SHARED = "die compile_gradients evaluate save_checkpoint Actor.forward Actor.act Critic.forward".split()
SHARED_NE = ["review_threshold", "Agent.hidden", "Agent.update_critic", "Agent.update_actor"]
SHARED_NE += ["Agent.critic_gradients", "Agent.actor_gradients", "ReplayBuffer.sample", "ReplayBuffer.state_dict"]
SHARED_TD3 = [
    "Actor",
    "Critic",
    "CudaGraph",
    "Linear",
    "adam_step",
    "dormancy_scores",
    "metrics",
    "Agent.update_critic",
    "Agent.update_actor",
]


def source(module, name: str) -> str:
    for part in name.split("."):
        module = getattr(module, part)
    return inspect.getsource(module)


def test_shared_passages_are_the_same_line_for_line():
    for name in SHARED + SHARED_NE:
        assert source(ne, name) == source(ne_td3_continuous, name), name
    for name in SHARED + SHARED_TD3:
        assert source(td3, name) == source(td3_continuous, name), name
    for name in (
        "make_tasks",
        "Batch",
        "ReplayBuffer.add",
        "Agent.critic_loss",
        "Agent.actor_loss",
        "continual_metrics",
    ):
        assert source(ne, name) == source(td3, name), name


def test_the_round_is_that_of_the_other_ne_script():
    theirs = (
        source(ne_td3_continuous, "topology_round").replace("topology.", "").replace(": Agent, batch: Batch", ", batch")
    )
    assert source(topology, "topology_round") == theirs


# --- CUDA -------------------------------------------------------------------------------------------------------------
@SCRIPTS
def test_updates_read_no_values_and_stay_on_their_device(script, monkeypatch):
    monkeypatch.setattr(topology, "apply_masks", lambda layers, targets: None)  # only between updates, may read
    meta = torch.device("meta")
    with meta:
        options = {"ne_actor": False, "ne_critic": False} if script is ne else {}
        agent = script.Agent(script.Args(**options), 4, 2, *([1] if script is ne else []), device=meta)
        obs, obs_actions, action, column = torch.empty(8, 4), torch.empty(8, 6), torch.empty(8, 2), torch.empty(8)
    batch = script.Batch(obs, obs_actions, obs, column, column, action, action)
    assert_updates_read_no_values(agent, batch, reads="mask")


@SCRIPTS
def test_what_a_graph_reads_and_writes_stays_where_it_is(script):
    agent, buffer = make_agent(script)

    def addresses() -> list[int]:
        moments = [t for adam in agent.optimizers.values() for state in adam.state.values() for t in state.values()]
        return [t.data_ptr() for t in (*agent.state_dict().values(), *moments, *buffer.batch)]

    before = addresses()
    train(agent, buffer, 20, topology_round, rounds=2 if script is ne else 0)
    if script is td3:
        td3.reset(agent)
    buffer.position = buffer.size = 0
    buffer.add(np.ones(5), np.ones(3), np.ones(5), 1.0, False, np.ones(3))
    train(agent, buffer, 4)
    assert addresses() == before


@SCRIPTS
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_agree_with_eager_over_batches_of_several_tasks(script):
    torch.cuda.set_stream(torch.cuda.Stream())
    agents = []
    for graphs in (False, True):
        agent, buffer = make_agent(script, torch.device("cuda"))
        if graphs:
            agent.update_critic = script.CudaGraph(agent.update_critic)
            agent.update_actor = script.CudaGraph(agent.update_actor)
        train(agent, buffer, 100, topology_round, rounds=4 if script is ne else 0)
        if script is td3:
            torch.manual_seed(5)
            td3.reset(agent)
        train(agent, buffer, 100)
        agents.append(agent)
    for (name, eager), graph in zip(agents[0].state_dict().items(), agents[1].state_dict().values(), strict=True):
        if torch.is_tensor(eager):
            assert torch.allclose(eager.float(), graph.float(), atol=1e-4), name


@pytest.mark.slow
@SCRIPTS
def test_compiled_gradients_are_those_of_the_eager_agent(script, monkeypatch):
    monkeypatch.setattr(torch.compiler, "set_stance", lambda **_: None)  # it would stay set for the tests to come
    agent, buffer = make_agent(script)
    train(agent, buffer, 20)
    eager = copy.deepcopy(agent)
    script.compile_gradients(agent, buffer.batch)
    batch = buffer.sample()
    for ours, theirs in (
        (agent.critic_gradients(batch), eager.critic_gradients(batch)),
        (agent.actor_gradients(batch), eager.actor_gradients(batch)),
    ):
        for a, b in zip(ours[-1], theirs[-1], strict=True):
            assert torch.allclose(a, b, atol=1e-5) and (a.any() or not b.any())
