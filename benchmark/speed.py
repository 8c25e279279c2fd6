"""Speed of NE-TD3, measured beside its peers in one run on one machine.

Run:   python benchmark/speed.py compare    steps per second, ours and the peers'; ceilings

Every contender is a real training in a process of its own that stops after each chunk of
environment steps until it is its turn again (paced.py). So a machine that is slower for a
minute is so for all, and the ratios hold.
"""

import csv
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ne_td3_continuous as ne  # noqa: E402
from ne_td3_continuous import die  # noqa: E402

RANDOM_STEPS = 1_000  # of each contender, before its first update
PEERS = {  # name: package, and the name of its environment and in peer.py
    "Stable-Baselines3": ("stable-baselines3", "sb3"),
    "SBX": ("sbx-rl", "sbx"),
}


@dataclass
class Setting:
    """What all contenders of a comparison share."""

    env_id: str = "HalfCheetah-v5"  # Gymnasium task
    widths: tuple[int, ...] = (256, 256)  # hidden layers of actor and critics
    batch_size: int = 256  # transitions per update
    threads: int = 1  # CPU threads, and cores, of each contender
    cuda: bool = False  # train on the GPU


# --- commands: [python, script, arguments ...] --------------------------------
def ours(setting: Setting, *flags: str) -> list[str]:
    """Our script, without evaluations and with ten times as many rounds."""
    widths = [str(width) for width in setting.widths]
    command = [sys.executable, str(ROOT / "ne_td3_continuous.py")]
    command += ["--env-id", setting.env_id]
    command += ["--actor-hidden", *widths, "--critic-hidden", *widths]
    command += ["--batch-size", str(setting.batch_size)]
    command += ["--torch-threads", str(setting.threads)]
    command += ["--learning-starts", str(RANDOM_STEPS)]
    command += ["--eval-frequency", "1000000", "--grow-interval", "1000"]
    if not setting.cuda:
        command.append("--no-cuda")
    return [*command, *flags]


def peer(name: str, setting: Setting) -> list[str]:
    """A peer; its environment is made at the first use."""
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


def all_commands(
    setting: Setting, peers: tuple, others: tuple, compiled: bool
) -> dict[str, list[str]]:
    """{contender: command}. Raises: SystemExit(2) for what cannot be."""
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


# --- contenders ---------------------------------------------------------------
def environment(threads: int) -> dict[str, str]:
    """Environment variables that hold every numerical library to so many threads."""
    variables = dict(os.environ, MUJOCO_GL="disable")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        variables[name] = str(threads)
    several = "true" if threads > 1 else "false"
    xla = f"--xla_cpu_multi_thread_eigen={several} intra_op_parallelism_threads={threads}"
    variables["XLA_FLAGS"] = xla
    return variables


def cores(threads: int) -> set[int]:
    """The cores of a contender: the first ones this process may use."""
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(allowed):
        die(f"--setting.threads must be 1 to {len(allowed)}, the cores here, got {threads}")
    return set(allowed[:threads])


class Contender:
    """A training behind the gate of paced.py."""

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
            said = self.errors.read().strip() or "it said nothing"
            last = said.splitlines()[-1]
            die(f"{self.name} ended with exit code {self.process.returncode}: {last}")
        return json.loads(line)

    def turn(self) -> dict:
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return self.wait()

    def warm_up(self) -> None:
        """Past the first updates, and past what it compiles."""
        report = self.wait()
        while report["steps"] < RANDOM_STEPS + 3 * self.chunk:
            report = self.turn()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.reports.close()
        self.errors.close()
        self.folder.cleanup()

    def rates(self) -> np.ndarray:
        """Environment steps per second, (turns,)."""
        return np.array([self.chunk / turn["seconds"] for turn in self.turns])


# --- ceilings -----------------------------------------------------------------
def rate(statement: str, threads: int, **names) -> float:
    """How often per second a statement about `names` can be executed."""
    timer = Timer(statement, globals=names, num_threads=threads)
    return 1 / timer.blocked_autorange().median


def operations(update, batch) -> int:
    """Floating-point operations of the matrix products of an update."""
    with FlopCounterMode(display=False) as counter:
        update(batch)
    return counter.get_total_flops()


