"""The figures as data: which runs each is made of. run.py makes the runs, figures.py draws them.

A run is METHODS[name] on a task with a seed. Its folder is TASK/NAME_seedN whichever figure asks
for it, so figures share runs.
§, Figure and Table refer to the paper, arXiv 2410.07994; tasks and values that its text does not
give are marked ours.
"""

import itertools
from typing import NamedTuple

# what follows `python` in the repository's root
NE = "ne_td3_continuous.py"
TD3 = "-m baselines.td3_continuous"
NE_CONTINUAL = "ne_td3_continual.py"
TD3_CONTINUAL = "-m baselines.td3_continual"
NE_DRQ = "ne_drq_dmc.py"
DRQ = "-m baselines.drq_dmc"


def widths(scale: int) -> str:
    """Flags of a scale above 1 (§B.1): width 256, and one more layer per step, in all networks."""
    hidden = " ".join(["256"] * (scale + 1))
    return f"--actor-hidden {hidden} --critic-hidden {hidden}"


class Method(NamedTuple):
    label: str  # in figures and tables
    script: str
    flags: str = ""  # {words} are filled in from LENGTHS


GROWTH = "--review-floor 1 --no-prune"
UNIFORM = " --sparse-init uniform"
RANDOM = " --growth random"
STATIC = "--review-floor 1 --growth none" + UNIFORM

METHODS = {  # name in folders and file names: method
    "ne_td3": Method("NE-TD3", NE),
    # --- rivals (§5.1) ---
    "td3_dense": Method("TD3", TD3),
    "td3_reset": Method("Reset", TD3, "--method reset --reset-interval {reset}"),
    "td3_redo": Method("ReDo", TD3, "--method redo"),
    "td3_regrama": Method("ReGraMa", TD3, "--method regrama"),
    "td3_layer_norm": Method("LayerNorm", TD3, "--method layer-norm"),
    "td3_injection": Method("Plasticity Injection", TD3, "--method injection"),
    "td3_recency": Method("recency-weighted", TD3, "--method recency"),
    # --- how to start and what to grow, without review (§4.1, §4.2) ---
    "static_25": Method("static, density 0.25", NE, STATIC),
    "static_50": Method("static, density 0.5", NE, STATIC + " --initial-density 0.5"),
    "random_uniform": Method("random growth, uniform start", NE, GROWTH + UNIFORM + RANDOM),
    "random_erdos_renyi": Method("random growth", NE, GROWTH + RANDOM),
    "gradient_uniform": Method("gradient growth, uniform start", NE, GROWTH + UNIFORM),
    "gradient_erdos_renyi": Method("gradient growth", NE, GROWTH),
    "ne_td3_no_review": Method("NE without review", NE, "--review-floor 1"),
    # --- how often to review (§4.2; floor and rule are ours) ---
    "ne_td3_floor_90": Method("NE, floor 0.9", NE, "--review-floor 0.9"),
    "ne_td3_fau": Method("NE, rule fau", NE, "--review-rule fau"),
    # --- parts of NE (§5.1, Figure 7; what its reviewers asked for) ---
    "ne_td3_actor_only": Method("NE on the actor only", NE, "--no-ne-critic"),
    "ne_td3_critic_only": Method("NE on the critics only", NE, "--no-ne-actor"),
    "ne_td3_no_prune": Method("NE without pruning", NE, "--no-prune"),
    "ne_td3_no_growth": Method("NE without growth", NE, "--growth none"),
    # --- NE with others (§C) ---
    "ne_td3_layer_norm": Method("NE + LayerNorm", NE, "--layer-norm"),
    "ne_td3_redo": Method("NE + ReDo", NE, "--redo-interval 1000"),
    "ne_td3_reset": Method("NE + Reset", NE, "--reset-interval {reset}"),
    # --- larger networks (§B.1) ---
    "ne_td3_scale2": Method("NE, scale 2", NE, widths(2)),
    "ne_td3_scale3": Method("NE, scale 3", NE, widths(3)),
    "ne_td3_scale4": Method("NE, scale 4", NE, widths(4)),
    "td3_dense_scale2": Method("TD3, scale 2", TD3, widths(2)),
    "td3_dense_scale3": Method("TD3, scale 3", TD3, widths(3)),
    "td3_dense_scale4": Method("TD3, scale 4", TD3, widths(4)),
    # --- sensitivity, one value changed at a time (values ours) ---
    "ne_td3_alpha_half": Method("α / 2", NE, "--grow-rate {alpha_half}"),
    "ne_td3_alpha_twice": Method("α · 2", NE, "--grow-rate {alpha_twice}"),
    "ne_td3_interval_quarter": Method("ΔT / 4, α solved", NE, "--grow-interval {interval_quarter}"),
    "ne_td3_interval_twice": Method("ΔT · 2, α solved", NE, "--grow-interval {interval_twice}"),
    "ne_td3_omega_10": Method("ω = 0.1", NE, "--prune-ratio 0.1"),
    "ne_td3_omega_80": Method("ω = 0.8", NE, "--prune-ratio 0.8"),
    "ne_td3_density_10": Method("D = 0.1", NE, "--initial-density 0.1"),
    "ne_td3_density_50": Method("D = 0.5", NE, "--initial-density 0.5"),
    "ne_td3_density_75": Method("D = 0.75", NE, "--initial-density 0.75"),
    # --- a sequence of tasks (§5.2) ---
    "ne_td3_continual": Method("NE-TD3", NE_CONTINUAL),
    "td3_continual": Method("TD3", TD3_CONTINUAL),
    "td3_continual_reset": Method("Reset", TD3_CONTINUAL, "--method reset"),
    # --- from pixels (§5.3) ---
    "ne_drq": Method("NE-DrQ", NE_DRQ),
    "drq": Method("DrQ", DRQ),
    "drq_reset": Method("Reset", DRQ, "--method reset --reset-interval {drq_reset}"),
    "drq_redo": Method("ReDo", DRQ, "--method redo"),
    "drq_layer_norm": Method("LayerNorm", DRQ, "--method layer-norm"),
    "drq_injection": Method("Plasticity Injection", DRQ, "--method injection"),
}


