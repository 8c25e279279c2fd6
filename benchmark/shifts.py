"""Shifts: does an agent learn its tenth task as well as a fresh one does?

Run:   python benchmark/shifts.py run --arms td3 fresh --seeds 2    in runs/shifts
       python benchmark/shifts.py table runs/shifts                 what came out, and a picture
One agent goes through the ten tasks of shifted_tasks.py, a stretch of steps on each; its buffer
is emptied at each change. The yardstick is a fresh TD3 on each task with as many steps. A run
of 500,000 steps takes 30 to 40 minutes on an idle core with --flags=--compile.
"""

import os
import signal
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro

import drawing
import matrix
import run
from estimates import estimate
from shifted_tasks import TASKS


class Arm(NamedTuple):
    label: str
    script: str
    flags: tuple[str, ...] = ()


ARMS = {  # name in folders; in the order of colours, which is that of the other figures
    "ne": Arm("NE", matrix.NE_CONTINUAL),
    "td3": Arm("TD3", matrix.TD3_CONTINUAL),
    "ne_no_review": Arm("NE without review", matrix.NE_CONTINUAL, ("--review-floor", "1")),
    "reset": Arm("Reset", matrix.TD3_CONTINUAL, ("--method", "reset")),
    "layer_norm": Arm("LayerNorm", matrix.TD3_CONTINUAL, ("--method", "layer-norm")),
}
FRESH = "fresh"  # a TD3 of its own on each task
ArmName = Literal[(*ARMS, FRESH)]


# --- runs ---------------------------------------------------------------------
def short_name(task: str) -> str:
    return task.rpartition(":")[2].removesuffix("-v0")


