"""Priming: heavy training of an agent on its first data, then normal training, with probes.

Run:   python benchmark/priming.py --arm ne --seed 1    one run of benchmark/plasticity.py

Heavy priming is from Nikishin et al. 2022, The Primacy Bias in Deep Reinforcement Learning:
random steps, many updates on them, then normal steps with --replay-ratio updates each. Agents,
rounds, reviews and rivals are imported from ne_td3_continuous.py and baselines/td3_continuous.py;
without priming updates a run equals that of the script. Its folder holds what theirs do (results
for plot.py curves, checkpoints for --resume), losses.csv and probes.csv.
"""

import csv
import math
import sys
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts

import ne_td3_continuous as ne
import probes
import utils_topology as topology
from baselines import td3_continuous as td3
from ne_td3_continuous import ReplayBuffer, as_script, parse_args


class Arm(NamedTuple):
    label: str
    script: ModuleType  # of the agent
    flags: dict = {}  # of the script
    reset_primed: str = ""  # once, right after priming: all, actor, critic, outputs (its)
    while_priming: bool = False  # NE acts then, too: see below


# as many weights as the sparse networks have at the start, on HalfCheetah
SMALL = {"actor_hidden": (119, 60), "critic_hidden": (118, 59)}

ARMS = {
    "td3": Arm("TD3", td3),
    "small_dense": Arm("small dense TD3", td3, SMALL),
    "layer_norm": Arm("LayerNorm", td3, {"method": "layer-norm"}),
    "redo": Arm("ReDo", td3, {"method": "redo"}),
    # once, at half of the run: see `script_args`
    "reset": Arm("Reset", td3, {"method": "reset"}),
    "reset_primed": Arm("TD3, reset after priming", td3, reset_primed="all"),
    # the actor, the critics, or what scales the values: which does an agent suffer from?
    "reset_actor": Arm("TD3, actor reset after priming", td3, reset_primed="actor"),
    "reset_critics": Arm("TD3, critics reset after priming", td3, reset_primed="critic"),
    "reset_outputs": Arm("TD3, critics' outputs reset", td3, reset_primed="outputs"),
    "regrama": Arm("ReGraMa", td3, {"method": "regrama"}),
    "recency": Arm("recency", td3, {"method": "recency"}),
    "ne": Arm("NE", ne),
    "ne_layer_norm": Arm("NE + LayerNorm", ne, {"layer_norm": True}),
    "ne_floor_90": Arm("NE, floor 0.9", ne, {"review_floor": 0.9}),
    "ne_fau": Arm("NE, rule fau", ne, {"review_rule": "fau"}),
    "ne_no_review": Arm("NE without review", ne, {"review_floor": 1.0}),
    # differs from ne_no_review in what is grown only
    "random_growth": Arm("random growth", ne, {"growth": "random", "review_floor": 1.0}),
    # a sparse start, and nothing else of NE
    "static": Arm("static sparse", ne, {"growth": "none", "review_floor": 1.0}),
}
# NE's rounds and reviews are spread over all updates. In the arms above they are spread over
# the normal steps only, as the scripts count environment steps, and none passes while priming;
# ReDo and ReGraMa count updates, so they always act
for name in ("ne", "ne_layer_norm", "ne_floor_90", "ne_fau", "ne_no_review", "random_growth"):
    label = f"{ARMS[name].label}, while priming"
    ARMS[f"{name}_while"] = ARMS[name]._replace(label=label, while_priming=True)
ArmName = Literal[tuple(ARMS)]


@dataclass
class PrimingArgs:
    """Heavy training on the first data."""

    arm: ArmName = "ne"  # the agent
    priming_updates: int = 50_000  # on the transitions of the random steps (ours)
    loss_frequency: int = 500  # updates between two rows of losses.csv, priming included
    hand_over: bool = False
    """At the end a fresh TD3 is trained on the buffer for as many updates (handed.csv)"""


@dataclass
class ProbeArgs:
    """Probes, before and after priming and at the end."""

    probe_inputs: int = 2_048  # transitions drawn from the buffer
    probe_fits: int = 500  # steps of Adam, on all inputs, to fit random targets
    probe_learning_rate: float = 1e-3  # of these steps
    probe_episodes: int = 3  # whose returns the critic's values are compared with


