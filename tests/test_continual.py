"""Continual learning: padding, action masks, growth, reset, schedule, metrics."""

import copy
import csv
import inspect
import math
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import fake_task  # noqa: F401, registers tasks
import ne_td3_continual as ne
import ne_td3_continuous
from baselines import td3_continual as td3
from helpers import assert_updates_read_no_values, equal, none_equal, sample, train, values

CPU = torch.device("cpu")
SCRIPTS = pytest.mark.parametrize("script", [ne, td3], ids=["ne", "td3"])


# --- padding ------------------------------------------------------------------
class Recorder(gym.Env):
    """Observations count up from 1; keeps what it was asked to do."""

    def __init__(self, n_obs: int, low: list[float], high: list[float]):
        low = np.array(low, np.float32)
        high = np.array(high, np.float32)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (n_obs,), np.float64)
        self.action_space = gym.spaces.Box(low, high)
        self.seen = []

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.arange(1.0, 1 + len(self.observation_space.low)), {}

    def step(self, action):
        self.seen.append(action)
        obs, _ = self.reset()
        return obs * 10, 0.5, False, True, {"own": True}


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


def make_envs(*tasks: str) -> list[ne.PaddedEnv]:
    return ne.make_envs(ne.Args(tasks=tasks))


def test_every_task_is_as_large_as_the_largest_and_reads_its_own_part(register):
    wide = register(lambda: Recorder(5, [-2.0], [2.0]))
    strong = register(lambda: Recorder(2, [-1.0, 0.0, -8.0], [3.0, 10.0, -2.0]))
    envs = make_envs(wide, strong)
    assert [(env.n_obs, env.n_act) for env in envs] == [(5, 3), (5, 3)]
    assert [env.action_mask.tolist() for env in envs] == [[1, 0, 0], [1, 1, 1]]
    assert envs[0].action_mask.dtype == np.float32
    for env, expected in zip(envs, ([1, 2, 3, 4, 5], [1, 2, 0, 0, 0]), strict=True):
        obs, _ = env.reset(seed=0)
        assert obs.tolist() == expected and obs.dtype == np.float32
        for action in ([1.0, 1.0, 1.0], [-0.5, -1.0, 0.5]):
            after, reward, terminated, truncated, info = env.step(np.array(action, np.float32))
            assert after.tolist() == [10 * x for x in expected]
            assert (reward, terminated, truncated) == (0.5, False, True)
            assert info == {"own": True}
    assert np.allclose(envs[0].unwrapped.seen, [[2], [-1]])
    assert np.allclose(envs[1].unwrapped.seen, [[3, 10, -2], [0, 0, -3.5]])


BOX = gym.spaces.Box
FLAT = "--tasks must have flat Boxes of floats"
BOUNDS = "--tasks must have actions between finite bounds"
BAD_SPACES = [
    ({"action_space": gym.spaces.Discrete(3)}, FLAT),
    ({"action_space": BOX(-1, 1, (2,), np.int64)}, FLAT),
    ({"action_space": BOX(-1, 1, (2, 2))}, FLAT),
    ({"action_space": BOX(-np.inf, np.inf, (2,))}, BOUNDS),
    ({"action_space": BOX(0.5, 0.5, (2,))}, BOUNDS),
    ({"observation_space": BOX(0, 255, (64, 64, 3), np.uint8)}, FLAT),
    ({"observation_space": BOX(0, 255, (3,), np.uint8)}, FLAT),
    ({"observation_space": gym.spaces.Dict({"a": BOX(-1, 1, (3,))})}, FLAT),
    ({"observation_space": gym.spaces.Discrete(5)}, FLAT),
]


@pytest.mark.parametrize(("spaces", "words"), BAD_SPACES, ids=str)
def test_other_spaces_are_refused_anywhere_in_the_sequence(register, capsys, spaces, words):
    def make() -> Recorder:
        env = Recorder(3, [-1.0], [1.0])
        vars(env).update(spaces)
        return env

    with pytest.raises(SystemExit) as stop:
        make_envs("Pendulum-v1", register(make))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"error: {words}") and error.count("\n") == 1
    assert str(*spaces.values()) in error


