"""The replay buffer, and the environment at the agent's boundary."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import fake_task
import ne_td3_continuous as ne
from baselines import td3_continuous as td3
from helpers import assert_equal_runs, load, refused, rows, run_here

CPU = torch.device("cpu")


# --- replay buffer ------------------------------------------------------------
def filled(capacity: int, transitions: int) -> ne.ReplayBuffer:
    """The n-th transition (from 0) holds the number n in every column but the last."""
    buffer = ne.ReplayBuffer(capacity, 3, 2, seed=0, device=CPU)
    for n in range(transitions):
        obs = np.full(3, n, dtype=np.float32)
        buffer.add(obs, np.full(2, n, dtype=np.float32), obs, n, n % 2 == 0)
    return buffer


@pytest.mark.parametrize("transitions", [1, 3, 8, 50, 100, 101, 130, 199, 200, 350])
def test_a_review_is_of_the_oldest_quarter(transitions):
    buffer = filled(100, transitions)
    kept = list(range(max(0, transitions - 100), transitions))
    oldest = kept[: max(1, int(0.25 * len(kept)))]
    assert {int(r) for r in buffer.sample(400, oldest=0.25).rewards} == set(oldest)
    everything = {int(r) for r in buffer.sample(2_000).rewards}
    assert everything <= set(kept)
    assert len(everything) > 0.95 * len(kept)


def test_a_batch_is_whole_transitions_in_their_columns():
    batch = filled(100, 130).sample(400)
    n = batch.rewards
    assert batch.rows.shape == (400, 10)
    assert batch.obs.shape == batch.next_obs.shape == (400, 3)
    assert batch.obs_actions.shape == (400, 5)
    assert n.shape == batch.terminated.shape == (400,)
    assert batch.noise.shape == (400, 2)
    for columns in (batch.obs, batch.obs_actions, batch.next_obs):
        assert torch.equal(columns, n[:, None].expand_as(columns))
    assert torch.equal(batch.terminated, (n % 2 == 0).float())
    assert batch.noise.mean().abs() < 0.2
    assert batch.noise.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("transitions", [60, 100, 130])
def test_the_state_is_the_filled_part_and_restores(transitions):
    buffer = filled(100, transitions)
    buffer.sample(64)
    state = buffer.state_dict()
    held = state["filled"]
    assert len(held) == min(transitions, 100)
    assert held.untyped_storage().nbytes() == held.numel() * 4  # not the whole ring's
    other = filled(100, 3)
    other.load_state_dict(state)
    for one in (buffer, other):
        obs = np.full(3, -1, dtype=np.float32)
        one.add(obs, obs[:2], obs, -1, False)
    assert torch.equal(other.sample(64).rows, buffer.sample(64).rows)


# --- spaces -------------------------------------------------------------------
# Updates from 61 on, checkpoints at 40, 80, ...
TINY = (
    "--learning-starts 60 --total-timesteps 160 --actor-hidden 8 --critic-hidden 8 "
    "--batch-size 8 --buffer-size 160 --eval-frequency 110 "
    "--eval-episodes 1 --checkpoint-frequency 40 --no-cuda "
)


def run(folder, task: str, flags: str = "", **options) -> int:
    return run_here(f"{TINY} --env-id fake_task:{task}-v0 --run-dir {folder} {flags}", **options)


def test_actions_are_rescaled_to_asymmetric_bounds():
    space = gym.spaces.Box(np.array([-1.0, 0, -8]), np.array([3.0, 10, -2]), dtype=np.float64)
    seen = []

    class Recorder(fake_task.Plain):
        def step(self, action):
            seen.append(action)
            return super().step(action[:2])

    gym.register("Recorder-v0", lambda: Recorder(act=space))
    env = ne.make_env("Recorder-v0")
    gym.registry.pop("Recorder-v0")
    assert env.action_space.shape == (3,)
    env.reset(seed=0)
    for action in ([-1, -1, -1], [0, 0, 0], [1, 1, 1], [0.5, -0.5, 0.0]):
        env.step(np.array(action, dtype=np.float32))
    assert np.allclose(seen, [[-1, 0, -8], [1, 5, -5], [3, 10, -2], [2, 2.5, -5]])


def test_actions_stay_within_the_bounds_to_the_last_bit():
    """Rescaled to [-0.9, 0.3], 1 becomes 0.30000007 before it is clipped."""
    env = ne.make_env("fake_task:Strict-v0")
    env.reset(seed=0)
    for action in (-1, 1):
        env.step(np.full(2, action, dtype=np.float32))  # raises outside


@pytest.mark.parametrize("name", [*fake_task.SPACES, "Nope"])
def test_tasks_that_do_not_fit_are_refused(name, tmp_path, capsys):
    task = f"fake_task:{name}-v0"
    flags = f"{TINY} --env-id {task} --run-dir {tmp_path / 'run'}"
    refused(capsys, flags, name, *map(str, fake_task.SPACES.get(name, {}).values()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("task", "word"),
    [("HalfCheeta-v5", "HalfCheetah"), ("no_such_module:Task-v0", "no_such_module")],
)
def test_unknown_tasks_are_refused(task, word, tmp_path, capsys):
    refused(capsys, f"--env-id {task} --run-dir {tmp_path / 'run'}", task, word)


def test_the_observations_of_a_dictionary_are_one_vector():
    env = ne.make_env("fake_task:Parts-v0")
    obs, _ = env.reset(seed=0)
    assert env.observation_space.shape == obs.shape == (6,)
    for _ in range(7):
        obs, *_ = env.step(np.ones(2, dtype=np.float32))
    assert np.allclose(obs[:2], env.unwrapped.position)
    assert obs[2:].tolist() == [0, 1, 0, 0]  # the second quarter of an episode


# --- what an environment does -------------------------------------------------
@pytest.mark.parametrize(
    ("script", "task"), [(td3, "NaNReward"), *((ne, task) for task in fake_task.FAULTS)]
)
def test_a_number_that_is_not_finite_stops_the_run_unstored(script, task, tmp_path, capsys):
    [part] = fake_task.FAULTS[task]
    name = {"obs": "observation", "start": "observation"}.get(part, part)
    step = 121 if part == "start" else 130
    flags = f"{TINY} --env-id fake_task:{task}-v0 --run-dir {tmp_path / 'run'}"
    words = f"the {name} is NaN or infinite at step {step}; --resume"
    refused(capsys, flags, words, module=script, code=1)
    checkpoint = load(tmp_path / "run")
    assert checkpoint["step"] == 120
    assert checkpoint["parts"]["buffer"]["filled"].isfinite().all()


def test_observations_that_change_in_place_are_copied(tmp_path):
    """An environment that changes its array in place gives the run of one that does not."""
    for task in ("Plain", "SameArray"):
        assert run(tmp_path / task, task, due={81: "SIGTERM"}) == 0
    one, two = [load(tmp_path / task)["parts"] for task in ("Plain", "SameArray")]
    assert torch.equal(one["buffer"]["filled"], two["buffer"]["filled"])


def test_an_environment_without_a_limit_gets_one(tmp_path, monkeypatch):
    """Of 10,000 steps, which are no terminal state."""
    env = ne.make_env("fake_task:Never-v0")
    env.reset(seed=0)
    action = np.zeros(2, dtype=np.float32)
    for _ in range(9_999):
        assert env.step(action)[2:4] == (False, False)
    assert env.step(action)[2:4] == (False, True)
    limited = ne.make_env("Pendulum-v1")
    limited.reset(seed=0)
    ends = [limited.step(action[:1])[3] for _ in range(200)]
    assert ends == [False] * 199 + [True]


def test_a_time_limit_is_stored_as_no_end(tmp_path):
    """Plain's episodes terminate after 20 steps, Pendulum's are cut off after 200."""
    assert run(tmp_path / "plain", "Plain", due={81: "SIGTERM"}) == 0
    flags = f"{TINY} --env-id Pendulum-v1 --total-timesteps 300 --buffer-size 300 "
    assert run_here(f"{flags} --run-dir {tmp_path / 'cut'}", due={161: "SIGTERM"}) == 0
    ends = load(tmp_path / "plain")["parts"]["buffer"]["filled"][:, -1]
    assert ends.nonzero().flatten().tolist() == [19, 39, 59, 79, 99]
    cut = load(tmp_path / "cut")
    assert cut["step"] == 200
    assert not cut["parts"]["buffer"]["filled"][:, -1].any()


@pytest.mark.parametrize("task", ["OldRandom", "NewRandom", "GlobalRandom", "Parts"])
def test_other_generators_are_seeded_and_resume_exactly(task, tmp_path):
    """Also the second of two Gaussians, which a RandomState keeps for later."""
    whole = tmp_path / "whole"
    assert run(whole, task) == 0
    assert run(tmp_path / "run", task, due={95: "SIGKILL"}) == -9
    assert load(tmp_path / "run")["step"] == 80
    assert run_here(f"--resume {tmp_path / 'run'}") == 0
    assert_equal_runs(whole, tmp_path / "run")
    assert run(tmp_path / "other", task, "--seed 2") == 0
    returns = [rows(folder)[0]["charts/episodic_return"] for folder in (whole, tmp_path / "other")]
    assert returns[0] != returns[1]


# --- evaluation ---------------------------------------------------------------
def test_evaluation_is_deterministic_and_has_its_own_starts():
    torch.manual_seed(0)
    actor = ne.Actor([3, 16, 1], layer_norm=False)
    env = ne.make_env("Pendulum-v1")
    returns = ne.evaluate(actor, env, 3, seed=7)
    assert returns == ne.evaluate(actor, env, 3, seed=7)
    assert len(set(returns)) == 3
    obs, _ = env.reset(seed=107)
    total = 0.0
    done = False
    while not done:
        with torch.no_grad():
            hidden = torch.relu(actor.layers[0](torch.tensor(obs)[None]))
            action = torch.tanh(actor.layers[1](hidden))
        obs, reward, terminated, truncated, _ = env.step(action[0].numpy())
        total += reward
        done = terminated or truncated
    assert returns[0] == pytest.approx(total)
