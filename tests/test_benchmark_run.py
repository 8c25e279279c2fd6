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

import run
from helpers import call

SCRIPT = Path(run.__file__)
# Pendulum's episodes are 200 steps, and so are the checkpoints apart
TINY = (
    "--total-timesteps {steps} --learning-starts {random} --batch-size 16 --buffer-size 2000"
    " --actor-hidden 8 --critic-hidden 8 --no-cuda"
    " --eval-frequency 200 --eval-episodes 1 --checkpoint-frequency {checkpoints}"
)
# long enough that it is not over before it is stopped; few updates, which take long
LONG = {"steps": 200_000, "random": 199_000, "checkpoints": 200_000}
ONE = ("--methods", "td3_dense", "--seeds", "1")


def arguments(out: Path, *more: str, steps=1200, random=600, checkpoints=200) -> list[str]:
    flags = TINY.format(steps=steps, random=random, checkpoints=checkpoints)
    return ["figure6", "--tasks", "Pendulum-v1", "--out", str(out), f"--flags={flags}", *more]


def jobs_in(out: Path, *more: str, **sizes) -> list[run.Job]:
    (out / "Pendulum-v1").mkdir(parents=True, exist_ok=True)
    return run.jobs_of(tyro.cli(run.Args, args=arguments(out, *more, **sizes)))


def job_in(out: Path, **sizes) -> run.Job:
    return jobs_in(out, *ONE, **sizes)[0]


def copy_of(done: run.Job, out: Path, *names: str) -> run.Job:
    """A job whose folder has these files of a finished run."""
    job = job_in(out)
    Path(job.folder).mkdir()
    for name in names:
        shutil.copy(Path(done.folder) / name, job.folder)
    return job


def starts(job: run.Job) -> list[str]:
    """The commands that were started in the folder of a run."""
    log = (Path(job.folder) / "output.log").read_text()
    return [line for line in log.splitlines() if line.startswith("$ ")]


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
    found = set()
    more = {pid}
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
    assert run.state_of(done) == "finished"
    assert run.last_step(Path(done.folder)) == 1200
    before = results(done)
    assert run.make_run(done) == ""
    assert results(done) == before
    assert "is finished" in (Path(done.folder) / "output.log").read_text()


