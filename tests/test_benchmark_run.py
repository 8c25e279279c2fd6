"""benchmark/run.py: what is missing is made, once, whatever is killed; what failed is said. Runs are real and tiny."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro

import run

SCRIPT = Path(run.__file__)
# Pendulum's episodes are 200 steps, and so are the checkpoints apart
TINY = (
    "--total-timesteps {steps} --learning-starts {random} --actor-hidden 8 --critic-hidden 8 --batch-size 16 --no-cuda "
)
TINY += "--eval-frequency 200 --eval-episodes 1 --checkpoint-frequency {checkpoints} --buffer-size 2000"


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
    return [line for line in (Path(job.folder) / "output.log").read_text().splitlines() if line.startswith("$ ")]


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


# --- what there is ----------------------------------------------------------------------------------------------------
def test_a_finished_run_is_recognised_and_not_made_again(done):
    assert run.state_of(done) == "finished" and run.last_step(Path(done.folder)) == 1200
    before = results(done)
    assert run.make_run(done) == ""
    assert results(done) == before and "is finished" in (Path(done.folder) / "output.log").read_text()


def test_what_is_computed_elsewhere_or_faster_is_the_same_run(done):
    assert run.state_of(done._replace(wanted=done.wanted | {"compile": True, "cuda": True})) == "finished"


def test_another_run_in_the_folder_is_refused_in_one_line(done, capsys):
    with pytest.raises(SystemExit) as stop:
        run.state_of(done._replace(wanted=done.wanted | {"tau": 0.5}))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: ") and "--tau is 0.005 there, 0.5 is wanted" in error


@pytest.mark.parametrize(
    ("damage", "state", "resumes"),
    [
        (lambda folder: (folder / "checkpoint.pt").unlink(), "interrupted", False),
        (lambda folder: (folder / "checkpoint.pt").write_bytes(b"damaged"), "interrupted", True),
        (
            lambda folder: os.truncate(folder / "results.csv", os.path.getsize(folder / "results.csv") - 5),
            "interrupted",
            True,
        ),
        (lambda folder: (folder / "failed.txt").write_text("why"), "finished", True),
        (lambda folder: [(folder / n).unlink() for n in ("args.json", "checkpoint.pt")], "new", False),
    ],
)
def test_states_and_how_they_go_on(done, tmp_path, damage, state, resumes):
    job = done._replace(folder=str(tmp_path / "run"))
    subprocess.run(["cp", "-r", done.folder, job.folder], check=True)
    damage(Path(job.folder))
    assert run.state_of(job) == state
    command, aside = run.next_command(job)
    assert ("--resume" in command) == resumes and ("--run-dir" in command) != resumes
    assert aside == (tmp_path / "run.stopped1" if state == "interrupted" and not resumes else None)


# --- losing the process that makes a run ------------------------------------------------------------------------------
@pytest.fixture
def make_elsewhere():
    """Makes a run in a process of its own, which is killed at the end at the latest."""
    workers = []

    def make(job: run.Job) -> subprocess.Popen:
        code = f"import sys; sys.path[:0] = {sys.path!r}\nimport run; run.make_run(run.Job(*{tuple(job)!r}))"
        workers.append(subprocess.Popen([sys.executable, "-c", code]))
        return workers[-1]

    yield make
    for worker in workers:
        worker.kill()
        worker.wait()


def test_an_orphaned_script_saves_before_the_run_goes_on_elsewhere(tmp_path, make_elsewhere):
    sizes = {
        "steps": 200_000,
        "random": 199_000,
        "checkpoints": 200_000,
    }  # so that it cannot be over before it is killed
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
    wait_for(lambda: run.saved_step(Path(job.folder)) > saved)  # the second script has saved as well
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
    assert sorted(p.name for p in folder.with_name(f"{folder.name}.stopped1").iterdir()) == ["args.json", "results.csv"]


def test_a_failure_keeps_its_last_line_until_it_is_made_again(tmp_path):
    job = job_in(tmp_path)
    Path(job.folder).mkdir()
    (Path(job.folder) / "output.log").write_text("step 500\nerror: loss is NaN\n")
    assert run.outcome(job, 1) == "exit code 1: error: loss is NaN" and run.state_of(job) == "failed"
    assert (Path(job.folder) / "failed.txt").read_text() == "exit code 1: error: loss is NaN\n"


def test_a_script_that_was_stopped_is_neither_finished_nor_failed(tmp_path):
    job = job_in(tmp_path)
    assert run.outcome(job, 0) == "stopped after step 0 of 1,200" and run.state_of(job) == "new"


# --- the command ------------------------------------------------------------------------------------------------------
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
    for name in ("args.json", "results.csv", "checkpoint.pt"):
        target = out / "Pendulum-v1" / "td3_dense_seed1" / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((Path(done.folder) / name).read_bytes())
    code, printed, err = main(monkeypatch, capsys, *arguments(out, "--seeds", "2", "--dry-run"))
    lines = [shlex.split(line) for line in printed.splitlines()]
    assert code == 0 and "figure6: 12 runs, 1 finished, 11 new" in err and len(lines) == 11
    for python, script, *flags in lines:
        assert python == "python" and Path(script).resolve().is_relative_to(run.ROOT)
        wanted, steps = run.parse(str(Path(script).resolve()), flags)
        assert steps == 1200 and wanted["run_dir"].startswith("out/Pendulum-v1/")
    (Path(job.folder) / "checkpoint.pt").unlink()
    _, printed, _ = main(monkeypatch, capsys, *arguments(out, "--seeds", "1", "--methods", "td3_dense", "--dry-run"))
    assert printed.startswith("mv out/Pendulum-v1/td3_dense_seed1 out/Pendulum-v1/td3_dense_seed1.stopped1 && python ")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("figure6 --quick --short", "error: --quick must be left out with --short"),
        ("figure6 --seeds 0", "error: --seeds must be at least 1, got 0"),
        ("figure6 --methods static_25", "error: --methods must be of ne_td3, td3_dense"),
        ("figure6 --flags=--tau=2", "error: --tau must be in [0, 1], got 2.0"),
        ("figure5", "invalid choice"),
    ],
)
def test_mistakes_are_refused(monkeypatch, capsys, args, says):
    code, _, err = main(monkeypatch, capsys, *args.split())
    assert code == 2 and says in err.replace("\n", " ") and "Traceback" not in err


def test_without_ray_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = main(monkeypatch, capsys, *arguments(tmp_path, "--methods", "td3_dense", "--seeds", "1"))
    assert code == 1 and err.splitlines()[-1].endswith("pip install -r requirements-benchmark.txt")


# --- Ray --------------------------------------------------------------------------------------------------------------
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
        try:
            found |= {
                sockets[os.readlink(fd)] for fd in Path(f"/proc/{pid}/fd").iterdir() if os.readlink(fd) in sockets
            }
        except OSError:
            pass
    return found


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_a_local_instance_makes_what_is_missing_and_lists_what_failed(done, tmp_path, monkeypatch, capsys):
    some = ("--methods", "td3_dense", "--seeds", "1", "--tasks", "NoSuch-v1", "Pendulum-v1")
    process = launch(tmp_path, *some, "--cpus", "1")
    finished = Path(jobs_in(tmp_path, *some)[1].folder)
    wait_for(lambda: run.last_step(finished) or process.poll() is not None)
    addresses = listening_addresses(processes_below(process.pid))
    _, err = process.communicate(timeout=120)
    assert addresses and addresses <= LOOPBACK
    assert process.returncode == 1 and "figure6: 1 of 2 runs are finished" in err
    assert "not finished: NoSuch-v1/td3_dense_seed1: exit code 2: error: --env-id: cannot make NoSuch-v1" in err
    assert (finished / "results.csv").read_bytes() == results(done)

    code, _, err = main(monkeypatch, capsys, *arguments(tmp_path, *some))  # nothing to do
    assert code == 1 and "1 finished, 1 failed" in err and "made again by --retry-failed" in err
    _, printed, _ = main(monkeypatch, capsys, *arguments(tmp_path, *some, "--retry-failed", "--dry-run"))
    assert printed.count("\n") == 1 and "--env-id NoSuch-v1" in printed
    jobs = jobs_in(tmp_path, *some)
    assert [len(starts(job)) for job in jobs] == [1, 1]
    assert [run.state_of(job) for job in jobs] == ["failed", "finished"]


@pytest.mark.slow
@pytest.mark.parametrize("sigint", [signal.SIG_DFL, signal.SIG_IGN], ids=["foreground", "background"])
def test_ctrl_c_saves_and_the_same_command_continues(tmp_path, sigint):
    sizes = {"steps": 100_000, "random": 99_000, "checkpoints": 100_000}
    job = job_in(tmp_path, **sizes)
    some = ("--methods", "td3_dense", "--seeds", "2", "--cpus", "1")
    ours = signal.signal(signal.SIGINT, sigint)  # a shell script's background jobs are born with SIGINT ignored
    process = launch(tmp_path, *some, **sizes)
    signal.signal(signal.SIGINT, ours)
    wait_for(lambda: run.last_step(Path(job.folder)) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped; the same command continues" in err
    assert run.saved_step(Path(job.folder)) > 0
    assert not (tmp_path / "Pendulum-v1" / "td3_dense_seed2").exists()  # what waits is not started
    assert run.next_command(job)[0][1] == "--resume"


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
    assert again == [1, 1, 1, 2]  # only the lost run was started twice, the second time from its checkpoint
    assert all("--resume" in line for job in jobs for line in starts(job)[1:])