def test_memory_that_an_environment_owns_is_copied():
    env = make_envs("fake_task:SameArray-v0", "Reacher-v5")[0]
    first, _ = env.reset(seed=0)
    kept = first.copy()
    second = env.step(np.ones(2, dtype=np.float32))[0]
    assert np.array_equal(first, kept) and not np.array_equal(first, second)


def test_actions_stay_within_the_bounds_of_their_task():
    env = make_envs("fake_task:Strict-v0", "Ant-v5")[0]
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    for _ in range(300):
        env.step(rng.choice([-1.0, 1.0], env.n_act).astype(np.float32))


def test_an_episode_without_end_is_cut_off():
    args = ne.Args(tasks=("fake_task:Never-v0", "Pendulum-v1"), max_episode_steps=30)
    env = ne.make_envs(args)[0]
    env.reset(seed=0)
    cut = [env.step(np.zeros(2, dtype=np.float32))[3] for _ in range(30)]
    assert cut == [False] * 29 + [True]


# --- agents on transitions of two tasks ---------------------------------------
def new_agent(script, args, n_obs: int, n_act: int, device=CPU):
    if script is ne:
        return ne.Agent(args, n_obs, n_act, ne_seed=1, device=device)
    return td3.Agent(args, n_obs, n_act, device)


def make_agent(script, device=CPU, **changes):
    """A small agent (5 observations, 3 actions) and a buffer of 600 random rows of two tasks.

    The even rows are of a task with 2 observations and 1 action, the odd ones of a task
    with 5 and 3.
    """
    options = {"actor_hidden": (32, 24), "critic_hidden": (32, 24), "batch_size": 64}
    options |= {"tasks": ("Pendulum-v1", "Reacher-v5"), "cycles": 1, "steps_per_task": 500}
    options |= {"learning_starts": 100}
    args = script.Args(**options | changes)
    if script is ne:
        ne.scale_to_run(args)
    torch.manual_seed(0)
    agent = new_agent(script, args, 5, 3, device)
    buffer = script.ReplayBuffer(600, 5, 3, 2, device)
    data = torch.randn(600, 5 + 3 + 5 + 2 + 3, generator=torch.Generator().manual_seed(3))
    data[:, 5:8].clamp_(-1, 1)
    data[:, 14] = (data[:, 14] > 1).float()
    data[:, 15:] = 1.0
    data[::2, [2, 3, 4, 6, 7, 10, 11, 12, 16, 17]] = 0.0  # what the smaller task does not have
    buffer.data.copy_(data)
    buffer.size = 600
    return agent, buffer


def topology_round(agent: ne.Agent, batch: ne.Batch, update: int) -> None:
    """A round with a large share of births, without an account of them."""
    args = copy.copy(agent.args)
    args.grow_rate = 0.3
    ne.topology_round(args, agent, batch, ne.Progress.of(agent), step=100)


def rows_of(batch, actions: int):
    """The transitions of the task with so many actions, and nothing else."""
    own = batch.action_mask.sum(1) == actions
    assert 10 < own.sum() < 60
    return type(batch)(*(column[own] for column in batch))


