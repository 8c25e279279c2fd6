"""The continual scripts as users run them: end to end, interrupted, given bad input."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import helpers
import ne_td3_continual as ne
from baselines import td3_continual as td3
from helpers import (
    KILL_IN_SAVING,
    REFUSED_NE,
    REFUSED_TD3,
    ROOT,
    assert_equal,
    assert_equal_runs,
    assert_one_line,
    assert_refused,
    assert_rows_have_all_episodes,
    bad_numbers,
    count_calls,
    finish,
    in_process,
    kill_at,
    load,
    rows,
    signal_at,
)

SCRIPTS = pytest.mark.parametrize("script", [ne, td3], ids=["ne", "td3"])
# 3 observations, 1 action, 200 steps; 10 observations, 2 actions, 50 steps
NAMES = ("Pendulum-v1", "Reacher-v5")
# updates from 101 on
TINY = (
    "--learning-starts 100 --actor-hidden 16 16 --critic-hidden 16 16 --batch-size 16 "
    "--eval-episodes 1 --no-cuda "
)
SMALL = f"{TINY} --tasks {' '.join(NAMES)} --cycles 2 --eval-frequency 250 --buffer-size 700 "
# a new task after 320, 640 and 960 steps, each time inside an episode
STEPS = SMALL + "--steps-per-task 320 --checkpoint-frequency 200 "
NE = "--grow-interval 100 --review-interval 20 "
EVALUATED = [0, 250, 320, 500, 640, 750, 960, 1000, 1250, 1280]


def launch(script, arguments: str, setup: str = "") -> subprocess.Popen:
    return helpers.launch(arguments, setup, Path(script.__file__))


def run(script, arguments: str, folder: Path, setup: str = "") -> Path:
    code, out, err = finish(launch(script, f"{arguments} --run-dir {folder}", setup))
    assert code == 0, err
    (folder / "stdout").write_text(out)
    return folder


def resume(script, folder: Path) -> None:
    code, out, err = finish(launch(script, f"--resume {folder}"))
    assert code == 0 and "average performance" in out, err


def killed(script, arguments: str, folder: Path, step: int) -> int:
    """Kills a run while it stores the transition of that step: the step of its checkpoint."""
    code, _, err = finish(launch(script, f"{arguments} --run-dir {folder}", kill_at(step)))
    assert code == -signal.SIGKILL, err
    return load(folder)["step"]


def scalars(folder: Path, key: str) -> list:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events.Scalars(key)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of an NE run that was never interrupted."""
    return run(ne, STEPS + NE, tmp_path_factory.mktemp("runs") / "whole")


