"""The replay buffer, and the environment at the agent's boundary."""

import sys

import gymnasium as gym
import numpy as np
import pytest
import torch

import fake_task
import ne_td3_continuous as ne
from helpers import assert_one_line, in_process, load, rows, run_here, sample

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
    assert {int(r) for r in sample(buffer, 400, oldest=0.25).rewards} == set(oldest)
    everything = {int(r) for r in sample(buffer, 2_000).rewards}
    assert everything <= set(kept)
    assert len(everything) > 0.95 * len(kept)


def test_a_batch_is_whole_transitions_in_their_columns():
    batch = sample(filled(100, 130), 400)
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


def test_batches_are_written_in_place_and_reproducible():
    buffer = filled(100, 60)
    batch = buffer.new_batch(400)
    buffer.sample(batch)
    first = batch.rows.clone()
    address = batch.rows.data_ptr()
    assert torch.equal(sample(filled(100, 60), 400).rows, first)
    buffer.sample(batch)
    assert batch.rows.data_ptr() == address
    assert not torch.equal(batch.rows, first)


def test_what_ne_draws_does_not_shift_the_batches_of_updates():
    buffer = filled(100, 60)
    state = buffer.rng.get_state()
    sample(buffer, 1_024, rng=torch.Generator().manual_seed(5))
    assert torch.equal(buffer.rng.get_state(), state)


@pytest.mark.parametrize("transitions", [60, 100, 130])
def test_the_state_is_the_filled_part_and_restores(transitions):
    buffer = filled(100, transitions)
    sample(buffer)
    state = buffer.state_dict()
    held = state["filled"]
    assert len(held) == min(transitions, 100)
    assert held.untyped_storage().nbytes() == held.numel() * 4  # not the whole ring's
    assert held.data_ptr() == buffer.data.data_ptr()  # nothing was copied
    other = filled(100, 3)
    other.load_state_dict(state)
    for one in (buffer, other):
        obs = np.full(3, -1, dtype=np.float32)
        one.add(obs, obs[:2], obs, -1, False)
    assert torch.equal(sample(other).rows, sample(buffer).rows)


def test_the_state_of_a_buffer_of_another_size_is_refused():
    with pytest.raises(ValueError, match="100 rows, got 50"):
        filled(100, 3).load_state_dict(filled(50, 3).state_dict())


# --- spaces -------------------------------------------------------------------
class Recorder(gym.Env):
    """Asymmetric action bounds; keeps what it was asked to do."""

    low = np.array([-1.0, 0.0, -8.0])
    high = np.array([3.0, 10.0, -2.0])
    observation_space = gym.spaces.Box(-1, 1, (3,), np.float64)
    action_space = gym.spaces.Box(low, high, dtype=np.float64)

    def __init__(self, obs=None, act=None):
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
        gym.register(ids[-1], lambda: Recorder(**spaces), disable_env_checker=True)
        return ids[-1]

    yield new
    for env_id in ids:
        gym.registry.pop(env_id)


def test_asymmetric_bounds_are_rescaled(register):
    env = ne.make_env(register(), 100)
    env.reset(seed=0)
    for action in ([-1, -1, -1], [0, 0, 0], [1, 1, 1], [0.5, -0.5, 0.0]):
        env.step(np.array(action, dtype=np.float32))
    expected = [[-1, 0, -8], [1, 5, -5], [3, 10, -2], [2, 2.5, -5]]
    assert np.allclose(env.unwrapped.seen, expected)


BOX = gym.spaces.Box
BAD_SPACES = [
    {"act": gym.spaces.Discrete(3)},
    {"act": BOX(-np.inf, np.inf, (2,))},
    {"act": BOX(-1, 1, (2, 2))},
    {"act": BOX(-1, 1, (2,), np.int32)},
    {"act": BOX(np.float32([-1, 0.5]), np.float32([1, 0.5]))},
    {"obs": BOX(0, 255, (64, 64, 3), np.uint8)},
    {"obs": gym.spaces.Dict({"a": BOX(-1, 1, (3,))})},
    {"obs": gym.spaces.Discrete(5)},
]


@pytest.mark.parametrize("spaces", BAD_SPACES, ids=str)
def test_other_spaces_are_refused(register, capsys, spaces):
    with pytest.raises(SystemExit) as stop:
        ne.make_env(register(**spaces), 100)
    assert stop.value.code == 2
    [space] = spaces.values()
    assert_one_line(capsys.readouterr().err, "--env-id must have", str(space))


