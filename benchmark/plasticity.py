"""Priming: does a network that was trained heavily on its first data still learn afterwards?

Run:   python benchmark/plasticity.py run --seeds 5 --workers 2       all arms, in runs/priming
       python benchmark/plasticity.py priming --arm ne --seed 1       one of these runs
       python benchmark/plasticity.py table runs/priming              what came out, and a picture
A run takes 10 to 12 minutes on an idle core with --compile. Its folder, {arm}_seed{seed}, holds
args.json, results.csv (as the scripts write it, for plot.py curves), losses.csv and probes.csv.

Heavy priming is from Nikishin et al. 2022, The Primacy Bias in Deep Reinforcement Learning:
random steps, many updates on them, then normal steps with an update each. Agents, rounds, reviews
and rivals are imported from ne_td3_continuous.py and baselines/td3_continuous.py; without priming
updates a run equals that of the script.
"""

import copy
import csv
import json
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib import ticker

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts

import drawing
import ne_td3_continuous as ne
import pool
import utils_topology as topology
from baselines import td3_continuous as td3
from estimates import estimate, versus
from ne_td3_continuous import die
from run import last_step, stored_args

TD3_ARMS = {  # flags of baselines/td3_continuous.py
    "td3": {},
    # as many weights as the sparse networks have at the start: see `arm_args`
    "small_dense": {},
    "layer_norm": {"method": "layer-norm"},
    "redo": {"method": "redo"},
    # once, at half of the run: see `arm_args`
    "reset": {"method": "reset"},
    "regrama": {"method": "regrama"},
    "recency": {"method": "recency"},
}
NE_ARMS = {  # flags of ne_td3_continuous.py
    "ne": {},
    "ne_no_review": {"review_floor": 1.0},
    # differs from ne_no_review in what is grown only
    "random_growth": {"growth": "random", "review_floor": 1.0},
    # a sparse start, and nothing else of NE
    "static": {"growth": "none", "review_floor": 1.0},
}
ARMS = tuple(TD3_ARMS | NE_ARMS)
ArmName = Literal[ARMS]


@dataclass
class RunArgs:
    """What is run, and what it writes."""

    arm: ArmName
    """the agent"""
    seed: int = 1
    """seed of everything random"""
    env_id: str = "HalfCheetah-v5"
    """Gymnasium id, or module:id, of a task with flat Boxes of floats"""
    out: Path = Path("runs/priming")
    """folder of all runs"""
    cuda: bool = True
    """use the GPU if there is one"""
    cudagraphs: bool = True
    """on CUDA: capture the two updates once and replay them"""
    compile: bool = False
    """compile losses and gradients; needs a C++ compiler and half a minute"""
    torch_threads: int = 1
    """CPU threads of torch; networks this small run best with one"""
    eval_frequency: int = 5_000
    """environment steps between two rows of results.csv"""
    eval_episodes: int = 3
    """episodes per evaluation, deterministic policy"""
    loss_frequency: int = 500
    """updates between two rows of losses.csv, priming included"""
    max_episode_steps: int = 10_000
    """longer episodes are cut off; far above the limits of all known tasks"""


@dataclass
class PrimingArgs:
    """Heavy training on the first data. The random steps are --learning-starts."""

    priming_updates: int = 50_000
    """updates on the transitions of the random steps (ours)"""
    normal_steps: int = 100_000
    """environment steps after priming, with one update each (ours)"""
    growth_while_priming: bool = False
    """NE acts while priming, too: its rounds and reviews are spread over all updates. Off:
    over the normal steps only, as the scripts count environment steps, and none passes while
    priming. ReDo and ReGraMa count updates, so they always act"""


@dataclass
class TD3Args(ne.TD3Args):
    """Values of the scripts, but for the number of random steps."""

    learning_starts: int = 10_000
    """environment steps with uniform random actions, then comes priming"""


@dataclass
class ProbeArgs:
    """Probes, before and after priming and at the end: see `probe`."""

    probe_inputs: int = 2_048
    """transitions drawn from the buffer"""
    probe_fits: int = 500
    """steps of Adam, on all inputs, to fit random targets"""
    probe_learning_rate: float = 1e-3
    """of these steps"""
    probe_episodes: int = 3
    """episodes whose returns the critic's values are compared with"""


@dataclass
class Args(ProbeArgs, TD3Args, PrimingArgs, RunArgs):
    """All flags."""

    @property
    def total_timesteps(self) -> int:
        return self.learning_starts + self.normal_steps


# --- arms ---------------------------------------------------------------------
def weights_of(sizes: list[int]) -> int:
    return sum(n_in * n_out for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True))


