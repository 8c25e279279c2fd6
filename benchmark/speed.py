"""Speed and memory of NE-TD3, measured beside its peers in one run on one machine.

Run:   python benchmark/speed.py compare        steps per second and memory, ours and the peers' in turn; the ceilings
       python benchmark/speed.py baselines      what each rival of NE costs against plain TD3
       python benchmark/speed.py whole-run      what NE costs against dense TD3, all intervals at their defaults
       python benchmark/speed.py scaling        steps per second against width, batch and task; time of a round
       python benchmark/speed.py side-by-side   throughput of several runs at once against one alone
       python benchmark/speed.py memory         peak memory against buffer and libraries

Every contender is a real training in a process of its own that stops after each chunk of environment steps until it is
its turn again (paced.py). So a machine that is slower for a minute is so for all, and the ratios hold.
"""

import csv
import json
import multiprocessing
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NoReturn

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ne_td3_continuous as ne  # noqa: E402

RANDOM_STEPS = 1_000  # of each contender, before its first update
PEERS = {  # name: packages of its environment, arguments of peer.py
    "Stable-Baselines3": (["stable-baselines3"], "sb3"),
    "SBX": (["sbx-rl"], "sbx"),
}


def die(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@dataclass
class Setting:
    """What all contenders of a comparison share."""

    env_id: str = "HalfCheetah-v5"  # Gymnasium task
    widths: tuple[int, ...] = (256, 256)  # hidden layers of actor and critics
    batch_size: int = 256  # transitions per update
    threads: int = 1  # CPU threads, and cores, of each contender
    cuda: bool = False  # train on the GPU


def environment(threads: int) -> dict[str, str]:
    """Environment variables that hold every numerical library to so many threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    xla = f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'} intra_op_parallelism_threads={threads}"
    return {**os.environ, **dict.fromkeys(names, str(threads)), "XLA_FLAGS": xla, "MUJOCO_GL": "disable"}


# --- contenders ------------------------------------------------------------------------------------------------------
NE, RIVALS = "ne_td3_continuous.py", "baselines/td3_continuous.py"


def ours(setting: Setting, *flags: str, script: str = NE) -> list[str]:
    """The command of a script of ours, without evaluations; NE with ten times as many topology rounds as by default."""
    widths = [str(width) for width in setting.widths]
    command = [sys.executable, str(ROOT / script), "--env-id", setting.env_id]
    command += ["--actor-hidden", *widths, "--critic-hidden", *widths, "--batch-size", str(setting.batch_size)]
    command += ["--torch-threads", str(setting.threads), "--learning-starts", str(RANDOM_STEPS)]
    command += ["--eval-frequency", "1000000", *(["--grow-interval", "1000"] if script == NE else [])]
    return [*command, *([] if setting.cuda else ["--no-cuda"]), *flags]


DENSE = ("--initial-density", "1", "--review-floor", "1")


def peer(name: str, setting: Setting) -> list[str]:
    """The command of a peer; its environment is made at the first use."""
    packages, library = PEERS[name]
    folder = ROOT / "benchmark" / f".venv-{library}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"installing {name} into {folder.relative_to(ROOT)}", flush=True)
        pins = ROOT / "benchmark" / "requirements.txt"
        try:
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", pins]
            subprocess.run([*install, "torch", "gymnasium[mujoco]", *packages], check=True)
        except (OSError, subprocess.CalledProcessError) as e:
            die(f"cannot install {name}: {e}; leave it out with --peers")
        (folder / "complete").touch()
    device = "cuda" if setting.cuda else "cpu"
    numbers = [1_000_000, RANDOM_STEPS, setting.batch_size]
    script = str(ROOT / "benchmark" / "peer.py")
    return [str(python), script, library, setting.env_id, *map(str, numbers), device, *map(str, setting.widths)]


class Contender:
    """A training behind the gate of paced.py. `command` is [python, script, arguments ...]."""

    def __init__(self, name: str, command: list[str], chunk: int, cores: set[int]):
        self.name, self.chunk, self.turns = name, chunk, []
        read, write = os.pipe()
        self.folder = tempfile.TemporaryDirectory()  # runs/ and error messages go there
        self.errors = open(Path(self.folder.name) / "stderr", "w+")
        python, *script = command
        self.process = subprocess.Popen(
            [python, str(ROOT / "benchmark" / "paced.py"), str(chunk), *script],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            pass_fds=[write],
            env={**environment(len(cores)), "SPEED_REPORT": str(write)},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
            cwd=self.folder.name,
        )
        os.close(write)
        self.reports = os.fdopen(read)

    def go(self) -> None:
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def wait(self) -> dict:
        """What the last chunk took. Raises: SystemExit if the process ended instead."""
        line = self.reports.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            last = [text for text in self.errors.read().splitlines() if text.strip()] or ["it said nothing"]
            die(f"{self.name} ended with exit code {self.process.returncode}: {last[-1]}")
        return json.loads(line)

    def turn(self) -> dict:
        self.go()
        return self.wait()

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()
        self.folder.cleanup()

    def rates(self) -> list[float]:
        return [self.chunk / turn["seconds"] for turn in self.turns]


def warm_up(contenders: list[Contender]) -> None:
    """Past the first updates of each, and past what it compiles."""
    for contender in contenders:
        report = contender.wait()
        while report["steps"] < RANDOM_STEPS + 3 * contender.chunk:
            report = contender.turn()


def take_turns(contenders: list[Contender], turns: int) -> None:
    for _ in tqdm(range(turns), unit=" turns", disable=None):
        for contender in contenders:
            contender.turns.append(contender.turn())
    for contender in contenders:
        contender.close()


def cores(threads: int) -> set[int]:
    """The cores of a contender: the first ones this process may use."""
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(allowed):
        die(f"--threads must be 1 to {len(allowed)}, the cores of this machine, got {threads}")
    return set(allowed[:threads])


# --- output ----------------------------------------------------------------------------------------------------------
def write_csv(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {file}")


def print_table(rows: list[dict]) -> None:
    widths = {key: max(len(str(row[key])) for row in [*rows, {key: key}]) for key in rows[0]}
    for row in [{key: key for key in widths}, *rows]:
        print("  ".join(f"{row[key]!s:>{width}}" for key, width in widths.items()))


def turns_of(contenders: list[Contender], **columns) -> list[dict]:
    return [
        {"contender": c.name, **columns, "turn": n, "steps_per_second": f"{c.chunk / turn['seconds']:.2f}"}
        | {"cpu_seconds": f"{turn['cpu_seconds']:.4f}", "peak_rss_mib": f"{turn['rss_mib']:.0f}"}
        for c in contenders
        for n, turn in enumerate(c.turns, 1)
    ]


def draw_bars(contenders: list[Contender], file: Path, title: str) -> None:
    """Median steps per second of each contender, with the middle half of its turns."""
    figure = Figure(figsize=(7, 0.5 * len(contenders) + 1.2), layout="constrained")
    ax = figure.subplots()
    for y, contender in enumerate(reversed(contenders)):
        low, middle, high = np.percentile(contender.rates(), [25, 50, 75])
        colour = "#999999" if contender.name in PEERS else "#0072B2"
        ax.barh(y, middle, color=colour, xerr=[[middle - low], [high - middle]], error_kw={"capsize": 3})
        ax.annotate(f"{middle:.0f}", (high, y), xytext=(5, 0), textcoords="offset points", va="center")
    ax.set_yticks(range(len(contenders)), [contender.name for contender in reversed(contenders)])
    ax.set_xlabel("environment steps per second (median and middle half of the turns)")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title)
    ax.margins(x=0.1)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    print(f"wrote {file}")


# --- ceilings --------------------------------------------------------------------------------------------------------
def best_seconds(function, repeats: int = 7) -> float:
    """The fastest of so many loops of at least 0.1 s, per call."""
    loops, best = 1, float("inf")
    while repeats:
        start = time.perf_counter()
        for _ in range(loops):
            function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took = time.perf_counter() - start
        if took < 0.1:
            loops *= 2
        else:
            best, repeats = min(best, took / loops), repeats - 1
    return best


def make_agent(setting: Setting) -> tuple[ne.Agent, ne.ReplayBuffer]:
    """Our agent with a buffer of random numbers."""
    device = torch.device("cuda" if setting.cuda else "cpu")
    env = ne.make_env(setting.env_id)
    n_obs, n_act = env.observation_space.shape[0], env.action_space.shape[0]
    args = ne.Args(actor_hidden=setting.widths, critic_hidden=setting.widths, batch_size=setting.batch_size)
    buffer = ne.ReplayBuffer(10_000, n_obs, n_act, args.batch_size, 0, device)
    buffer.data.normal_()
    buffer.size = buffer.capacity
    return ne.Agent(args, n_obs, n_act, 0, device), buffer


def ceilings(setting: Setting) -> list[dict]:
    """What no training can exceed: matrix products against the work of an update, and the simulator alone."""
    torch.set_num_threads(setting.threads)
    agent, buffer = make_agent(setting)
    batch, device = buffer.sample(), buffer.data.device
    operations = {}
    for name, update in (("critic", agent.update_critic), ("actor", agent.update_actor)):
        with FlopCounterMode(display=False) as counter:
            update(batch)
        operations[name] = counter.get_total_flops()
    per_step = operations["critic"] + operations["actor"] / agent.args.policy_frequency
    rates = {}
    for rows, width in ((2048, 2048), (setting.batch_size, max(setting.widths))):
        a, b = torch.randn(rows, width, device=device), torch.randn(width, width, device=device)
        rates[rows, width] = 2 * rows * width**2 / best_seconds(lambda a=a, b=b: a @ b)
    peak = max(rates.values())
    env = ne.make_env(setting.env_id)
    env.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (1000, env.action_space.shape[0])).astype(np.float32)

    def simulate() -> None:
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()

    products = [
        {"ceiling": f"matrix product {n} x {w} x {w}", "value": f"{rate / 1e9:.1f}", "unit": "GFLOP/s"}
        for (n, w), rate in rates.items()
    ]
    return [
        *products,
        {"ceiling": "matrix products of one environment step", "value": f"{per_step / 1e6:.1f}", "unit": "MFLOP"},
        {"ceiling": "updates at the faster rate", "value": f"{peak / per_step:.0f}", "unit": "steps/s"},
        {"ceiling": "simulator alone", "value": f"{1000 / best_seconds(simulate, 3):.0f}", "unit": "steps/s"},
    ]


# --- commands --------------------------------------------------------------------------------------------------------
def all_commands(setting: Setting, peers: tuple[str, ...], others: tuple[str, ...]) -> dict[str, list[str]]:
    """{contender: [python, script, arguments ...]}. Raises: SystemExit for a peer or a command that cannot be."""
    flags = {"NE-TD3, compiled": ["--compile"], "NE-TD3": [], "TD3 (ours, dense), compiled": ["--compile", *DENSE]}
    commands = {name: ours(setting, *extra) for name, extra in (flags | {"TD3 (ours, dense)": DENSE}).items()}
    if setting.cuda:
        commands["NE-TD3, without CUDA graphs"] = ours(setting, "--no-cudagraphs")
    for name in peers:
        if name not in PEERS:
            die(f"--peers must be from {', '.join(PEERS)}, got {name}")
        commands[name] = peer(name, setting)
    for text in others:
        label, _, line = text.partition("=")
        if len(shlex.split(line)) < 2:
            die(f"--command must be LABEL=PYTHON SCRIPT [ARGS...], got {text}")
        python, script, *rest = shlex.split(line)
        commands[label] = [python, str(Path(script).resolve()), *rest]
    return commands


def rival_commands(setting: Setting, injection_step: int, compiled: bool) -> dict[str, list[str]]:
    """{contender: [python, script, arguments ...]}: TD3, NE, and each rival."""
    rivals = {"TD3": "none", "Reset": "reset --reset-interval 1000", "ReDo": "redo --redo-interval 100"}
    rivals |= {"LayerNorm": "layer-norm", "Plasticity Injection": f"injection --injection-step {injection_step}"}
    rivals |= {"recency-weighted replay": "recency"}
    extra = ["--compile"] * compiled
    lines = {name: ours(setting, "--method", *line.split(), *extra, script=RIVALS) for name, line in rivals.items()}
    return lines | {"NE-TD3": ours(setting, *extra)}


def fastest_peer(contenders: list[Contender]) -> Contender:
    peers = [c for c in contenders if c.name in PEERS]
    return max(peers or contenders, key=lambda c: median(c.rates()))


def print_ratios(contenders: list[Contender], reference: Contender) -> None:
    """Medians, and the ratios to the reference: medians over pairs of neighbouring turns."""
    table = []
    for c in contenders:
        ratio = median(a / b for a, b in zip(c.rates(), reference.rates(), strict=True))
        row = {"contender": c.name, "steps/s": f"{median(c.rates()):.1f}", f"against {reference.name}": f"{ratio:.2f}"}
        table.append(row | {"peak MiB": f"{max(turn['rss_mib'] for turn in c.turns):.0f}"})
    print_table(table)


def compare(
    setting: Setting = Setting(),  # noqa: B008
    peers: tuple[str, ...] = tuple(PEERS),
    command: tuple[str, ...] = (),
    chunk: int = 100,
    turns: int = 30,
    out: Path = ROOT / "results",
    figure: Path = ROOT / "docs" / "speed.png",
) -> None:
    """Environment steps per second with updates, and peak memory, of ours and the peers in turn.

    Args:
        setting: the same for all
        peers: which of them take part; their environments are made at the first use
        command: LABEL=PYTHON SCRIPT [ARGS...], another contender; its first update must come within 1,000 steps
        chunk: environment steps of a turn
        turns: turns of each contender
        out: folder of the CSVs
        figure: where the bar chart goes
    """
    commands = all_commands(setting, peers, command)
    contenders = [Contender(name, line, chunk, cores(setting.threads)) for name, line in commands.items()]
    warm_up(contenders)
    take_turns(contenders, turns)
    print_ratios(contenders, fastest_peer(contenders))
    limits = ceilings(setting)
    print_table(limits)
    write_csv(out / "speed_compare.csv", turns_of(contenders))
    write_csv(out / "speed_ceilings.csv", limits)
    shape = f"{'-'.join(map(str, setting.widths))}, batch {setting.batch_size}, {setting.threads} thread"
    draw_bars(contenders, figure, f"{setting.env_id}, {shape}{'s' * (setting.threads > 1)}")


def baselines(
    setting: Setting = Setting(widths=(256, 128)),  # noqa: B008
    chunk: int = 100,
    turns: int = 20,
    compiled: bool = True,
    out: Path = ROOT / "results",
) -> None:
    """What NE and each rival cost against plain TD3, in turn. Events come more often than by default.

    Args:
        setting: the same for all
        chunk: environment steps of a turn
        turns: turns of each contender
        compiled: all with --compile
        out: folder of the CSV
    """
    commands = rival_commands(setting, RANDOM_STEPS + chunk, compiled)
    contenders = [Contender(name, line, chunk, cores(setting.threads)) for name, line in commands.items()]
    warm_up(contenders)
    take_turns(contenders, turns)
    print_ratios(contenders, contenders[0])
    write_csv(out / "speed_baselines.csv", turns_of(contenders))


def whole_run(steps: int = 100_000, chunk: int = 1_000, compiled: bool = True, out: Path = ROOT / "results") -> None:
    """NE against dense TD3 over whole runs, in turn: rounds, reviews, evaluations, logging, checkpoints as by default.

    Args:
        steps: length of each run in environment steps
        chunk: environment steps of a turn
        compiled: both with --compile
        out: folder of the CSV
    """
    command = [sys.executable, str(ROOT / "ne_td3_continuous.py"), "--total-timesteps", str(steps + 1), "--no-cuda"]
    command += ["--compile"] * compiled
    runs = {"NE-TD3": command, "TD3 (ours, dense)": [*command, *DENSE]}
    contenders = [Contender(name, line, chunk, cores(1)) for name, line in runs.items()]
    for contender in contenders:
        contender.wait()
    take_turns(contenders, steps // chunk)
    seconds = {c.name: sum(turn["seconds"] for turn in c.turns) for c in contenders}
    print_table([{"run": name, "seconds": f"{s:.0f}", "steps/s": f"{steps / s:.1f}"} for name, s in seconds.items()])
    ours_, dense = seconds.values()
    middle = median(a / b for a, b in zip(*[contender.rates() for contender in contenders], strict=True))
    print(f"NE runs at {dense / ours_:.3f} of the speed of dense TD3 over the whole run (median turn: {middle:.3f})")
    write_csv(out / "speed_whole_run.csv", turns_of(contenders))


def scaling(chunk: int = 50, turns: int = 12, compiled: bool = True, out: Path = ROOT / "results") -> None:
    """Steps per second of NE-TD3 against width, batch and task, one changed at a time; time of one topology round.

    Args:
        chunk: environment steps of a turn
        turns: turns of each setting
        compiled: with --compile
        out: folder of the CSVs
    """
    settings = [Setting(widths=(width, width)) for width in (128, 256, 512, 1024)]
    settings += [Setting(batch_size=batch) for batch in (64, 1024)]
    settings += [Setting(env_id=env_id) for env_id in ("Ant-v5", "Humanoid-v5")]
    rows = []
    contenders = [
        Contender(f"{s.env_id} {s.widths[0]} {s.batch_size}", ours(s, *["--compile"] * compiled), chunk, cores(1))
        for s in settings
    ]
    warm_up(contenders)
    take_turns(contenders, turns)
    for setting, contender in zip(settings, contenders, strict=True):
        limit = {row["ceiling"]: row["value"] for row in ceilings(setting)}
        row = {"task": setting.env_id, "width": setting.widths[0], "batch": setting.batch_size}
        row |= {"steps/s": f"{median(contender.rates()):.1f}"}
        row["MFLOP per step"] = limit["matrix products of one environment step"]
        row["GFLOP/s reached"] = f"{float(row['MFLOP per step']) * median(contender.rates()) / 1e3:.1f}"
        rows.append(row | {"peak MiB": f"{max(turn['rss_mib'] for turn in contender.turns):.0f}"})
    print_table(rows)
    write_csv(out / "speed_scaling.csv", rows)
    rounds = [time_of_round(width) for width in (128, 256, 512, 1024, 2048)]
    print_table(rounds)
    write_csv(out / "speed_round.csv", rounds)


def time_of_round(width: int) -> dict:
    """One topology round of all networks at 25% density, without resets: milliseconds, and per million weights."""
    agent, buffer = make_agent(Setting(widths=(width, width)))
    weights = sum(layer.weight.numel() for layer in agent.online_layers)
    batch = buffer.sample()
    seconds = best_seconds(lambda: ne.topology_round(agent, batch, 500_000, 0.0), 5)
    grown = best_seconds(lambda: ne.topology_round(agent, batch, 500_000, 0.001), 5)
    row = {"width": width, "weights": weights, "without growth, ms": f"{seconds * 1e3:.1f}"}
    return row | {"whole round, ms": f"{grown * 1e3:.1f}", "ms per million weights": f"{grown * 1e9 / weights:.1f}"}


def side_by_side(
    runs: int = 2, chunk: int = 100, turns: int = 20, compiled: bool = True, out: Path = ROOT / "results"
) -> None:
    """Throughput of so many runs at once, one core each, against one run alone, in turn.

    Args:
        runs: how many
        chunk: environment steps of a turn
        turns: turns alone, and turns together
        compiled: with --compile
        out: folder of the CSV
    """
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 < runs <= len(allowed):
        die(f"--runs must be 2 to {len(allowed)}, the cores of this machine, got {runs}")
    line = ours(Setting(), *["--compile"] * compiled)
    contenders = [Contender(f"run {n + 1}", line, chunk, {allowed[n]}) for n in range(runs)]
    warm_up(contenders)
    rows = []
    for n in tqdm(range(turns), unit=" turns", disable=None):
        alone = contenders[n % runs].turn()
        for contender in contenders:
            contender.go()
        together = [contender.wait() for contender in contenders]
        rate = sum(chunk / report["seconds"] for report in together)
        rows.append({"turn": n + 1, "alone": f"{chunk / alone['seconds']:.2f}", "together": f"{rate:.2f}"})
    for contender in contenders:
        contender.close()
    alone, together = (median(float(row[key]) for row in rows) for key in ("alone", "together"))
    ratio = median(float(row["together"]) / float(row["alone"]) for row in rows)
    print(f"one run alone {alone:.1f} steps/s, {runs} runs {together:.1f} steps/s in all: {ratio:.2f} times as many")
    write_csv(out / "speed_side_by_side.csv", rows)


def peak_after(transitions: int, results) -> None:
    """In a process of its own: fills a buffer, updates, writes a checkpoint; reports the peak memory in MiB."""
    setting = Setting(env_id="Humanoid-v5", widths=(256, 128))
    agent, small = make_agent(setting)
    n_obs, n_act = small.batch.obs.shape[1], small.batch.noise.shape[1]
    buffer = ne.ReplayBuffer(max(transitions, 256), n_obs, n_act, setting.batch_size, 0, torch.device("cpu"))
    for start in range(0, buffer.capacity, 1000):
        buffer.data[start : start + 1000].normal_()
    buffer.size = buffer.capacity
    for _ in range(20):
        agent.update_critic(buffer.sample())
        agent.update_actor(buffer.sample())
    with tempfile.TemporaryDirectory() as folder:
        ne.save_checkpoint(Path(folder) / "checkpoint.pt", {"agent": agent.state_dict(), "buffer": buffer.state_dict()})
    results.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, buffer.data.nbytes / 2**20))


def memory(transitions: int = 500_000, out: Path = ROOT / "results") -> None:
    """Peak memory with a full buffer and a checkpoint written, against the buffer plus the same without it (Humanoid).

    Args:
        transitions: capacity of the buffer, all of it filled
        out: folder of the CSV
    """
    context = multiprocessing.get_context("spawn")
    peaks = []
    for size in (0, transitions):
        results = context.Queue()
        process = context.Process(target=peak_after, args=(size, results))
        process.start()
        peaks.append(results.get())
        process.join()
    (base, _), (peak, buffer) = peaks
    ratio = peak / (base + buffer)
    print(f"libraries and agent {base:.0f} MiB, buffer {buffer:.0f} MiB, peak {peak:.0f} MiB: {ratio:.2f} of their sum")
    row = {"transitions": transitions, "libraries_mib": f"{base:.0f}", "buffer_mib": f"{buffer:.0f}"}
    write_csv(out / "speed_memory.csv", [row | {"peak_mib": f"{peak:.0f}", "ratio": f"{ratio:.3f}"}])


if __name__ == "__main__":
    commands = {"compare": compare, "baselines": baselines, "whole-run": whole_run, "scaling": scaling}
    tyro.extras.subcommand_cli_from_dict(commands | {"side-by-side": side_by_side, "memory": memory})
