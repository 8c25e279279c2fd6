"""Speed and memory of NE-TD3, measured beside its peers in one run on one machine.

Run:   python benchmark/speed.py compare    steps per second, ours and the peers' in turn; ceilings
       python benchmark/speed.py memory     peak memory against buffer and libraries
       python benchmark/speed.py round      the time of a topology round against width

Every contender of `compare` is a real training in a process of its own that stops after each chunk
of environment steps until it is its turn again (paced.py). So a machine that is slower for a
minute is so for all, and the ratios hold.
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
from dataclasses import dataclass, replace
from pathlib import Path
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

OUT = ROOT / "runs" / "speed"
RANDOM_STEPS = 1_000  # of each contender, before its first update
PEERS = {  # name: package, and the name of its environment and in peer.py
    "Stable-Baselines3": ("stable-baselines3", "sb3"),
    "SBX": ("sbx-rl", "sbx"),
}


def die(message: str, code: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


@dataclass
class Setting:
    """What all contenders of a comparison share."""

    env_id: str = "HalfCheetah-v5"
    """Gymnasium task"""
    widths: tuple[int, ...] = (256, 256)
    """hidden layers of actor and critics"""
    batch_size: int = 256
    """transitions per update"""
    threads: int = 1
    """CPU threads, and cores, of each contender"""
    cuda: bool = False
    """train on the GPU"""


# --- contenders ---------------------------------------------------------------
def environment(threads: int) -> dict[str, str]:
    """Environment variables that hold every numerical library to so many threads."""
    variables = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        variables[name] = str(threads)
    several = "true" if threads > 1 else "false"
    xla = f"--xla_cpu_multi_thread_eigen={several} intra_op_parallelism_threads={threads}"
    variables["XLA_FLAGS"] = xla
    variables["MUJOCO_GL"] = "disable"
    return variables


def cores(threads: int) -> set[int]:
    """The cores of a contender: the first ones this process may use."""
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(allowed):
        die(f"--threads must be 1 to {len(allowed)}, the cores of this machine, got {threads}")
    return set(allowed[:threads])


def ours(setting: Setting, *flags: str) -> list[str]:
    """The command of our script, without evaluations and with ten times as many rounds."""
    widths = [str(width) for width in setting.widths]
    command = [sys.executable, str(ROOT / "ne_td3_continuous.py"), "--env-id", setting.env_id]
    command += ["--actor-hidden", *widths, "--critic-hidden", *widths]
    command += ["--batch-size", str(setting.batch_size)]
    command += ["--torch-threads", str(setting.threads)]
    command += ["--learning-starts", str(RANDOM_STEPS)]
    command += ["--eval-frequency", "1000000", "--grow-interval", "1000"]
    if not setting.cuda:
        command.append("--no-cuda")
    return [*command, *flags]


def peer(name: str, setting: Setting) -> list[str]:
    """The command of a peer; its environment is made at the first use."""
    package, library = PEERS[name]
    folder = ROOT / "benchmark" / f".venv-{library}"
    if not (folder / "complete").exists():
        install(name, package, folder)
    command = [str(folder / "bin" / "python"), str(ROOT / "benchmark" / "peer.py")]
    command += [library, setting.env_id, "1000000", str(RANDOM_STEPS), str(setting.batch_size)]
    command.append("cuda" if setting.cuda else "cpu")
    return [*command, *map(str, setting.widths)]


def install(name: str, package: str, folder: Path) -> None:
    """Raises: SystemExit(2)."""
    print(f"installing {name} into {folder.relative_to(ROOT)}", flush=True)
    pins = ROOT / "benchmark" / "requirements.txt"
    pip = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([*pip, "-c", pins, "torch", "gymnasium[mujoco]", package], check=True)
    except (OSError, subprocess.CalledProcessError) as e:
        die(f"cannot install {name}: {e}; leave it out with --peers")
    (folder / "complete").touch()


class Contender:
    """A training behind the gate of paced.py. `command` is [python, script, arguments ...]."""

    def __init__(self, name: str, command: list[str], chunk: int, cores: set[int]):
        self.name = name
        self.chunk = chunk
        self.turns: list[dict] = []
        self.folder = tempfile.TemporaryDirectory()  # runs/ and error messages go there
        self.errors = open(Path(self.folder.name) / "stderr", "w+")
        python, *script = command
        read, write = os.pipe()
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

    def wait(self) -> dict:
        """What the last chunk took. Raises: SystemExit if the process ended instead."""
        line = self.reports.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            said = [text for text in self.errors.read().splitlines() if text.strip()]
            last = said[-1] if said else "it said nothing"
            die(f"{self.name} ended with exit code {self.process.returncode}: {last}")
        return json.loads(line)

    def turn(self) -> dict:
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
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

    def rates(self) -> np.ndarray:
        """Environment steps per second, (turns,)."""
        return np.array([self.chunk / turn["seconds"] for turn in self.turns])


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


# --- output -------------------------------------------------------------------
def write_csv(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {file}")


def print_table(rows: list[dict]) -> None:
    head = {key: key for key in rows[0]}
    widths = {}
    for key in head:
        widths[key] = max(len(str(row[key])) for row in [head, *rows])
    for row in [head, *rows]:
        print("  ".join(f"{row[key]!s:>{width}}" for key, width in widths.items()))


def turns_of(contenders: list[Contender]) -> list[dict]:
    rows = []
    for contender in contenders:
        for n, turn in enumerate(contender.turns, 1):
            row = {"contender": contender.name, "turn": n}
            row["steps_per_second"] = f"{contender.chunk / turn['seconds']:.2f}"
            row["cpu_seconds"] = f"{turn['cpu_seconds']:.4f}"
            row["peak_rss_mib"] = f"{turn['rss_mib']:.0f}"
            rows.append(row)
    return rows


def draw_bars(contenders: list[Contender], file: Path, title: str) -> None:
    """Median steps per second of each contender, with the middle half of its turns."""
    figure = Figure(figsize=(7, 0.5 * len(contenders) + 1.2), layout="constrained")
    ax = figure.subplots()
    upwards = contenders[::-1]
    for y, contender in enumerate(upwards):
        low, middle, high = np.percentile(contender.rates(), [25, 50, 75])
        colour = "#999999" if contender.name in PEERS else "#0072B2"
        spread = [[middle - low], [high - middle]]
        ax.barh(y, middle, color=colour, xerr=spread, error_kw={"capsize": 3})
        style = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        ax.annotate(f"{middle:.0f}", (high, y), **style)
    ax.set_yticks(range(len(upwards)), [contender.name for contender in upwards])
    ax.set_xlabel("environment steps per second (median and middle half of the turns)")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title)
    ax.margins(x=0.1)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    print(f"wrote {file}")


# --- our agent, without an environment ----------------------------------------
def sizes_of(env_id: str) -> tuple[int, int]:
    """Observations and actions of a task."""
    env = ne.make_env(env_id, 1_000)
    return env.observation_space.shape[0], env.action_space.shape[0]


def make_agent(setting: Setting, transitions: int = 10_000) -> tuple:
    """Arguments, our agent, and a buffer full of random numbers."""
    device = torch.device("cuda" if setting.cuda else "cpu")
    n_obs, n_act = sizes_of(setting.env_id)
    args = ne.Args(
        actor_hidden=setting.widths,
        critic_hidden=setting.widths,
        batch_size=setting.batch_size,
    )
    ne.scale_to_run(args)
    agent = ne.Agent(args, n_obs, n_act, 0, device)
    buffer = ne.ReplayBuffer(transitions, n_obs, n_act, 0, device)
    for rows in buffer.data.split(1_000):
        rows.normal_()
    buffer.size = transitions
    return args, agent, buffer


def best_seconds(function, repeats: int = 7) -> float:
    """The fastest of so many loops of at least 0.1 s, per call."""
    loops = 1
    best = float("inf")
    while repeats > 0:
        start = time.perf_counter()
        for _ in range(loops):
            function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if seconds < 0.1:
            loops *= 2
        else:
            best = min(best, seconds / loops)
            repeats -= 1
    return best


# --- ceilings -----------------------------------------------------------------
def operations(update, batch) -> int:
    """Floating-point operations of the matrix products of an update."""
    with FlopCounterMode(display=False) as counter:
        update(batch)
    return counter.get_total_flops()


def product_rate(rows: int, width: int, device: torch.device) -> float:
    """Operations per second of a matrix product (rows, width) x (width, width)."""
    a = torch.randn(rows, width, device=device)
    b = torch.randn(width, width, device=device)
    return 2 * rows * width**2 / best_seconds(lambda: a @ b)


def simulator_rate(env_id: str) -> float:
    """Steps per second of the task alone, with random actions."""
    env = ne.make_env(env_id, 1_000)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (1000, env.action_space.shape[0])).astype(np.float32)

    def simulate() -> None:
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()

    return len(actions) / best_seconds(simulate, 3)


def ceilings(setting: Setting) -> list[dict]:
    """What no training can exceed: the matrix products of its updates, the simulator alone."""
    torch.set_num_threads(setting.threads)
    args, agent, buffer = make_agent(setting)
    batch = buffer.new_batch(setting.batch_size)
    buffer.sample(batch)
    critic = operations(agent.update_critic, batch)
    actor = operations(agent.update_actor, batch)
    per_step = critic + actor / args.policy_frequency
    rows = []
    rates = []
    for n, width in ((2048, 2048), (setting.batch_size, max(setting.widths))):
        rate = product_rate(n, width, buffer.data.device)
        rates.append(rate)
        rows.append((f"matrix product {n} x {width} x {width}", f"{rate / 1e9:.1f}", "GFLOP/s"))
    rows.append(("matrix products of one environment step", f"{per_step / 1e6:.1f}", "MFLOP"))
    rows.append(("updates at the faster rate", f"{max(rates) / per_step:.0f}", "steps/s"))
    rows.append(("simulator alone", f"{simulator_rate(setting.env_id):.0f}", "steps/s"))
    return [dict(zip(("ceiling", "value", "unit"), row, strict=True)) for row in rows]


# --- commands -----------------------------------------------------------------
def all_commands(
    setting: Setting, peers: tuple, others: tuple, compiled: bool
) -> dict[str, list[str]]:
    """{contender: [python, script, arguments ...]}. Raises: SystemExit(2) for what cannot be."""
    dense = ["--initial-density", "1", "--review-floor", "1"]
    commands = {}
    for name, flags in (("NE-TD3", []), ("TD3 (ours, dense)", dense)):
        if compiled:
            commands[f"{name}, compiled"] = ours(setting, "--compile", *flags)
        commands[name] = ours(setting, *flags)
    if setting.cuda:
        commands["NE-TD3, without CUDA graphs"] = ours(setting, "--no-cudagraphs")
    for name in peers:
        if name not in PEERS:
            die(f"--peers must be from {', '.join(PEERS)}, got {name}")
        commands[name] = peer(name, setting)
    for text in others:
        label, _, line = text.partition("=")
        words = shlex.split(line)
        if len(words) < 2:
            die(f"--command must be LABEL=PYTHON SCRIPT [ARGS...], got {text}")
        python, script, *arguments = words
        commands[label] = [python, str(Path(script).resolve()), *arguments]
    return commands


def fastest_peer(contenders: list[Contender]) -> Contender:
    peers = [contender for contender in contenders if contender.name in PEERS]
    return max(peers or contenders, key=lambda contender: np.median(contender.rates()))


def print_ratios(contenders: list[Contender], reference: Contender) -> None:
    """Medians, and ratios to the reference: median and middle half over pairs of turns."""
    table = []
    for contender in contenders:
        ratios = contender.rates() / reference.rates()
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        row = {"contender": contender.name}
        row["steps/s"] = f"{np.median(contender.rates()):.1f}"
        row[f"against {reference.name}"] = f"{middle:.2f} ({low:.2f}-{high:.2f})"
        row["peak MiB"] = f"{max(turn['rss_mib'] for turn in contender.turns):.0f}"
        table.append(row)
    print_table(table)


def compare(
    setting: Setting = Setting(),  # noqa: B008
    peers: tuple[str, ...] = tuple(PEERS),
    command: tuple[str, ...] = (),
    compiled: bool = True,
    chunk: int = 100,
    turns: int = 30,
    out: Path = OUT,
) -> None:
    """Environment steps per second with updates, and peak memory, ours and the peers in turn.

    Args:
        setting: the same for all
        peers: which of them take part; their environments are made at the first use
        command: LABEL=PYTHON SCRIPT [ARGS...], another contender; its first update must come
            within 1,000 steps
        compiled: ours with --compile, too
        chunk: environment steps of a turn
        turns: turns of each contender
        out: folder of the CSVs and the bar chart
    """
    if setting.cuda and not torch.cuda.is_available():
        die("--setting.cuda needs a GPU that torch can use, and there is none")
    commands = all_commands(setting, peers, command, compiled)
    allowed = cores(setting.threads)
    contenders = []
    for name, line in commands.items():
        contenders.append(Contender(name, line, chunk, allowed))
    warm_up(contenders)
    take_turns(contenders, turns)
    print_ratios(contenders, fastest_peer(contenders))
    write_csv(out / "speed_compare.csv", turns_of(contenders))
    limits = ceilings(setting)
    print_table(limits)
    write_csv(out / "speed_ceilings.csv", limits)
    widths = "-".join(map(str, setting.widths))
    threads = "1 thread" if setting.threads == 1 else f"{setting.threads} threads"
    title = f"{setting.env_id}, {widths}, batch {setting.batch_size}, {threads}"
    draw_bars(contenders, out / "speed.png", title)


def time_of_round(width: int) -> dict:
    """One round of all networks, without resets: milliseconds, and per million weights."""
    args, agent, buffer = make_agent(Setting(widths=(width, width)))
    batch = buffer.new_batch(args.batch_size)
    buffer.sample(batch)
    progress = ne.Progress.of(agent)
    growing = replace(args, prune=False, grow_rate=0.002)  # small: it grows over and over
    still = replace(growing, growth="none")
    step = args.total_timesteps // 2
    seconds = {}
    for name, changed in (("without growth", still), ("whole", growing)):

        def one_round(changed=changed) -> None:
            ne.topology_round(changed, agent, batch, progress, step)

        seconds[name] = best_seconds(one_round, 5)
    weights = 0
    for network in agent.networks.values():
        weights += sum(layer.weight.numel() for layer in network.layers)
    row = {"width": width, "weights": weights}
    row["without growth, ms"] = f"{seconds['without growth'] * 1e3:.1f}"
    row["whole round, ms"] = f"{seconds['whole'] * 1e3:.1f}"
    row["ms per million weights"] = f"{seconds['whole'] * 1e9 / weights:.1f}"
    return row


def rounds(widths: tuple[int, ...] = (128, 256, 512, 1024, 2048), out: Path = OUT) -> None:
    """The time of one topology round of actor and critics at 25% density.

    Args:
        widths: of both hidden layers
        out: folder of the CSV
    """
    torch.set_num_threads(1)
    rows = [time_of_round(width) for width in widths]
    print_table(rows)
    write_csv(out / "speed_round.csv", rows)


def peak_after(transitions: int, results) -> None:
    """In a process of its own: updates, then a checkpoint; sends (peak, buffer) in MiB."""
    torch.set_num_threads(1)
    setting = Setting(env_id="Humanoid-v5", widths=(256, 128))
    args, agent, buffer = make_agent(setting, transitions)
    batch = buffer.new_batch(args.batch_size)
    for _ in range(20):
        buffer.sample(batch)
        agent.update_critic(batch)
        agent.update_actor(batch)
    with tempfile.TemporaryDirectory() as folder:
        parts = {"agent": agent.state_dict(), "buffer": buffer.state_dict()}
        torch.save(parts, Path(folder) / "checkpoint.pt")  # as `Run.save` does
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results.send((peak, buffer.data.nbytes / 2**20))


def memory(transitions: int = 500_000, out: Path = OUT) -> None:
    """Peak memory with a full buffer and a checkpoint, against the same plus the buffer (Humanoid).

    Args:
        transitions: capacity of the buffer, all of it filled
        out: folder of the CSV
    """
    if transitions < 256:
        die(f"--transitions must be at least 256, a batch, got {transitions}")
    context = multiprocessing.get_context("spawn")
    measured = []
    for size in (256, transitions):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=peak_after, args=(size, sender))
        process.start()
        sender.close()  # so that the child's end is the only one
        try:
            measured.append(receiver.recv())
        except EOFError:
            process.join()
            die(f"the process with {size:,} transitions died, exit code {process.exitcode}", 1)
        process.join()
    base = measured[0][0]
    peak, buffer = measured[1]
    ratio = peak / (base + buffer)
    print(f"libraries and agent {base:.0f} MiB, buffer {buffer:.0f} MiB")
    print(f"peak {peak:.0f} MiB: {ratio:.2f} of their sum")
    row = {"transitions": transitions, "libraries_mib": f"{base:.0f}"}
    row |= {"buffer_mib": f"{buffer:.0f}", "peak_mib": f"{peak:.0f}", "ratio": f"{ratio:.3f}"}
    write_csv(out / "speed_memory.csv", [row])


if __name__ == "__main__":
    commands = {"compare": compare, "memory": memory, "round": rounds}
    try:
        tyro.extras.subcommand_cli_from_dict(commands)
    except BrokenPipeError:  # of `| head`; as if it had been killed by SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes it once more
        raise SystemExit(141) from None