CHEETAH = ("HalfCheetah-v5",)
TWO = ("HalfCheetah-v5", "Ant-v5")  # where the paper says two tasks and not which (ours)
MUJOCO = ("HalfCheetah-v5", "Humanoid-v5", "Ant-v5", "Hopper-v5")
CONTINUAL = ("continual",)  # the sequence of all four; its scripts have no --env-id
DMC = ("walker_walk", "reacher_easy", "reacher_hard", "cartpole_swingup_sparse")


class Figure(NamedTuple):
    title: str
    methods: tuple[str, ...]  # in the order of the legend
    tasks: tuple[str, ...] = TWO
    reference: str = "td3_dense"  # the method whose return is 1 in the aggregate
    quick_tasks: int = 1  # how many of the tasks, from the first, with --quick
    quick_seeds: int = 3
    steps: str = "environment steps"  # what its scripts count
    # (label of the y-axis, columns), top to bottom; none: return, active ratio and density
    panels: tuple[tuple[str, tuple[str, ...]], ...] = ()


NE_AND_TD3 = ("ne_td3", "td3_dense")
RIVALS = ("td3_dense", "td3_reset", "td3_redo", "td3_layer_norm", "td3_injection")
DRQ_RIVALS = ("drq", "drq_reset", "drq_redo", "drq_layer_norm", "drq_injection")
SCALES = ("ne_td3", "ne_td3_scale2", "ne_td3_scale3", "ne_td3_scale4")
SCALES += ("td3_dense", "td3_dense_scale2", "td3_dense_scale3", "td3_dense_scale4")
COMBINED = ("ne_td3", "ne_td3_layer_norm", "td3_layer_norm", "ne_td3_redo", "td3_redo")
COMBINED += ("ne_td3_reset", "td3_reset")
COMPONENTS = ("ne_td3_no_prune", "gradient_erdos_renyi", "ne_td3_no_growth", "ne_td3_no_review")
GROWTHS = ("gradient_erdos_renyi", "gradient_uniform", "random_erdos_renyi", "random_uniform")
DENSITIES = ("ne_td3_density_10", "ne_td3_density_50", "ne_td3_density_75")
SEQUENCE = ("ne_td3_continual", "td3_continual", "td3_continual_reset")
REVIEW = (
    ("evaluation return\n(sum of rewards per episode)", ("eval/return_mean",)),
    ("critics: dormant neurons\n(score 0, Eq. 1)", ("ne/critic/dormant",)),
    ("critics: active ratio, τ = 0.1\n(share of neurons)", ("ne/critic/active_ratio_0.1",)),
    ("ε (1 - ε: chance\nthat a batch is a review)", ("ne/review_epsilon",)),
)