@dataclass
class Args(ProbeArgs, PrimingArgs, ne.TD3Args, ne.RunArgs):
    """Flags of the scripts, and what differs."""

    exp_name: str = "priming"
    total_timesteps: int = 110_000  # the random steps and 100,000 normal ones (ours)
    learning_starts: int = 10_000  # uniform random actions, then comes priming
    eval_episodes: int = 3  # per evaluation, deterministic policy
    checkpoint_frequency: int = 10_000  # steps between two, each at an episode's end


ne.LIMITS["priming_updates"] = (0, 10**9)


# --- arms ---------------------------------------------------------------------
def script_args(args: Args):
    """The arguments of the arm's script."""
    arm = ARMS[args.arm]
    known = {flag.name for flag in fields(arm.script.Args)}
    shared = {name: value for name, value in vars(args).items() if name in known}
    own = arm.script.Args(**shared | arm.flags)
    if args.arm == "reset":
        own.reset_interval = math.ceil(args.total_timesteps / 2)
    if arm.script is ne:
        if arm.while_priming:
            own.total_timesteps += args.priming_updates
        ne.scale_to_run(own)
    return own


@dataclass
class Progress(ne.Progress):
    """Also the rows of losses.csv and probes.csv, which a resumed run needs."""

    rows: dict[str, list[dict]] = field(default_factory=dict)

    def write(self, file: Path, row: dict) -> None:
        rows = self.rows.setdefault(file.name, [])
        rows.append(row)
        with open(file, "w", newline="") as stream:
            table = csv.DictWriter(stream, row)
            table.writeheader()
            table.writerows(rows)


class Learner:
    """An arm's agent and buffer, and what its script does between environment steps."""

    def __init__(self, args: Args, n_obs: int, n_act: int, device: torch.device, buffer=None):
        seeds = np.random.SeedSequence(args.seed).generate_state(4).tolist()  # of the scripts
        weight_seed, _, batch_seed, agent_seed = seeds
        torch.manual_seed(weight_seed)
        self.arm = ARMS[args.arm]
        self.args = script_args(args)
        self.agent = self.arm.script.Agent(self.args, n_obs, n_act, agent_seed, device)
        if buffer is None:
            buffer = ReplayBuffer(args.buffer_size, n_obs, n_act, batch_seed, device)
        self.buffer = buffer
        self.progress = Progress()
        updates = ne.fast_updates(self.args, self.agent, self.buffer)
        self.update_critic, self.update_actor = updates
        self.is_ne = self.arm.script is ne
        self.method = "ne" if self.is_ne else self.args.method
        if self.is_ne:
            self.rounds = ne.growth_rounds(self.args)
        else:
            self.weight_sums = td3.recency_weights(self.args, device)

    def sample(self, acting: bool) -> ne.Batch:
        if self.method == "recency":
            return td3.sample_recent(self.buffer, self.args.batch_size, self.weight_sums)
        oldest = 1.0
        if self.is_ne and acting:
            u = torch.rand((), generator=self.agent.rng).item()
            if u > self.progress.epsilon:
                self.progress.reviewed += 1
                oldest = self.args.review_fraction
        return self.buffer.sample(self.args.batch_size, oldest)

    def update(self, acting: bool = True) -> None:
        """One update of the script's loop; NE has a part in it while it is `acting`."""
        args = self.args
        self.progress.updates += 1
        updates = self.progress.updates
        batch = self.sample(acting)
        self.update_critic(batch)
        if updates % args.policy_frequency == 0:
            self.update_actor(batch)
        if self.is_ne and acting and updates % args.review_interval == 0:
            self.count_dormant()
        if self.method == "redo" and updates % args.redo_interval == 0:
            td3.redo(self.agent, batch)
        if self.method == "regrama" and updates % args.regrama_interval == 0:
            td3.regrama(self.agent, batch)

    def count_dormant(self) -> None:
        batch = self.buffer.sample(1_024, rng=self.agent.rng)
        hidden = self.agent.networks["critic"].hidden(batch)
        dormant = len(topology.dormant_neurons(hidden, self.args.review_tau))
        fau = topology.activity(hidden)["fau"]
        self.progress.epsilon = ne.review_threshold(self.args, self.progress, dormant, fau)
        self.progress.dormant = dormant

    def round(self, clock: int) -> None:
        """NE's, if one is due."""
        if self.is_ne and clock in self.rounds:
            batch = self.buffer.sample(self.args.batch_size, rng=self.agent.rng)
            ne.topology_round(self.agent, batch, clock)

    def measure_losses(self) -> ne.Batch:
        """The critics' loss and mean Q on a uniform batch, whatever was trained on."""
        rng = torch.Generator().manual_seed(self.progress.updates)
        batch = self.buffer.sample(self.args.batch_size, rng=rng)
        loss, mean_q, _ = self.agent.critic_gradients(batch)
        self.progress.losses = {"qf_loss": loss.clone(), "qf_values": mean_q.clone()}
        return batch


