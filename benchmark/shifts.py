"""Shifts: does an agent learn its tenth task as well as a fresh one does?

Run:   python benchmark/shifts.py run --arms td3 fresh --seeds 2    in runs/shifts
       python benchmark/shifts.py table runs/shifts                 what came out, and a picture
One agent goes through the ten tasks of shifted_tasks.py, a stretch of steps on each; its buffer
is emptied at each change. The yardstick is a fresh TD3 on each task with as many steps. A run
of 500,000 steps takes 30 to 40 minutes on an idle core with --flags=--compile.
"""

import os
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent))

import drawing
import run
from estimates import estimate
from shifted_tasks import TASKS

NE = "ne_td3_continual.py"
TD3 = "-m baselines.td3_continual"
ARMS = {  # name in folders: script, its flags
    "td3": (TD3, []),
    "ne": (NE, []),
    "ne_no_review": (NE, ["--review-floor", "1"]),
    "reset": (TD3, ["--method", "reset"]),
    "layer_norm": (TD3, ["--method", "layer-norm"]),
}
FRESH = "fresh"  # a TD3 of its own on each task
LABELS = {  # in the order of colours, which is that of the other figures
    "ne": "NE",
    "td3": "TD3",
    "ne_no_review": "NE without review",
    "reset": "Reset",
    "layer_norm": "LayerNorm",
}
ArmName = Literal[(*ARMS, FRESH)]


# --- runs ---------------------------------------------------------------------
def short_name(task: str) -> str:
    return task.rpartition(":")[2].removesuffix("-v0")


def folders_of(out: Path, arm: str, seed: int) -> dict[str, Path]:
    """{task, or "" for all tasks: folder of the run}."""
    if arm != FRESH:
        return {"": out / f"{arm}_seed{seed}"}
    return {task: out / f"{FRESH}_{short_name(task)}_seed{seed}" for task in TASKS}