def gradients(agent, name: str, batch) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Gradient of each parameter of "actor" or "critic"."""
    function = {"actor": agent.actor_gradients, "critic": agent.critic_gradients}[name]
    return dict(zip(agent.networks[name].params, function(batch)[-1], strict=True))


def test_a_transition_keeps_the_mask_of_its_task():
    _, buffer = make_agent(ne)
    obs = np.arange(5.0)
    action = np.arange(5.0, 8)
    next_obs = np.arange(8.0, 13)
    buffer.add(obs, action, next_obs, 13.0, True, np.array([1.0, 0.0, 0.0]))
    # obs | action | next obs | reward | terminated | mask
    assert buffer.data[0].tolist() == [*range(14), 1, 1, 0, 0]
    buffer.add(obs, action, next_obs, 13.0, False, np.ones(3))
    assert buffer.data[1].tolist() == [*range(14), 0, 1, 1, 1]
    _, buffer = make_agent(ne)
    batch = sample(buffer)
    small = batch.action_mask.sum(1) == 1
    assert set(batch.action_mask.sum(1).tolist()) == {1, 3}
    assert (batch.action_mask[:, 0] == 1).all()
    for inputs in (batch.obs, batch.next_obs):
        assert not inputs[small][:, 2:].any() and inputs[~small].all()
    assert not batch.obs_actions[small][:, 6:].any() and batch.obs_actions[~small].all()


def test_a_cleared_buffer_starts_at_its_beginning():
    _, buffer = make_agent(ne)
    buffer.clear()
    buffer.add(np.ones(5), np.ones(3), np.ones(5), 1.0, False, np.ones(3))
    assert (buffer.size, buffer.position) == (1, 1)
    assert (sample(buffer).rows == buffer.data[0]).all()


@SCRIPTS
def test_unused_action_outputs_get_no_gradient(script):
    agent, buffer = make_agent(script)
    train(agent, buffer, 20)
    batch = sample(buffer)
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
def test_padded_inputs_get_no_gradient(script):
    dense = {"initial_density": 1.0} if script is ne else {}
    agent, buffer = make_agent(script, **dense)
    small = rows_of(sample(buffer), 1)
    actor = gradients(agent, "actor", small)[agent.actor.layers[0].weight]
    assert actor[:, :2].any() and not actor[:, 2:].any()
    critics = gradients(agent, "critic", small)
    for critic in (agent.critic_1, agent.critic_2):
        gradient = critics[critic.layers[0].weight]
        assert gradient[:, [0, 1, 5]].any() and not gradient[:, [2, 3, 4, 6, 7]].any()


@SCRIPTS
def test_targets_see_only_the_actions_of_the_transition_s_task(script):
    agent, buffer = make_agent(script)
    train(agent, buffer, 20)
    batch = sample(buffer)
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


# --- growth -------------------------------------------------------------------
def padded_masks(agent: ne.Agent) -> list[torch.Tensor]:
    """Masks of what the small task does not use: inputs, and outputs of the actor."""
    masks = [agent.actor.layers[0].mask[:, 2:], agent.actor.layers[-1].mask[1:]]
    for critic in (agent.critic_1, agent.critic_2):
        masks.append(critic.layers[0].mask[:, [2, 3, 4, 6, 7]])
    return [mask.clone() for mask in masks]


def test_growth_gives_no_padded_input_a_connection_before_its_task_comes():
    agent, buffer = make_agent(ne, prune=False)
    both_tasks = buffer.data.clone()
    buffer.data[1::2] = buffer.data[::2]  # the small task only
    before = padded_masks(agent)
    train(agent, buffer, 120, topology_round, rounds=30)
    assert equal(padded_masks(agent), before)
    # hardly any connection is left that could learn, hence there was much to choose from
    batch = sample(buffer)
    for name, network in agent.networks.items():
        gradient_of = gradients(agent, name, batch)
        for layer in network.layers:
            candidates = (layer.mask == 0) & (gradient_of[layer.weight] != 0)
            assert candidates.float().mean() < 0.05
    buffer.data.copy_(both_tasks)
    train(agent, buffer, 120, topology_round, rounds=30)
    for was, mask in zip(before, padded_masks(agent), strict=True):
        assert mask.sum() > was.sum()


def test_what_is_born_is_counted_among_what_can_learn():
    agent, buffer = make_agent(ne, prune=False, grow_rate=0.1)
    buffer.data[1::2] = buffer.data[::2]
    progress = ne.Progress.of(agent)
    batch = sample(buffer)
    first = agent.actor.layers[0]
    gradient = gradients(agent, "actor", batch)[first.weight]
    candidates = (first.mask == 0) & (gradient != 0)
    before = first.mask.sum()
    ne.topology_round(agent.args, agent, batch, progress, step=100)
    fraction = ne.growth_fraction(agent.args, 100)
    assert first.mask.sum() - before == math.ceil(fraction * candidates.sum())
    assert 0 < progress.grown["actor"][0] < progress.planned["actor"][0]


# --- reset --------------------------------------------------------------------
def adam_states(agent) -> list[torch.Tensor]:
    tensors = []
    for network in agent.networks.values():
        for state in network.optimizer.state.values():
            tensors += state.values()
    return tensors


def test_reset_starts_everything_anew_but_the_buffer():
    agent, buffer = make_agent(td3, method="reset")
    train(agent, buffer, 40)
    before = values(agent)
    data = buffer.data.clone()
    td3.reset(agent)
    assert none_equal(values(agent), before)
    assert equal(values(agent.actor), values(agent.target_actor))
    assert equal(values(agent.critic_1), values(agent.target_critic_1))
    assert equal(values(agent.critic_2), values(agent.target_critic_2))
    assert none_equal(values(agent.critic_1), values(agent.critic_2))
    assert not any(tensor.any() for tensor in adam_states(agent))
    assert torch.equal(buffer.data, data) and buffer.size == 600


# --- schedule -----------------------------------------------------------------
def lengths(script, **changes) -> list[int]:
    args = script.Args(tasks=("Pendulum-v1", "Reacher-v5"), cycles=3, **changes)
    script.set_length(args)
    assert args.total_timesteps == 3 * sum(args.task_lengths)
    return args.task_lengths


@SCRIPTS
def test_the_length_of_a_run(script):
    assert lengths(script) == [250_000, 250_000]
    assert lengths(script, steps_per_task=700) == [700, 700]
    # time limits of Pendulum and Reacher, then one that is shorter
    assert lengths(script, episodes_per_task=4) == [4 * 200, 4 * 50]
    assert lengths(script, episodes_per_task=4, max_episode_steps=60) == [4 * 60, 4 * 50]


def test_a_task_without_a_time_limit_is_as_long_as_what_cuts_its_episodes_off():
    args = ne.Args(tasks=("fake_task:Plain-v0",), episodes_per_task=2, max_episode_steps=30)
    args.cycles = 5
    assert args.total_timesteps == 5 * 2 * 30


def test_the_schedule_covers_the_whole_sequence():
    args = ne.Args(tasks=("Pendulum-v1", "Reacher-v5"), cycles=2, steps_per_task=5_000)
    args.learning_starts = 1_000
    ne.scale_to_run(args)
    assert args.growth_end == 20_000 and args.grow_interval == 200
    assert args.review_interval == 19
    rounds = [1_200 + 200 * n for n in range(94)]
    assert list(ne.growth_rounds(args)) == rounds
    plan, densities = ne.growth_plan(args).splitlines()
    assert plan == "topology: 25% -> 95% in 94 rounds, less what is pruned"

    inactive = 0.75
    expected = {0: 0.25}
    for step in rounds:
        inactive *= 1 - args.grow_rate / 2 * (1 + math.cos(math.pi * step / 20_000))
        expected[step] = 1 - inactive
    starts = []
    for name, step in (("Pendulum-v1", 0), ("Reacher-v5", 5_000)):
        starts.append(f"{name} {expected[step]:.0%}")
    for name, step in (("Pendulum-v1", 10_000), ("Reacher-v5", 15_000)):
        starts.append(f"{name} {expected[step]:.0%}")
    assert densities == "density at the start: " + ", ".join(starts)


def test_a_plan_of_episodes_says_what_it_supposes():
    args = ne.Args(tasks=("Pendulum-v1", "Reacher-v5"), cycles=2, episodes_per_task=4)
    args.learning_starts = 100
    ne.scale_to_run(args)
    plan, densities = ne.growth_plan(args).splitlines()
    assert plan.endswith("less what is pruned, if no episode ends early (2,000 steps)")
    assert densities.startswith("density at the start: Pendulum-v1 25%, Reacher-v5 ")


def test_without_growth_there_are_no_densities_to_plan():
    options = {"tasks": ("Pendulum-v1",), "steps_per_task": 1_000, "learning_starts": 100}
    for changes in ({"initial_density": 1.0}, {"growth": "none"}):
        args = ne.Args(**options | changes)
        ne.scale_to_run(args)
        assert len(ne.growth_plan(args).splitlines()) == 1


# --- metrics ------------------------------------------------------------------
# return on A and on B: untrained, after A, after B, after A, after B
BY_HAND = [[-5.0, 10.0], [50.0, 14.0], [20.0, 80.0], [60.0, 30.0], [45.0, 90.0]]


def results(matrix: list[list[float]], tasks: list[str]) -> list[dict]:
    """Rows as in results.csv, with another evaluation in the middle of each stretch."""
    evaluations = []  # (step, stretch, returns)
    for n, returns in enumerate(matrix):
        stretch = max(n - 1, 0)
        if n > 0:
            evaluations.append((100 * n - 50, stretch, [r - 1000 for r in returns]))
        evaluations.append((100 * n, stretch, returns))
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
    three = [[20.0, 1.0, 2.0], [9.0, 4.0, 3.0], [7.0, 8.0, 12.0], [5.0, 9.0, 30.0]]
    assert ne.continual_metrics(results(three, ["A", "B", "C"])) == {
        "average performance": {"A": 5, "B": 9, "C": 30, "mean": pytest.approx(44 / 3)},
        "forgetting": {"A": 4, "B": -1, "mean": 1.5},
        "forward transfer": {"B": 3, "C": 10, "mean": 6.5},
    }


def test_metrics_of_a_single_task():
    table = ne.continual_metrics(results([[1.0], [2.0]], ["A"]))
    assert table["average performance"] == {"A": 2, "mean": 2}
    for name in ("forgetting", "forward transfer"):
        assert list(table[name]) == ["mean"] and math.isnan(table[name]["mean"])


def test_long_task_names_do_not_run_together_in_the_table(tmp_path, capsys):
    tasks = ["InvertedDoublePendulum-v5", "some.module:MuchLongerThanAnyOther-v0"]
    rows = results(BY_HAND, tasks)
    with open(tmp_path / "results.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    ne.print_metrics(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [*tasks, "mean"]
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["average", "performance", "45.0", "90.0", "67.5"]


# --- evaluations that are postponed -------------------------------------------
class FakeRun:
    """Keeps what is written."""

    def __init__(self):
        self.stop_signal = None
        self.rows = []

    def write_row(self, row: dict) -> None:
        self.rows.append((row["step"], row["task_evaluated"], row["eval/return_mean"]))

    def log(self, step: int, key: str, value: float) -> None:
        float(value)

    def say(self, text: str) -> None:
        """Nothing."""


@pytest.mark.parametrize("last", [False, True])
def test_a_stopping_run_leaves_evaluations_to_the_resumed_one_but_not_at_its_end(last):
    args = ne.Args(tasks=("fake_task:Plain-v0", "Pendulum-v1"), eval_episodes=1)
    args.steps_per_task = 1_000
    envs = ne.make_envs(args)
    torch.manual_seed(0)
    ne.scale_to_run(args)
    agent = ne.Agent(args, envs[0].n_obs, envs[0].n_act, 1, CPU)
    progress = ne.Progress.of(agent)
    for step in (10, 20):
        with torch.no_grad():
            agent.actor.layers[-1].bias.add_(0.1)  # each evaluation has a policy of its own
        weights = copy.deepcopy(agent.actor.state_dict())
        progress.postponed.append((ne.new_row(args, progress, step), weights))
    undisturbed = FakeRun()
    ne.evaluate_postponed(undisturbed, copy.deepcopy(progress), agent.actor, envs, args)
    steps = [(10, args.tasks[0]), (10, args.tasks[1]), (20, args.tasks[0]), (20, args.tasks[1])]
    assert [row[:2] for row in undisturbed.rows] == steps
    assert len({row[2] for row in undisturbed.rows}) == 4

    run = FakeRun()
    step_of_env = envs[0].unwrapped.step

    def stopped_meanwhile(action):
        if run.rows:  # in the second evaluation, on the first task
            run.stop_signal = 15
        return step_of_env(action)

    envs[0].unwrapped.step = stopped_meanwhile
    ne.evaluate_postponed(run, progress, agent.actor, envs, args, last)
    if not last:
        assert run.rows == undisturbed.rows[:2] and len(progress.postponed) == 1
        resumed = FakeRun()
        ne.evaluate_postponed(resumed, progress, agent.actor, envs, args)
        run.rows += resumed.rows
    assert run.rows == undisturbed.rows and progress.postponed == []


# --- what the scripts share ---------------------------------------------------
SAME = """
    TD3Args NEArgs Progress.of
    ReplayBuffer.sample ReplayBuffer.state_dict ReplayBuffer.load_state_dict
    MaskedLinear MLP Actor Critic Network Agent.__init__ Agent.update_critic Agent.update_actor
    scale_to_run growth_rounds annealed solve_grow_rate growth_fraction planned_density
    topology_round review_threshold redo reset CheckedEnv evaluate log_masks fast_updates