# --- end to end ---------------------------------------------------------------
def test_a_row_for_every_task_at_every_evaluation(whole):
    results = rows(whole)
    assert [int(row["step"]) for row in results] == [step for step in EVALUATED for _ in NAMES]
    assert [row["task_evaluated"] for row in results] == [*NAMES] * len(EVALUATED)
    for row in results:
        stretch = max(int(row["step"]) - 1, 0) // 320
        expected = [str(1 + stretch // 2), str(stretch % 2), NAMES[stretch % 2]]
        assert [row["cycle"], row["task/id"], row["task_trained"]] == expected
        low = -2000 if row["task_evaluated"] == "Pendulum-v1" else -300
        assert low < float(row["eval/return_mean"]) < 0
    returns = {row["eval/return_mean"] for row in results}
    assert len(returns) > len(EVALUATED)  # the policy changes
    assert list(results[0])[:7] == [
        "step",
        "cycle",
        "task/id",
        "task_trained",
        "task_evaluated",
        "eval/return_mean",
        "eval/return_std",
    ]


def test_rows_of_one_step_differ_in_the_evaluation_only(whole):
    results = rows(whole)
    for one, two in zip(results[::2], results[1::2], strict=True):
        differ = {key for key in one if one[key] != two[key]}
        assert "task_evaluated" in differ
        assert differ <= {"task_evaluated", "eval/return_mean", "eval/return_std"}


def test_the_topology_grows_over_the_whole_sequence(whole):
    results = rows(whole)
    for name in ("actor", "critic"):
        density = [float(row[f"ne/{name}/density"]) for row in results]
        assert density[0] == pytest.approx(0.25, abs=0.02)
        assert density[-1] > 1.5 * density[0]
        grown = [int(row[f"ne/{name}/grown"]) for row in results]
        assert grown == sorted(grown) and grown[0] == 0 < grown[-1]
        for row in results:
            assert int(row[f"ne/{name}/pruned"]) <= 0.4 * int(row[f"ne/{name}/grown"])
            assert int(row[f"ne/{name}/grown"]) <= int(row[f"ne/{name}/planned"])
        assert [row[f"ne/{name}/active_ratio"] for row in results[:2]] == ["nan", "nan"]
        assert all(0 < float(row[f"ne/{name}/active_ratio"]) <= 1 for row in results[2:])


def test_tensorboard_has_a_return_for_every_task(whole):
    for name in NAMES:
        logged = scalars(whole, f"eval/{name}/return_mean")
        assert [event.step for event in logged] == EVALUATED
    logged = [event.value for event in scalars(whole, "task/id")]
    assert logged == [0, 0, 0, 1, 1, 0, 0, 1, 1, 1]
    args = json.loads((whole / "args.json").read_text())
    assert args["steps_per_task"] == 320 and args["growth_end"] == 1280


def test_the_buffer_holds_each_task_s_own_dimensions(tmp_path):
    folder = tmp_path / "run"
    assert killed(ne, STEPS + NE, folder, 500) == 420
    data = load(folder)["parts"]["buffer"]["filled"]
    assert data.shape == (420, 10 + 2 + 10 + 2 + 2)
    pendulum = data[:320]
    reacher = data[320:]
    padded = [*range(3, 10), 11, *range(15, 22)]
    assert not pendulum[:, padded].any()
    assert pendulum[:, :3].all() and pendulum[:, 10].all()
    assert (pendulum[:, -2:] == torch.tensor([1.0, 0.0])).all()
    assert reacher[:, 10:12].all() and reacher[:, :10].any(0).all()
    assert (reacher[:, -2:] == 1).all()
    # neither task terminates, and a cut at a switch is no termination
    assert not data[:, 23].any()
    # within an episode, but not across the switch
    assert torch.equal(pendulum[:199, 12:22], pendulum[1:200, :10])
    assert not torch.equal(pendulum[319, 12:22], reacher[0, :10])


def test_growth_gives_no_padded_input_a_connection_before_its_task_comes(tmp_path):
    """The first task only, then both."""
    flags = f"{STEPS} --grow-interval 10 --no-prune --initial-density 0.5"
    folder = tmp_path / "run"
    setup = kill_at(250)
    finish(launch(ne, f"{flags} --run-dir {folder}", setup))
    content = load(folder)
    assert content["step"] == 200
    args = ne.Args(**content["args"])
    seeds = ne.np.random.SeedSequence(args.seed).generate_state(4).tolist()
    born = ne.Agent(args, 10, 2, seeds[3], torch.device("cpu")).state_dict()
    grown = content["parts"]["agent"]
    padded = {"actor": range(3, 10), "critic_1": [*range(3, 10), 11]}
    padded["critic_2"] = padded["critic_1"]
    for name, inputs in padded.items():
        key = f"{name}.layers.0.mask"
        assert torch.equal(born[key][:, inputs], grown[key][:, inputs])
        assert grown[key].sum() > born[key].sum()
    key = "actor.layers.2.mask"
    assert torch.equal(born[key][1], grown[key][1])  # an action that Pendulum does not have


def test_it_says_what_will_happen_and_what_came_out(whole):
    out = (whole / "stdout").read_text()
    assert "topology: 25% -> 98% in 11 rounds, less what is pruned\n" in out
    assert "density at the start: Pendulum-v1 25%, Reacher-v5 " in out
    results = {}
    for row in rows(whole):
        results[row["step"], row["task_evaluated"]] = float(row["eval/return_mean"])
    steps = ("0", "320", "640", "960", "1280")
    a, b = ([results[step, name] for step in steps] for name in NAMES)
    table = out.splitlines()[-4:]
    lines = {line[:20].strip(): line[20:].split() for line in table}
    assert lines[""] == [*NAMES, "mean"]
    forgetting = f"{max(a[1:-1]) - a[-1]:,.1f}"
    transfer = f"{b[1] - b[0]:,.1f}"
    performance = [f"{x:,.1f}" for x in (a[-1], b[-1], (a[-1] + b[-1]) / 2)]
    assert lines["average performance"] == performance
    assert lines["forgetting"] == [forgetting, "nan", forgetting]
    assert lines["forward transfer"] == ["nan", transfer, transfer]


def test_a_finished_run_is_left_alone(whole, monkeypatch, capsys):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    code, _ = in_process(monkeypatch, capsys, f"--resume {whole}", ne)
    assert code == 0
    assert before == {path.name: path.read_bytes() for path in whole.iterdir()}


# --- equal to the other scripts -----------------------------------------------
@pytest.mark.parametrize("layer_norm", [False, True])
def test_without_ne_it_is_td3_bit_for_bit(tmp_path, layer_norm):
    more = (" --layer-norm", " --method layer-norm") if layer_norm else ("", "")
    dense = run(ne, STEPS + "--initial-density 1 --review-floor 1" + more[0], tmp_path / "dense")
    plain = run(td3, STEPS + more[1], tmp_path / "plain")
    one = load(dense)["parts"]
    two = load(plain)["parts"]
    compared = 0
    for key, value in two["agent"].items():
        if torch.is_tensor(value):
            assert torch.equal(one["agent"][key], value), key
            compared += 1
    layers = 5 if layer_norm else 3  # each with a weight and a bias, in six MLPs
    assert compared == 6 * 2 * layers
    for name in ("actor_optimizer", "critic_optimizer", "noise_rng", "Pendulum-v1 rng"):
        assert_equal(one[name], two[name])
    assert (dense / "results.csv").read_bytes() == (plain / "results.csv").read_bytes()


def test_with_one_task_it_is_the_other_ne_script_bit_for_bit(tmp_path):
    shared = f"{TINY} {NE} --eval-frequency 300 --buffer-size 400 "
    shared += "--redo-interval 70 --reset-interval 250 "
    flags = f"{shared} --tasks Pendulum-v1 --cycles 1 --steps-per-task 600"
    one = run(ne, flags, tmp_path / "one")
    flags = f"{shared} --env-id Pendulum-v1 --total-timesteps 600 --run-dir {tmp_path / 'two'}"
    code, _, err = finish(helpers.launch(flags))
    assert code == 0, err
    two = tmp_path / "two"
    for name in ("agent", "actor_optimizer", "critic_optimizer", "ne_rng"):
        assert_equal(load(one)["parts"][name], load(two)["parts"][name])
    columns = rows(two)[0].keys()
    after_the_first = rows(one)[1:]  # which is of the untrained policy
    assert [{key: row[key] for key in columns} for row in after_the_first] == rows(two)


# --- interrupted and resumed --------------------------------------------------
@pytest.mark.parametrize(
    ("step", "saved", "flags"),
    [(310, 200, ""), (500, 420, ""), (330, 320, "--checkpoint-frequency 320")],
    ids=["before a switch", "after one", "saved at one"],
)
def test_a_killed_run_resumes_exactly(whole, tmp_path, step, saved, flags):
    folder = tmp_path / "run"
    assert killed(ne, f"{STEPS} {NE} {flags}", folder, step) == saved
    time.sleep(1.1)  # TensorBoard orders its files by the second in their names
    resume(ne, folder)
    assert_equal_runs(whole, folder)
    assert [event.step for event in scalars(folder, "task/id")] == EVALUATED


def test_a_run_killed_while_saving_resumes_exactly(whole, tmp_path):
    folder = tmp_path / "run"
    code, _, err = finish(launch(ne, f"{STEPS} {NE} --run-dir {folder}", KILL_IN_SAVING))
    assert code == -signal.SIGKILL, err
    assert load(folder)["step"] == 200
    resume(ne, folder)
    assert_equal_runs(whole, folder)


def test_a_run_with_reset_resumes_exactly(tmp_path):
    flags = STEPS + "--method reset"
    folder = tmp_path / "killed"
    assert killed(td3, flags, folder, 500) == 420
    resume(td3, folder)
    undisturbed = run(td3, flags, tmp_path / "whole", count_calls("reset"))
    out = (undisturbed / "stdout").read_text()
    assert out.count("called: reset") == 3  # at 320, 640 and 960, not at the end
    assert_equal_runs(undisturbed, folder)


def test_episodes_and_an_emptied_buffer_resume_exactly(tmp_path):
    """A checkpoint at a switch, hence without transitions, and a row before there is a batch."""
    flags = f"{SMALL} --episodes-per-task 2 --clear-buffer --checkpoint-frequency 100 "
    flags += "--eval-frequency 405 --grow-interval 101 --review-interval 20"
    undisturbed = run(ne, flags, tmp_path / "whole", count_calls("topology_round"))
    folder = tmp_path / "killed"
    assert killed(ne, flags, folder, 410) == 400
    parts = load(folder)["parts"]
    assert len(parts["buffer"]["filled"]) == 0
    assert parts["progress"]["stretches"] == 1 and parts["progress"]["episodes"] == 0
    resume(ne, folder)
    assert_equal_runs(undisturbed, folder)
    results = rows(undisturbed)
    # tasks of 2 x 200 and 2 x 50 steps
    assert [int(row["step"]) for row in results[::2]] == [0, 400, 405, 500, 810, 900, 1000]
    assert results[4]["losses/qf_loss"] == results[2]["losses/qf_loss"]
    # none in the 16 steps after a switch, until there is a batch
    assert load(undisturbed)["parts"]["progress"]["updates"] == 1000 - 100 - 3 * 16
    out = (undisturbed / "stdout").read_text()
    # at 101, 202, ..., 909 without 404, 505 and 909: a few rows say nothing about dormancy
    assert out.count("called: topology_round") == 6
    assert_rows_have_all_episodes(undisturbed)
    assert "less what is pruned, if no episode ends early (1,000 steps)\n" in out


def test_the_baselines_rows_have_the_last_episode_of_a_task(tmp_path):
    folder = run(td3, f"{SMALL} --episodes-per-task 2", tmp_path / "run")
    assert_rows_have_all_episodes(folder)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 0), ("SIGINT", 130), ("SIGUSR1", 0)])
