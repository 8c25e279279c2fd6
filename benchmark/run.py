"""Makes the runs that a figure needs and that are missing, one per core, on this machine or on a Ray cluster.

Run:   python benchmark/run.py figure6 --seeds 7           all runs of Figure 6, in runs/full
       python benchmark/run.py figure6 --quick             a small version, about an hour on two cores, in runs/quick
       python benchmark/run.py figure6 --dry-run           only print the commands, for Slurm or GNU parallel

Scheduling is Ray's: a run is a task, retried when its worker or node is lost. A run holds a lock for as long as its
script lives, so it is never made twice at once. The figures are in matrix.py, the pages in docs/benchmark.md.
"""

import csv
import fcntl
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import tyro
from tqdm import tqdm
from tyro.conf import Positional

import matrix

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "baselines")]


@dataclass
class Args:
    figure: Positional[Literal[tuple(matrix.FIGURES)]]  # the figure whose runs are made
    seeds: int | None = None  # seeds 1, 2, ..., this; default: 7, with --quick 1 to 3
    quick: bool = False  # small version of the runs: about an hour on two cores
    short: bool = False  # 200,000 steps, the length of the runs in results/, instead of a million
    tasks: tuple[str, ...] = ()  # these tasks instead of the figure's
    methods: tuple[str, ...] = ()  # only these of the figure's methods, by the names in matrix.py
    flags: str = ""  # further flags of every run, e.g. --flags=--compile; they win over the figure's
    out: Path | None = None  # folder of all runs; default runs/full, runs/short or runs/quick
    address: str | None = None  # of a running Ray cluster, HOST:PORT or auto; default: a local instance of our own
    cpus: int | None = None  # runs at a time on this machine, without --address; default: its cores
    gpus_per_run: float | None = None  # share of a GPU; default: all GPUs shared evenly among the cores, 0 without
    memory_per_run: float = 0  # GiB that Ray reserves for each run, which limits how many start; 0 = not limited
    retry_failed: bool = False  # also make the runs that failed before
    dry_run: bool = False  # print one command per line and exit


class Job(NamedTuple):
    """A run, as far as the machine that makes it must know it. Paths are absolute."""

    name: str  # of the folder, below the one of all runs
    folder: str
    script: str
    flags: list[str]
    steps: int  # last step of the finished run
    wanted: dict  # what args.json must hold
    cost: float


# What may differ between a run that exists and the one that is wanted: where and how fast it is computed
HOW = {"run_dir", "resume", "evaluate", "cuda", "cudagraphs", "compile", "torch_threads", "checkpoint_frequency"}
HOW |= {"track", "wandb_project_name", "wandb_entity", "capture_video", "buffer_device"}

# The script in a process that gets SIGTERM, upon which it saves, when its parent (the Ray worker) is gone
ORPHAN_STOPS = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def die(message: str, code: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


# --- what there is ----------------------------------------------------------------------------------------------------
def parse(script: str, flags: list[str]) -> tuple[dict, int]:
    """Arguments of a script as it would write them to args.json, and its last step. Raises: SystemExit(2)."""
    if not (ROOT / script).exists():
        die(f"there is no {script}")
    argv, sys.argv = sys.argv, [script, *flags]
    try:
        args, _ = importlib.import_module(Path(script).stem).parse_args()
    finally:
        sys.argv = argv
    return json.loads(json.dumps(vars(args))), args.total_timesteps


def last_step(folder: Path) -> int:
    """Of results.csv; 0 where there is none yet. A line that is still being written does not count."""
    try:
        with open(folder / "results.csv", "rb") as file:
            header = file.readline()
            file.seek(max(len(header), os.path.getsize(file.fileno()) - 10_000))
            line = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2].decode()
            return int(next(csv.DictReader([header.decode(), line]))["step"])
    except (OSError, StopIteration, ValueError, KeyError):
        return 0


def saved_step(folder: Path) -> int:
    """Step of the checkpoint; 0 where there is none that can be read."""
    import torch

    try:
        return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)["run"]["step"]
    except Exception:  # torch raises many kinds for a damaged or foreign file; resuming says what is wrong
        return 0


def state_of(job: Job) -> Literal["finished", "failed", "interrupted", "new"]:
    """Raises: SystemExit(2) where the folder holds another run than the one that is wanted."""
    folder = Path(job.folder)
    if (folder / "args.json").exists():
        stored = json.loads((folder / "args.json").read_text())
        defaults, _ = parse(job.script, [])
        for name, value in job.wanted.items():
            if name not in HOW and (there := stored.get(name, defaults[name])) != value:
                flag = "--" + name.replace("_", "-")
                die(f"{folder} holds another run: {flag} is {there} there, {value} is wanted; choose another --out")
        if last_step(folder) == job.steps == saved_step(folder):
            return "finished"
    if (folder / "failed.txt").exists():
        return "failed"
    return "interrupted" if (folder / "args.json").exists() else "new"