FIGURES = {
    # --- of the paper ---
    "figure2": Figure(
        "Naive growth against static networks (§4.1)",
        ("random_uniform", "td3_dense", "static_50", "static_25"),
        CHEETAH,
    ),
    "figure3": Figure(
        "Random or gradient growth, uniform or Erdos-Renyi start, pruning; no review (§4.2)",
        ("ne_td3_no_review", "td3_dense", *GROWTHS),
        CHEETAH,
    ),
    "figure5": Figure(
        "Dormant neurons, ε and return, with and without review (§4.2)",
        ("ne_td3", "ne_td3_no_review"),
        reference="ne_td3_no_review",
        quick_tasks=2,
        panels=REVIEW,
    ),
    "figure6": Figure("NE and its rivals (§5.1)", ("ne_td3", *RIVALS), MUJOCO),
    "figure7": Figure(
        "Experience review; NE on one network only (§5.1)",
        (*NE_AND_TD3, "ne_td3_no_review", "ne_td3_actor_only", "ne_td3_critic_only"),
    ),
    "figure8": Figure(
        "A sequence of tasks: active ratio (§5.2)", SEQUENCE, CONTINUAL, "td3_continual"
    ),
    "figure9": Figure("A sequence of tasks: return (§5.2)", SEQUENCE, CONTINUAL, "td3_continual"),
    "figure10": Figure(
        "DrQ, from pixels (§5.3)",
        ("ne_drq", *DRQ_RIVALS),
        DMC,
        reference="drq",
        quick_seeds=2,
        steps="environment frames",
    ),
    # reference: as in the paper
    "figure11": Figure("NE together with its rivals (§C)", COMBINED, reference="ne_td3"),
    "scale-up": Figure("Larger networks (§B.1)", SCALES, CHEETAH, quick_seeds=1),
    # --- asked for by the paper's reviewers ---
    "components": Figure("NE without one of its parts; growth alone", (*NE_AND_TD3, *COMPONENTS)),
    "alpha": Figure(
        "Sensitivity to the growth rate α",
        (*NE_AND_TD3, "ne_td3_alpha_half", "ne_td3_alpha_twice"),
    ),
    "interval": Figure(
        "Sensitivity to the interval ΔT between rounds",
        (*NE_AND_TD3, "ne_td3_interval_quarter", "ne_td3_interval_twice"),
    ),
    "omega": Figure(
        "Sensitivity to the pruning bound ω (0.4 by default)",
        (*NE_AND_TD3, "ne_td3_no_prune", "ne_td3_omega_10", "ne_td3_omega_80"),
    ),
    "density": Figure(
        "Sensitivity to the initial density D (0.25 by default)", (*NE_AND_TD3, *DENSITIES)
    ),
    # --- ours ---
    "returns": Figure(
        "Does NE pay?",
        (*NE_AND_TD3, "ne_td3_no_review"),
        panels=(("evaluation return", ("eval/return_mean",)),),
    ),
    "replay": Figure(
        "Reviews of old experience against a preference for recent experience",
        (*NE_AND_TD3, "ne_td3_no_review", "td3_recency"),
    ),
    "review": Figure(
        "Which review: floor 0.65 (NE-TD3) or 0.9, the authors' rule, none?",
        ("ne_td3_no_review", "ne_td3", "ne_td3_floor_90", "ne_td3_fau"),
        ("HalfCheetah-v5", "Hopper-v5"),
        reference="ne_td3_no_review",
        panels=REVIEW,
    ),
    "regrama": Figure(
        "ReGraMa, by NE's authors (2025), beside ReDo and NE; not in the paper",
        (*NE_AND_TD3, "td3_redo", "td3_regrama"),
    ),
}

SEEDS = 7  # as in the paper

