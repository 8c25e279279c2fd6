"""Priming: does a network that was trained heavily on its first data still learn afterwards?

Run:   python benchmark/plasticity.py run --seeds 5 --workers 2       all arms, in runs/priming
       python benchmark/plasticity.py table runs/priming              what came out, and a picture
       python benchmark/plasticity.py ladder runs/ladder              doses: runs/ladder/0 and so on
The runs are priming.py's, 10 to 12 minutes each on an idle core with --compile, the probes those
of probes.py.
"""

import math
import os
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from matplotlib import ticker

import drawing
import run
from estimates import estimate, versus
from priming import ARMS, ArmName, ne

SCRIPT = "benchmark/priming.py"


# --- runs ---------------------------------------------------------------------
def make_runs(
    arms: tuple[ArmName, ...] = tuple(ARMS),
    seeds: int = 5,
    workers: int = 2,
    out: Path = Path("runs/priming"),
    flags: str = "",
) -> None:
    """Makes the runs that are missing or failed, seed by seed, as run.py does.

    The same command continues.

    Args:
        arms: which
        seeds: seeds 1, 2, ..., this of each
        workers: runs at a time
        out: folder of all runs
        flags: further flags of every run, e.g. --flags=--compile
    """
    run.check_range("--seeds", seeds, 1)
    run.check_range("--workers", workers, 1)
    more = run.check_flags(flags, ("--arm", "--seed", "--run-dir", "--resume"))
    jobs = []
    for seed in range(1, seeds + 1):
        for arm in arms:
            folder = f"{os.path.abspath(out)}/{arm}_seed{seed}"
            words = ["--arm", arm, "--seed", str(seed), *more]
            wanted, steps = run.parse(SCRIPT, words)
            jobs.append(run.Job(f"{arm}_seed{seed}", folder, SCRIPT, words, steps, wanted))
    run.make(run.Args("priming", cpus=workers, retry_failed=True), jobs)


# --- the table ----------------------------------------------------------------
PROBES = {  # column of probes.csv: its format
    "actor/fit_ratio": ".2f",
    "critic/fit_ratio": ".2f",
    "critic/srank": ".0f",
    "actor/saturated": ".1%",
    "actor/dormant_0": ".1%",
    "critic/dormant_0": ".1%",
    "actor/dormant_0.1": ".1%",
    "critic/dormant_0.1": ".1%",
    "actor/weight_norm": ".1f",
    "critic/weight_norm": ".1f",
    "q": ",.0f",
    "overestimation": ",.0f",
}


SATURATED = "actor/saturated"  # earlier runs have none

POINTS = ("before", "after", "end")  # of priming and of the run

Values = dict[str, np.ndarray]  # {arm: (seeds,), one number per seed}


def read_probes(folder: Path) -> dict[str, dict[str, str]]:
    """{point: row}. Raises: SystemExit(2) for a damaged file."""
    rows = drawing.read_rows(folder / "probes.csv", ["point", *PROBES.keys() - {SATURATED}])
    points = {row["point"]: row for row in rows}
    if tuple(points) != POINTS:
        drawing.die(f"{folder / 'probes.csv'} must have the points {POINTS}, got {tuple(points)}")
    return points


def scores_of(runs: dict[str, list[Path]], from_step: int, to_step: int) -> dict[str, Values]:
    """Mean return of the last two evaluations, and between two steps; fits after priming."""
    scores = {"late": {}, "whole": {}, "actor": {}, "critic": {}}
    for arm, folders in runs.items():
        found = []
        for folder in folders:
            rows = drawing.read_rows(folder / "results.csv", ["step", "eval/return_mean"])
            steps = np.array([int(row["step"]) for row in rows])
            returns = np.array([float(row["eval/return_mean"]) for row in rows])
            primed = read_probes(folder)["after"]
            fits = [float(primed[f"{name}/fit_ratio"]) for name in ("actor", "critic")]
            chosen = (from_step <= steps) & (steps <= to_step)
            found.append([returns[-2:].mean(), returns[chosen].mean(), *fits])
        for values, own in zip(scores.values(), np.array(found).T, strict=True):
            values[arm] = own
    return scores


