"""Makes the runs that a figure needs and that are missing, one per core, here or on a Ray cluster.

Run:   python benchmark/run.py figure6 --seeds 7    all runs of Figure 6, in runs/full
       python benchmark/run.py figure6 --quick      an hour on two cores, in runs/quick
       python benchmark/run.py figure6 --dry-run    only print the commands, for Slurm or parallel

Scheduling is Ray's: a run is a task, retried when its worker or node is lost. A run holds a lock
for as long as its script lives, so it is never made twice at once. The figures are in matrix.py,
the pages in docs/benchmark.md.
"""

import contextlib
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
sys.path.insert(0, str(ROOT))


@dataclass
class Args:
    figure: Positional[Literal[tuple(matrix.FIGURES)]]
    """the figure whose runs are made"""
    seeds: int | None = None
    """seeds 1, 2, ..., this; default: 7, with --quick 1 to 3"""
    quick: bool = False
    """small version of the runs: about an hour on two cores"""
    short: bool = False
    """200,000 steps instead of a million"""
    tasks: tuple[str, ...] = ()
    """these tasks instead of the figure's"""
    methods: tuple[str, ...] = ()
    """only these of the figure's methods, by the names in matrix.py"""
    flags: str = ""
    """further flags of every run, e.g. --flags=--compile; they win over the figure's"""
    out: Path | None = None
    """folder of all runs; default: runs/full, runs/short or runs/quick"""
    address: str | None = None
    """of a running Ray cluster, HOST:PORT or auto; default: a local instance of our own"""
    cpus: int | None = None
    """runs at a time on this machine, without --address; default: its cores"""
    gpus_per_run: float | None = None
    """share of a GPU; default: evenly among the cores, from pixels or on few cores, else 0"""
    memory_per_run: float = 0
    """GiB that Ray reserves for each run, which limits how many start; 0: not limited"""
    retry_failed: bool = False
    """also make the runs that failed before"""
    dry_run: bool = False
    """print one command per line and exit"""


class Job(NamedTuple):
    """A run, as far as the machine that makes it must know it."""

    name: str  # of the folder, below the one of all runs
    folder: str  # absolute
    script: str  # what follows `python` in the repository's root
    flags: list[str]
    steps: int  # last step of the finished run
    wanted: dict  # what args.json must hold
    cost: float  # seconds


# what may differ between a run that exists and the one wanted: where and how fast it is computed
HOW = {"run_dir", "resume", "cuda", "cudagraphs", "compile", "torch_threads"}
HOW |= {"checkpoint_frequency", "buffer_device", "track", "wandb_project_name", "wandb_entity"}

# what says which run it is, which is not for --flags to say
OWN_FLAGS = ("--env-id", "--tasks", "--episodes-per-task", "--seed", "--run-dir", "--resume")

# a GPU makes as many steps of a small network as so many cores (docs/speed.md)
CORES_PER_GPU = 4

# functions of the scripts that fill in what depends on the run, before args.json is written
FILL_IN = ("scale_to_task", "set_length", "check_sizes", "check_method", "scale_to_run")

# the script in a process that gets SIGTERM, upon which it saves, when its parent (the Ray worker)
# is gone
ORPHAN_STOPS = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""