# --- what an environment does -------------------------------------------------
TINY = (
    "--learning-starts 60 --total-timesteps 200 --actor-hidden 8 8 --critic-hidden 8 8 "
    "--batch-size 8 --buffer-size 200 --eval-frequency 110 --eval-episodes 1 "
    "--checkpoint-frequency 40 --no-cuda "
)


def run(capsys, folder, task: str, flags: str = "") -> tuple[int, str]:
    """A run of 200 steps here, saved after the end of episodes: (exit code, stderr)."""
    arguments = f"{TINY} --env-id fake_task:{task}-v0 --run-dir {folder} {flags}"
    code = run_here(arguments)
    return code, capsys.readouterr().err


FAULTS = [
    ("NaNObs", "observation"),
    ("InfiniteObs", "observation"),
    ("LongObs", "observation has shape (3,), not (2,)"),
    ("NaNReward", "reward is nan"),
    ("InfiniteReward", "reward is inf"),
    ("TwoRewards", "size 1"),
    ("NoReward", "reward"),
    ("Raises", "exploded"),
    ("NoNumbers", "observation is not made of floats"),
    ("Complex", "observation is not made of floats"),
    ("HugeReward", "reward is 1e+300"),
    ("Exits", "SystemExit in step"),
    ("TwoEnds", "ambiguous"),
]


@pytest.mark.parametrize(("task", "words"), FAULTS, ids=[task for task, _ in FAULTS])
def test_a_fault_of_the_environment_stops_the_run_at_its_step(
    task, words, tmp_path, monkeypatch, capsys
):
    """In one line, before it is stored; the line says how to continue."""
    stored = []
    add = ne.ReplayBuffer.add

    def noted(buffer, obs, action, next_obs, reward, terminated):
        stored.append([*obs, *action, *next_obs, reward])
        add(buffer, obs, action, next_obs, reward, terminated)

    monkeypatch.setattr(ne.ReplayBuffer, "add", noted)
    code, err = run(capsys, tmp_path / "run", task)
    assert code == 1
    kept = f"--resume {tmp_path / 'run'} continues from step 120"
    assert_one_line(err, f"fake_task:{task}-v0", words, "at step 130", kept)
    assert len(stored) == 129
    assert np.isfinite(stored).all()
    checkpoint = load(tmp_path / "run")
    assert checkpoint["step"] == 120
    assert checkpoint["parts"]["buffer"]["filled"].isfinite().all()


def test_an_episode_that_does_not_start_stops_the_run(tmp_path, monkeypatch, capsys):
    code, err = run(capsys, tmp_path / "run", "RaisesInReset")
    assert code == 1
    assert_one_line(err, "RaisesInReset", "no start", "--resume continues the last checkpoint")
    assert load(tmp_path / "run")["step"] == 120


def test_a_fault_in_an_evaluation_stops_the_run(tmp_path, monkeypatch, capsys):
    """Seven episodes of 20 steps at step 80: step 130 of the evaluation is in the last."""
    flags = "--eval-frequency 80 --eval-episodes 7"
    code, err = run(capsys, tmp_path / "run", "NaNObs", flags)
    assert code == 1
    assert_one_line(err, "NaNObs", "observation", "--resume continues the last checkpoint")
    assert load(tmp_path / "run")["step"] == 40


def test_an_environment_that_never_starts(tmp_path, monkeypatch, capsys):
    code, err = run(capsys, tmp_path / "run", "NeverStarts")
    assert code in (1, 2)
    assert_one_line(err, "NeverStarts", "no start")


@pytest.mark.parametrize("task", ["Integers", "IntegerObs", "NoWidth", "NoBounds", "NoSize"])
def test_actions_that_are_no_floats_or_have_no_width_or_size(task, tmp_path, monkeypatch, capsys):
    code, err = run(capsys, tmp_path / "run", task)
    assert code == 2
    assert_one_line(err, "--env-id must have")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", ["Strict", "ArrayReward"])
def test_unusual_environments_run(task, tmp_path, monkeypatch, capsys):
    """Actions never leave the bounds by the last bit; a reward may be an array of one."""
    code, err = run(capsys, tmp_path / "run", task)
    assert code == 0, err
    assert len(rows(tmp_path / "run")) == 2


def test_the_largest_action_stays_within_the_bounds():
    """Rescaled to [-0.9, 0.3], 1 becomes 0.30000007 before it is clipped."""
    env = ne.make_env("fake_task:Strict-v0", 100)
    env.reset(seed=0)
    for action in (-1, 1):
        env.step(np.full(2, action, dtype=np.float32))  # raises outside