# --- one run ------------------------------------------------------------------
def write_losses(learner: Learner, folder: Path, step: int) -> None:
    progress = learner.progress
    batch = learner.measure_losses()
    row = {"updates": progress.updates, "step": step}
    row |= {f"losses/{key}": float(value) for key, value in progress.losses.items()}
    row["losses/abs_q"] = learner.agent.critic_1(batch.obs_actions).abs().mean().item()
    ne.require_finite(step, loss=row["losses/qf_loss"])
    progress.write(folder / "losses.csv", row)


def write_probe(args: Args, learner: Learner, env, folder: Path, point: str, step: int) -> None:
    row = {"point": point, "step": step, "updates": learner.progress.updates}
    row |= probes.probe(args, learner.agent, learner.buffer, env)
    learner.progress.write(folder / "probes.csv", row)


def evaluate(args: Args, learner: Learner, env, step: int) -> dict[str, float]:
    """A row of results.csv."""
    agent, progress = learner.agent, learner.progress
    learner.measure_losses()
    row = ne.measure(agent, learner.buffer, progress, env, step)
    row["updates"] = progress.updates
    mean, q = row["eval/return_mean"], row["losses/qf_values"]
    print(f"step {step:,}: return {mean:,.1f}, mean Q {q:,.1f}")
    return row


@torch.no_grad()
def reset_part(agent: td3.Agent, part: str) -> None:
    """Of a reset, with Adam's state and the targets: all, the actor, the critics, their outputs."""
    if part == "all":
        td3.reset(agent)
    if part in agent.networks:
        td3.draw_all(agent.networks[part], agent.rng)
        agent.networks[part].update_targets(tau=1.0)
    if part == "outputs":
        network = agent.networks["critic"]
        for critic in network.mlps:
            layer = critic.layers[-1]
            for p, fresh in zip(layer.parameters(), td3.draw(layer, agent.rng), strict=True):
                p.copy_(fresh)
                for value in network.optimizer.state[p].values():
                    value.zero_()
        network.update_targets(tau=1.0)


def prime(args: Args, learner: Learner, folder: Path, stop: ne.Stop) -> None:
    """Updates on what is in the buffer; the environment stands still."""
    started = time.time()
    acting = learner.arm.while_priming
    for update in range(1, args.priming_updates + 1):
        learner.update(acting)
        if acting:
            learner.round(args.learning_starts + update)
        if update % args.loss_frequency == 0:
            write_losses(learner, folder, args.learning_starts)
        if stop.signal:
            print("stopped while priming, from which no run continues")
            raise SystemExit(0)
    reset_part(learner.agent, learner.arm.reset_primed)
    speed = args.priming_updates / max(time.time() - started, 1e-9)
    print(f"primed with {args.priming_updates:,} updates, {speed:.0f} per second")