def test_a_signal_ends_the_episode_saves_and_resumes_exactly(whole, tmp_path, name, code):
    """With the evaluations of steps 500 and, at a switch, 640 left to the resumed run."""
    at, saved, postponed = {
        "SIGTERM": (490, 520, 1),
        "SIGINT": (625, 640, 1),
        "SIGUSR1": (645, 840, 1),
    }[name]
    folder = tmp_path / "run"
    process = launch(ne, f"{STEPS} {NE} --run-dir {folder}", signal_at(at, name))
    returned, out, err = finish(process)
    assert returned == code, err
    content = load(folder)
    assert content["step"] == saved
    assert len(content["parts"]["progress"]["postponed"]) == postponed
    assert f"stopped at step {saved}" in out and f"--resume {folder}" in out
    resume(ne, folder)
    assert_equal_runs(whole, folder)


def test_a_signal_in_the_last_episode_loses_no_row(whole, tmp_path):
    """The evaluation of step 1,250 falls due while it stops, then comes the end."""
    folder = tmp_path / "run"
    flags = f"{STEPS} {NE} --eval-frequency 25 --tasks Pendulum-v1 --cycles 1"
    undisturbed = run(ne, flags, tmp_path / "whole")
    run(ne, flags, folder, signal_at(270, "SIGTERM"))
    assert_equal_runs(undisturbed, folder)