def small_widths(n_in: int, hidden: tuple[int, ...], n_out: int, density: float) -> tuple:
    """Widths in the ratio of `hidden`, so that a dense network has `density` of its weights."""
    wanted = density * weights_of([n_in, *hidden, n_out])
    best = hidden
    for first in range(1, hidden[0] + 1):
        widths = tuple(max(1, round(first * n / hidden[0])) for n in hidden)
        miss = abs(weights_of([n_in, *widths, n_out]) - wanted)
        if miss < abs(weights_of([n_in, *best, n_out]) - wanted):
            best = widths
    return best


def arm_args(args: Args, n_obs: int, n_act: int):
    """The arguments of the arm's script. Raises: SystemExit(2) for what it would refuse."""
    script = td3 if args.arm in TD3_ARMS else ne
    shared = {}
    for flag in fields(script.Args):
        if hasattr(args, flag.name):
            shared[flag.name] = getattr(args, flag.name)
    own = script.Args(**shared)
    for name, value in (TD3_ARMS | NE_ARMS)[args.arm].items():
        setattr(own, name, value)
    if args.arm == "reset":
        own.reset_interval = math.ceil(args.total_timesteps / 2)
    if args.arm == "small_dense":
        density = ne.Args.initial_density
        own.actor_hidden = small_widths(n_obs, args.actor_hidden, n_act, density)
        own.critic_hidden = small_widths(n_obs + n_act, args.critic_hidden, 1, density)
    if script is ne:
        if args.growth_while_priming:
            own.total_timesteps += args.priming_updates
        ne.scale_to_run(own)
    ne.check_limits(own)
    if own.batch_size > own.buffer_size:
        die(f"--batch-size must be at most {own.buffer_size}, got {own.batch_size}")
    return own


class Learner:
    """An agent and its buffer; what its script does around an update is in the subclasses."""

    def __init__(self, args, agent: nn.Module, progress, buffer: ne.ReplayBuffer):
        self.args = args  # of the script
        self.agent = agent
        self.progress = progress
        self.buffer = buffer
        self.batch = buffer.new_batch(args.batch_size)
        self.uniform_batch = buffer.new_batch(args.batch_size)  # of rounds and metrics
        self.update_critic, self.update_actor = ne.fast_updates(args, agent, self.batch)

    def update(self, acting: bool) -> None:
        """One update of the script's loop; NE has a part in it while it is `acting`."""
        self.progress.updates += 1
        self.sample(acting)
        self.update_critic(self.batch)
        if self.progress.updates % self.args.policy_frequency == 0:
            self.update_actor(self.batch)
        self.after_update(acting)

    @torch.no_grad()
    def require_finite(self) -> None:
        for p in self.agent.parameters():
            if not p.isfinite().all():
                die(f"a weight is NaN or infinite after {self.progress.updates:,} updates", code=1)

    def measure_losses(self) -> None:
        """The critics' loss and mean Q on a uniform batch, whatever was trained on."""
        rng = torch.Generator().manual_seed(self.progress.updates)
        self.buffer.sample(self.uniform_batch, rng=rng)
        loss, mean_q, _ = self.agent.critic_gradients(self.uniform_batch)
        self.progress.losses = {"qf_loss": loss.clone(), "qf_values": mean_q.clone()}


class NELearner(Learner):
    """The parts of NE between updates, as in the loop of ne_td3_continuous.py."""

    def __init__(self, args: ne.Args, agent: ne.Agent, buffer: ne.ReplayBuffer):
        super().__init__(args, agent, ne.Progress.of(agent), buffer)
        self.review_batch = buffer.new_batch(1_024)
        self.rounds = ne.growth_rounds(args)

    def sample(self, acting: bool) -> None:
        oldest = 1.0
        if acting:
            u = torch.rand((), generator=self.agent.ne_rng).item()
            if u > self.progress.epsilon:
                self.progress.reviewed += 1
                oldest = self.args.review_fraction
        self.buffer.sample(self.batch, oldest=oldest)

    def after_update(self, acting: bool) -> None:
        progress = self.progress
        if acting and progress.updates % self.args.review_interval == 0:
            self.buffer.sample(self.review_batch, rng=self.agent.ne_rng)
            hidden = self.agent.networks["critic"].hidden(self.review_batch)
            dormant = len(topology.dormant_neurons(hidden, self.args.review_tau))
            neurons = 2 * sum(self.args.critic_hidden)
            progress.epsilon = ne.review_threshold(self.args, progress, dormant, neurons)
            progress.dormant = dormant

    def round(self, clock: int) -> None:
        if clock in self.rounds:
            self.buffer.sample(self.uniform_batch, rng=self.agent.ne_rng)
            ne.topology_round(self.args, self.agent, self.uniform_batch, self.progress, clock)

    def after_step(self, step: int, clock: int) -> None:
        self.round(clock)

    def row(self, step: int) -> dict[str, float]:
        self.buffer.sample(self.uniform_batch, rng=torch.Generator().manual_seed(step))
        return ne.measure(self.agent, self.uniform_batch, self.progress, step)