def hand_over(args: Args, learner: Learner, env, folder: Path, stop: ne.Stop) -> None:
    """Rows of handed.csv, whose `step` counts updates: is it the data, or the networks?"""
    buffer = learner.buffer
    device = buffer.data.device
    fresh = Learner(replace(args, arm="td3"), buffer.n_obs, buffer.n_act, device, buffer)
    last = learner.progress.updates
    rows = []
    for update in range(1, last + 1):
        fresh.update()
        if update % args.eval_frequency == 0 or update == last:
            rows.append(evaluate(args, fresh, env, update))
        if stop.signal:
            print(f"stopped while handing over, which --resume {folder} does anew")
            raise SystemExit(0)
    for row in rows:  # only once it is whole
        fresh.progress.write(folder / "handed.csv", row)


def main() -> None:
    # --- setup ---
    args, checkpoint = parse_args(Args)
    args.run_dir = args.run_dir or f"runs/priming/{args.arm}_seed{args.seed}"
    device = ne.set_up(args)
    noise_seed = np.random.SeedSequence(args.seed).generate_state(4).tolist()[1]
    noise_rng = np.random.default_rng(noise_seed)
    env = ne.make_env(args.env_id)
    eval_env = ne.make_env(args.env_id)
    n_obs = env.observation_space.shape[0]
    n_act = env.action_space.shape[0]
    learner = Learner(args, n_obs, n_act, device)
    agent, buffer, progress = learner.agent, learner.buffer, learner.progress
    parts = (agent, buffer, progress, noise_rng, [env])  # all that a resumed run needs
    start = 0
    obs, _ = env.reset(seed=args.seed)
    if checkpoint is not None:
        start = checkpoint["step"]
        ne.restore(parts, checkpoint.pop("parts"))
        obs, _ = env.reset()
    folder, lock = ne.open_folder(args, checkpoint, args.env_id)
    log = ne.Log(args, folder, start)
    stop = ne.Stop()
    print(f"{args.env_id}, {args.arm}, seed {args.seed}, {device}: {folder}")

    # --- the loop ---
    saved = start
    started = time.time()
    last = args.total_timesteps
    updates_before = args.priming_updates if learner.arm.while_priming else 0
    for step in range(start + 1, last + 1):
        # act
        if step <= args.learning_starts:
            action = noise_rng.uniform(-1, 1, n_act)
        else:
            noise = noise_rng.normal(0, args.exploration_noise, n_act)
            action = agent.actor.act(obs) + noise
        action = action.clip(-1, 1).astype(np.float32)

        # update
        updates = args.replay_ratio if step > args.learning_starts else 0
        for _ in range(updates):
            learner.update()
            if progress.updates % args.loss_frequency == 0:
                write_losses(learner, folder, step)

        # step and store
        ne.require_finite(step, observation=obs, action=action)
        next_obs, reward, terminated, truncated, info = env.step(action)
        ne.require_finite(step, observation=next_obs, reward=reward)
        buffer.add(obs, action, next_obs, reward, terminated)
        obs = next_obs
        ended = terminated or truncated
        if ended:
            progress.returns.append(float(info["episode"]["r"]))

        # rounds, resets, priming
        if step > args.learning_starts:
            learner.round(step + updates_before)
        if learner.method == "reset" and step % learner.args.reset_interval == 0 and step < last:
            td3.reset(agent)
        if step == args.learning_starts:
            write_probe(args, learner, eval_env, folder, "before", step)
            prime(args, learner, folder, stop)
            write_probe(args, learner, eval_env, folder, "after", step)

        # evaluate
        if step % args.eval_frequency == 0 or step == last:
            row = evaluate(args, learner, eval_env, step)
            ne.write_row(folder, row)
            for key, value in row.items():
                log.scalar(key, value, step)

        # episode end; no environment can be saved inside an episode
        if ended and step < last:
            if stop.signal or step - saved >= args.checkpoint_frequency:
                ne.save(folder, args, checkpoint, step, parts)
                saved = step
            if stop.signal:
                log.close()
                stop.leave(step, folder)
            obs, _ = env.reset()

    write_probe(args, learner, eval_env, folder, "end", step)
    if args.hand_over:
        hand_over(args, learner, eval_env, folder, stop)
    ne.save(folder, args, checkpoint, step, parts, finished=True)
    log.close()
    print(f"finished: {folder}, {(step - start) / (time.time() - started):.0f} steps/s")


if __name__ == "__main__":
    as_script(main)