def versus_table(scores: dict, titles: dict[str, str], spec: str, reference: str) -> str:
    """Each arm's own value and its difference from one arm's. titles: {score: title}."""
    head = ["arm", "seeds"]
    lines = {arm: [arm, str(len(own))] for arm, own in scores["late"].items()}
    for name, title in titles.items():
        head += [title, f"minus {reference}", "p"]
        against = versus(scores[name], reference, spec)
        for arm, own in scores[name].items():
            lines[arm] += [format(estimate([own]), spec), *against[arm]]
    return drawing.markdown(head, lines.values())


def control_table(scores: dict, control: dict, titles: dict[str, str]) -> str:
    """What priming adds to a return and to its difference from TD3's."""
    head = ["arm", "seeds", "without priming", "minus td3", "priming adds", "to minus td3"]
    lines = []
    none = np.array([])
    for name, title in titles.items():
        for arm, without in control[name].items():
            primed = scores[name].get(arm, none)
            # of td3 itself there is no difference from td3
            td3_primed = none if arm == "td3" else scores[name].get("td3", none)
            td3_without = none if arm == "td3" else control[name].get("td3", none)
            estimates = [
                estimate([without]),
                estimate([without], [td3_without]),
                estimate([primed], [without]),
                estimate([primed, td3_without], [without, td3_primed]),
            ]
            cells = [f"{own:,.0f}" for own in estimates]
            lines.append([f"{arm}, {title}", f"{len(primed)}, {len(without)}", *cells])
    return drawing.markdown(head, lines)


def probes_table(runs: dict[str, list[Path]]) -> str:
    """Means over the seeds that have a value."""
    probed = {arm: [read_probes(folder) for folder in folders] for arm, folders in runs.items()}
    known = {column for rows in probed.values() for row in rows for column in row["end"]}
    columns = [column for column in PROBES if column in known]
    lines = []
    for arm, rows in probed.items():
        for point in POINTS:
            cells = [arm, point]
            for column in columns:
                values = [float(row[point][column]) for row in rows if column in row[point]]
                cells.append(format(np.mean(values), PROBES[column]) if values else "–")
            lines.append(cells)
    return drawing.markdown(["arm", "point", *columns], lines)


def draw_arms(ax, values: Values, fill: str = "full", above: float = 0) -> None:
    """Each seed as a dot, the mean with its 95% interval as a bar; an arm in each line."""
    for y, (arm, own) in enumerate(reversed(values.items())):  # the first at the top
        y += above
        colour = "#0072B2" if ARMS[arm].script is ne else "#555555"
        dots = {"fillstyle": fill, "alpha": 0.4, "markersize": 4}
        ax.plot(own, [y] * len(own), "o", color=colour, markeredgewidth=0.8, **dots)
        mean = estimate([own])
        ax.plot(mean.value, y, "|", color=colour, markersize=10, markeredgewidth=2)
        ax.plot([mean.low, mean.high], [y, y], color=colour, linewidth=1.5)


def picture(scores: dict[str, Values], titles: dict[str, str]):
    """Both returns, and how well the primed networks learn; TD3's means are dotted."""
    figure, part = drawing.canvas(11, 0.32 * len(scores["late"]) + 1.2, "")
    axes = part.subplots(1, 3, sharey=True)
    dotted = {"color": "#999999", "linewidth": 1, "linestyle": ":"}
    for ax, (name, title) in zip(axes, titles.items(), strict=False):
        if "td3" in scores[name]:
            ax.axvline(scores[name]["td3"].mean(), **dotted)
        draw_arms(ax, scores[name])
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("evaluation return")
    draw_arms(axes[2], scores["critic"], "full", 0.15)
    draw_arms(axes[2], scores["actor"], "none", -0.15)
    axes[2].axvline(1, **dotted)
    axes[2].set_xscale("log")
    axes[2].xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
    axes[2].xaxis.set_major_formatter("{x:g}")
    axes[2].xaxis.set_minor_formatter("")
    axes[2].set_title("after priming: critic full, actor hollow", fontsize=10)
    axes[2].set_xlabel("loss on new targets / a fresh one's")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    seeds = {arm: len(own) for arm, own in reversed(scores["late"].items())}
    labels = [f"{ARMS[arm].label} ({count})" for arm, count in seeds.items()]
    axes[0].set_yticks(range(len(labels)), labels)
    return figure


