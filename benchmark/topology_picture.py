"""What NE did in one run, from its results.csv and the mask pictures in its TensorBoard events.

A command of plot.py. Masks are under masks/actor/N and masks/critic/N, a white pixel for each
active connection; N counts layers, the critic's those of both critics one after the other.
"""

import functools
import io
from pathlib import Path

import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from PIL import Image
from tyro.conf import Positional

import drawing
from drawing import COLOURS, die

NETWORKS = {"actor": "--", "critic": "-"}  # line styles
COLUMNS = ["eval/return_mean", "ne/review_epsilon", "ne/review_share"]
for _network in NETWORKS:
    COLUMNS += [f"ne/{_network}/{name}" for name in ("dormant", "grown", "pruned")]
GIF_FRAMES = 20  # so that a page that shows it loads fast

Layer = dict[int, np.ndarray]  # {step: mask (out, in), True where a connection is}


def read_masks(folder: Path) -> dict[str, list[Layer]]:
    """Layers of actor and critic 1, at the steps that all have.

    Raises: SystemExit(2) where there are none.
    """
    # here, as it takes seconds that the other commands of plot.py need not wait
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={IMAGES: 0})  # 0: all of them
    events.Reload()
    tags = events.Tags()["images"]
    masks: dict[str, list[Layer]] = {}
    for network in NETWORKS:
        own = [tag for tag in tags if tag.startswith(f"masks/{network}/")]
        masks[network] = []
        for n in range(len(own)):
            layer = {}
            for event in events.Images(f"masks/{network}/{n}"):  # the last one of a step counts
                pixels = Image.open(io.BytesIO(event.encoded_image_string)).convert("L")
                layer[event.step] = np.asarray(pixels) > 127
            masks[network].append(layer)
    both = masks["critic"]
    masks["critic"] = both[: max(1, len(both) // 2)]
    if not both:
        die(f"there are no pictures of the critic's masks in the TensorBoard events of {folder}")
    every = masks["actor"] + masks["critic"]
    steps = set.intersection(*map(set, every))  # a run may be writing just now
    for layer in every:
        for step in set(layer) - steps:
            del layer[step]
    return masks


def middle(layers: list[Layer]) -> Layer:
    return layers[len(layers) // 2]


def per_round(steps: np.ndarray, counts: np.ndarray, rounds: list[int]) -> np.ndarray:
    """Mean per round since the row before, (rows,), of a count so far; NaN without a round."""
    passed = np.searchsorted(rounds, steps, side="right")  # rounds up to each row
    number = np.diff(passed, prepend=0)
    changes = np.full(len(steps), np.nan)
    np.divide(np.diff(counts, prepend=0), number, out=changes, where=number > 0)
    return changes


def chosen_steps(layer: Layer) -> list[int]:
    """Birth, a third and two thirds of what the density changes, and the end."""
    steps = list(layer)
    density = np.array([mask.mean() for mask in layer.values()])
    change = np.abs(density - density[0])
    places = [np.argmax(change >= share * change[-1]) for share in (0, 1 / 3, 2 / 3)]
    places.append(len(steps) - 1)
    if len(set(places)) < 4:  # the density stays, or jumps: evenly
        places = np.linspace(0, len(steps) - 1, 4).round().astype(int)
    return [steps[place] for place in sorted(set(places))]


# --- drawing ------------------------------------------------------------------
def draw_mask(ax, mask: np.ndarray, step: int) -> None:
    when = "birth" if step == 0 else f"step {drawing.step_label(step)}"
    ax.imshow(mask, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="antialiased")
    ax.set_title(f"{when}: {mask.mean():.0%}", fontsize=10)
    ax.set_xticks([])
    ax.set_yticks([])


def draw_masks(part, layer: Layer) -> None:
    """At birth and later."""
    steps = chosen_steps(layer)
    axes = part.subplots(1, len(steps), squeeze=False)[0]
    for ax, step in zip(axes, steps, strict=True):
        draw_mask(ax, layer[step], step)
    n_out, n_in = layer[steps[0]].shape
    axes[0].set_ylabel(f"{n_out} neurons", fontsize=9)
    axes[0].set_xlabel(f"{n_in} inputs", fontsize=9)
    part.suptitle("Critic 1, middle layer; white: an active connection", fontsize=10)


def draw_layers(ax, masks: dict[str, list[Layer]]) -> None:
    for network, name in (("critic", "critic 1"), ("actor", "actor")):
        for n, layer in enumerate(masks[network]):
            density = [mask.mean() for mask in layer.values()]
            look = {"color": COLOURS[n % len(COLOURS)], "linestyle": NETWORKS[network]}
            label = f"{name}, layer {n + 1}"
            ax.plot(list(layer), density, label=label, drawstyle="steps-post", **look)


def draw_rows(axes: dict, rows: drawing.Seed, rounds: list[int]) -> None:
    """What results.csv says."""
    steps = rows["step"]
    for network, style in NETWORKS.items():
        for name, what, colour in (("grown", "born", "#009E73"), ("pruned", "pruned", "#D55E00")):
            changes = per_round(steps, rows[f"ne/{network}/{name}"], rounds)
            axes["changes"].plot(steps, changes, style, color=colour, label=f"{network}: {what}")
        name = "critics" if network == "critic" else network
        dormant = rows[f"ne/{network}/dormant"]
        axes["dormant"].plot(steps, dormant, style, color=COLOURS[0], label=name)
    axes["review"].plot(steps, rows["ne/review_epsilon"], color=COLOURS[0], label="ε")
    share = rows["ne/review_share"]
    axes["review"].plot(steps, share, color=COLOURS[1], label="share of reviews so far")


def picture(run: drawing.Run, masks: dict[str, list[Layer]], title: str) -> Figure:
    """About 900 pixels wide where a page shows it, so 9 inches of 100 pixels."""
    figure = Figure(figsize=(9, 10.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[2.6, 7.6])
    layer = middle(masks["critic"])
    draw_masks(upper, layer)
    axes = lower.subplot_mosaic([["density", "changes"], ["dormant", "review"], ["return"] * 2])
    draw_layers(axes["density"], masks)
    rows = next(iter(run.tasks.values()))  # but for the return the same for all tasks
    draw_rows(axes, rows, [step for step in layer if step > 0])
    for (task, own), colour in zip(run.tasks.items(), COLOURS, strict=False):
        axes["return"].plot(own["step"], own["eval/return_mean"], color=colour, label=task)

    axes["changes"].set_yscale("symlog", linthresh=1)  # few are pruned, many are born
    titles = ["density per layer", "connections born and pruned per round"]
    titles += ["dormant neurons (score 0)", "experience review", "evaluation return"]
    for ax, text in zip(axes.values(), titles, strict=True):
        ax.set_title(text, fontsize=10)
        drawing.dress(ax)
        ax.set_xlim(left=0)
        for line in ax.lines:
            line.set_linewidth(1.5)
        if ax is not axes["return"] or len(run.tasks) > 1:
            ax.legend(fontsize=8, frameon=False)
    axes["density"].set_ylim(0, 1.04)
    axes["review"].set_ylim(0, 1.04)
    axes["dormant"].set_ylim(bottom=0)
    axes["changes"].yaxis.set_major_formatter(drawing.step_label)
    axes["changes"].set_ylim(bottom=0)
    axes["return"].set_xlabel("environment steps")
    figure.suptitle(title)
    return figure


def animate(masks: dict[str, list[Layer]], file: Path) -> None:
    """The middle layers of critic 1 and of the actor, a picture per round."""
    shown = {"critic 1": middle(masks["critic"])}
    if masks["actor"]:
        shown["actor"] = middle(masks["actor"])
    figure = Figure(figsize=(3.7 * len(shown), 3), dpi=64, layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]

    def draw_frame(step: int) -> None:
        for ax, (name, layer) in zip(axes, shown.items(), strict=True):
            ax.clear()
            draw_mask(ax, layer[step], step)
            ax.set_ylabel(f"{name}, middle layer", fontsize=9)

    every = list(shown["critic 1"])
    places = np.linspace(0, len(every) - 1, min(len(every), GIF_FRAMES)).round().astype(int)
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
    data = drawing.read_run(run / "results.csv", COLUMNS)
    masks = read_masks(run)
    files = {out: functools.partial(drawing.save, picture(data, masks, title))}
    if gif is not None:
        files[gif] = functools.partial(animate, masks)
    drawing.write(files)