def test_another_run_in_the_folder_is_refused_in_one_line(done, capsys):
    elsewhere = done.wanted | {"compile": True, "cuda": True}
    assert run.state_of(done._replace(wanted=elsewhere)) == "finished"
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


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "state", "resumes", "moves"),
    [
        (remove("checkpoint.pt"), "interrupted", False, True),
        (remove("results.csv", "checkpoint.pt"), "new", False, False),  # it failed to start
        (write("results.csv", b"step\n\0\0\0\0\n"), "interrupted", True, False),
        (cut_rows, "interrupted", True, False),
        (write("failed.txt", b"why"), "finished", True, False),
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


def test_finished_runs_are_those_of_the_longest(tmp_path, capsys):
    names = ("a_seed1", "a_seed2", "a_seed10", "a_seed3.stopped1", "b_seed1", "c_seed1")
    for name, steps in zip(names, (30, 20, 30, 30, 30, 40), strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.csv").write_text(f"x,step\n1,10\n1,{steps}\n")
    found = run.finished_runs(tmp_path, ["b", "a"])
    a = [tmp_path / "a_seed1", tmp_path / "a_seed10"]
    assert list(found.items()) == [("b", [tmp_path / "b_seed1"]), ("a", a)]
    assert capsys.readouterr().err == "left out: a_seed2 is at step 20 of 30\n"
    assert run.finished_runs(tmp_path, ["a"], steps=20) == {"a": [tmp_path / "a_seed2"]}
    with pytest.raises(SystemExit):
        run.finished_runs(tmp_path, ["d"])


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
    job = job_in(tmp_path, **LONG)
    folder = Path(job.folder)
    worker = make_elsewhere(job)
    wait_for(lambda: run.last_step(folder) >= 400)
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
    saved = run.saved_step(folder)
    assert saved >= 400 and "--resume" in starts(job)[1]
    wait_for(lambda: run.last_step(folder) > saved)
    other.kill()
    other.wait()
    wait_for(lambda: run.saved_step(folder) > saved)  # the second script has saved as well
    assert run.state_of(job) == "interrupted"


def test_a_run_lost_without_a_checkpoint_starts_anew_beside_what_it_left(done, tmp_path):
    job = copy_of(done, tmp_path, "args.json", "results.csv")
    assert run.make_run(job) == ""
    assert run.state_of(job) == "finished" and results(job) == results(done)
    aside = Path(f"{job.folder}.stopped1")
    assert sorted(p.name for p in aside.iterdir()) == ["args.json", "results.csv"]


def test_a_failure_keeps_its_last_line_and_a_stop_is_none(tmp_path):
    job = job_in(tmp_path)
    assert run.outcome(job, 0) == "stopped after step 0 of 1,200"
    assert run.state_of(job) == "new"
    Path(job.folder).mkdir()
    (Path(job.folder) / "output.log").write_text("step 500\nerror: loss is NaN\n")
    assert run.outcome(job, 1) == "exit code 1: error: loss is NaN"
    assert run.state_of(job) == "failed"
    assert (Path(job.folder) / "failed.txt").read_text() == "exit code 1: error: loss is NaN\n"


# --- the command --------------------------------------------------------------
def test_dry_run_prints_commands_that_the_scripts_accept(done, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = Path("out")
    copy_of(done, out, "args.json", "results.csv", "checkpoint.pt")
    code, printed, err = call(capsys, run, *arguments(out, "--seeds", "2", "--dry-run"))
    lines = [shlex.split(line) for line in printed.splitlines()]
    assert code == 0 and "figure6: 12 runs, 1 finished, 11 new" in err and len(lines) == 11
    scripts = set()
    for cd, root, and_, python, *words in lines:
        assert [cd, root, and_, python] == ["cd", str(run.ROOT), "&&", "python"]
        script = " ".join(words[:2]) if words[0] == "-m" else words[0]
        scripts.add(script)
        wanted, steps = run.parse(script, words[len(script.split()) :])
        assert steps == 1200 and wanted["run_dir"].startswith(f"{tmp_path}/out/Pendulum-v1/")
    assert scripts == {"ne_td3_continuous.py", "-m baselines.td3_continuous"}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["figure6", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["figure6", "--methods", "static_25"], "--methods must be of ne_td3, td3_dense"),
        (["figure6", "--flags=--tau=2"], "--tau must be in [0, 1], got 2.0"),
        (["figure6", "--flags=--env-id=Hopper-v5"], "say what run it is: --env-id=Hopper-v5"),
        (["figure8", "--flags=--tasks Ant-v5"], "say what run it is: --tasks"),
        (["figure6", "--flags=--resume x"], "say what run it is: --resume"),
        (["figure6", "--cpus", "0"], "--cpus must be in [1, "),
        (["figure6", "--gpus-per-run", "nan"], "--gpus-per-run must be in [0, 1], got nan"),
        (["figure6", "--tasks", "Nope-v0"], "Nope"),
        (["figure8", "--tasks", "Ant-v5"], "--tasks must be left out with figure8"),
    ],
)
def test_mistakes_are_refused_in_one_line(monkeypatch, capsys, tmp_path, args, says):
    monkeypatch.setattr(run, "start_ray", None)  # should one not be refused, nothing is run
    code, printed, err = call(capsys, run, *args, "--out", str(tmp_path))
    assert code == 2 and printed == ""
    assert err.startswith("error: ") and says in err and err.count("\n") == 1


# --- Ray ----------------------------------------------------------------------
@pytest.mark.parametrize(("gpu", "seen"), [(True, "0,1"), (False, "")])
def test_a_run_without_a_share_sees_no_gpu(monkeypatch, tmp_path, gpu, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    command = ["-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"]
    with open(tmp_path / "log", "w") as log, open(tmp_path / "lock", "w") as lock:
        assert run.run_script(command, log, lock, gpu) == 0
    assert (tmp_path / "log").read_text().splitlines()[1:] == [seen]


def launch(out: Path, *args: str, **sizes) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), *arguments(out, *args, **sizes)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}  # of fake_task
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def listening_addresses(pids: set[int]) -> set[str]:
    """Addresses, in hexadecimal as in /proc/net, of the TCP sockets that wait for connections."""
    sockets = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                sockets[f"socket:[{fields[9]}]"] = fields[1].split(":")[0]
    files = [str(file) for pid in pids for file in open_files(pid)]
    return {sockets[file] for file in files if file in sockets}


def test_a_local_instance_makes_what_is_missing_and_lists_what_failed(done, tmp_path, capsys):
    some = (*ONE, "--tasks", "fake_task:NaNObs-v0", "Pendulum-v1")
    failing, finishing = jobs_in(tmp_path, *some)
    process = launch(tmp_path, *some, "--cpus", "1")
    finished = Path(finishing.folder)
    wait_for(lambda: run.last_step(finished) or process.poll() is not None)
    addresses = listening_addresses(processes_below(process.pid))
    _, err = process.communicate(timeout=240)
    assert addresses and addresses <= LOOPBACK
    assert process.returncode == 1 and "figure6: 1 of 2 runs are finished" in err
    problem = "exit code 1: error: the observation is NaN or infinite at step 130"
    assert f"not finished: {failing.name}: {problem}" in err
    assert results(finishing) == results(done)

    code, _, err = call(capsys, run, *arguments(tmp_path, *some))  # nothing to do
    assert code == 1 and "1 failed, 1 finished" in err and "made again by --retry-failed" in err
    again = arguments(tmp_path, *some, "--retry-failed", "--dry-run")
    _, printed, _ = call(capsys, run, *again)
    assert printed.count("\n") == 1 and "NaNObs" in printed
    assert [len(starts(job)) for job in (failing, finishing)] == [1, 1]


@pytest.mark.slow
def test_a_stop_saves_and_the_same_command_continues(tmp_path):
    job = job_in(tmp_path, **LONG)
    process = launch(tmp_path, "--methods", "td3_dense", "--seeds", "2", "--cpus", "1", **LONG)
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
    # only the lost run was started twice, the second time from its checkpoint
    assert sorted(len(starts(job)) for job in jobs) == [1, 1, 1, 2]
    assert all("--resume" in line for job in jobs for line in starts(job)[1:])
