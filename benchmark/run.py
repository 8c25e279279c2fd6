"""Makes the runs that a figure needs and that are missing, one per core, here or on a Ray cluster.

Run:   python benchmark/run.py figure6 --seeds 7    all runs of Figure 6, in runs/full
       python benchmark/run.py figure6 --quick      an hour on two cores, in runs/quick
       python benchmark/run.py figure6 --dry-run    only print the commands, for Slurm or parallel

Scheduling is Ray's: a run is a task, retried when its worker or node is lost. A run holds a lock
for as long as its script lives, so it is never made twice at once. The figures are in matrix.py,
the pages in docs/benchmark.md. plasticity.py and shifts.py make their runs with `make`, too.
"""

import collections
import csv
import fcntl
import importlib
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import tyro
from tqdm import tqdm
from tyro.conf import Positional

import matrix

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclass
class Args:
    figure: Positional[Literal[tuple(matrix.FIGURES)]]  # whose runs are made
    seeds: int | None = None  # seeds 1, 2, ..., this; default: 7, with --quick 1 to 3
    quick: bool = False  # small version of the runs: about an hour on two cores
    short: bool = False  # 200,000 steps instead of a million
    tasks: tuple[str, ...] = ()  # these tasks instead of the figure's
    methods: tuple[str, ...] = ()  # only these of the figure's methods, named as in matrix.py
    flags: str = ""  # further flags of every run, e.g. --flags=--compile; they win
    out: Path | None = None  # of all runs; default: runs/full, runs/short or runs/quick
    address: str | None = None  # of a running Ray cluster, HOST:PORT or auto; default: our own
    cpus: int | None = None  # runs at a time, without --address; default: the machine's cores
    gpus_per_run: float | None = None  # default: 0, or evenly, from pixels or on few cores
    retry_failed: bool = False  # also make the runs that failed before
    dry_run: bool = False  # print one command per line and exit


class Job(NamedTuple):
    """A run, as far as the machine that makes it must know it."""

    name: str  # of the folder, below the one of all runs
    folder: str  # absolute
    script: str  # what follows `python` in the repository's root
    flags: list[str]
    steps: int  # last step of the finished run
    wanted: dict  # what args.json must hold


# what may differ between a run that exists and the one wanted: where and how fast it is computed
HOW = {"run_dir", "resume", "cuda", "cudagraphs", "compile", "torch_threads"}
HOW |= {"checkpoint_frequency", "buffer_device", "track"}

# what says which run it is, which is not for --flags to say
OWN_FLAGS = ("--env-id", "--tasks", "--episodes-per-task", "--seed", "--run-dir", "--resume")

# a GPU makes as many steps of a small network as so many cores (docs/speed.md)
CORES_PER_GPU = 4

# functions of the scripts that fill in what depends on the run, before args.json is written
FILL_IN = ("scale_to_task", "check_method", "scale_to_run")

# the script in a process that gets SIGTERM, upon which it saves, when its parent (the Ray worker)
# is gone
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


# --- what is wanted -----------------------------------------------------------
def parse(script: str, flags: list[str]) -> tuple[dict, int]:
    """Arguments as a script would write them to args.json, and its last step.

    Raises: SystemExit(2) for flags that the script refuses.
    """
    name = script.removeprefix("-m ").removesuffix(".py")
    module = importlib.import_module(name.removeprefix("benchmark/"))
    argv = sys.argv
    sys.argv = [script, *flags]
    try:
        args, _ = module.parse_args(module.Args)
    finally:
        sys.argv = argv
    for function in FILL_IN:
        if hasattr(module, function):
            getattr(module, function)(args)
    return json.loads(json.dumps(vars(args))), args.total_timesteps


def check_range(flag: str, value: float | None, low: float, high: float = 1e6) -> None:
    """Raises: SystemExit(2)."""
    if value is not None and not low <= value <= high:
        die(f"{flag} must be in [{low:,}, {high:,.0f}], got {value}")


def check_flags(flags: str, own: tuple[str, ...] = OWN_FLAGS) -> list[str]:
    """--flags as a list. Raises: SystemExit(2)."""
    try:
        words = shlex.split(flags)
    except ValueError as e:
        die(f"--flags: {e}, got {flags}")
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        if flag in own:
            die(f"--flags must not have {', '.join(own)}, which say what run it is: {word}")
    return words