def job_of(folder: Path, arm: str, seed: int, task: str, stretch: int, more: list) -> run.Job:
    """Ten per cent of a stretch are random steps. Raises: SystemExit(2) for refused flags."""
    if arm == FRESH:
        script = "-m baselines.td3_continuous"
        flags = ["--env-id", task, "--total-timesteps", str(stretch)]
    else:
        script, own = ARMS[arm]
        flags = [*own, "--tasks", *TASKS, "--cycles", "1", "--clear-buffer"]
        flags += ["--steps-per-task", str(stretch)]
    flags += ["--seed", str(seed), "--learning-starts", str(stretch // 10)]
    flags += ["--eval-frequency", str(stretch // 5), "--eval-episodes", "2", *more]
    wanted, steps = run.parse(script, flags)
    return run.Job(folder.name, str(folder), script, flags, steps, wanted, cost=0)


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
    for name, value, least in (
        ("seeds", seeds, 1),
        ("workers", workers, 1),
        ("stretch", stretch, 10),
    ):
        if value < least:
            drawing.die(f"--{name} must be at least {least}, got {value}")
    more = run.check_flags(flags)
    out = Path(os.path.abspath(out))
    jobs = []
    for seed in range(1, seeds + 1):
        for arm in arms:
            for task, folder in folders_of(out, arm, seed).items():
                jobs.append(job_of(folder, arm, seed, task, stretch, more))
    run.make(run.Args("shifts", cpus=workers, retry_failed=True), jobs)


# --- what came out ------------------------------------------------------------
def seeds_of(out: Path, name: str) -> list[Path]:
    """Folders of all seeds, without those that run.py set aside."""
    own = [folder for folder in out.glob(f"{name}_seed*") if not folder.suffix]
    return sorted(folder for folder in own if folder.is_dir())


def late_return(rows: list[dict[str, str]]) -> float:
    """Mean return of the last two evaluations."""
    return float(np.mean([float(row["eval/return_mean"]) for row in rows[-2:]]))


def fresh_returns(out: Path, stretch: int) -> list[np.ndarray]:
    """(seeds,) of each task. Raises: SystemExit(2) where a task has none of that length."""
    returns = []
    for task in TASKS:
        found = []
        for folder in seeds_of(out, f"{FRESH}_{short_name(task)}"):
            if is_at(folder, stretch):
                rows = drawing.read_rows(folder / "results.csv", ["eval/return_mean"])
                found.append(late_return(rows))
        if not found:
            wanted = f"there is no fresh run of {stretch:,} steps on {task} in {out}"
            drawing.die(f"{wanted}: make it with --arms {FRESH}")
        returns.append(np.array(found))
    return returns


def returns_of(folder: Path) -> np.ndarray:
    """(tasks,), at the end of each task's stretch."""
    columns = ["task_trained", "task_evaluated", "charts/episodic_return", "eval/return_mean"]
    rows = drawing.read_rows(folder / "results.csv", columns)
    returns = []
    for task in TASKS:
        own = [row for row in rows if row["task_trained"] == row["task_evaluated"] == task]
        own = [row for row in own if row["charts/episodic_return"] != "nan"]
        if len(own) < 2:
            drawing.die(f"{folder} has fewer than two evaluations on {task}")
        returns.append(late_return(own))
    return np.array(returns)


def is_at(folder: Path, steps: int) -> bool:
    """Whether a run is at its end; says where it is not."""
    step = run.last_step(folder)
    if step != steps:
        print(f"left out: {folder.name} is at step {step:,} of {steps:,}", file=sys.stderr)
    return step == steps


def returns_of_arms(out: Path) -> tuple[dict[str, np.ndarray], int]:
    """{arm: (seeds, tasks)}, of finished runs; steps of a stretch. Raises: SystemExit(2)."""
    folders = {}
    for arm in ARMS:
        folders[arm] = seeds_of(out, arm)
    steps = max((run.last_step(own) for arm in ARMS for own in folders[arm]), default=0)
    if steps == 0:
        drawing.die(f"there are no runs through all tasks in {out}")
    returns = {}
    for arm in ARMS:
        found = [returns_of(own) for own in folders[arm] if is_at(own, steps)]
        if found:
            returns[arm] = np.array(found)
    return returns, steps // len(TASKS)


def share(returns: np.ndarray, fresh: np.ndarray, shifts: slice) -> np.ndarray:
    """(seeds, tasks), (tasks,) -> (seeds,): the sum over some shifts, of the fresh network's.

    Not the mean of the shares: on some tasks a fresh network learns next to nothing.
    """
    return returns[:, shifts].sum(axis=1) / fresh[shifts].sum()


def table_of(returns: dict[str, np.ndarray], fresh: np.ndarray) -> list[str]:
    head = "| arm | seeds | shift 1 | 2 to 5 | 6 to 10 | the last five minus 2 to 5 |"
    lines = [head + " 2 to 10 minus td3 |", "|---" * 7 + "|"]
    for arm, own in returns.items():
        first = share(own, fresh, slice(0, 1))  # (seeds,)
        early = share(own, fresh, slice(1, 5))
        late = share(own, fresh, slice(5, None))
        cells = [arm, str(len(own))]
        for values in (first, early, late, late - early):
            cells.append(f"{estimate([values]):.2f}")
        if arm == "td3" or "td3" not in returns:
            cells.append("–")
        else:
            changed = share(own, fresh, slice(1, None))
            reference = share(returns["td3"], fresh, slice(1, None))
            cells.append(f"{estimate([changed], [reference]):.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def returns_table(returns: dict[str, np.ndarray], fresh: np.ndarray) -> list[str]:
    """Mean returns, a line for each shift."""
    lines = ["| shift | task | " + " | ".join(returns) + f" | {FRESH} |"]
    lines.append("|---" * (len(returns) + 3) + "|")
    for place, task in enumerate(TASKS):
        cells = [str(place + 1), short_name(task)]
        cells += [f"{own[:, place].mean():,.0f}" for own in returns.values()]
        cells.append(f"{fresh[place]:,.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


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
            label = f"{LABELS[arm]} through all tasks" if seed == 0 else None
            colour = drawing.COLOURS[list(LABELS).index(arm)]
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
    returns, stretch = returns_of_arms(folder)
    fresh_seeds = fresh_returns(folder, stretch)
    fresh = np.array([own.mean() for own in fresh_seeds])
    tables = [table_of(returns, fresh), returns_table(returns, fresh)]
    page = "\n\n".join("\n".join(lines) for lines in tables) + "\n"
    print(page)
    files = {out: lambda file: drawing.save(picture(returns, fresh_seeds), file)}
    files[out.with_suffix(".md")] = lambda file: file.write_text(page)
    drawing.write(files)


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each row at once
    commands = {"run": make_runs, "table": table}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # of `| head`; as if it had been killed by SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes it once more
        raise SystemExit(141) from None


if __name__ == "__main__":
    main()