def test_a_signal_during_an_evaluation_does_not_wait_for_its_other_tasks(tmp_path):
    """It comes while the untrained policy is evaluated, on a task of 3 seconds, then one more."""
    tasks = "fake_task:Slow-v0 fake_task:Plain-v0"
    flags = f"{TINY} --tasks {tasks} --cycles 1 --steps-per-task 200 --eval-episodes 15"
    folder = tmp_path / "run"
    process = launch(ne, f"{flags} --run-dir {folder}")
    deadline = time.time() + 120
    while time.time() < deadline and not (folder / "results.csv").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    returned, out, err = finish(process)
    assert returned == 0, err
    assert rows(folder) == []
    assert load(folder)["step"] == 20
    assert len(load(folder)["parts"]["progress"]["postponed"]) == 1
    resume(ne, folder)
    assert [row["step"] for row in rows(folder)] == ["0", "0", "200", "200", "400", "400"]


# --- environments that are not as they should be ------------------------------
FAULTS = [
    ("NaNObs", "the observation is NaN or infinite"),
    ("InfiniteReward", "the reward is inf"),
    ("Raises", "ValueError in step: the simulation exploded"),
]


@SCRIPTS
@pytest.mark.parametrize(("task", "words"), FAULTS)
def test_a_fault_of_an_environment_is_named_with_task_and_step(
    tmp_path, monkeypatch, capsys, script, task, words
):
    """After 150 steps of Pendulum, in the 130th of the faulty task; nothing of it is kept."""
    folder = tmp_path / "run"
    flags = f"{TINY} --tasks Pendulum-v1 fake_task:{task}-v0 --cycles 1 --steps-per-task 150"
    flags += f" --checkpoint-frequency 50 --run-dir {folder}"
    code, err = in_process(monkeypatch, capsys, flags, script)
    assert code == 1
    assert_one_line(err, f"fake_task:{task}-v0: {words}", "at step 280")
    content = load(folder)
    assert content["step"] == 270
    assert content["parts"]["buffer"]["filled"].isfinite().all()