LIST_PIXEL_TASKS = """
from dm_control import suite
for domain, task in suite.ALL_TASKS:
    if domain != "lqr":  # actions without bounds, refused by the scripts
        print(f"{domain}_{task}")
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
    module = importlib.import_module(name)
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


def pixel_tasks() -> list[str]:
    """Asked in another process, as dm_control chooses how to render when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", LIST_PIXEL_TASKS],
        env=os.environ | {"MUJOCO_GL": "disable"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        die(f"--tasks: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.split()


def check_task(task: str, script: str) -> None:
    """Raises: SystemExit(2) for a task that Gymnasium or dm_control does not have."""
    if script in (matrix.NE_DRQ, matrix.DRQ):
        if task not in pixel_tasks():
            die(f"--tasks: dm_control has no task {task}")
        return
    import gymnasium

    module, _, name = task.rpartition(":")
    try:
        if module:
            importlib.import_module(module)  # registers its tasks
        gymnasium.spec(name)
    except Exception as e:  # each module has errors of its own
        reason = " ".join(str(e).split())
        die(f"--tasks: there is no {task}: {reason}")


def check_flags(flags: str) -> list[str]:
    """--flags as a list. Raises: SystemExit(2)."""
    try:
        words = shlex.split(flags)
    except ValueError as e:
        die(f"--flags: {e}, got {flags}")
    for word in words:
        if word in ("-h", "--help"):
            die("--flags must be flags of a run, got --help: ask the script for it")
        flag = word.partition("=")[0].replace("_", "-")
        if flag in OWN_FLAGS:
            die(f"--flags must not have {', '.join(OWN_FLAGS)}, which say what run it is: {word}")
    return words


def check_resources(args: Args) -> None:
    """Raises: SystemExit(2)."""
    if args.cpus is not None and args.cpus < 1:
        die(f"--cpus must be at least 1, got {args.cpus}")
    if args.gpus_per_run is not None and not 0 <= args.gpus_per_run <= 1:
        die(f"--gpus-per-run must be in [0, 1], got {args.gpus_per_run}")
    if not 0 <= args.memory_per_run < 1e6:
        die(f"--memory-per-run must be in [0, 1,000,000], got {args.memory_per_run}")


def job_of(run: matrix.Run, out: Path, more: list[str]) -> Job:
    flags = [*shlex.split(run.flags), *more]
    wanted, steps = parse(run.script, flags)
    seconds = matrix.METHODS[run.name].cost * steps / matrix.QUICK_SPEED[run.script]
    return Job(run.path, str(out / run.path), run.script, flags, steps, wanted, seconds)


def jobs_of(args: Args) -> list[Job]:
    """Raises: SystemExit(2) for a mistake on the command line, be it in --flags."""
    check_resources(args)
    more = check_flags(args.flags)
    try:
        chosen = matrix.choose(
            args.figure, args.quick, args.short, args.seeds, args.tasks, args.methods
        )
    except ValueError as e:
        die(str(e))
    for task in chosen.tasks:
        if task not in matrix.FIGURES[args.figure].tasks:
            check_task(task, matrix.METHODS[chosen.methods[0]].script)
    out = Path(os.path.abspath(args.out or Path("runs") / chosen.length))
    runs = matrix.runs_of(chosen.length, chosen.seeds, chosen.tasks, chosen.methods)
    return [job_of(run, out, more) for run in runs]


# --- what there is ------------------------------------------------------------
def has_rows(folder: Path) -> bool:
    file = folder / "results.csv"
    return file.is_file() and file.read_bytes().count(b"\n") > 1


def last_step(folder: Path) -> int:
    """Of results.csv; 0 where there is none yet. A line that is being written does not count."""
    try:
        with open(folder / "results.csv", "rb") as file:
            header = file.readline()
            size = os.path.getsize(file.fileno())
            file.seek(max(len(header), size - 10_000))
            complete = file.read().rpartition(b"\n")[0]
        line = complete.rpartition(b"\n")[2]
        row = next(csv.DictReader([header.decode(), line.decode()]))
        return int(row["step"])
    except (OSError, StopIteration, ValueError, KeyError):
        return 0


def saved_step(folder: Path) -> int:
    """Step of the checkpoint; 0 where there is none that can be read."""
    import torch

    file = folder / "checkpoint.pt"
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return checkpoint["step"]
    except Exception:  # torch raises many kinds for a damaged file; resuming says what is wrong
        return 0


def stored_args(folder: Path) -> dict:
    """Raises: SystemExit(2) for a file that no run has written."""
    file = folder / "args.json"
    try:
        stored = json.loads(file.read_bytes().decode())
    except (OSError, ValueError) as e:
        die(f"{file} is damaged: {e}; remove the folder or choose another --out")
    if not isinstance(stored, dict):
        die(f"{file} holds no arguments; remove the folder or choose another --out")
    return stored


def require_same(job: Job) -> None:
    """Raises: SystemExit(2) where the folder holds another run than the one that is wanted."""
    stored = stored_args(Path(job.folder))
    defaults, _ = parse(job.script, [])
    for name, value in job.wanted.items():
        there = stored.get(name, defaults[name])
        if name not in HOW and there != value:
            flag = "--" + name.replace("_", "-")
            difference = f"{flag} is {there} there, {value} is wanted"
            die(f"{job.folder} holds another run: {difference}; choose another --out")


def state_of(job: Job) -> Literal["finished", "failed", "interrupted", "new"]:
    """Raises: SystemExit(2) where the folder holds another run than the one that is wanted."""
    folder = Path(job.folder)
    if (folder / "args.json").exists():
        require_same(job)
        if last_step(folder) == job.steps == saved_step(folder):
            return "finished"
    if (folder / "failed.txt").exists():
        return "failed"
    if (folder / "checkpoint.pt").exists() or has_rows(folder):
        return "interrupted"
    return "new"


def free_name(folder: Path) -> Path:
    """Where to move a folder: its name with .stopped1, .stopped2, ..."""
    number = 1
    while True:
        aside = folder.with_name(f"{folder.name}.stopped{number}")
        if not aside.exists():
            return aside
        number += 1


def next_command(job: Job) -> tuple[list[str], Path | None]:
    """What follows `python` to start or continue the run.

    Second: where to move a folder that cannot be continued.
    """
    folder = Path(job.folder)
    script = job.script.split()
    if (folder / "checkpoint.pt").exists():
        return [*script, "--resume", job.folder], None
    aside = free_name(folder) if has_rows(folder) else None
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
        if child.poll() is None:
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
def shown(path: Path) -> str:
    """A path as it is in the repository's root."""
    if path.is_relative_to(ROOT):
        return str(path.relative_to(ROOT))
    return str(path)


def print_commands(jobs: list[Job]) -> None:
    """What is left to do as plain commands, one per line; each works alone and in any order."""
    for job in jobs:
        command, aside = next_command(job)
        folder = Path(job.folder)
        parts = []
        if Path.cwd() != ROOT:
            parts.append(shlex.join(["cd", os.path.relpath(ROOT)]))
        if aside is not None:
            parts.append(shlex.join(["mv", shown(folder), shown(aside)]))
        words = [shown(folder) if word == job.folder else word for word in command]
        parts.append(shlex.join(["python", *words]))
        print(" && ".join(parts))


def import_ray():
    """Raises: SystemExit(1) without it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray._private import services
    except ImportError:
        die("runs are scheduled by Ray: pip install -r requirements-benchmark.txt", code=1)
    # Ray would turn 127.0.0.1 into an address for all
    services.resolve_ip_for_localhost = lambda host: host
    return ray


def start_ray(args: Args):
    """Ray at --address, or an instance of our own that only this machine can reach."""
    ray = import_ray()
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
    for attempts_left in (2, 1, 0):
        try:
            ray.init(**options, log_to_driver=False, logging_level="ERROR")
            break
        except Exception as e:  # a busy machine may be slower than Ray's limit of half a minute
            ray.shutdown()
            reason = str(e).splitlines()[0]
            if args.address:
                die(f"--address: cannot reach Ray at {args.address}: {reason}", code=1)
            if not attempts_left:
                die(f"Ray does not start: {reason}", code=1)
    return ray


def even_share(gpus: float, cores: float, pixels: bool) -> float:
    """Of a GPU, for a run on each core; 0 where the cores alone are faster."""
    if not pixels and cores > CORES_PER_GPU * gpus:
        return 0
    return min(1, int(gpus / max(cores, 1) * 1e4) / 1e4)  # Ray counts in ten-thousandths


def resources_of(ray, jobs: list[Job], args: Args) -> dict:
    """What a run takes up. Raises: SystemExit(1) for what is not there: Ray would wait for it."""
    there = ray.cluster_resources()
    share = args.gpus_per_run
    if share is None:
        pixels = any("drq" in job.script for job in jobs)
        share = even_share(there.get("GPU", 0), there.get("CPU", 0), pixels)
    memory = int(args.memory_per_run * 2**30) or None
    if share > there.get("GPU", 0):
        die("--gpus-per-run must be 0 where Ray finds no GPU", code=1)
    most = there.get("memory", 0) / 2**30
    if args.memory_per_run > most:
        die(f"--memory-per-run must be at most {most:.1f}, the GiB that Ray finds", code=1)
    return {"num_cpus": 1, "num_gpus": share, "memory": memory}


def result_of(ray, ref) -> str:
    """What went wrong with a run that has ended, or nothing."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as e:  # an unwritable folder; a worker lost too often
        cause = getattr(e, "cause", None) or e
        return str(cause).splitlines()[0]


def progress_bar(jobs: list[Job], done: dict[str, int]):
    return tqdm(
        total=sum(job.steps for job in jobs),
        initial=sum(done.values()),
        unit=" steps",
        smoothing=0,
        miniters=0,
        mininterval=0.5 if sys.stderr.isatty() else 60,
    )


def look(jobs: list[Job], done: dict[str, int]) -> None:
    """How far the runs are: `done` in place, never backwards."""
    for job in jobs:
        step = min(last_step(Path(job.folder)), job.steps)
        done[job.name] = max(done.get(job.name, 0), step)


def follow(ray, pending: dict, jobs: list[Job]) -> dict[str, str]:
    """Waits for the runs, with progress. Returns: {name of a run: what went wrong}."""
    problems = {}
    done = {}
    look(jobs, done)
    with contextlib.closing(progress_bar(jobs, done)) as bar:
        while pending:
            ended, _ = ray.wait(list(pending), timeout=1)
            for ref in ended:
                job = pending.pop(ref)
                problem = result_of(ray, ref)
                if problem:
                    problems[job.name] = problem
                bar.write(f"{job.name}: {problem or 'finished'}", file=sys.stderr)
            look(jobs, done)
            text = f"{len(jobs) - len(pending)} of {len(jobs)} runs ended"
            bar.set_postfix_str(f"{text}, {len(problems)} not finished", refresh=False)
            bar.update(sum(done.values()) - bar.n)
    return problems


def make_all(ray, jobs: list[Job], args: Args) -> dict[str, str]:
    """Makes the runs. Returns: {name of a run: what went wrong}. Raises: KeyboardInterrupt."""
    resources = resources_of(ray, jobs, args)
    task = ray.remote(make_run).options(**resources, max_retries=10)
    for job in jobs:
        # here only, so other machines must see the same files
        try:
            Path(job.folder).parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            die(f"--out must be a folder that can be written: {e}", code=1)
    pending = {}
    try:
        for job in jobs:
            pending[task.remote(job, gpu=resources["num_gpus"] > 0)] = job
        return follow(ray, pending, jobs)
    except KeyboardInterrupt:
        print("\nstopping: runs save their checkpoints (once more: at once)", file=sys.stderr)
        for ref in pending:
            ray.cancel(ref)
        ray.wait(list(pending), num_returns=len(pending))
        raise


def make_due(args: Args, jobs: list[Job]) -> dict[str, str]:
    """As `make_all`. Raises: SystemExit(130) when it is stopped."""
    if not jobs:
        return {}
    try:
        ray = start_ray(args)
        # as Ctrl-C; Ray has set a handler of its own
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return make_all(ray, jobs, args)
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None


def report(args: Args, jobs: list[Job], problems: dict[str, str]) -> NoReturn:
    for name, problem in problems.items():
        print(f"not finished: {name}: {problem}", file=sys.stderr)
    finished = len(jobs) - len(problems)
    print(f"{args.figure}: {finished} of {len(jobs)} runs are finished", file=sys.stderr)
    raise SystemExit(1 if problems else 0)


def print_states(args: Args, states: list[str]) -> None:
    counts = []
    for kind in ("finished", "interrupted", "failed", "new"):
        if kind in states:
            counts.append(f"{states.count(kind)} {kind}")
    print(f"{args.figure}: {len(states)} runs, {', '.join(counts)}", file=sys.stderr)


def make(args: Args, jobs: list[Job]) -> None:
    """Makes the runs that are missing. Raises: SystemExit, with 0 when all are finished."""
    states = {job.name: state_of(job) for job in jobs}
    print_states(args, list(states.values()))
    makes = ["interrupted", "new"]
    if args.retry_failed:
        makes.append("failed")
    due = [job for job in jobs if states[job.name] in makes]
    if args.quick:
        minutes = sum(job.cost for job in due) / 60
        print(f"about {minutes:.0f} minutes, divided by the number of cores", file=sys.stderr)
    if args.dry_run:
        return print_commands(due)
    problems = {}
    for job in jobs:
        if states[job.name] == "failed" and job not in due:
            reason = (Path(job.folder) / "failed.txt").read_text().strip()
            problems[job.name] = f"{reason}; made again by --retry-failed"
    problems |= make_due(args, due)
    report(args, jobs, problems)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    make(args, jobs_of(args))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    main()