def jobs_of(args: Args) -> list[Job]:
    """Raises: SystemExit(2) for a mistake on the command line, be it in --flags."""
    check_range("--cpus", args.cpus, 1)
    check_range("--gpus-per-run", args.gpus_per_run, 0, 1)
    more = check_flags(args.flags)
    try:
        chosen = matrix.choose(
            args.figure, args.quick, args.short, args.seeds, args.tasks, args.methods
        )
    except ValueError as e:
        die(str(e))
    known = matrix.FIGURES[args.figure].tasks
    for task in args.tasks:
        if task not in known and known != matrix.DMC:
            importlib.import_module("ne_td3_continuous").make_env(task)  # or says what is wrong
    out = Path(os.path.abspath(args.out or Path("runs") / chosen.length))
    jobs = []
    for run in matrix.runs_of(chosen.length, chosen.seeds, chosen.tasks, chosen.methods):
        flags = [*shlex.split(run.flags), *more]
        wanted, steps = parse(run.script, flags)
        jobs.append(Job(run.path, str(out / run.path), run.script, flags, steps, wanted))
    return jobs


# --- what there is ------------------------------------------------------------
def last_step(folder: Path) -> int:
    """Of results.csv; 0 where there is none yet. A line that is being written does not count."""
    try:
        header, *lines = (folder / "results.csv").read_text().splitlines(keepends=True)
        complete = [line for line in lines if line.endswith("\n")]
        row = next(csv.DictReader([header, complete[-1]]))
        return int(row["step"])
    except (OSError, LookupError, TypeError, ValueError):  # no file, no row, a damaged one
        return 0


def finished_runs(
    out: Path, names: Iterable[str], steps: int | None = None
) -> dict[str, list[Path]]:
    """{name: folders NAME_seedN with so many steps, by default as many as the longest has}.

    Says which are left out. Raises: SystemExit(2) without any.
    """
    reached = {}
    for name in names:
        for folder in sorted(out.glob(f"{name}_seed*")):
            if folder.is_dir() and not folder.suffix:  # else set aside by `make_run`
                reached[folder] = last_step(folder)
    steps = steps or max(reached.values(), default=0)
    finished = {}
    for folder, step in reached.items():
        if 0 < step == steps:
            finished.setdefault(folder.name.rpartition("_seed")[0], []).append(folder)
        else:
            print(f"left out: {folder.name} is at step {step:,} of {steps:,}", file=sys.stderr)
    if not finished:
        die(f"there are no finished runs of {', '.join(names)} in {out}")
    return finished


def saved_step(folder: Path) -> int:
    """Step of the checkpoint; 0 where there is none that can be read."""
    import torch

    file = folder / "checkpoint.pt"
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return checkpoint["step"]
    except Exception:  # torch raises many kinds for a damaged file; resuming says what is wrong
        return 0


def require_same(job: Job) -> None:
    """Raises: SystemExit(2) where the folder holds another run than the one that is wanted."""
    file = Path(job.folder) / "args.json"
    defaults, _ = parse(job.script, [])
    try:
        stored = defaults | json.loads(file.read_bytes())
    except (TypeError, ValueError) as e:
        die(f"{file} is damaged: {e}; remove the folder or choose another --out")
    for name, value in job.wanted.items():
        if name not in HOW and stored[name] != value:
            flag = "--" + name.replace("_", "-")
            difference = f"{flag} is {stored[name]} there, {value} is wanted"
            die(f"{job.folder} holds another run: {difference}; choose another --out")


def state_of(job: Job) -> Literal["finished", "failed", "interrupted", "new"]:
    """Raises: SystemExit(2) where the folder holds another run than the one that is wanted."""
    folder = Path(job.folder)
    step = last_step(folder)
    if (folder / "args.json").exists():
        require_same(job)
        if step == job.steps == saved_step(folder):
            return "finished"
    if (folder / "failed.txt").exists():
        return "failed"
    if step > 0 or (folder / "checkpoint.pt").exists():
        return "interrupted"
    return "new"


def free_name(folder: Path) -> Path:
    """Where to move a folder: its name with .stopped1, .stopped2, ..."""
    for number in itertools.count(1):
        aside = folder.with_name(f"{folder.name}.stopped{number}")
        if not aside.exists():
            return aside