def test_tasks_with_random_states_and_rewards_in_arrays_resume_exactly(tmp_path):
    flags = f"{TINY} --tasks fake_task:OldRandom-v0 fake_task:ArrayReward-v0 --cycles 2"
    flags += " --steps-per-task 70 --checkpoint-frequency 30 "
    undisturbed = run(ne, flags, tmp_path / "whole")
    folder = tmp_path / "killed"
    assert killed(ne, flags, folder, 200) == 180
    resume(ne, folder)
    assert_equal_runs(undisturbed, folder)


# --- refused ------------------------------------------------------------------
REFUSED = [
    ("--tasks HalfCheeta-v5", "HalfCheetah"),
    ("--tasks Pendulum-v1 CartPole-v1", "flat Boxes of floats"),
    ("--tasks Pendulum-v1 Blackjack-v1", "flat Boxes of floats"),
    ("--tasks", "--tasks must have a value or more"),
    ("--tasks Pendulum-v1 Pendulum-v1", "one task or more, each once"),
    ("--tasks Pendulum", "--tasks must name versions, as in Ant-v5, got Pendulum"),
    ("--cycles 0", "in [1, 1,000,000,000], got 0"),
    ("--cycles 999999999", "--cycles must make a run of at most 1,000,000,000 steps"),
    ("--steps-per-task 0", "in [1, 1,000,000,000], got 0"),
    ("--episodes-per-task -1", "in [1, 1,000,000,000], got -1"),
    ("--episodes-per-task 999999999", "a run of at most 1,000,000,000 steps"),
    ("--steps-per-task 500 --episodes-per-task 5", "left out with --episodes-per-task, got 500"),
]
CASES = []
for case in REFUSED + REFUSED_TD3:
    CASES += [(ne, *case), (td3, *case)]