class TD3Learner(Learner):
    """The rivals between updates, as in the loop of baselines/td3_continuous.py."""

    def __init__(self, args: td3.Args, agent: td3.Agent, buffer: ne.ReplayBuffer):
        super().__init__(args, agent, td3.Progress.of(agent), buffer)
        self.weight_sums = td3.recency_weights(args, buffer.data.device)
        self.resets = td3.reset_steps(args)

    def sample(self, acting: bool) -> None:
        if self.args.method == "recency":
            td3.sample_recent(self.buffer, self.batch, self.weight_sums)
        else:
            self.buffer.sample(self.batch)

    def after_update(self, acting: bool) -> None:
        updates = self.progress.updates
        if self.args.method == "redo" and updates % self.args.redo_interval == 0:
            td3.redo(self.agent, self.batch)
        if self.args.method == "regrama" and updates % self.args.regrama_interval == 0:
            td3.regrama(self.agent, self.batch)

    def round(self, clock: int) -> None:
        """Nothing: rounds are NE's."""

    def after_step(self, step: int, clock: int) -> None:
        if step in self.resets:
            td3.reset(self.agent)

    def row(self, step: int) -> dict[str, float]:
        self.buffer.sample(self.uniform_batch, rng=torch.Generator().manual_seed(step))
        return td3.measure(self.agent, self.uniform_batch, self.progress, step)


def make_learner(args: Args, n_obs: int, n_act: int, device: torch.device) -> Learner:
    """With the seeds of the scripts."""
    seeds = np.random.SeedSequence(args.seed).generate_state(4).tolist()
    weight_seed, _, batch_seed, ne_seed = seeds
    torch.manual_seed(weight_seed)
    own = arm_args(args, n_obs, n_act)
    buffer = ne.ReplayBuffer(own.buffer_size, n_obs, n_act, batch_seed, device)
    if args.arm in TD3_ARMS:
        return TD3Learner(own, td3.Agent(own, n_obs, n_act, device, ne_seed), buffer)
    return NELearner(own, ne.Agent(own, n_obs, n_act, ne_seed, device), buffer)


# --- probes -------------------------------------------------------------------
def linear_output(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The last layer's output (B, n), of an actor before its tanh."""
    return mlp.layers[-1](mlp.activations(x)[-1])


def fresh_copy(mlp: nn.Module, rng: torch.Generator) -> nn.Module:
    """A new network of the same size; a masked layer gets new masks of its density.

    Draws weights from torch's global generator, masks from `rng`.
    """
    fresh = copy.deepcopy(mlp)
    for part in fresh.modules():
        if isinstance(part, nn.Linear | nn.LayerNorm):
            part.reset_parameters()
        if hasattr(part, "mask"):
            density = float(part.mask.mean())
            part.mask.copy_(topology.sample_mask(part.mask.shape, density, rng))
            part.weight.data.mul_(part.mask)
    return fresh


def fit(mlp: nn.Module, x: torch.Tensor, targets: torch.Tensor, args: ProbeArgs) -> float:
    """Loss of a copy of `mlp` that has learnt to add `targets` (B, n) to its output.

    At the start the loss is the mean square of the targets, in every network: what its
    outputs are, large or small, has no part in it. Masks stay.
    """
    mlp = copy.deepcopy(mlp)
    with torch.no_grad():
        wanted = linear_output(mlp, x) + targets  # (B, n)
    params = [*mlp.layers.parameters(), *mlp.norms.parameters()]
    optimizer = torch.optim.Adam(params, args.probe_learning_rate)
    for _ in range(args.probe_fits):
        loss = F.mse_loss(linear_output(mlp, x), wanted)
        optimizer.zero_grad()
        loss.backward()
        for layer in mlp.layers:
            if hasattr(layer, "mask"):
                layer.weight.grad.mul_(layer.mask)
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(linear_output(mlp, x), wanted))