def job_of(folder: Path, script: str, own: list[str], seed: int, stretch: int) -> run.Job:
    """Ten per cent of a stretch are random steps. Raises: SystemExit(2) for refused flags."""
    flags = ["--seed", str(seed), "--learning-starts", str(stretch // 10)]
    flags += ["--eval-frequency", str(stretch // 5), "--eval-episodes", "2", *own]
    wanted, steps = run.parse(script, flags)
    return run.Job(folder.name, str(folder), script, flags, steps, wanted)


def jobs_of(arm: str, seed: int, stretch: int, out: Path, more: list[str]) -> list[run.Job]:
    jobs = []
    if arm == FRESH:
        for task in TASKS:
            own = ["--env-id", task, "--total-timesteps", str(stretch), *more]
            folder = out / f"{FRESH}_{short_name(task)}_seed{seed}"
            jobs.append(job_of(folder, matrix.TD3, own, seed, stretch))
    else:
        _, script, flags = ARMS[arm]
        own = [*flags, "--tasks", *TASKS, "--cycles", "1", "--clear-buffer"]
        own += ["--steps-per-task", str(stretch), *more]
        jobs.append(job_of(out / f"{arm}_seed{seed}", script, own, seed, stretch))
    return jobs


def make_runs(
    arms: tuple[ArmName, ...] = (*ARMS, FRESH),
    seeds: int = 4,
    workers: int = 2,
    stretch: int = 50_000,
    out: Path = Path("runs/shifts"),
    flags: str = "",
) -> None:
    """Makes the runs that are missing or failed, seed by seed, as run.py does.

    The same command continues.

    Args:
        arms: which
        seeds: seeds 1, 2, ..., this of each
        workers: runs at a time
        stretch: environment steps on a task
        out: folder of all runs; runs of another stretch need another
        flags: further flags of every run, e.g. --flags=--compile
    """
    run.check_range("--seeds", seeds, 1)
    run.check_range("--workers", workers, 1)
    run.check_range("--stretch", stretch, 10)
    more = run.check_flags(flags)
    jobs = []
    for seed in range(1, seeds + 1):
        for arm in arms:
            jobs += jobs_of(arm, seed, stretch, Path(os.path.abspath(out)), more)
    run.make(run.Args("shifts", cpus=workers, retry_failed=True), jobs)


# --- what came out ------------------------------------------------------------
def late_return(rows: list[dict[str, str]]) -> float:
    """Mean return of the last two evaluations."""
    return float(np.mean([float(row["eval/return_mean"]) for row in rows[-2:]]))


def fresh_returns(out: Path, stretch: int) -> list[np.ndarray]:
    """(seeds,) of each task. Raises: SystemExit(2) where a task has none of that length."""
    returns = []
    for task in TASKS:
        name = f"{FRESH}_{short_name(task)}"
        found = []
        for folder in run.finished_runs(out, [name], stretch)[name]:
            rows = drawing.read_rows(folder / "results.csv", ["eval/return_mean"])
            found.append(late_return(rows))
        returns.append(np.array(found))
    return returns


def returns_of(folder: Path) -> np.ndarray:
    """(tasks,), at the end of each task's stretch."""
    columns = ["task_trained", "task_evaluated", "eval/return_mean"]
    rows = drawing.read_rows(folder / "results.csv", columns)
    returns = []
    for task in TASKS:
        own = [row for row in rows if row["task_trained"] == row["task_evaluated"] == task]
        if len(own) < 2:
            drawing.die(f"{folder} has fewer than two evaluations on {task}")
        returns.append(late_return(own))
    return np.array(returns)


def share(returns: np.ndarray, fresh: np.ndarray, shifts: slice) -> np.ndarray:
    """(seeds, tasks), (tasks,) -> (seeds,): the sum over some shifts, of the fresh network's.

    Not the mean of the shares: on some tasks a fresh network learns next to nothing.
    """
    return returns[:, shifts].sum(axis=1) / fresh[shifts].sum()


def shares_table(returns: dict[str, np.ndarray], fresh: np.ndarray) -> str:
    head = ["arm", "seeds", "shift 1", "2 to 5", "6 to 10", "the last five minus 2 to 5"]
    head.append("2 to 10 minus td3")
    lines = []
    changed = {arm: share(own, fresh, slice(1, None)) for arm, own in returns.items()}
    for arm, own in returns.items():
        first = share(own, fresh, slice(0, 1))  # (seeds,)
        early = share(own, fresh, slice(1, 5))
        late = share(own, fresh, slice(5, None))
        estimates = [estimate([values]) for values in (first, early, late, late - early)]
        reference = np.array([]) if arm == "td3" else changed.get("td3", np.array([]))
        estimates.append(estimate([changed[arm]], [reference]))
        lines.append([arm, str(len(own)), *[f"{value:.2f}" for value in estimates]])
    return drawing.markdown(head, lines)


def returns_table(returns: dict[str, np.ndarray], fresh: np.ndarray) -> str:
    """Mean returns, a line for each shift."""
    lines = []
    for place, task in enumerate(TASKS):
        values = [own[:, place].mean() for own in returns.values()]
        cells = [f"{value:,.0f}" for value in (*values, fresh[place])]
        lines.append([str(place + 1), short_name(task), *cells])
    return drawing.markdown(["shift", "task", *returns, FRESH], lines)


def picture(returns: dict[str, np.ndarray], fresh: list[np.ndarray]):
    """Bars: the mean of fresh TD3s; circles: each of them; dots: an arm's seeds."""
    figure, part = drawing.canvas(7, 3.6, "")
    ax = part.subplots()
    shifts = np.arange(1, len(TASKS) + 1)
    means = [own.mean() for own in fresh]
    ax.bar(shifts, means, width=0.8, color="#DDDDDD", label="mean of fresh TD3s")
    for shift, own in zip(shifts, fresh, strict=True):
        label = "fresh TD3s, as many steps" if shift == 1 else None
        style = {"markersize": 5, "markerfacecolor": "white", "markeredgecolor": "grey"}
        ax.plot(np.full(len(own), shift - 0.3), own, "o", label=label, **style)
    for place, (arm, own) in enumerate(returns.items()):
        offset = 0.5 * ((place + 0.5) / len(returns) - 0.5) + 0.1
        for seed, values in enumerate(own):
            label = f"{ARMS[arm].label} through all tasks" if seed == 0 else None
            colour = drawing.COLOURS[list(ARMS).index(arm)]
            ax.plot(shifts + offset, values, "o", color=colour, markersize=5, label=label)
    names = [short_name(task).removeprefix("Cheetah") for task in TASKS]
    ax.set_xticks(shifts, names, rotation=35, ha="right", rotation_mode="anchor")
    ax.set_xlabel("task, in this order")
    ax.set_ylabel("return at the end of its stretch")
    ax.spines[["top", "right"]].set_visible(False)
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 4}
    ax.legend(frameon=False, fontsize=8, **above)
    return figure


def table(folder: tyro.conf.Positional[Path], /, out: Path = Path("shifts.png")) -> None:
    """Markdown: shares of a fresh TD3's return, 95% intervals; the returns; and a picture.

    Args:
        folder: of all runs
        out: where the PNG goes, and beside it the Markdown
    """
    drawing.check_picture(out)
    runs = run.finished_runs(folder, ARMS)
    returns = {arm: np.array([returns_of(own) for own in runs[arm]]) for arm in runs}
    steps = max(run.last_step(own[0]) for own in runs.values())
    fresh_seeds = fresh_returns(folder, steps // len(TASKS))
    fresh = np.array([own.mean() for own in fresh_seeds])
    page = shares_table(returns, fresh) + "\n" + returns_table(returns, fresh)
    print(page)
    files = {out: lambda file: drawing.save(picture(returns, fresh_seeds), file)}
    files[out.with_suffix(".md")] = lambda file: file.write_text(page)
    drawing.write(files)


def main() -> None:
    commands = {"run": make_runs, "table": table}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    main()
