"""benchmark/shifts.py: its commands, the table and the picture; the tasks of shifted_tasks.py."""

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import ne_td3_continuous as ne
import shifted_tasks
import shifts
from helpers import call
from test_plot import write_rows


def sequence(folder: Path, share: float, last_task: int = 10) -> None:
    """A run that reaches `share` of the fresh network's 1,000 at the end of each stretch."""
    rows = []
    for number, trained in enumerate(shifts.TASKS[:last_task]):
        for step in (10, 20, 30):
            for evaluated in shifts.TASKS:
                row = {"step": 30 * number + step, "task_trained": trained}
                row["task_evaluated"] = evaluated
                own = evaluated == trained and step > 10
                row["eval/return_mean"] = 1_000 * share if own else -5_000
                rows.append(row)
    write_rows(folder, rows, list(rows[0]))


def fresh_run(folder: Path, value: float, last_step: int = 30) -> None:
    steps = range(10, last_step + 1, 10)
    rows = [{"step": step, "eval/return_mean": value} for step in steps]
    write_rows(folder, rows, list(rows[0]))


def fresh(out: Path) -> None:
    for task in shifts.TASKS:
        fresh_run(out / f"fresh_{shifts.short_name(task)}_seed1", 1_000)


# --- runs ---------------------------------------------------------------------
@pytest.mark.parametrize("arm", [*shifts.ARMS, shifts.FRESH])
def test_the_scripts_accept_the_commands(arm):
    jobs = shifts.jobs_of(arm, 3, 50_000, Path("runs"), ["--compile"])
    for job in jobs:
        wanted = job.wanted
        assert (wanted["seed"], wanted["compile"], wanted["learning_starts"]) == (3, True, 5_000)
    if arm == shifts.FRESH:
        assert tuple(job.wanted["env_id"] for job in jobs) == shifts.TASKS
        assert {job.steps for job in jobs} == {50_000}
    else:
        assert tuple(wanted["tasks"]) == shifts.TASKS and wanted["clear_buffer"]
        assert (wanted["steps_per_task"], wanted["cycles"], job.steps) == (50_000, 1, 500_000)


RUN = ("run", "--arms", "td3", "--seeds", 1, "--workers", 1)


def test_runs_are_made_seed_by_seed_and_another_stretch_is_another_run(
    monkeypatch, tmp_path, capsys
):
    made = []
    monkeypatch.setattr(shifts.run, "make", lambda args, jobs: made.extend(jobs))
    flags = ["run", "--arms", "td3", "fresh", "--seeds", 2, "--workers", 3, "--out", tmp_path]
    call(capsys, shifts, *flags)
    names = [job.name for job in made]
    assert (names[0], names[11], len(set(names))) == ("td3_seed1", "td3_seed2", 22)
    sequence(tmp_path / "td3_seed1", 1.0, last_task=1)
    wanted = made[0].wanted | {"steps_per_task": 30}
    (tmp_path / "td3_seed1" / "args.json").write_text(json.dumps(wanted))
    with pytest.raises(SystemExit):
        shifts.run.state_of(made[0])
    assert "holds another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--flags=--seed 7"], "say what run it is: --seed"),
        (["--stretch", 9], "--stretch must be in [10, "),
    ],
)
def test_refusals(tmp_path, capsys, flags, words):
    code, _, err = call(capsys, shifts, *RUN, "--out", tmp_path / "runs", *flags)
    assert code == 2 and words in err
    assert not (tmp_path / "runs").exists()


# --- what came out ------------------------------------------------------------
def test_table_and_picture(tmp_path, capsys):
    fresh(tmp_path)
    for seed, share in ((1, 0.5), (2, 0.7)):
        sequence(tmp_path / f"td3_seed{seed}", share)
        sequence(tmp_path / f"ne_seed{seed}", share + 0.2)
    sequence(tmp_path / "ne_seed3", 0.1, last_task=9)
    task = shifts.short_name(shifts.TASKS[0])
    fresh_run(tmp_path / f"fresh_{task}_seed2", -9_000, last_step=10)
    sequence(tmp_path / "td3_seed1.stopped1", 5.0)  # set aside by run.py
    fresh_run(tmp_path / f"fresh_{task}_seed1.stopped1", -9_000)
    _, out, err = call(capsys, shifts, "table", tmp_path, "--out", tmp_path / "shifts.png")
    assert "left out: ne_seed3 is at step 270 of 300" in err
    assert f"left out: fresh_{task}_seed2 is at step 10 of 30" in err
    rows = {line.split()[1]: line for line in out.splitlines() if line.startswith("| ")}
    assert rows["td3"].startswith("| td3 | 2 | 0.60 [-0.67, 1.87] | 0.60 ")
    assert rows["td3"].endswith("| 0.00 | – |")
    assert rows["ne"].endswith("| 0.20 [-0.41, 0.81] |")
    assert rows["10"] == "| 10 | CheetahBackwardSticky | 800 | 600 | 1,000 |"
    assert (tmp_path / "shifts.png").stat().st_size > 10_000


# --- the tasks ----------------------------------------------------------------
def one_step(env) -> tuple[np.ndarray, float]:
    """From the same state, on the ground, with the same action."""
    env.reset(seed=1)
    body = env.unwrapped
    qpos = body.init_qpos.copy()
    qpos[1] = -0.15  # its feet touch the floor
    qvel = np.full_like(body.init_qvel, 0.5)
    body.set_state(qpos, qvel)
    for _ in range(5):
        obs, reward, *_ = env.step(np.full(6, 0.8, dtype=np.float32))
    return obs, reward


def test_shifts_are_ten_tasks_that_differ():
    plain = gym.make("HalfCheetah-v5")
    seen = [one_step(plain)]
    assert len(shifts.TASKS) == 10
    for name in shifted_tasks.SHIFTS:
        env = gym.make(f"shifted_tasks:{name}-v0")
        assert env.observation_space == plain.observation_space
        assert env.action_space == plain.action_space
        assert env.spec.max_episode_steps == plain.spec.max_episode_steps
        obs, reward = one_step(env)
        for other_obs, other_reward in seen:
            assert not np.allclose(obs, other_obs) or reward != other_reward
        seen.append((obs, reward))


def test_shifted_tasks_are_ids_in_the_root():
    env = ne.make_env("benchmark.shifted_tasks:CheetahHeavy-v0")
    assert env.unwrapped.model.opt.gravity[2] == pytest.approx(-9.81 * 1.5)