CASES += [(ne, *case) for case in REFUSED_NE]


@pytest.mark.parametrize(("script", "flags", "words"), CASES)
def test_values_out_of_range_are_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, script, flags, words
):
    folder = tmp_path / "run"
    few = "" if "--tasks" in flags else "--tasks Pendulum-v1"
    code, err = in_process(monkeypatch, capsys, f"{few} --run-dir {folder} {flags}", script)
    assert code == 2
    assert_one_line(err, words)
    assert not folder.exists()


@SCRIPTS
def test_numbers_that_no_flag_accepts_are_refused_in_one_line(
    tmp_path, monkeypatch, capsys, script
):
    for flags in bad_numbers(script.Args):
        arguments = f"--tasks Pendulum-v1 --run-dir {tmp_path / 'run'} {flags}"
        code, err = in_process(monkeypatch, capsys, arguments, script)
        assert code == 2, flags
        assert_one_line(err, flags.split()[0])
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--tasks Pendulum-v1", "--tasks must be ('Pendulum-v1', 'Reacher-v5') or left out"),
        ("--cycles 3", "--cycles must be 2 or left out"),
        ("--episodes-per-task 3", "--episodes-per-task must be None or left out"),
        ("--clear-buffer", "--clear-buffer must be False or left out"),
    ],
)
def test_resume_refuses_flags_that_contradict_the_run(whole, monkeypatch, capsys, flags, words):
    assert_refused(monkeypatch, capsys, f"--resume {whole}", words, flags, ne)


def test_checkpoints_of_other_scripts_and_other_tasks_are_refused(
    whole, tmp_path, monkeypatch, capsys
):
    foreign = "is a checkpoint of ne_td3_continual, this is td3_continual"
    assert_refused(monkeypatch, capsys, f"--resume {whole}", foreign, module=td3, code=1)
    content = load(whole)
    content["finished"] = False
    content["args"]["tasks"] = ("Pendulum-v1",)
    shutil.copy(whole / "results.csv", tmp_path)
    torch.save(content, tmp_path / "checkpoint.pt")
    (tmp_path / "args.json").write_text(json.dumps(content["args"], indent=2))
    unfit = "the checkpoint must have the parts"
    assert_refused(monkeypatch, capsys, f"--resume {tmp_path}", unfit, module=ne, code=1)


# --- help and speed -----------------------------------------------------------
@SCRIPTS
def test_help_names_the_flags_of_a_sequence_in_groups(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.__file__, "--help"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for flag in ("--tasks", "--cycles", "--steps-per-task", "--episodes-per-task"):
        assert flag in out
    assert "--total-timesteps" not in out and "--task-lengths" not in out


def test_the_readme_s_example_plans_what_it_says(tmp_path):
    flags = "--tasks Pendulum-v1 Reacher-v5 --cycles 2 --steps-per-task 5000 "
    flags += f"--learning-starts 1000 --eval-episodes 1 --run-dir {tmp_path / 'run'}"
    process = launch(ne, flags, signal_at(30, "SIGTERM"))
    code, out, err = finish(process)
    assert code == 0, err
    assert "topology: 25% -> 95% in 94 rounds, less what is pruned\n" in out
    plan = out.split("density at the start: ")[1].splitlines()[0].split(", ")
    assert [start.split()[0] for start in plan] == [*NAMES, *NAMES]
    densities = [float(start.split()[1].rstrip("%")) for start in plan]
    assert densities == sorted(densities) and densities[0] == 25
    assert not math.isclose(densities[1], 25)


def test_scripts_run_from_the_root_as_they_say():
    for words in (["ne_td3_continual.py"], ["-m", "baselines.td3_continual"]):
        command = [sys.executable, *words, "--cycles", "0"]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == 2
        assert_one_line(process.stderr, "--cycles must be in")