def trainability(mlp: nn.Module, x: torch.Tensor, args: ProbeArgs, seed: int) -> dict:
    """How well `mlp` and a fresh network fit standard normal targets; 1: equally well.

    Above 1 the trained network is left with more loss. Two fresh networks differ by 10%.
    """
    rng = torch.Generator().manual_seed(seed)
    n_out = mlp.layers[-1].out_features
    targets = torch.randn(len(x), n_out, generator=rng).to(x.device)
    with torch.random.fork_rng():  # the training's own generator must not notice
        torch.manual_seed(seed)
        fresh = fresh_copy(mlp, rng)
    own_loss = fit(mlp, x, targets, args)
    fresh_loss = fit(fresh, x, targets, args)
    ratio = own_loss / max(fresh_loss, 1e-12)
    return {"fit_ratio": ratio, "fit_loss": own_loss, "fit_loss_fresh": fresh_loss}


def effective_rank(features: torch.Tensor, delta: float = 0.01) -> int:
    """srank of (B, n): the fewest singular values with 1 - delta of the sum (Kumar et al. 2021)."""
    singular = torch.linalg.svdvals(features.double())
    shares = singular.cumsum(0) / singular.sum().clamp_min(1e-300)
    return int((shares < 1 - delta).sum()) + 1


def weight_norm(mlp: nn.Module) -> float:
    """Euclidean norm of all weights, without biases."""
    squares = sum(float(layer.weight.detach().square().sum()) for layer in mlp.layers)
    return math.sqrt(squares)


def discounted_returns(rewards: list[float], gamma: float) -> np.ndarray:
    """From each step of an episode on, (steps,)."""
    returns = np.empty(len(rewards))
    following = 0.0
    for t in reversed(range(len(rewards))):
        following = rewards[t] + gamma * following
        returns[t] = following
    return returns


def play(actor: nn.Module, env, seed: int) -> tuple[np.ndarray, list[float], bool]:
    """An episode: the critic's inputs (steps, obs + act), rewards, whether it terminated."""
    inputs = []
    rewards = []
    obs, _ = env.reset(seed=seed)
    done = False
    while not done:
        action = actor.act(obs)
        inputs.append(np.concatenate((obs, action)))
        obs, reward, terminated, truncated, _ = env.step(action)
        rewards.append(reward)
        done = terminated or truncated
    return np.array(inputs, dtype=np.float32), rewards, terminated


@torch.no_grad()
def overestimation(agent: nn.Module, env, gamma: float, episodes: int, seed: int) -> dict:
    """Mean Q1(s, a) of the policy's own steps, and the discounted return that followed.

    What a time limit cuts off would be missing from the return: the last steps of such an
    episode, from which more than 1% of the weight lies beyond its end, do not count.
    """
    predicted = []
    followed = []
    for episode in range(episodes):
        # neither a seed of training nor one of evaluation
        inputs, rewards, terminated = play(agent.actor, env, 100_000 + seed + episode)
        kept = len(rewards)
        if not terminated and gamma < 1:
            kept -= math.ceil(math.log(0.01) / math.log(gamma))
        if kept > 0:
            x = torch.from_numpy(inputs[:kept]).to(agent.critic_1.layers[0].weight.device)
            predicted += agent.critic_1(x).tolist()
            followed += discounted_returns(rewards, gamma)[:kept].tolist()
    q = float(np.mean(predicted or math.nan))
    value = float(np.mean(followed or math.nan))
    return {"q": q, "return": value, "overestimation": q - value}


def probe(args: Args, learner: Learner, env, point: str, step: int) -> dict:
    """A row of probes.csv; nothing that training draws from is touched.

    {actor,critic}/fit_ratio: `trainability`, of the critics of the first. critic/srank: of its
    last hidden layer. dormant_0, _0.025, _0.1: share of hidden neurons with a score (Eq. 1) of
    at most that, of both critics. weight_norm. q, return, overestimation.
    """
    row = {"point": point, "step": step, "updates": learner.progress.updates}
    agent = learner.agent
    batch = learner.buffer.new_batch(args.probe_inputs)
    learner.buffer.sample(batch, rng=torch.Generator().manual_seed(args.seed))
    probed = {"actor": (agent.actor, batch.obs), "critic": (agent.critic_1, batch.obs_actions)}
    for name, (mlp, x) in probed.items():
        for key, value in trainability(mlp, x, args, args.seed).items():
            row[f"{name}/{key}"] = value
        hidden = agent.networks[name].hidden(batch)
        for tau in (0.0, 0.025, 0.1):
            scores = torch.cat([topology.dormancy_scores(h) for h in hidden])  # (neurons,)
            row[f"{name}/dormant_{tau:g}"] = float((scores <= tau).float().mean())
        row[f"{name}/weight_norm"] = weight_norm(mlp)
    row["critic/srank"] = effective_rank(agent.critic_1.hidden(batch)[-1])
    return row | overestimation(agent, env, args.gamma, args.probe_episodes, args.seed)