"""


@pytest.mark.parametrize("name", SAME.split())
def test_what_means_the_same_is_the_same_line_for_line(name):
    texts = []
    for part in (ne, ne_td3_continuous):
        for attribute in name.split("."):
            part = getattr(part, attribute)
        texts.append(inspect.getsource(part))
    assert texts[0] == texts[1]


def test_part_two_is_the_same_byte_for_byte():
    texts = [Path(script.__file__).read_text() for script in (ne, ne_td3_continuous)]
    one, two = (text.split("# Part two, ", 1)[1] for text in texts)
    assert one == two


# --- CUDA ---------------------------------------------------------------------
@SCRIPTS
def test_updates_read_no_values_and_stay_on_their_device(script):
    meta = torch.device("meta")
    with meta:
        dense = {"ne_actor": False, "ne_critic": False} if script is ne else {}
        agent = new_agent(script, script.Args(**dense), 4, 2, meta)
        obs = torch.empty(8, 4)
        obs_actions = torch.empty(8, 6)
        action = torch.empty(8, 2)
        column = torch.empty(8)
        rows = torch.empty(8, 14)
    batch = ne.Batch(rows, obs, obs_actions, obs, column, column, action, action)
    assert_updates_read_no_values(agent, batch, reads="action_mask")


@SCRIPTS
def test_what_a_graph_reads_and_writes_stays_where_it_is(script):
    agent, buffer = make_agent(script)
    batch = buffer.new_batch(64)

    def addresses() -> list[int]:
        tensors = [*agent.parameters(), *agent.buffers(), *adam_states(agent), *batch]
        return [tensor.data_ptr() for tensor in tensors]

    before = addresses()
    if script is ne:
        train(agent, buffer, 20, topology_round, rounds=2)
    else:
        train(agent, buffer, 20)
    script.reset(agent)
    buffer.clear()
    buffer.add(np.ones(5), np.ones(3), np.ones(5), 1.0, False, np.ones(3))
    buffer.sample(batch)
    train(agent, buffer, 4)
    assert addresses() == before


def trained_with_resets(script, graphs: bool):
    """On the GPU, through one memory for all batches, with rounds and a reset."""
    agent, buffer = make_agent(script, torch.device("cuda"))
    batch = buffer.new_batch(64)
    update_critic = agent.update_critic
    update_actor = agent.update_actor
    if graphs:
        update_critic = script.CudaGraph(update_critic)
        update_actor = script.CudaGraph(update_actor)
    for update in range(1, 201):
        buffer.sample(batch)
        update_critic(batch)
        if update % 2 == 0:
            update_actor(batch)
        if script is ne and update % 25 == 0:
            topology_round(agent, sample(buffer, rng=agent.ne_rng), update)
        if update == 100:
            script.reset(agent)
    return agent


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_agree_with_eager_over_batches_of_several_tasks(monkeypatch):
    monkeypatch.setattr(td3, "CudaGraph", ne.CudaGraph, raising=False)
    torch.cuda.set_stream(torch.cuda.Stream())
    for script in (ne, td3):
        eager = trained_with_resets(script, graphs=False).state_dict()
        graph = trained_with_resets(script, graphs=True).state_dict()
        for name, value in eager.items():
            if torch.is_tensor(value):
                assert torch.allclose(value, graph[name], atol=1e-4), name


@pytest.mark.slow
@SCRIPTS
def test_compiled_gradients_are_those_of_the_eager_agent(script):
    agent, buffer = make_agent(script, compile=True)
    train(agent, buffer, 20)
    eager = copy.deepcopy(agent)
    batch = sample(buffer)
    script.fast_updates(agent.args, agent, batch)
    for name in ("critic", "actor"):
        ours = gradients(agent, name, batch).values()
        theirs = gradients(eager, name, batch).values()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, atol=1e-5) and (a.any() or not b.any())
