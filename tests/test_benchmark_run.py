"""benchmark/run.py: what is missing is made, once, whatever is killed; what failed is said.

Runs are real and tiny.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro

import matrix
import run

SCRIPT = Path(run.__file__)
# Pendulum's episodes are 200 steps, and so are the checkpoints apart
TINY = (
    "--total-timesteps {steps} --learning-starts {random} --batch-size 16 --buffer-size 2000"
    " --actor-hidden 8 --critic-hidden 8 --no-cuda"
    " --eval-frequency 200 --eval-episodes 1 --checkpoint-frequency {checkpoints}"
)


def arguments(out: Path, *more: str, steps=1200, random=600, checkpoints=200) -> list[str]:
    flags = TINY.format(steps=steps, random=random, checkpoints=checkpoints)
    return ["figure6", "--tasks", "Pendulum-v1", "--out", str(out), f"--flags={flags}", *more]


def jobs_in(out: Path, *more: str, **sizes) -> list[run.Job]:
    (out / "Pendulum-v1").mkdir(parents=True, exist_ok=True)
    return run.jobs_of(tyro.cli(run.Args, args=arguments(out, *more, **sizes)))


def job_in(out: Path, **sizes) -> run.Job:
    return jobs_in(out, "--methods", "td3_dense", "--seeds", "1", **sizes)[0]


def starts(job: run.Job) -> list[str]:
    """The commands that were started in the folder of a run."""
    return [
        line
        for line in (Path(job.folder) / "output.log").read_text().splitlines()
        if line.startswith("$ ")
    ]


def results(job: run.Job) -> bytes:
    return (Path(job.folder) / "results.csv").read_bytes()


def wait_for(condition, seconds: float = 120) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.05)


def processes_below(pid: int) -> set[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            pass  # it has ended
    found, more = set(), {pid}
    while more:
        found |= more
        more = {child for child, parent in parents.items() if parent in found} - found
    return found


def open_files(pid: int) -> list[Path]:
    try:
        return [fd.readlink() for fd in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:  # one was closed just now
        return []


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> run.Job:
    """A finished run that nothing has disturbed."""
    job = job_in(tmp_path_factory.mktemp("done"))
    assert run.state_of(job) == "new"
    assert run.make_run(job) == ""
    return job


# --- what there is ------------------------------------------------------------
def test_a_finished_run_is_recognised_and_not_made_again(done):
    assert run.state_of(done) == "finished" and run.last_step(Path(done.folder)) == 1200
    before = results(done)
    assert run.make_run(done) == ""
    assert (
        results(done) == before and "is finished" in (Path(done.folder) / "output.log").read_text()
    )


def test_what_is_computed_elsewhere_or_faster_is_the_same_run(done):
    assert (
        run.state_of(done._replace(wanted=done.wanted | {"compile": True, "cuda": True}))
        == "finished"
    )


def test_another_run_in_the_folder_is_refused_in_one_line(done, capsys):
    with pytest.raises(SystemExit) as stop:
        run.state_of(done._replace(wanted=done.wanted | {"tau": 0.5}))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: ") and "--tau is 0.005 there, 0.5 is wanted" in error


def cut_rows(folder: Path) -> None:
    file = folder / "results.csv"
    os.truncate(file, file.stat().st_size - 5)


def remove(*names: str):
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


@pytest.mark.parametrize(
    ("damage", "state", "resumes", "moves"),
    [
        (remove("checkpoint.pt"), "interrupted", False, True),
        (remove("args.json", "checkpoint.pt"), "interrupted", False, True),
        (remove("results.csv", "checkpoint.pt"), "new", False, False),  # it failed to start
        (
            lambda folder: (folder / "checkpoint.pt").write_bytes(b"damaged"),
            "interrupted",
            True,
            False,
        ),
        (cut_rows, "interrupted", True, False),
        (lambda folder: (folder / "failed.txt").write_text("why"), "finished", True, False),
    ],
)
def test_states_and_how_they_go_on(done, tmp_path, damage, state, resumes, moves):
    job = done._replace(folder=str(tmp_path / "run"))
    shutil.copytree(done.folder, job.folder)
    damage(Path(job.folder))
    assert run.state_of(job) == state
    command, aside = run.next_command(job)
    assert ("--resume" in command) == resumes and ("--run-dir" in command) != resumes
    assert aside == (tmp_path / "run.stopped1" if moves else None)


def test_what_the_script_fills_in_is_what_is_wanted(tmp_path):
    """args.json of NE holds intervals and rates that follow from the length of the run."""
    (job,) = jobs_in(tmp_path, "--methods", "ne_td3", "--seeds", "1", steps=400, random=200)
    assert run.make_run(job) == ""
    assert run.state_of(job) == "finished"
    changed = job.wanted | {"grow_interval": job.wanted["grow_interval"] + 1}
    with pytest.raises(SystemExit):
        run.state_of(job._replace(wanted=changed))


def test_a_folder_in_which_a_run_failed_to_start_is_used_again(done, tmp_path):
    job = job_in(tmp_path)
    folder = Path(job.folder)
    folder.mkdir()
    (folder / "args.json").write_bytes((Path(done.folder) / "args.json").read_bytes())
    (folder / "results.csv").write_text("")
    assert run.state_of(job) == "new" and run.make_run(job) == ""
    assert results(job) == results(done)
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


# --- losing the process that makes a run --------------------------------------
@pytest.fixture
def make_elsewhere():
    """Makes a run in a process of its own, which is killed at the end at the latest."""
    workers = []

    def make(job: run.Job) -> subprocess.Popen:
        code = f"import sys; sys.path[:0] = {sys.path!r}\n"
        code += f"import run; run.make_run(run.Job(*{tuple(job)!r}))"
        workers.append(subprocess.Popen([sys.executable, "-c", code]))
        return workers[-1]

    yield make
    for worker in workers:
        worker.kill()
        worker.wait()


def test_an_orphaned_script_saves_before_the_run_goes_on_elsewhere(tmp_path, make_elsewhere):
    # so that it cannot be over before it is killed
    sizes = {"steps": 200_000, "random": 199_000, "checkpoints": 200_000}
    job = job_in(tmp_path, **sizes)
    worker = make_elsewhere(job)
    wait_for(lambda: run.last_step(Path(job.folder)) >= 400)
    (script,) = processes_below(worker.pid) - {worker.pid}
    os.kill(script, signal.SIGSTOP)  # saving takes its time
    worker.kill()
    worker.wait()
    other = make_elsewhere(job)
    wait_for(lambda: run.lock_of(job) in open_files(other.pid))
    time.sleep(2)
    assert len(starts(job)) == 1  # it waits for the lock
    os.kill(script, signal.SIGCONT)
    wait_for(lambda: len(starts(job)) == 2)
    saved = run.saved_step(Path(job.folder))
    assert saved >= 400 and "--resume" in starts(job)[1]
    wait_for(lambda: run.last_step(Path(job.folder)) > saved)
    other.kill()
    other.wait()
    wait_for(
        lambda: run.saved_step(Path(job.folder)) > saved
    )  # the second script has saved as well
    assert run.state_of(job) == "interrupted"


def test_a_run_lost_without_a_checkpoint_starts_anew_beside_what_it_left(done, tmp_path):
    job = job_in(tmp_path)
    folder = Path(job.folder)
    folder.mkdir()
    for name in ("args.json", "results.csv"):
        (folder / name).write_bytes((Path(done.folder) / name).read_bytes())
    assert run.state_of(job) == "interrupted"
    assert run.make_run(job) == ""
    assert run.state_of(job) == "finished" and results(job) == results(done)
    aside = folder.with_name(f"{folder.name}.stopped1")
    assert sorted(p.name for p in aside.iterdir()) == ["args.json", "results.csv"]


def test_a_failure_keeps_its_last_line_until_it_is_made_again(tmp_path):
    job = job_in(tmp_path)
    Path(job.folder).mkdir()
    (Path(job.folder) / "output.log").write_text("step 500\nerror: loss is NaN\n")
    assert (
        run.outcome(job, 1) == "exit code 1: error: loss is NaN" and run.state_of(job) == "failed"
    )
    assert (Path(job.folder) / "failed.txt").read_text() == "exit code 1: error: loss is NaN\n"


def test_a_script_that_was_stopped_is_neither_finished_nor_failed(tmp_path):
    job = job_in(tmp_path)
    assert run.outcome(job, 0) == "stopped after step 0 of 1,200" and run.state_of(job) == "new"


# --- the command --------------------------------------------------------------
def main(monkeypatch, capsys, *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *args])
    code = 0
    try:
        run.main()
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_dry_run_prints_commands_that_the_scripts_accept(done, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = Path("out")
    job = job_in(out)
    folder = Path(job.folder)
    folder.mkdir()
    for name in ("args.json", "results.csv", "checkpoint.pt"):
        (folder / name).write_bytes((Path(done.folder) / name).read_bytes())
    code, printed, err = main(monkeypatch, capsys, *arguments(out, "--seeds", "2", "--dry-run"))
    lines = [shlex.split(line) for line in printed.splitlines()]
    assert code == 0 and "figure6: 12 runs, 1 finished, 11 new" in err and len(lines) == 11
    scripts = set()
    for cd, root, and_, python, *words in lines:
        assert [cd, and_, python] == ["cd", "&&", "python"] and Path(root).resolve() == run.ROOT
        script = " ".join(words[:2]) if words[0] == "-m" else words[0]
        scripts.add(script)
        wanted, steps = run.parse(script, words[len(script.split()) :])
        assert steps == 1200 and wanted["run_dir"].startswith(f"{tmp_path}/out/Pendulum-v1/")
    assert scripts == {"ne_td3_continuous.py", "-m baselines.td3_continuous"}

    (folder / "checkpoint.pt").unlink()
    some = ("--seeds", "1", "--methods", "td3_dense", "--dry-run")
    _, printed, _ = main(monkeypatch, capsys, *arguments(out, *some))
    assert f" && mv {folder} {folder}.stopped1 && python -m baselines.td3_continuous" in printed


def test_in_the_root_commands_are_short(monkeypatch, capsys):
    monkeypatch.chdir(run.ROOT)
    some = ("--seeds", "1", "--dry-run", "--out", "runs/none_such")
    code, printed, _ = main(monkeypatch, capsys, "figure2", *some)
    assert code == 0
    expected = "python -m baselines.td3_continuous --env-id HalfCheetah-v5 --seed 1"
    expected += " --run-dir runs/none_such/HalfCheetah-v5/td3_dense_seed1"
    assert expected in printed.splitlines()


def test_a_printed_command_works_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    some = ("--seeds", "1", "--methods", "td3_dense", "--dry-run")
    given = arguments(Path("out"), *some, steps=400, random=200)
    _, printed, _ = main(monkeypatch, capsys, *given)
    command = printed.replace("python ", f"{sys.executable} ")
    subprocess.run(command, shell=True, check=True, capture_output=True)
    assert run.last_step(tmp_path / "out/Pendulum-v1/td3_dense_seed1") == 400


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["figure6", "--quick", "--short"], "--quick must be left out with --short"),
        (["figure6", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["figure6", "--methods", "static_25"], "--methods must be of ne_td3, td3_dense"),
        (["figure6", "--flags=--tau=2"], "--tau must be in [0, 1], got 2.0"),
        (["figure6", "--flags=--help"], "--flags must be flags of a run, got --help"),
        (["figure6", "--flags='"], "--flags: No closing quotation, got '"),
        (["figure6", "--flags=--env-id Hopper-v5"], "say what run it is: --env-id"),
        (["figure6", "--flags=--env-id=Hopper-v5"], "say what run it is: --env-id=Hopper-v5"),
        (["figure6", "--flags=--tau 0.1 --env_id Hopper-v5"], "say what run it is: --env_id"),
        (["figure6", "--flags=--seed 4"], "say what run it is: --seed"),
        (["figure6", "--flags=--run_dir=x"], "say what run it is: --run_dir=x"),
        (["figure6", "--flags=--resume x"], "say what run it is: --resume"),
        (["figure8", "--flags=--tasks Ant-v5"], "say what run it is: --tasks"),
        (["figure8", "--flags=--episodes-per-task 9"], "say what run it is: --episodes-per-task"),
        (["figure6", "--cpus", "0"], "--cpus must be at least 1, got 0"),
        (["figure6", "--gpus-per-run", "-1"], "--gpus-per-run must be in [0, 1], got -1.0"),
        (["figure6", "--gpus-per-run", "nan"], "--gpus-per-run must be in [0, 1], got nan"),
        (["figure6", "--memory-per-run", "-2"], "--memory-per-run must be in [0, "),
        (["figure6", "--memory-per-run", "inf"], "--memory-per-run must be in [0, "),
        (["figure6", "--tasks", "Nope-v0"], "--tasks: there is no Nope-v0"),
        (["figure6", "--tasks", "nope:Nope-v0"], "--tasks: there is no nope:Nope-v0"),
        (["figure6", "--tasks", "HalfCheetah-v5", "Hopper-v99"], "there is no Hopper-v99"),
        (["figure10", "--tasks", "walker_swim"], "--tasks: dm_control has no task walker_swim"),
        (["figure10", "--tasks", "lqr_lqr_2_1"], "--tasks: dm_control has no task lqr_lqr_2_1"),
        (["figure8", "--tasks", "Ant-v5"], "--tasks must be left out with figure8"),
    ],
)
def test_mistakes_are_refused_in_one_line(monkeypatch, capsys, tmp_path, args, says):
    monkeypatch.setattr(run, "start_ray", None)  # should one not be refused, nothing is run
    for more in ([], ["--dry-run"]):
        code, printed, err = main(monkeypatch, capsys, *args, *more, "--out", str(tmp_path))
        assert code == 2 and printed == ""
        assert err.startswith("error: ") and says in err and err.count("\n") == 1


def test_an_unknown_figure_is_refused(monkeypatch, capsys):
    code, _, err = main(monkeypatch, capsys, "figure4")
    assert code == 2 and "invalid choice" in err and "Traceback" not in err


def test_a_task_of_a_module_that_can_be_imported_is_accepted(monkeypatch, tmp_path, capsys):
    (tmp_path / "my_tasks.py").write_text(
        "import gymnasium\n"
        "entry = 'gymnasium.envs.classic_control.pendulum:PendulumEnv'\n"
        "gymnasium.register('Mine-v0', entry_point=entry, max_episode_steps=200)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    some = ["--methods", "ne_td3", "--seeds", "1", "--out", str(tmp_path), "--dry-run"]
    given = ["figure6", "--tasks", "my_tasks:Mine-v0", *some]
    code, printed, err = main(monkeypatch, capsys, *given)
    assert code == 0 and "--env-id my_tasks:Mine-v0 --seed 1" in printed, err


def test_a_task_of_dm_control_is_accepted(capfd):
    run.check_task("ball_in_cup_catch", matrix.NE_DRQ)
    assert capfd.readouterr() == ("", "")  # not a word about OpenGL either


@pytest.mark.parametrize("content", [b"", b'{"seed": 1, "tau"', b"[]", b'{"\xff": 1}', b"null"])
def test_arguments_that_no_run_has_written_are_one_line(content, tmp_path, monkeypatch, capsys):
    job = job_in(tmp_path)
    Path(job.folder).mkdir()
    (Path(job.folder) / "args.json").write_bytes(content)
    for more in ([], ["--dry-run"]):
        some = ("--seeds", "1", "--methods", "td3_dense", *more)
        code, printed, err = main(monkeypatch, capsys, *arguments(tmp_path, *some))
        assert code == 2 and printed == "" and err.count("\n") == 1
        assert err.startswith(f"error: {job.folder}/args.json ")


def test_help_and_commands_may_be_cut_off(tmp_path):
    for args in ("--help", f"figure2 --seeds 1 --dry-run --out {tmp_path}"):
        command = f"{sys.executable} {SCRIPT} {args} | true"
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert "BrokenPipe" not in done.stderr and "Traceback" not in done.stderr


def test_without_ray_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = main(
        monkeypatch, capsys, *arguments(tmp_path, "--methods", "td3_dense", "--seeds", "1")
    )
    assert code == 1 and err.splitlines()[-1].endswith("pip install -r requirements-benchmark.txt")


# --- Ray ----------------------------------------------------------------------
class FakeRay:
    """A machine with two cores, 4 GiB and no GPU; no run is ever started on it."""

    def cluster_resources(self) -> dict:
        return {"CPU": 2.0, "memory": 4.0 * 2**30}

    def remote(self, function):
        return self

    def options(self, **resources):
        return self


@pytest.mark.parametrize(
    ("gpus", "cores", "pixels", "share"),
    [
        (0, 2, False, 0),
        (0, 2, True, 0),
        (1, 16, False, 0),  # the cores alone are faster
        (1, 16, True, 0.0625),
        (1, 4, False, 0.25),
        (8, 3, False, 1),
        (1, 7, True, 0.1428),  # seven shares must not be more than the GPU
    ],
)
def test_gpus_are_shared_where_that_is_faster(gpus, cores, pixels, share):
    assert run.even_share(gpus, cores, pixels) == share


@pytest.mark.parametrize(("gpu", "seen"), [(True, "0,1"), (False, "")])
def test_a_run_without_a_share_sees_no_gpu(monkeypatch, tmp_path, gpu, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    command = ["-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"]
    with open(tmp_path / "log", "w") as log, open(tmp_path / "lock", "w") as lock:
        assert run.run_script(command, log, lock, gpu) == 0
    assert (tmp_path / "log").read_text().splitlines()[1:] == [seen]


@pytest.mark.parametrize(("figure", "share"), [("figure6", 0), ("figure10", 0.0625)])
def test_runs_from_pixels_get_the_gpu_of_many_cores(monkeypatch, figure, share):
    there = {"CPU": 16.0, "GPU": 1.0, "memory": 2.0**35}
    monkeypatch.setattr(FakeRay, "cluster_resources", lambda self: there)
    args = run.Args(figure, seeds=1)
    jobs = run.jobs_of(args)[:1]
    assert run.resources_of(FakeRay(), jobs, args)["num_gpus"] == share


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--gpus-per-run", "0.5"], "--gpus-per-run must be 0 where Ray finds no GPU"),
        (["--memory-per-run", "5"], "--memory-per-run must be at most 4.0"),
        ([], "--out must be a folder that can be written"),
    ],
)
def test_what_can_never_start_is_one_line(monkeypatch, capsys, tmp_path, more, says):
    """Ray would wait for ever for what no machine has."""
    monkeypatch.setattr(run, "start_ray", lambda args: FakeRay())
    file = tmp_path / "file"
    file.touch()
    given = ["figure6", "--seeds", "1", "--out", str(file), *more]
    code, _, err = main(monkeypatch, capsys, *given)
    assert code == 1
    assert err.splitlines()[-1].startswith(f"error: {says}")


def launch(out: Path, *args: str, **sizes) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), *arguments(out, *args, **sizes)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def listening_addresses(pids: set[int]) -> set[str]:
    """Addresses, in hexadecimal as in /proc/net, of the TCP sockets that wait for connections."""
    sockets = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                sockets[f"socket:[{fields[9]}]"] = fields[1].split(":")[0]
    found = set()
    for pid in pids:
        for file in open_files(pid):
            if str(file) in sockets:
                found.add(sockets[str(file)])
    return found


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_a_local_instance_makes_what_is_missing_and_lists_what_failed(
    done, tmp_path, monkeypatch, capsys
):
    some = ("--methods", "td3_dense", "--seeds", "1", "--tasks", "CartPole-v1", "Pendulum-v1")
    process = launch(tmp_path, *some, "--cpus", "1")
    finished = Path(jobs_in(tmp_path, *some)[1].folder)
    wait_for(lambda: run.last_step(finished) or process.poll() is not None)
    addresses = listening_addresses(processes_below(process.pid))
    _, err = process.communicate(timeout=120)
    assert addresses and addresses <= LOOPBACK
    assert process.returncode == 1 and "figure6: 1 of 2 runs are finished" in err
    problem = "exit code 2: error: --env-id must have flat Boxes of floats"
    assert f"not finished: CartPole-v1/td3_dense_seed1: {problem}" in err
    assert (finished / "results.csv").read_bytes() == results(done)

    code, _, err = main(monkeypatch, capsys, *arguments(tmp_path, *some))  # nothing to do
    assert code == 1 and "1 finished, 1 failed" in err and "made again by --retry-failed" in err
    _, printed, _ = main(
        monkeypatch, capsys, *arguments(tmp_path, *some, "--retry-failed", "--dry-run")
    )
    assert printed.count("\n") == 1 and "--env-id CartPole-v1" in printed
    jobs = jobs_in(tmp_path, *some)
    assert [len(starts(job)) for job in jobs] == [1, 1]
    assert [run.state_of(job) for job in jobs] == ["failed", "finished"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sigint", [signal.SIG_DFL, signal.SIG_IGN], ids=["foreground", "background"]
)
def test_ctrl_c_saves_and_the_same_command_continues(tmp_path, sigint):
    sizes = {"steps": 100_000, "random": 99_000, "checkpoints": 100_000}
    job = job_in(tmp_path, **sizes)
    some = ("--methods", "td3_dense", "--seeds", "2", "--cpus", "1")
    ours = signal.signal(
        signal.SIGINT, sigint
    )  # a shell script's background jobs are born with SIGINT ignored
    process = launch(tmp_path, *some, **sizes)
    signal.signal(signal.SIGINT, ours)
    wait_for(lambda: run.last_step(Path(job.folder)) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped; the same command continues" in err
    assert run.saved_step(Path(job.folder)) > 0
    assert not (tmp_path / "Pendulum-v1" / "td3_dense_seed2").exists()  # what waits is not started
    assert "--resume" in run.next_command(job)[0]


@pytest.mark.slow
def test_two_nodes_of_which_one_is_killed(tmp_path):
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    sizes = {"steps": 3000, "random": 1000}
    some = ("--methods", "ne_td3", "td3_dense", "--seeds", "2")
    undisturbed = jobs_in(tmp_path / "undisturbed", *some, **sizes)
    for job in undisturbed:
        assert run.make_run(job) == ""

    jobs = jobs_in(tmp_path / "cluster", *some, **sizes)
    cluster = cluster_utils.Cluster()
    try:
        cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1", include_dashboard=False)
        lost = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")
        process = launch(tmp_path / "cluster", *some, "--address", cluster.address, **sizes)
        wait_for(lambda: sum(400 <= run.last_step(Path(job.folder)) < 2500 for job in jobs) >= 2)
        cluster.remove_node(lost, allow_graceful=False)
        _, err = process.communicate(timeout=400)
    finally:
        cluster.shutdown()
    assert process.returncode == 0 and "4 of 4 runs are finished" in err
    assert [results(job) for job in jobs] == [results(job) for job in undisturbed]
    again = sorted(len(starts(job)) for job in jobs)
    assert again == [
        1,
        1,
        1,
        2,
    ]  # only the lost run was started twice, the second time from its checkpoint
    assert all("--resume" in line for job in jobs for line in starts(job)[1:])