# --- one run ------------------------------------------------------------------
def append_row(file: Path, row: dict) -> None:
    with open(file, "a", newline="") as stream:
        table = csv.DictWriter(stream, row.keys())
        if stream.tell() == 0:
            table.writeheader()
        table.writerow(row)


def write_losses(learner: Learner, folder: Path, step: int) -> None:
    learner.require_finite()
    learner.measure_losses()
    row = {"updates": learner.progress.updates, "step": step}
    for key, value in learner.progress.losses.items():
        row[f"losses/{key}"] = float(value)
    append_row(folder / "losses.csv", row)


def write_evaluation(args: Args, learner: Learner, env, folder: Path, step: int) -> None:
    learner.require_finite()
    learner.measure_losses()
    returns = ne.evaluate(learner.agent.actor, env, args.eval_episodes, args.seed)
    row = learner.row(step)
    row["eval/return_mean"] = float(np.mean(returns))
    row["eval/return_std"] = float(np.std(returns))
    row["updates"] = learner.progress.updates
    learner.progress.returns = []
    append_row(folder / "results.csv", row)
    q = row["losses/qf_values"]
    print(f"step {step:,}: return {row['eval/return_mean']:,.1f}, mean Q {q:,.1f}")


def prime(args: Args, learner: Learner, folder: Path) -> None:
    """Updates on what is in the buffer; the environment stands still."""
    started = time.time()
    acting = args.growth_while_priming
    for update in range(1, args.priming_updates + 1):
        learner.update(acting)
        if acting:
            learner.round(args.learning_starts + update)
        if update % args.loss_frequency == 0:
            write_losses(learner, folder, args.learning_starts)
    speed = args.priming_updates / max(time.time() - started, 1e-9)
    print(f"primed with {args.priming_updates:,} updates, {speed:.0f} per second")


def train(args: Args, folder: Path) -> None:
    """Raises: SystemExit, EnvironmentFault."""
    # --- setup ---
    device = ne.set_up_torch(args)
    noise_seed = np.random.SeedSequence(args.seed).generate_state(4).tolist()[1]
    noise_rng = np.random.default_rng(noise_seed)
    env = ne.make_env(args.env_id, args.max_episode_steps)
    eval_env = ne.make_env(args.env_id, args.max_episode_steps)
    n_obs = env.observation_space.shape[0]
    n_act = env.action_space.shape[0]
    learner = make_learner(args, n_obs, n_act, device)
    if args.arm in NE_ARMS:
        print(ne.growth_plan(learner.args))
    obs, _ = env.reset(seed=args.seed)

    # --- the loop ---
    episodic_return = 0.0
    passed = 0  # updates of priming that count in NE's schedule
    for step in range(1, args.total_timesteps + 1):
        # act
        if step <= args.learning_starts:
            action = noise_rng.uniform(-1, 1, n_act)
        else:
            noise = noise_rng.normal(0, args.exploration_noise, n_act)
            action = learner.agent.actor.act(obs) + noise
        action = action.clip(-1, 1).astype(np.float32)

        # update
        if step > args.learning_starts:
            learner.update(acting=True)
            if learner.progress.updates % args.loss_frequency == 0:
                write_losses(learner, folder, step)

        # step and store
        next_obs, reward, terminated, truncated, _ = env.step(action)
        learner.buffer.add(obs, action, next_obs, reward, terminated)
        obs = next_obs
        episodic_return += reward

        # rounds and resets
        learner.after_step(step, clock=step + passed)

        # priming
        if step == args.learning_starts:
            append_row(folder / "probes.csv", probe(args, learner, eval_env, "before", step))
            prime(args, learner, folder)
            append_row(folder / "probes.csv", probe(args, learner, eval_env, "after", step))
            started = time.time()
            if args.growth_while_priming:
                passed = args.priming_updates

        # episode end
        if terminated or truncated:
            learner.progress.returns.append(episodic_return)
            episodic_return = 0.0
            obs, _ = env.reset()

        # evaluate
        if step % args.eval_frequency == 0 or step == args.total_timesteps:
            write_evaluation(args, learner, eval_env, folder, step)

    speed = args.normal_steps / (time.time() - started)
    append_row(folder / "probes.csv", probe(args, learner, eval_env, "end", step))
    print(f"finished: {folder}, {speed:.0f} steps per second")


# --- folders of runs ----------------------------------------------------------
HOW = ("out", "cuda", "cudagraphs", "compile", "torch_threads")  # change no result


def folder_of(out: Path, arm: str, seed: int) -> Path:
    return out / f"{arm}_seed{seed}"