def next_command(job: Job) -> tuple[list[str], Path | None]:
    """Script and flags that start or continue the run, and where to move a folder that cannot be continued."""
    folder = Path(job.folder)
    if (folder / "checkpoint.pt").exists():
        return [job.script, "--resume", job.folder], None
    aside = None
    if (folder / "args.json").exists():
        aside = next(p for n in range(1, 1000) if not (p := folder.with_name(f"{folder.name}.stopped{n}")).exists())
    return [job.script, *job.flags, "--run-dir", job.folder], aside


# --- one run, wherever Ray puts it ------------------------------------------------------------------------------------
def lock_of(job: Job) -> Path:
    return Path(job.folder).with_name(f".{Path(job.folder).name}.lock")


def make_run(job: Job) -> str:
    """Starts or continues the run and waits for its end. Returns: "" when it is finished, else what went wrong.

    The script inherits the lock: should this process be killed, whoever is sent to make the run again waits until the
    orphaned script has saved and ended.
    """
    folder = Path(job.folder)
    with open(lock_of(job), "a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.5)
        command, aside = next_command(job)
        if aside:
            folder.rename(aside)
        folder.mkdir(exist_ok=True)
        (folder / "failed.txt").unlink(missing_ok=True)
        with open(folder / "output.log", "a") as log:
            print(f"$ python {shlex.join(command)}", file=log, flush=True)
            child = subprocess.Popen(
                [sys.executable, "-c", ORPHAN_STOPS, str(os.getpid()), *command],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # out of reach of Ctrl-C and of Ray, which ends whole groups, so that it saves
                pass_fds=[lock.fileno()],
            )
            try:
                while child.poll() is None:
                    time.sleep(0.2)
            finally:  # cancelled: the script saves
                if child.poll() is None:
                    child.terminate()
                    child.wait()
        return outcome(job, child.returncode)


def outcome(job: Job, code: int) -> str:
    """What to say about a script that ended with this exit code; a failure is also written to failed.txt."""
    if code == 0:
        step = last_step(Path(job.folder))
        return "" if step == job.steps else f"stopped after step {step:,} of {job.steps:,}"
    text = (Path(job.folder) / "output.log").read_text(errors="replace").strip()
    problem = f"exit code {code}: {text.splitlines()[-1]}"
    (Path(job.folder) / "failed.txt").write_text(problem + "\n")
    return problem


# --- all runs ---------------------------------------------------------------------------------------------------------
def jobs_of(args: Args) -> list[Job]:
    """Raises: SystemExit(2) for a mistake on the command line, be it in --flags."""
    try:
        chosen = matrix.choose(args.figure, args.quick, args.short, args.seeds, args.tasks, args.methods)
    except ValueError as e:
        die(str(e))
    length, seeds, tasks, methods = chosen
    folder = Path(os.path.abspath(args.out or Path("runs") / length))
    jobs = []
    for run in matrix.runs_of(length, seeds, tasks, methods):
        flags = shlex.split(f"{run.flags} {args.flags}")
        wanted, steps = parse(run.script, flags)
        cost = matrix.METHODS[run.name].cost * steps / matrix.QUICK_SPEED[run.script]
        jobs.append(Job(run.path, str(folder / run.path), str(ROOT / run.script), flags, steps, wanted, cost))
    return jobs


def print_commands(jobs: list[Job]) -> None:
    """What is left to do as plain commands, one per line; each works alone, in any order, on any machine."""
    for job in jobs:
        (script, *flags), aside = next_command(job)
        folder = Path(job.folder)
        move = f"mv {shlex.quote(os.path.relpath(folder))} {shlex.quote(os.path.relpath(aside))} && " if aside else ""
        flags = [os.path.relpath(folder) if flag == job.folder else flag for flag in flags]
        print(f"{move}python {shlex.join([os.path.relpath(script), *flags])}")


def start_ray(args: Args):
    """Ray at --address, or an instance of our own that only this machine can reach. Raises: SystemExit."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray._private import services
    except ImportError:
        die("runs are scheduled by Ray: pip install -r requirements-benchmark.txt", code=1)
    services.resolve_ip_for_localhost = lambda host: host  # Ray would turn 127.0.0.1 into an address for all
    # A shell script's background jobs are born with SIGINT ignored; Ray's workers, whose tasks it cancels, must not be
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options = {"address": args.address or "local"}
    if not args.address:
        options |= {"num_cpus": args.cpus or len(os.sched_getaffinity(0)), "object_store_memory": 100 * 2**20}
        options |= {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
    for attempts_left in (2, 1, 0):
        try:
            ray.init(**options, log_to_driver=False, logging_level="ERROR")
            break
        except Exception as e:  # a busy machine may be slower than Ray's own limit of half a minute
            ray.shutdown()
            if args.address:
                die(f"--address: cannot reach Ray at {args.address}: {str(e).splitlines()[0]}", code=1)
            if not attempts_left:
                die(f"Ray does not start: {str(e).splitlines()[0]}", code=1)
    return ray


def make_all(ray, jobs: list[Job], args: Args) -> dict[str, str]:
    """Makes the runs, with progress. Returns: {name of the run: what went wrong}. Raises: KeyboardInterrupt."""
    gpus, cpus = (ray.cluster_resources().get(kind, 0) for kind in ("GPU", "CPU"))
    share = min(1, int(gpus / max(cpus, 1) * 1e4) / 1e4) if args.gpus_per_run is None else args.gpus_per_run
    resources = {"num_cpus": 1, "num_gpus": share, "memory": int(args.memory_per_run * 2**30) or None}
    task = ray.remote(make_run).options(**resources, max_retries=10)
    for job in jobs:
        Path(job.folder).parent.mkdir(
            parents=True, exist_ok=True
        )  # here only: so other machines must see the same files
    problems, pending = {}, {}
    done = {job.name: min(last_step(Path(job.folder)), job.steps) for job in jobs}
    looks = {"unit": " steps", "smoothing": 0, "miniters": 0, "mininterval": 0.5 if sys.stderr.isatty() else 60}
    bar = tqdm(total=sum(job.steps for job in jobs), initial=sum(done.values()), **looks)
    try:
        pending = {task.remote(job): job for job in jobs}
        while pending:
            ends = f"{len(jobs) - len(pending)} of {len(jobs)} runs ended, {len(problems)} not finished"
            bar.set_postfix_str(ends, refresh=False)
            ended, _ = ray.wait(list(pending), timeout=1)
            for ref in ended:
                job = pending.pop(ref)
                try:
                    problem = ray.get(ref)
                except ray.exceptions.RayError as e:  # a folder that cannot be written; a worker lost too often
                    problem = str(getattr(e, "cause", None) or e).splitlines()[0]
                if problem:
                    problems[job.name] = problem
                bar.write(f"{job.name}: {problem or 'finished'}", file=sys.stderr)
            for job in jobs:
                done[job.name] = max(done[job.name], min(last_step(Path(job.folder)), job.steps))
            bar.update(sum(done.values()) - bar.n)
    except KeyboardInterrupt:
        print("\nstopping: runs save their checkpoints (once more: at once)", file=sys.stderr)
        for ref in pending:
            ray.cancel(ref)
        ray.wait(list(pending), num_returns=len(pending))
        raise
    finally:
        bar.close()
    return problems


def report(args: Args, jobs: list[Job], problems: dict[str, str]) -> NoReturn:
    for name, problem in problems.items():
        print(f"not finished: {name}: {problem}", file=sys.stderr)
    print(f"{args.figure}: {len(jobs) - len(problems)} of {len(jobs)} runs are finished", file=sys.stderr)
    raise SystemExit(1 if problems else 0)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    jobs = jobs_of(args)
    states = {job.name: state_of(job) for job in jobs}
    kinds = ["finished", "interrupted", "failed", "new"]
    counts = [f"{count} {kind}" for kind in kinds if (count := list(states.values()).count(kind))]
    print(f"{args.figure}: {len(jobs)} runs, {', '.join(counts)}", file=sys.stderr)
    makes = {"interrupted", "new"} | ({"failed"} if args.retry_failed else set())
    due = [job for job in jobs if states[job.name] in makes]
    if args.quick:
        minutes = sum(job.cost for job in due) / 60
        print(f"about {minutes:.0f} minutes, divided by the number of cores", file=sys.stderr)
    if args.dry_run:
        return print_commands(due)
    problems = {}
    for job in jobs:
        if states[job.name] == "failed" and job not in due:
            problems[job.name] = (
                f"{(Path(job.folder) / 'failed.txt').read_text().strip()}; made again by --retry-failed"
            )
    if due:
        try:
            ray = start_ray(args)
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C; Ray has set a handler of its own
            problems |= make_all(ray, due, args)
        except KeyboardInterrupt:
            print("stopped; the same command continues", file=sys.stderr)
            raise SystemExit(130) from None
    report(args, jobs, problems)


if __name__ == "__main__":
    main()
