"""What NE did in one run, from its results.csv and the mask pictures in its TensorBoard events.

A command of plot.py. Masks are under masks/actor/N and masks/critic/N, a white pixel for each
active connection; N counts layers, the critic's those of both critics one after the other.
"""

import functools
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from PIL import Image
from tyro.conf import Positional

import drawing
from drawing import COLOURS, die

NETWORKS = ("actor", "critic")
GIF_FRAMES = 20  # so that a page that shows it loads fast

Masks = dict[str, list[dict[int, np.ndarray]]]  # {network: [of each layer: {step: (out, in)}]}


class RunData(NamedTuple):
    rows: drawing.Seed
    returns: dict[str, np.ndarray]  # {task evaluated: (rows,)}
    masks: Masks

    def critic(self) -> list[dict[int, np.ndarray]]:
        """The layers of critic 1, the first half."""
        layers = self.masks["critic"]
        return layers[: max(1, len(layers) // 2)]

    def middle(self) -> dict[int, np.ndarray]:
        """Critic 1's middle layer."""
        layers = self.critic()
        return layers[len(layers) // 2]


# --- reading ------------------------------------------------------------------
def read_events(folder: Path) -> dict[str, list]:
    """{tag: image events} of what is under masks/. Raises: SystemExit(2) where nothing is."""
    # here, as it takes seconds that the other commands of plot.py need not wait
    from tensorboard.backend.event_processing import event_accumulator

    everything = {event_accumulator.IMAGES: 0}
    events = event_accumulator.EventAccumulator(str(folder), size_guidance=everything)
    try:
        events.Reload()
        tags = events.Tags()["images"]
        images = {tag: events.Images(tag) for tag in tags if tag.startswith("masks/")}
    except Exception as e:  # TensorBoard and protobuf raise many kinds for a damaged file
        reason = " ".join(str(e).split())
        die(f"cannot read the TensorBoard events in {folder}: {reason}")
    if not any(tag.startswith("masks/critic/") for tag in images):
        die(f"there are no pictures of the critic's masks in the TensorBoard events of {folder}")
    return images


def decode(folder: Path, tag: str, event) -> np.ndarray:
    """The mask (out, in) of an image event, 1 where a connection is. Raises: SystemExit(2)."""
    try:
        picture = Image.open(io.BytesIO(event.encoded_image_string))
        pixels = np.asarray(picture.convert("L"))
    except Exception as e:  # Pillow raises many kinds for a damaged picture
        reason = " ".join(str(e).split())
        die(f"{tag} of step {event.step} in {folder} is damaged: {reason}")
    return pixels > 127


def read_masks(folder: Path) -> Masks:
    """Raises: SystemExit(2) where pictures are missing or damaged."""
    images = read_events(folder)
    masks: Masks = {}
    for network in NETWORKS:
        masks[network] = []
        for layer in range(len(images)):
            tag = f"masks/{network}/{layer}"
            if tag not in images:
                break
            # a resumed run may have logged a step twice: the last one counts
            layers = {event.step: decode(folder, tag, event) for event in images[tag]}
            masks[network].append(dict(sorted(layers.items())))
    every = masks["actor"] + masks["critic"]
    if any(layer.keys() != every[0].keys() for layer in every):
        why = "it is being written just now, or damaged"
        die(f"the layers in {folder} have pictures of different steps: {why}")
    return masks


def columns_of(network: str) -> list[str]:
    columns = []
    for name in ("density", "dormant", "grown", "pruned"):
        columns.append(f"ne/{network}/{name}")
    return columns


def read_run(folder: Path) -> RunData:
    """Raises: SystemExit(2) for what is no run of NE."""
    if not folder.is_dir():
        die(f"there is no run folder {folder}")
    file = folder / "results.csv"
    columns = ["step", "eval/return_mean", "ne/review_epsilon", "ne/review_share"]
    for network in NETWORKS:
        columns += columns_of(network)
    first = drawing.read_rows(file, columns)[0]
    if "task_evaluated" in first:
        tasks = drawing.read_continual(file, columns).tasks
    else:
        tasks = {"": drawing.read_results(file, columns)}
    rows = next(iter(tasks.values()))  # but for the return the same for all tasks
    returns = {task: own["eval/return_mean"] for task, own in tasks.items()}
    return RunData(rows, returns, read_masks(folder))


def per_round(steps: np.ndarray, counts: np.ndarray, rounds: list[int]) -> np.ndarray:
    """Mean per round since the row before, (rows,), of a count so far; NaN without a round."""
    before = np.concatenate(([0.0], counts[:-1]))
    passed = np.searchsorted(rounds, steps, side="right")  # rounds up to each row
    passed_before = np.concatenate(([0], passed[:-1]))
    number = passed - passed_before
    changes = np.full(len(steps), np.nan)
    np.divide(counts - before, number, out=changes, where=number > 0)
    return changes


# --- drawing ------------------------------------------------------------------
def chosen_steps(layer: dict[int, np.ndarray]) -> list[int]:
    """Birth, a third and two thirds of what the density changes, and the end."""
    steps = list(layer)
    density = np.array([mask.mean() for mask in layer.values()])
    change = np.abs(density - density[0])
    places = [0]
    for share in (1 / 3, 2 / 3):
        places.append(int(np.argmax(change >= share * change[-1])))
    places.append(len(steps) - 1)
    if len(set(places)) < 4:  # the density stays, or jumps: evenly
        places = np.linspace(0, len(steps) - 1, 4).round().astype(int).tolist()
    return [steps[place] for place in sorted(set(places))]


def draw_mask(ax, mask: np.ndarray, step: int) -> None:
    when = "birth" if step == 0 else f"step {drawing.step_label(step)}"
    ax.imshow(mask, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="antialiased")
    ax.set_title(f"{when}: {mask.mean():.0%}", fontsize=10)
    ax.set_xticks([])
    ax.set_yticks([])


def draw_masks(part, layer: dict[int, np.ndarray]) -> None:
    """Critic 1's middle layer at birth and later."""
    steps = chosen_steps(layer)
    axes = part.subplots(1, len(steps), squeeze=False)[0]
    for ax, step in zip(axes, steps, strict=True):
        draw_mask(ax, layer[step], step)
    n_out, n_in = next(iter(layer.values())).shape
    axes[0].set_ylabel(f"{n_out} neurons", fontsize=9)
    axes[0].set_xlabel(f"{n_in} inputs", fontsize=9)
    part.suptitle("Critic 1, middle layer; white: an active connection", fontsize=10)


def draw_density(ax, run: RunData) -> None:
    """Of each layer of critic 1 and of the actor."""
    networks = {"critic 1": (run.critic(), "-"), "actor": (run.masks["actor"], "--")}
    for name, (layers, style) in networks.items():
        for n, layer in enumerate(layers):
            density = [mask.mean() for mask in layer.values()]
            label = f"{name}, layer {n + 1}"
            colour = COLOURS[n % len(COLOURS)]
            look = {"color": colour, "linewidth": 1.5, "drawstyle": "steps-post"}
            ax.plot(list(layer), density, style, label=label, **look)
    ax.set_ylim(0, 1.04)
    ax.set_title("density per layer", fontsize=10)


def draw_changes(ax, run: RunData) -> None:
    rounds = [step for step in run.middle() if step > 0]
    for network, style in zip(NETWORKS, ("--", "-"), strict=True):
        for name, what, colour in (("grown", "born", "#009E73"), ("pruned", "pruned", "#D55E00")):
            counts = run.rows[f"ne/{network}/{name}"]
            changes = per_round(run.rows["step"], counts, rounds)
            label = f"{network}: {what}"
            ax.plot(run.rows["step"], changes, style, color=colour, linewidth=1.5, label=label)
    ax.set_yscale("symlog", linthresh=1)  # few are pruned, many are born
    ax.yaxis.set_major_formatter(drawing.step_label)
    ax.set_ylim(bottom=0)
    ax.set_title("connections born and pruned per round", fontsize=10)


def draw_dormant(ax, run: RunData) -> None:
    for network, style in zip(NETWORKS, ("--", "-"), strict=True):
        values = run.rows[f"ne/{network}/dormant"]
        label = "critics" if network == "critic" else network
        ax.plot(run.rows["step"], values, style, color=COLOURS[0], linewidth=1.5, label=label)
    ax.set_ylim(bottom=0)
    ax.set_title("dormant neurons (score 0)", fontsize=10)


def draw_review(ax, run: RunData) -> None:
    columns = {"ε": "ne/review_epsilon", "share of reviews so far": "ne/review_share"}
    for (label, column), colour in zip(columns.items(), COLOURS, strict=False):
        ax.plot(run.rows["step"], run.rows[column], color=colour, linewidth=1.5, label=label)
    ax.set_ylim(0, 1.04)
    ax.set_title("experience review", fontsize=10)


def draw_return(ax, run: RunData) -> None:
    for (task, values), colour in zip(run.returns.items(), COLOURS, strict=False):
        ax.plot(run.rows["step"], values, color=colour, linewidth=1.5, label=task)
    ax.set_title("evaluation return", fontsize=10)


def picture(run: RunData, title: str, steps: str) -> Figure:
    """About 900 pixels wide where a page shows it, so 9 inches of 100 pixels."""
    figure = Figure(figsize=(9, 10.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[2.6, 7.6])
    draw_masks(upper, run.middle())
    axes = lower.subplot_mosaic([["density", "changes"], ["dormant", "review"], ["return"] * 2])
    draw_density(axes["density"], run)
    draw_changes(axes["changes"], run)
    draw_dormant(axes["dormant"], run)
    draw_review(axes["review"], run)
    draw_return(axes["return"], run)
    for name, ax in axes.items():
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.xaxis.set_major_formatter(drawing.step_label)
        ax.set_xlim(left=0)
        if name != "return" or len(run.returns) > 1:
            ax.legend(fontsize=8, frameon=False)
    axes["return"].set_xlabel(steps)
    figure.suptitle(title)
    return figure


# --- animation ----------------------------------------------------------------
def animate(run: RunData, file: Path) -> None:
    """The middle layers of critic 1 and of the actor, a picture per round."""
    shown = {"critic 1": run.middle()}
    if run.masks["actor"]:
        layers = run.masks["actor"]
        shown["actor"] = layers[len(layers) // 2]
    figure = Figure(figsize=(3.7 * len(shown), 3), dpi=64, layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]

    def draw_frame(step: int) -> None:
        for ax, (name, layer) in zip(axes, shown.items(), strict=True):
            ax.clear()
            draw_mask(ax, layer[step], step)
            ax.set_ylabel(f"{name}, middle layer", fontsize=9)

    every = list(run.middle())
    count = min(len(every), GIF_FRAMES)
    places = np.linspace(0, len(every) - 1, count).round().astype(int)
    steps = [every[place] for place in places]
    animation = FuncAnimation(figure, draw_frame, frames=steps, init_func=lambda: None)
    animation.save(file, writer=PillowWriter(fps=4))


def topology(
    run: Positional[Path],
    /,
    out: Path = Path("topology.png"),
    title: str = "",
    gif: Path | None = None,
):
    """What NE did in one run: masks, density, births, prunings, dormant neurons, reviews, return.

    Args:
        run: folder of a run of a script of NE
        out: where the PNG goes
        title: title of the figure
        gif: also write the masks as an animation, a GIF
    """
    drawing.check_picture(out)
    if gif is not None:
        drawing.check_picture(gif, ".gif", "--gif")
    data = read_run(run)
    frames = drawing.counts_frames(run / "results.csv")
    steps = "environment frames" if frames else "environment steps"
    files = {out: functools.partial(drawing.save, picture(data, title, steps))}
    if gif is not None:
        files[gif] = functools.partial(animate, data)
    drawing.write(files)