def next_command(job: Job) -> tuple[list[str], Path | None]:
    """What follows `python` to start or continue the run.

    Second: where to move a folder that cannot be continued.
    """
    folder = Path(job.folder)
    script = job.script.split()
    if (folder / "checkpoint.pt").exists():
        return [*script, "--resume", job.folder], None
    aside = free_name(folder) if last_step(folder) > 0 else None
    return [*script, *job.flags, "--run-dir", job.folder], aside


# --- one run, wherever Ray puts it --------------------------------------------
def lock_of(job: Job) -> Path:
    folder = Path(job.folder)
    return folder.with_name(f".{folder.name}.lock")


def wait_for_lock(lock) -> None:
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.5)


def run_script(command: list[str], log, lock, gpu: bool) -> int:
    """Exit code of `python COMMAND`. If this call is cancelled, the script saves."""
    print(f"$ python {shlex.join(command)}", file=log, flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if not gpu:  # Ray hides none from a run that was given none
        environment["CUDA_VISIBLE_DEVICES"] = ""
    child = subprocess.Popen(
        [sys.executable, "-c", ORPHAN_STOPS, str(os.getpid()), *command],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        # out of reach of Ctrl-C and of Ray, which ends whole groups, so that it saves
        start_new_session=True,
        pass_fds=[lock.fileno()],
    )
    try:
        while child.poll() is None:
            time.sleep(0.2)
    finally:
        child.terminate()
        child.wait()
    return child.returncode


def make_run(job: Job, gpu: bool = False) -> str:
    """Starts or continues the run, on the GPU if Ray gave it one, and waits for its end.

    The script inherits the lock: should this process be killed, whoever is sent to make the run
    again waits until the orphaned script has saved and ended.

    Returns: "" when it is finished, else what went wrong.
    """
    folder = Path(job.folder)
    with open(lock_of(job), "a") as lock:
        wait_for_lock(lock)
        command, aside = next_command(job)
        if aside is not None:
            folder.rename(aside)
        folder.mkdir(exist_ok=True)
        (folder / "failed.txt").unlink(missing_ok=True)
        with open(folder / "output.log", "a") as log:
            code = run_script(command, log, lock, gpu)
        return outcome(job, code)


def outcome(job: Job, code: int) -> str:
    """What to say about an exit code; a failure is also written to failed.txt."""
    folder = Path(job.folder)
    if code == 0:
        step = last_step(folder)
        if step == job.steps:
            return ""
        return f"stopped after step {step:,} of {job.steps:,}"
    text = (folder / "output.log").read_text(errors="replace").strip()
    problem = f"exit code {code}: {text.splitlines()[-1]}"
    (folder / "failed.txt").write_text(problem + "\n")
    return problem


# --- all runs -----------------------------------------------------------------
def print_commands(jobs: list[Job]) -> None:
    """What is left to do as plain commands, one per line; each works alone and in any order."""
    for job in jobs:
        command, aside = next_command(job)
        parts = []
        if Path.cwd() != ROOT:
            parts.append(["cd", str(ROOT)])
        if aside is not None:
            parts.append(["mv", job.folder, str(aside)])
        parts.append(["python", *command])
        line = " && ".join(shlex.join(part) for part in parts)
        print(line.replace(f"{ROOT}/", ""))  # where it is run


def start_ray(args: Args):
    """Ray at --address, or an instance of our own that only this machine can reach."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray._private import services
    except ImportError:
        die("runs are scheduled by Ray: pip install -r requirements-benchmark.txt", code=1)
    # Ray would turn 127.0.0.1 into an address for all
    services.resolve_ip_for_localhost = lambda host: host
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # its connections may close at any time
    # A shell script's background jobs are born with SIGINT ignored; Ray's workers, whose tasks it
    # cancels, must not be
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options = {"address": args.address or "local"}
    if args.address is None:
        options["num_cpus"] = args.cpus or len(os.sched_getaffinity(0))
        options["object_store_memory"] = 100 * 2**20
        options["_node_ip_address"] = "127.0.0.1"
        options["include_dashboard"] = False
    for _ in range(3):  # a busy machine may be slower than Ray's limit of half a minute
        try:
            ray.init(**options, log_to_driver=False, logging_level="ERROR")
            return ray
        except Exception as e:
            ray.shutdown()
            reason = str(e).splitlines()[0]
    die(f"Ray does not start or is not at --address: {reason}", code=1)


def even_share(gpus: float, cores: float, pixels: bool) -> float:
    """Of a GPU, for a run on each core; 0 where the cores alone are faster."""
    if not pixels and cores > CORES_PER_GPU * gpus:
        return 0
    return min(1, int(gpus / max(cores, 1) * 1e4) / 1e4)  # Ray counts in ten-thousandths


def resources_of(ray, jobs: list[Job], args: Args) -> dict:
    """What a run takes up. Raises: SystemExit(1) for what is not there: Ray would wait for it."""
    there = ray.cluster_resources()
    gpus = there.get("GPU", 0)
    share = args.gpus_per_run
    if share is None:
        pixels = any("drq" in job.script for job in jobs)
        share = even_share(gpus, there.get("CPU", 0), pixels)
    if share > gpus:
        die("--gpus-per-run must be 0 where Ray finds no GPU", code=1)
    return {"num_cpus": 1, "num_gpus": share}


def result_of(ray, ref) -> str:
    """What went wrong with a run that has ended, or nothing."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as e:  # an unwritable folder; a worker lost too often
        cause = getattr(e, "cause", None) or e
        return str(cause).splitlines()[0]


def follow(ray, pending: dict[object, Job]) -> dict[str, str]:
    """Waits for the runs, with progress. Returns: {name of a run: what went wrong}."""
    jobs = list(pending.values())
    problems = {}
    with tqdm(total=sum(job.steps for job in jobs), unit=" steps", disable=None) as bar:
        bar.initial = sum(last_step(Path(job.folder)) for job in jobs)
        while pending:
            ended, _ = ray.wait(list(pending), timeout=1)
            for ref in ended:
                job = pending.pop(ref)
                problem = result_of(ray, ref)
                if problem:
                    problems[job.name] = problem
                tqdm.write(f"{job.name}: {problem or 'finished'}", file=sys.stderr)
            bar.n = sum(last_step(Path(job.folder)) for job in jobs)
            bar.set_postfix_str(f"{len(pending)} of {len(jobs)} runs to end")
    return problems


def make_all(args: Args, jobs: list[Job]) -> dict[str, str]:
    """Makes the runs. Returns: {name of a run: what went wrong}.

    Raises: SystemExit, with 130 when it is stopped.
    """
    pending = {}
    try:
        ray = start_ray(args)
        # as Ctrl-C; Ray has set a handler of its own
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        resources = resources_of(ray, jobs, args)
        task = ray.remote(make_run).options(**resources, max_retries=10)
        for job in jobs:
            # here only, so other machines must see the same files
            Path(job.folder).parent.mkdir(parents=True, exist_ok=True)
            pending[task.remote(job, gpu=resources["num_gpus"] > 0)] = job
        return follow(ray, pending)
    except OSError as e:
        die(f"--out must be a folder that can be written: {e}", code=1)
    except KeyboardInterrupt:
        print("\nstopping: runs save their checkpoints (once more: at once)", file=sys.stderr)
        for ref in pending:
            ray.cancel(ref)
        if pending:
            ray.wait(list(pending), num_returns=len(pending))
        print("stopped; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None


def make(args: Args, jobs: list[Job]) -> None:
    """Makes the runs that are missing. Raises: SystemExit, with 0 when all are finished."""
    states = {job.name: state_of(job) for job in jobs}
    counts = collections.Counter(states.values())
    text = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    print(f"{args.figure}: {len(jobs)} runs, {text}", file=sys.stderr)
    left = [job for job in jobs if states[job.name] != "finished"]
    due = [job for job in left if args.retry_failed or states[job.name] != "failed"]
    if args.dry_run:
        return print_commands(due)
    problems = {}
    for job in left:
        if job not in due:
            reason = (Path(job.folder) / "failed.txt").read_text().strip()
            problems[job.name] = f"{reason}; made again by --retry-failed"
    if due:
        problems |= make_all(args, due)
    for name, problem in problems.items():
        print(f"not finished: {name}: {problem}", file=sys.stderr)
    finished = len(jobs) - len(problems)
    print(f"{args.figure}: {finished} of {len(jobs)} runs are finished", file=sys.stderr)
    raise SystemExit(1 if problems else 0)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    make(args, jobs_of(args))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    main()