def table(
    folder: tyro.conf.Positional[Path],
    /,
    control: Path | None = None,
    reference: ArmName = "td3",
    from_step: int = 25_000,
    to_step: int = 10**9,
    out: Path = Path("priming.png"),
) -> None:
    """Markdown: returns, trainability, their 95% intervals, the probes' means; and a picture.

    p is of no difference from the reference, corrected for the number of arms (Holm).

    Args:
        folder: of all runs
        control: folder of runs with --priming-updates 0, for a table of what priming adds
        reference: the arm that the others are compared with
        from_step: environment step from which the second return is averaged
        to_step: up to which it is
        out: where the PNG goes, and beside it the Markdown
    """
    drawing.check_picture(out)
    runs = run.finished_runs(folder, ARMS)
    scores = scores_of(runs, from_step, to_step)
    steps = f"from step {from_step:,} " + (f"to {to_step:,}" if to_step < 10**9 else "on")
    titles = {"late": "last two evaluations", "whole": steps}
    fits = {"actor": "actor's loss on new targets, of a fresh network's"}
    fits["critic"] = fits["actor"].replace("actor", "critic")
    tables = [
        versus_table(scores, titles, ",.0f", reference),
        versus_table(scores, fits, ".2f", reference),
    ]
    if control is not None:
        unprimed = scores_of(run.finished_runs(control, ARMS), from_step, to_step)
        tables.append(control_table(scores, unprimed, titles))
    tables.append(probes_table(runs))
    page = "\n".join(tables)
    print(page)
    files = {out: lambda file: drawing.save(picture(scores, titles), file)}
    files[out.with_suffix(".md")] = lambda file: file.write_text(page)
    drawing.write(files)


# --- a ladder of doses --------------------------------------------------------
class Rung(NamedTuple):
    """A seed at a dose; returns are means over the last half of the normal steps."""

    td3: float
    reset: float  # TD3, reset after priming
    fresh: float  # on TD3's buffer, over the last half of its updates; NaN: not run
    q_primed: float  # mean |Q| of TD3 right after priming
    q_late: float  # over the last half
    td3_first: float  # return of TD3 over the first half


def columns_of(file: Path, *names: str) -> list[np.ndarray]:
    rows = drawing.read_rows(file, list(names))
    return [np.array([float(row[name]) for row in rows]) for name in names]


def last_half(x: np.ndarray, values: np.ndarray, start: float = 0) -> float:
    """Mean of the values from the middle between `start` and the last x on."""
    return float(values[x > (start + x[-1]) / 2].mean())


def read_rung(td3: Path, reset: Path | None) -> Rung:
    random_steps = float(read_probes(td3)["before"]["step"])
    columns = ("step", "eval/return_mean")
    steps, own = columns_of(td3 / "results.csv", *columns)
    returns = [last_half(steps, own, random_steps), math.nan, math.nan]
    td3_first = float(own[steps <= (random_steps + steps[-1]) / 2].mean())
    if reset is not None:
        returns[1] = last_half(*columns_of(reset / "results.csv", *columns), random_steps)
    if (td3 / "handed.csv").exists():
        returns[2] = last_half(*columns_of(td3 / "handed.csv", *columns))
    steps, q = columns_of(td3 / "losses.csv", "step", "losses/abs_q")
    primed = q[steps == random_steps]
    q_primed = primed[-1] if len(primed) else math.nan
    return Rung(*returns, q_primed, last_half(steps, q, random_steps), td3_first)


def ladder_table(doses: dict[int, dict[str, Rung]]) -> str:
    """Returns; in brackets shares of TD3's, not primed, of the same seed."""
    head = ["dose", "seed", "TD3", "reset after priming", "fresh on its buffer"]
    head += ["lost, and mended", "mean abs Q after priming", "last half"]
    lines = []
    for dose, rungs in doses.items():
        for seed, own in rungs.items():
            whole = doses[0][seed].td3
            shares = [value / whole for value in own[:3]]
            cells = [
                "–" if math.isnan(value) else f"{value:,.0f} ({share:.0%})"
                for value, share in zip(own[:3], shares, strict=True)
            ]
            cures = [share for share in shares[1:] if not math.isnan(share)]
            lost = shares[0] <= 0.5
            known = dose > 0 and (cures or not lost)
            verdict = "yes" if lost and cures and max(cures) >= 0.8 else "no"
            qs = ["–" if math.isnan(q) else f"{q:,.0f}" for q in own[3:5]]
            lines.append([f"{dose:,}", seed.removeprefix("seed"), *cells])
            lines[-1] += [verdict if known else "–", *qs]
    return drawing.markdown(head, lines)