# all defaults: a million steps, three for the sequence, 1.1 or 3.1 million frames; a fifth of the
# paper's length; a figure in about an hour on two cores, which shows that everything works, not
# which method is better
LENGTHS = ("full", "short", "quick")
_TD3 = (
    "",
    "--total-timesteps 200000",
    "--total-timesteps 30000 --learning-starts 5000"
    " --eval-frequency 2000 --eval-episodes 3 --checkpoint-frequency 5000",
)
_CONTINUAL = (
    "",
    "--steps-per-task 50000",
    "--steps-per-task 3000 --learning-starts 1500"
    " --eval-frequency 3000 --eval-episodes 2 --checkpoint-frequency 3000",
)
_DRQ = (
    "",
    "--total-timesteps 500000",
    "--total-timesteps 12000 --frame-size 48 --channels 16 --hidden-dim 256 --batch-size 16"
    " --learning-starts 2000 --stddev-duration 5000 --buffer-size 15000"
    " --eval-frequency 3000 --eval-episodes 1 --checkpoint-frequency 3000",
)
FLAGS = {NE: _TD3, TD3: _TD3, NE_CONTINUAL: _CONTINUAL, TD3_CONTINUAL: _CONTINUAL}
FLAGS |= {NE_DRQ: _DRQ, DRQ: _DRQ}

# what {words} in the flags of METHODS stand for, by length. Half and twice the alpha that the
# default schedule solves, 2 ln(0.75 / 0.05) / sum(1 + cos(pi t / T_end)), over 97, 87 and 83
# rounds; a quarter and twice the default interval, a hundredth of the run
WORDS = {
    "reset": (200_000, 100_000, 15_000),
    "drq_reset": (200_000, 200_000, 6_000),
    "alpha_half": (0.0285, 0.0360, 0.0400),
    "alpha_twice": (0.1140, 0.1438, 0.1599),
    "interval_quarter": (2_500, 500, 75),
    "interval_twice": (20_000, 4_000, 600),
}


class Run(NamedTuple):
    name: str  # key of METHODS
    task: str
    seed: int
    script: str  # what follows `python`
    flags: str

    @property
    def path(self) -> str:
        """Folder of the run, or CSV file without its ending, below that of all runs."""
        return f"{self.task}/{self.name}_seed{self.seed}"


def run_of(length: str, seed: int, task: str, name: str) -> Run:
    method = METHODS[name]
    place = LENGTHS.index(length)
    words = {word: values[place] for word, values in WORDS.items()}
    flags = f"--seed {seed} {FLAGS[method.script][place]} {method.flags.format_map(words)}"
    if (task,) != CONTINUAL:
        flags = f"--env-id {task} {flags}"
    return Run(name, task, seed, method.script, " ".join(flags.split()))


def runs_of(length: str, seeds: int, tasks: tuple[str, ...], methods: tuple[str, ...]) -> list[Run]:
    """Seed by seed, so that an unfinished figure has all methods on all tasks."""
    wanted = itertools.product(range(1, seeds + 1), tasks, methods)
    return [run_of(length, seed, task, name) for seed, task, name in wanted]


class Choice(NamedTuple):
    length: str
    seeds: int
    tasks: tuple[str, ...]
    methods: tuple[str, ...]


def choose(
    name: str,
    quick: bool,
    short: bool,
    seeds: int | None,
    tasks: tuple[str, ...],
    methods: tuple[str, ...],
) -> Choice:
    """What is made of a figure, by default all of it. Raises: ValueError for what cannot be."""
    figure = FIGURES[name]
    if quick and short:
        raise ValueError("--quick must be left out with --short")
    if seeds is not None and seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {seeds}")
    unknown = [method for method in methods if method not in figure.methods]
    if unknown:
        known = ", ".join(figure.methods)
        raise ValueError(f"--methods must be of {known}, got {', '.join(unknown)}")
    if figure.tasks == CONTINUAL and tasks not in ((), CONTINUAL):
        raise ValueError(f"--tasks must be left out with {name}, a sequence of tasks")
    default_tasks = figure.tasks
    if quick:
        length = "quick"
        seeds = seeds or figure.quick_seeds
        default_tasks = figure.tasks[: figure.quick_tasks]
    else:
        length = "short" if short else "full"
    return Choice(length, seeds or SEEDS, tasks or default_tasks, methods or figure.methods)