def operations_per_step(setting: Setting, n_obs: int, n_act: int, device) -> float:
    args = ne.Args(actor_hidden=setting.widths, critic_hidden=setting.widths)
    agent = ne.Agent(args, n_obs, n_act, 0, device)
    buffer = ne.ReplayBuffer(1, n_obs, n_act, 0, device)
    buffer.size = 1
    batch = buffer.sample(setting.batch_size)
    critic = operations(agent.update_critic, batch)
    actor = operations(agent.update_actor, batch)
    return critic + actor / args.policy_frequency


def ceilings(setting: Setting) -> list[dict]:
    """What no training can exceed: matrix products of its updates, the simulator alone."""
    device = torch.device("cuda" if setting.cuda else "cpu")
    env = ne.make_env(setting.env_id)
    n_obs = env.observation_space.shape[0]
    n_act = env.action_space.shape[0]
    rows = []

    def add(name: str, value: float, unit: str) -> None:
        rows.append({"ceiling": name, "value": f"{value:.1f}", "unit": unit})

    rates = []
    for n, width in ((2048, 2048), (setting.batch_size, max(setting.widths))):
        a = torch.randn(n, width, device=device)
        b = torch.randn(width, width, device=device)
        rates.append(2 * n * width**2 * rate("a @ b", setting.threads, a=a, b=b))
        add(f"matrix product {n} x {width} x {width}", rates[-1] / 1e9, "GFLOP/s")
    per_step = operations_per_step(setting, n_obs, n_act, device)
    add("matrix products of one environment step", per_step / 1e6, "MFLOP")
    add("updates at the faster rate", max(rates) / per_step, "steps/s")
    env = gym.wrappers.Autoreset(env)
    env.reset(seed=0)
    random = np.random.default_rng(0).uniform(-1, 1, (1_000, n_act)).astype(np.float32)
    actions = itertools.cycle(random)
    alone = rate("env.step(next(actions))", setting.threads, env=env, actions=actions)
    add("simulator alone", alone, "steps/s")
    return rows


# --- output -------------------------------------------------------------------
def write_csv(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {file}")


def print_table(rows: list[dict]) -> None:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = zip(line, widths, strict=True)
        print("  ".join(cell.rjust(width) for cell, width in cells))


def turns_of(contenders: list[Contender]) -> list[dict]:
    rows = []
    for contender in contenders:
        for n, turn in enumerate(contender.turns, 1):
            row = {"contender": contender.name, "turn": n}
            row["steps_per_second"] = f"{contender.chunk / turn['seconds']:.2f}"
            row["peak_rss_mib"] = f"{turn['rss_mib']:.0f}"
            rows.append(row)
    return rows


def ratios(contenders: list[Contender]) -> list[dict]:
    """Medians, and ratios to the fastest peer over pairs of turns: median, middle half."""
    peers = [contender for contender in contenders if contender.name in PEERS]
    fastest = max(peers or contenders, key=lambda contender: np.median(contender.rates()))
    table = []
    for contender in contenders:
        pairs = contender.rates() / fastest.rates()
        low, middle, high = np.percentile(pairs, [25, 50, 75])
        row = {"contender": contender.name}
        row["steps/s"] = f"{np.median(contender.rates()):.1f}"
        row[f"against {fastest.name}"] = f"{middle:.2f} ({low:.2f}-{high:.2f})"
        row["peak MiB"] = f"{max(turn['rss_mib'] for turn in contender.turns):.0f}"
        table.append(row)
    return table


def compare(
    setting: Setting = Setting(),  # noqa: B008
    peers: tuple[str, ...] = tuple(PEERS),
    command: tuple[str, ...] = (),
    compiled: bool = True,
    chunk: int = 100,
    turns: int = 30,
    out: Path = ROOT / "runs" / "speed",
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
        out: folder of the CSVs
    """
    if setting.cuda and not torch.cuda.is_available():
        die("--setting.cuda needs a GPU that torch can use, and there is none")
    allowed = cores(setting.threads)
    contenders = []
    for name, line in all_commands(setting, peers, command, compiled).items():
        contenders.append(Contender(name, line, chunk, allowed))
    for contender in contenders:
        contender.warm_up()
    for _ in tqdm(range(turns), unit=" turns", disable=None):
        for contender in contenders:
            contender.turns.append(contender.turn())
    for contender in contenders:
        contender.close()
    print_table(ratios(contenders))
    write_csv(out / "speed_compare.csv", turns_of(contenders))
    limits = ceilings(setting)
    print_table(limits)
    write_csv(out / "speed_ceilings.csv", limits)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"compare": compare})