def cost_table(doses: dict[int, dict[str, Rung]]) -> str:
    """What a dose costs TD3: means over the seeds, and differences from none."""
    head = ["dose", "seeds", "first half", "minus dose 0", "last half", "minus dose 0"]
    lines = []
    for dose, rungs in doses.items():
        lines.append([f"{dose:,}", str(len(rungs))])
        for half in ("td3_first", "td3"):
            own, none = (
                np.array([getattr(rung, half) for rung in doses[d].values()]) for d in (dose, 0)
            )
            minus = estimate([own], [none]) if dose else estimate([np.array([])])
            lines[-1] += [f"{estimate([own]):,.0f}", f"{minus:,.0f}"]
    return drawing.markdown(head, lines)


PANELS = (  # file of a run, its column, labels
    ("results", "eval/return_mean", "evaluation return", "step"),
    ("handed", "eval/return_mean", "return of a fresh TD3\non the same buffer", "update"),
    ("losses", "losses/abs_q", "mean |Q| of a uniform batch", "update"),
)


def ladder_picture(runs: dict[int, dict[str, list[Path]]]):
    """Seeds thin, their means thick. runs: {dose: {arm: folders}}."""
    figure, part = drawing.canvas(12, 3.8, "")
    axes = part.subplots(1, len(PANELS))
    for colour, (dose, arms) in zip(drawing.COLOURS[4::-1], runs.items(), strict=False):
        for arm, folders in arms.items():
            look = {"color": colour, "linestyle": "-" if arm == "td3" else ":"}
            label = f"{ARMS[arm].label}, {dose:,} updates" if dose else "TD3, not primed"
            for ax, (name, column, *_) in zip(axes, PANELS, strict=True):
                files = [own / f"{name}.csv" for own in folders]
                x = "updates" if name == "losses" else "step"
                curves = [columns_of(file, x, column) for file in files if file.exists()]
                for own_x, y in curves:
                    ax.plot(own_x, y, linewidth=0.6, alpha=0.4, **look)
                if curves:
                    mean = np.mean([y for _, y in curves], axis=0)
                    ax.plot(curves[0][0], mean, linewidth=2, label=label, **look)
    for ax, (*_, label, x) in zip(axes, PANELS, strict=True):
        drawing.dress(ax)
        ax.set_xlabel(x)
        ax.set_ylabel(label)
    axes[2].set_yscale("log")
    axes[2].yaxis.set_major_formatter("{x:g}")
    handles = axes[0].get_legend_handles_labels()
    part.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def ladder(folder: tyro.conf.Positional[Path], /, out: Path = Path("ladder.png")) -> None:
    """Markdown: what each dose of priming costs TD3, and what mends it; and a picture.

    Args:
        folder: holds one folder of runs per dose, named by its updates: 0, 25000, ...
        out: where the PNG goes, and beside it the Markdown
    """
    drawing.check_picture(out)
    runs = {}
    doses = {}
    steps = max(map(run.last_step, folder.glob("*/td3_seed*")), default=0)
    for dose in sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit()):
        runs[dose] = run.finished_runs(folder / str(dose), ["td3", "reset_primed"], steps)
        found = {own.name: own for folders in runs[dose].values() for own in folders}
        seeds = [own.name.removeprefix("td3_") for own in runs[dose].get("td3", [])]
        doses[dose] = {
            seed: read_rung(found[f"td3_{seed}"], found.get(f"reset_primed_{seed}"))
            for seed in seeds
        }
    missing = [seed for rungs in doses.values() for seed in rungs if seed not in doses.get(0, {})]
    if missing or not doses:
        drawing.die(f"{folder}/0 must hold TD3, not primed, of each seed")
    page = ladder_table(doses) + "\n" + cost_table(doses)
    print(page)
    files = {out: lambda file: drawing.save(ladder_picture(runs), file)}
    files[out.with_suffix(".md")] = lambda file: file.write_text(page)
    drawing.write(files)


def main() -> None:
    commands = {"run": make_runs, "table": table, "ladder": ladder}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    main()