def test_the_memory_of_the_environment_is_not_stored(tmp_path, monkeypatch, capsys):
    """An environment that changes its array in place gives the run of one that does not."""
    for task in ("Plain", "SameArray"):
        code, err = run(capsys, tmp_path / task, task)
        assert code == 0, err
    plain = (tmp_path / "Plain" / "results.csv").read_bytes()
    assert (tmp_path / "SameArray" / "results.csv").read_bytes() == plain


def test_an_environment_that_never_ends_is_cut_off(tmp_path, monkeypatch, capsys):
    """Evaluations end, the run ends, and a cut is no terminal state."""
    ends = []
    add = ne.ReplayBuffer.add

    def noted(buffer, *transition):
        ends.append(transition[-1])
        add(buffer, *transition)

    monkeypatch.setattr(ne.ReplayBuffer, "add", noted)
    code, err = run(capsys, tmp_path / "run", "Never", "--max-episode-steps 30")
    assert code == 0, err
    assert load(tmp_path / "run")["finished"]
    assert len(ends) == 200
    assert not any(ends)
    returns = [float(row["charts/episodic_return"]) for row in rows(tmp_path / "run")]
    assert all(-60 < value < 60 for value in returns)  # of episodes of 30 steps


def test_an_environment_whose_random_state_cannot_be_saved(tmp_path, monkeypatch, capsys):
    code, err = run(capsys, tmp_path / "run", "ForeignRandom")
    assert code == 1
    assert_one_line(err, "ForeignRandom-v0: np_random must be NumPy's, got Random")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", ["OldRandom", "NewRandom"])
def test_an_environment_of_another_kind_of_random_state(task, tmp_path, monkeypatch, capsys):
    """np_random is a RandomState, or made anew: saved, and the run resumes exactly."""
    code, err = run(capsys, tmp_path / "whole", task)
    assert code == 0, err

    def stop(buffer, *transition):
        add(buffer, *transition)
        if buffer.size == 95:
            raise KeyboardInterrupt

    add = ne.ReplayBuffer.add
    with monkeypatch.context() as patch:
        patch.setattr(ne.ReplayBuffer, "add", stop)
        code, _ = run(capsys, tmp_path / "run", task)
    assert code == 130
    assert load(tmp_path / "run")["step"] == 80
    assert run_here(f"--resume {tmp_path / 'run'}") == 0
    whole = (tmp_path / "whole" / "results.csv").read_bytes()
    assert (tmp_path / "run" / "results.csv").read_bytes() == whole


@pytest.mark.parametrize("name", ["observation_space", "action_space"])
def test_an_environment_without_spaces(name, monkeypatch, capsys):
    env = fake_task.Plain()
    monkeypatch.setattr(ne.gym, "make", lambda env_id: env)
    monkeypatch.delattr(fake_task.Plain, name)
    code, err = in_process(monkeypatch, capsys, "--env-id fake_task:Plain-v0")
    assert code == 2
    assert_one_line(err, "--env-id: cannot make", name)


def test_an_id_that_does_not_exist(monkeypatch, capsys):
    for env_id, words in (
        ("HalfCheeta-v5", "HalfCheetah"),
        ("no_such_module:Task-v0", "no_such_module"),
        ("fake_task:Nope-v0", "Nope"),
    ):
        code, err = in_process(monkeypatch, capsys, f"--env-id {env_id}")
        assert code == 2
        assert_one_line(err, "--env-id", words)


def test_an_environment_whose_package_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "Box2D", None)
    code, err = in_process(monkeypatch, capsys, "--env-id BipedalWalker-v3")
    assert code == 2
    assert_one_line(err, "--env-id: cannot make BipedalWalker-v3", "ox2d")


# --- evaluation ---------------------------------------------------------------
def test_evaluation_is_deterministic_and_has_its_own_starts():
    torch.manual_seed(0)
    actor = ne.Actor([3, 16, 1], layer_norm=False)
    env = ne.make_env("Pendulum-v1", 1_000)
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


def test_the_tasks_of_these_tests_are_as_they_say():
    env = fake_task.SameArray()
    obs, _ = env.reset(seed=0)
    before = obs.copy()
    again, *_ = env.step(np.ones(2, dtype=np.float32))
    assert again is obs
    assert not np.array_equal(obs, before)