def is_finished(folder: Path) -> bool:
    """The probe at the end is the last that a run writes."""
    file = folder / "probes.csv"
    if not file.exists():
        return False
    lines = file.read_text(errors="replace").splitlines()
    return bool(lines) and lines[-1].partition(",")[0] == "end"


def as_stored(args: Args) -> dict:
    """What args.json holds."""
    return json.loads(json.dumps(vars(args), default=str))


def require_same(folder: Path, args: dict) -> None:
    """Raises: SystemExit(2) where the folder holds a run with other arguments."""
    stored = stored_args(folder)
    for name, value in args.items():
        if name not in HOW and stored.get(name) != value:
            flag = "--" + name.replace("_", "-")
            there = stored.get(name)
            die(f"{folder} holds another run: {flag} is {there} there, {value} is wanted")


def start_over(folder: Path) -> None:
    print(f"{folder} was interrupted after step {last_step(folder):,}: it starts over")
    for name in ("results.csv", "losses.csv", "probes.csv"):
        (folder / name).unlink(missing_ok=True)


def check_flags(args: Args) -> None:
    """Raises: SystemExit(2). The scripts' own flags are checked by `arm_args`."""
    least = {"priming_updates": 0, "probe_learning_rate": 1e-9}
    for own in (PrimingArgs, ProbeArgs):
        for flag in fields(own):
            value = getattr(args, flag.name)
            low = least.get(flag.name, 1)
            if flag.type is not bool and not low <= value:
                name = "--" + flag.name.replace("_", "-")
                die(f"{name} must be at least {low}, got {value}")
    if args.loss_frequency < 1:
        die(f"--loss-frequency must be at least 1, got {args.loss_frequency}")


def priming(run: RunArgs, phases: PrimingArgs, agent: TD3Args, probes: ProbeArgs) -> None:
    """One run of one arm. A finished run is not made again, an interrupted one starts over."""
    args = Args(**vars(run), **vars(phases), **vars(agent), **vars(probes))
    check_flags(args)
    stored = as_stored(args)
    folder = folder_of(args.out, args.arm, args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    lock = ne.lock(folder)  # another process may be at it
    if (folder / "args.json").exists():
        if last_step(folder) > 0:
            require_same(folder, stored)
        if is_finished(folder):
            print(f"{folder} is finished, there is nothing to do")
            return
        start_over(folder)
    (folder / "args.json").write_text(json.dumps(stored, indent=2))
    print(f"{args.env_id}, {args.arm}, seed {args.seed}: {folder}")
    try:
        train(args, folder)
    except ne.EnvironmentFault as fault:
        die(str(fault), code=1)
    lock.close()


# --- many runs ----------------------------------------------------------------
def make_runs(
    arms: tuple[ArmName, ...] = ARMS,
    seeds: int = 5,
    workers: int = 2,
    out: Path = Path("runs/priming"),
    flags: str = "",
) -> None:
    """Makes the runs that are missing, seed by seed; Ctrl-C or SIGTERM stops them all.

    Args:
        arms: which
        seeds: seeds 1, 2, ..., this of each
        workers: runs at a time
        out: folder of all runs
        flags: further flags of every run, e.g. --flags=--compile
    """
    for name, value in (("seeds", seeds), ("workers", workers)):
        if value < 1:
            die(f"--{name} must be at least 1, got {value}")
    try:
        more = shlex.split(flags)
    except ValueError as e:
        die(f"--flags: {e}, got {flags}")
    due = []
    for seed in range(1, seeds + 1):
        for arm in arms:
            folder = folder_of(out.resolve(), arm, seed)
            words = ["--arm", arm, "--seed", str(seed), "--out", str(folder.parent)]
            words += more
            wanted = tyro.cli(Args, args=words)
            check_flags(wanted)
            if (folder / "args.json").exists() and last_step(folder) > 0:
                require_same(folder, as_stored(wanted))
            if not is_finished(folder):
                due.append(pool.Job(folder, [__file__, "priming", *words]))
    out.mkdir(parents=True, exist_ok=True)
    print(f"{seeds * len(arms)} runs, {len(due)} to make, {workers} at a time: {out}")
    pool.make(due, workers)


# --- the table ----------------------------------------------------------------
LABELS = {
    "td3": "TD3",
    "small_dense": "small dense TD3",
    "layer_norm": "LayerNorm",
    "redo": "ReDo",
    "reset": "Reset",
    "regrama": "ReGraMa",
    "recency": "recency",
    "ne": "NE",
    "ne_no_review": "NE without review",
    "random_growth": "random growth",
    "static": "static sparse",
}


class Scores(NamedTuple):
    """One number per seed, in the order of the seeds."""

    late: np.ndarray  # (seeds,), mean return of the last two evaluations
    whole: np.ndarray  # (seeds,), mean return from a step on
    actor_fit: np.ndarray  # (seeds,), `trainability` after priming
    critic_fit: np.ndarray  # (seeds,)


def finished_runs(folder: Path) -> dict[str, list[Path]]:
    """{arm: folders of finished runs}; says which are not. Raises: SystemExit(2) without any."""
    runs = {}
    for arm in ARMS:
        for own in sorted(folder.glob(f"{arm}_seed*")):
            if not own.is_dir():
                continue
            if is_finished(own):
                runs.setdefault(arm, []).append(own)
            else:
                step = last_step(own)
                print(f"left out: {own.name} is at step {step:,}, unfinished", file=sys.stderr)
    if not runs:
        die(f"there are no finished runs in {folder}")
    ends = {last_step(own) for folders in runs.values() for own in folders}
    if len(ends) > 1:
        die(f"all runs must be of one length, got {sorted(ends)} steps")
    return runs


def read_probes(folder: Path) -> list[dict[str, str]]:
    """Raises: SystemExit(2) for a damaged file."""
    rows = drawing.read_rows(folder / "probes.csv", ["point", *PROBES])
    points = [row["point"] for row in rows]
    if points != ["before", "after", "end"]:
        die(f"{folder / 'probes.csv'} must have the points before, after, end, got {points}")
    return rows


def scores_of(folders: list[Path], from_step: int) -> Scores:
    found = []
    for folder in folders:
        rows = drawing.read_rows(folder / "results.csv", ["step", "eval/return_mean"])
        returns = [float(row["eval/return_mean"]) for row in rows]
        counted = [float(row["eval/return_mean"]) for row in rows if int(row["step"]) >= from_step]
        probes = {row["point"]: row for row in read_probes(folder)}
        fits = [float(probes["after"][f"{name}/fit_ratio"]) for name in ("actor", "critic")]
        found.append([np.mean(returns[-2:]), np.mean(counted or math.nan), *fits])
    return Scores(*np.array(found).T)


def versus_table(scores: dict, titles: dict[str, str], spec: str, reference: str) -> list[str]:
    """Each arm's own value and its difference from one arm's. titles: {field of Scores: title}."""
    head = "| arm | seeds"
    for title in titles.values():
        head += f" | {title} | minus {reference} | p"
    lines = [head + " |", "|---" * (2 + 3 * len(titles)) + "|"]
    cells = {arm: [arm, str(len(own.late))] for arm, own in scores.items()}
    for name in titles:
        values = {arm: getattr(own, name) for arm, own in scores.items()}
        against = versus(values, reference, spec)
        for arm, own in values.items():
            cells[arm] += [format(estimate([own]), spec), *against[arm]]
    lines += ["| " + " | ".join(row) + " |" for row in cells.values()]
    return lines


def control_table(scores: dict, control: dict, titles: dict[str, str]) -> list[str]:
    """What priming adds to a return and to its difference from TD3's."""
    head = "| arm | seeds | without priming | minus td3 | priming adds | to minus td3 |"
    lines = [head, "|---" * 6 + "|"]
    for name, title in titles.items():
        primed = {arm: getattr(own, name) for arm, own in scores.items() if arm in control}
        without = {arm: getattr(control[arm], name) for arm in primed}
        none = np.array([])
        for arm in primed:
            # of td3 itself there is no difference from td3
            td3_primed = none if arm == "td3" else primed.get("td3", none)
            td3_without = none if arm == "td3" else without.get("td3", none)
            estimates = [
                estimate([without[arm]]),
                estimate([without[arm]], [td3_without]),
                estimate([primed[arm]], [without[arm]]),
                estimate([primed[arm], td3_without], [without[arm], td3_primed]),
            ]
            cells = [f"{arm}, {title}", f"{len(primed[arm])}, {len(without[arm])}"]
            cells += [f"{own:,.0f}" for own in estimates]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


PROBES = {  # column of probes.csv: its format
    "actor/fit_ratio": ".2f",
    "critic/fit_ratio": ".2f",
    "critic/srank": ".0f",
    "actor/dormant_0": ".1%",
    "critic/dormant_0": ".1%",
    "actor/dormant_0.1": ".1%",
    "critic/dormant_0.1": ".1%",
    "actor/weight_norm": ".1f",
    "critic/weight_norm": ".1f",
    "q": ",.0f",
    "overestimation": ",.0f",
}


def probes_table(runs: dict[str, list[Path]]) -> list[str]:
    lines = ["| arm | point | " + " | ".join(PROBES) + " |"]
    lines.append("|---" * (len(PROBES) + 2) + "|")
    for arm, folders in runs.items():
        rows = []
        for folder in folders:
            rows += read_probes(folder)
        for point in ("before", "after", "end"):
            cells = [arm, point]
            for column, style in PROBES.items():
                values = [float(row[column]) for row in rows if row["point"] == point]
                cells.append(format(np.mean(values), style))
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw_arms(ax, values: dict[str, np.ndarray], fill: str, above: float = 0) -> None:
    """Each seed as a dot, the mean with its 95% interval as a bar; an arm in each line."""
    for y, (arm, own) in enumerate(reversed(values.items())):  # the first at the top
        y += above
        colour = "#0072B2" if arm in NE_ARMS else "#555555"
        dots = {"fillstyle": fill, "alpha": 0.4, "markersize": 4}
        ax.plot(own, [y] * len(own), "o", color=colour, markeredgewidth=0.8, **dots)
        mean = estimate([own])
        ax.plot(mean.value, y, "|", color=colour, markersize=10, markeredgewidth=2)
        if not math.isnan(mean.low):
            ax.plot([mean.low, mean.high], [y, y], color=colour, linewidth=1.5)


def picture(scores: dict[str, Scores], titles: dict[str, str]):
    """Both returns, and how well the primed networks learn; TD3's means are dotted."""
    figure, part = drawing.canvas(10, 0.32 * len(scores) + 1.2, "")
    axes = part.subplots(1, 3, sharey=True)
    for ax, (name, title) in zip(axes, titles.items(), strict=False):
        values = {arm: getattr(own, name) for arm, own in scores.items()}
        if "td3" in values:
            ax.axvline(values["td3"].mean(), color="#999999", linewidth=1, linestyle=":")
        draw_arms(ax, values, "full")
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("evaluation return")
    draw_arms(axes[2], {arm: own.critic_fit for arm, own in scores.items()}, "full", 0.15)
    draw_arms(axes[2], {arm: own.actor_fit for arm, own in scores.items()}, "none", -0.15)
    axes[2].axvline(1, color="#999999", linewidth=1, linestyle=":")
    axes[2].set_xscale("log")
    axes[2].xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes[2].xaxis.set_major_formatter("{x:g}")
    axes[2].xaxis.set_minor_formatter("")
    axes[2].set_title("after priming: critic full, actor hollow", fontsize=10)
    axes[2].set_xlabel("loss on new targets / a fresh one's")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    labels = [f"{LABELS[arm]} ({len(own.late)})" for arm, own in reversed(scores.items())]
    axes[0].set_yticks(range(len(labels)), labels)
    return figure


def table(
    folder: tyro.conf.Positional[Path],
    /,
    control: Path | None = None,
    reference: ArmName = "td3",
    from_step: int = 25_000,
    out: Path = Path("priming.png"),
) -> None:
    """Markdown: returns, trainability, their 95% intervals, the probes' means; and a picture.

    p is of no difference from the reference, corrected for the number of arms (Holm).

    Args:
        folder: of all runs
        control: folder of runs with --priming-updates 0, for a table of what priming adds
        reference: the arm that the others are compared with
        from_step: environment step from which the second return is averaged
        out: where the PNG goes, and beside it the Markdown
    """
    drawing.check_picture(out)
    runs = finished_runs(folder)
    scores = {arm: scores_of(folders, from_step) for arm, folders in runs.items()}
    titles = {"late": "last two evaluations", "whole": f"from step {from_step:,} on"}
    fits = {"actor_fit": "actor's loss on new targets, of a fresh network's"}
    fits["critic_fit"] = fits["actor_fit"].replace("actor", "critic")
    tables = [
        versus_table(scores, titles, ",.0f", reference),
        versus_table(scores, fits, ".2f", reference),
    ]
    if control is not None:
        without = finished_runs(control)
        unprimed = {arm: scores_of(folders, from_step) for arm, folders in without.items()}
        tables.append(control_table(scores, unprimed, titles))
    tables.append(probes_table(runs))
    page = "\n\n".join("\n".join(lines) for lines in tables) + "\n"
    print(page)
    files = {out: lambda file: drawing.save(picture(scores, titles), file)}
    files[out.with_suffix(".md")] = lambda file: file.write_text(page)
    drawing.write(files)


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each row at once
    commands = {"priming": priming, "run": make_runs, "table": table}
    flat = (tyro.conf.OmitArgPrefixes,)
    try:
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, config=flat)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (FileExistsError, NotADirectoryError, PermissionError) as e:
        die(f"--out must be a folder that can be written: {e}")
    except BrokenPipeError:  # of `| head`; as if it had been killed by SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes it once more
        raise SystemExit(141) from None


if __name__ == "__main__":
    main()
