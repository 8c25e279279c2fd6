"""DrQ-v2 and rivals of Neuroplastic Expansion on it, continuous control from pixels.

Paper: Neuroplastic Expansion in Deep Reinforcement Learning, arXiv 2410.07994.
       §, Eq. and Table refer to it; docs/ne_drq_dmc.md says what each method does.
Run:   python -m baselines.drq_dmc --method redo    (--help lists all flags)
       in the root of the repository, on a GPU, as ne_drq_dmc.py
With --method none it is DrQ-v2, and ne_drq_dmc.py without NE (--initial-density 1
--review-floor 1) is bit-equal to it. The agent here is the witness for that: its layers and
steps are plain. The losses, and what is not the agent's, are imported from that script.
"""

import copy
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python baselines/NAME.py

import ne_drq_dmc
import utils_topology as topology
from baselines.td3_continuous import MLP
from ne_drq_dmc import (
    TRUNK,
    Batch,
    DrQArgs,
    Encoder,
    Log,
    PixelEnv,
    Policy,
    Progress,
    ReplayBuffer,
    RunArgs,
    Stop,
    as_script,
    check_steps,
    die,
    fast_update,
    measure,
    open_folder,
    orthogonal,
    parse_args,
    require_finite,
    restore,
    save,
    scale_to_task,
    set_up,
    write_row,
)

Method = Literal["none", "reset", "redo", "layer-norm", "injection"]


@dataclass
class MethodArgs:
    """A rival of NE, on the MLP heads, and its flags."""

    method: Method = "none"  # what acts on DrQ-v2; none: DrQ-v2
    reset_interval: int = 200_000  # reset: steps between two (Nikishin et al. 2022)
    redo_interval: int = 1_000  # redo: updates between two (Sokar et al. 2023)
    redo_tau: float = 0.1  # redo: dormant is a score (Eq. 1) up to this
    injection_step: int | None = None  # injection (Nikishin et al. 2024); default: half the run


@dataclass
class Args(MethodArgs, DrQArgs, RunArgs):
    """DrQ-v2 and rivals of Neuroplastic Expansion (arXiv 2410.07994) on it."""

    exp_name: str = "drq_dmc"  # part of the run's name


# --- networks -----------------------------------------------------------------
def make_trunk(n_features: int) -> nn.Sequential:
    """(B, features) -> (B, TRUNK)."""
    return nn.Sequential(nn.Linear(n_features, TRUNK), nn.LayerNorm(TRUNK), nn.Tanh())


def make_head(args: Args, sizes: list[int]) -> MLP:
    return MLP(sizes, "layer-norm" if args.method == "layer-norm" else "none")


class Actor(nn.Module):
    """Deterministic tanh policy: (B, features) -> (B, act) in [-1, 1]."""

    def __init__(self, args: Args, n_features: int, n_act: int):
        super().__init__()
        sizes = [TRUNK, args.hidden_dim, args.hidden_dim, n_act]
        self.trunk = make_trunk(n_features)
        self.heads = nn.ModuleList([make_head(args, sizes)])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.heads[0](self.trunk(features)))


class Critic(nn.Module):
    """Two action-value functions on one trunk: (B, features), (B, act) -> (B,), (B,)."""

    def __init__(self, args: Args, n_features: int, n_act: int):
        super().__init__()
        sizes = [TRUNK + n_act, args.hidden_dim, args.hidden_dim, 1]
        self.trunk = make_trunk(n_features)
        self.heads = nn.ModuleList(make_head(args, sizes) for _ in range(2))

    def forward(self, features: torch.Tensor, actions: torch.Tensor):
        x = torch.cat((self.trunk(features), actions), dim=1)  # (B, TRUNK + act)
        q_1 = self.heads[0](x)[:, 0]
        q_2 = self.heads[1](x)[:, 0]
        return q_1, q_2


# --- agent: DrQ-v2 ------------------------------------------------------------
class Network:
    """What one optimiser trains, the actor or the critic, and the critic's target."""

    def __init__(self, module: Actor | Critic, target: Critic | None, learning_rate: float):
        self.module = module
        self.target = target
        self.mlps = module.heads
        self.params = list(module.trunk.parameters())
        for head in module.heads:
            self.params += [*head.layers.parameters(), *head.norms.parameters()]
        self.optimizer = topology.Adam(self.params, learning_rate)

    def step(self, gradients: tuple[torch.Tensor, ...]) -> None:
        self.optimizer.apply(gradients)

    @torch.no_grad()
    def update_targets(self, tau: float) -> None:
        """Polyak averaging: target <- (1 - tau) * target + tau * online."""
        targets = self.target.parameters()
        for p, target in zip(self.module.parameters(), targets, strict=True):
            target.lerp_(p, tau)

    def density(self) -> float:
        return 1.0


class Agent(ne_drq_dmc.Agent):
    """The losses of DrQ-v2 on plain layers."""

    def __init__(self, args: Args, n_act: int, method_seed: int, device):
        encoder = Encoder(args)
        Policy.__init__(self, encoder, Actor(args, encoder.n_features, n_act))
        self.args = args
        # of all that a method draws: it must not shift exploration noise and batches
        self.rng = torch.Generator().manual_seed(method_seed)
        self.critic = Critic(args, encoder.n_features, n_act)
        self.apply(orthogonal)
        if args.method == "injection":
            for head in self.critic.heads:  # what is in them until then is of no account
                head.frozen = copy.deepcopy(head.layers)
                head.copied = copy.deepcopy(head.layers)
        self.target_critic = copy.deepcopy(self.critic)
        self.register_buffer("stddev", torch.tensor(args.stddev[0]))  # of the action noise
        self.to(device)
        self.encoder.to(memory_format=torch.channels_last)
        self.networks = {
            "actor": Network(self.actor, None, args.learning_rate),
            "critic": Network(self.critic, self.target_critic, args.learning_rate),
        }
        self.encoder_optimizer = topology.Adam(list(encoder.parameters()), args.learning_rate)
        self.optimizers = [network.optimizer for network in self.networks.values()]
        self.optimizers.append(self.encoder_optimizer)


# --- methods, on the heads ----------------------------------------------------
def draw(layer: nn.Linear, rng: torch.Generator) -> torch.Tensor:
    """A weight (out, in), as `orthogonal` draws it; the bias is 0."""
    weight = torch.empty(layer.weight.shape)
    nn.init.orthogonal_(weight, generator=rng)
    return weight.to(layer.weight.device)


@torch.no_grad()
def draw_all(head: MLP, optimizer: torch.optim.Adam, rng: torch.Generator) -> None:
    """Draws the layers that learn and zeroes Adam's state of them, step counters too."""
    for layer in head.layers:
        layer.weight.copy_(draw(layer, rng))
        layer.bias.zero_()
        for p in (layer.weight, layer.bias):
            for value in optimizer.state[p].values():
                value.zero_()


def reset(agent: Agent) -> None:
    """Reset (Nikishin et al. 2022): heads, their targets and Adam's state start anew."""
    for network in agent.networks.values():
        for head in network.mlps:
            draw_all(head, network.optimizer, agent.rng)
    agent.target_critic.heads.load_state_dict(agent.critic.heads.state_dict())


@torch.no_grad()
def start_anew(head: MLP, chosen: list[torch.Tensor], optimizer, rng: torch.Generator) -> None:
    """Draws what enters the chosen neurons, zeroes what leaves them; Adam's moments are 0.

    Args:
        chosen: boolean (n,) of each hidden layer.
    """
    for layer, neurons in zip(head.layers[:-1], chosen, strict=True):
        layer.weight[neurons] = draw(layer, rng)[neurons]
        layer.bias[neurons] = 0.0
        for p in (layer.weight, layer.bias):
            optimizer.state[p]["exp_avg"][neurons] = 0.0
            optimizer.state[p]["exp_avg_sq"][neurons] = 0.0
    # afterwards, so that 0 wins where the two overlap
    for layer, neurons in zip(head.layers[1:], chosen, strict=True):
        state = optimizer.state[layer.weight]
        for values in (layer.weight, state["exp_avg"], state["exp_avg_sq"]):
            values[:, neurons] = 0.0


def redo(agent: Agent, batch: Batch) -> None:
    """ReDo (Sokar et al. 2023): dormant neurons (Eq. 1) start anew; the targets stay."""
    hidden_of = agent.hidden(batch)
    for name, network in agent.networks.items():
        for head, hidden in zip(network.mlps, hidden_of[name], strict=True):
            scores = [topology.dormancy_scores(h) for h in hidden]  # [(n,), ...]
            dormant = [score <= agent.args.redo_tau for score in scores]
            start_anew(head, dormant, network.optimizer, agent.rng)


def inject(agent: Agent) -> None:
    """Plasticity Injection (Nikishin et al. 2024): Q heads h(x) become h(x) + h_1(x) - h_2(x).

    h keeps its weights, h_2 those that h_1 starts from, and Adam starts anew with h_1. A
    target has an h of its own, which goes on following, and the same h_1 and h_2.
    """
    heads = agent.critic.heads
    targets = agent.target_critic.heads
    for head in [*heads, *targets]:
        head.frozen.load_state_dict(head.layers.state_dict())
        head.injected = True
    for head, target in zip(heads, targets, strict=True):
        draw_all(head, agent.networks["critic"].optimizer, agent.rng)
        fresh = head.layers.state_dict()
        for layers in (head.copied, target.layers, target.copied):
            layers.load_state_dict(fresh)


# --- training -----------------------------------------------------------------
def check_method(args: Args) -> None:
    """Raises: SystemExit(2) for a flag that needs another method, or does not fit the run."""
    for flag in fields(MethodArgs):
        method = flag.name.split("_")[0]
        given = getattr(args, flag.name) != flag.default
        if given and method not in ("method", args.method):
            name = "--" + flag.name.replace("_", "-")
            die(f"{name} needs --method {method}, got --method {args.method}")
    if args.method == "injection" and args.injection_step is None:
        half = args.total_timesteps // args.action_repeat // 2
        args.injection_step = max(1, half) * args.action_repeat
    if args.method == "injection" and args.injection_step > args.total_timesteps:
        last = args.total_timesteps
        die(f"--injection-step must be at most {last}, got {args.injection_step}")
    in_steps = {"reset": ["reset_interval"], "injection": ["injection_step"]}
    check_steps(args, *in_steps.get(args.method, []))


def main() -> None:
    # --- setup ---
    args, checkpoint = parse_args(Args)
    scale_to_task(args)
    check_method(args)
    device = set_up(args)
    seeds = np.random.SeedSequence(args.seed).generate_state(4).tolist()
    weight_seed, noise_seed, batch_seed, method_seed = seeds
    torch.manual_seed(weight_seed)
    noise_rng = np.random.default_rng(noise_seed)
    env = PixelEnv(args)
    eval_env = PixelEnv(args)
    agent = Agent(args, env.n_act, method_seed, device)
    buffer = ReplayBuffer(args, env.n_act, batch_seed, device)
    progress = Progress()
    parts = (agent, buffer, progress, noise_rng, [env])  # all that a resumed run needs
    start = 0
    if checkpoint is not None:
        start = checkpoint["step"]
        restore(parts, checkpoint.pop("parts"))
    folder, lock = open_folder(args, checkpoint, args.env_id)
    log = Log(args, folder, start)
    stop = Stop()
    print(f"{args.env_id}, seed {args.seed}, {device}: {folder}\nmethod: {args.method}")
    print(f"rendering: {env.backend}")
    update = fast_update(args, agent, buffer)
    obs = env.reset()
    buffer.start_episode(obs)

    # --- the loop ---
    saved = start
    started = time.time()
    last = args.total_timesteps
    repeat = args.action_repeat
    steps = range(start + repeat, last + 1, repeat)
    for step in tqdm(steps, initial=start // repeat, total=last // repeat, disable=None):
        # act
        agent_step = step // repeat
        stddev = np.interp(agent_step, (0, args.stddev_duration), args.stddev)
        if step <= args.learning_starts:
            action = noise_rng.uniform(-1, 1, env.n_act)
        else:
            action = agent.act(obs) + noise_rng.normal(0, stddev, env.n_act)
        action = action.clip(-1, 1).astype(np.float32)
        require_finite(step, action=action)

        # update; before the environment steps, so that on CUDA both run at the same time
        due = step > args.learning_starts and agent_step % args.update_frequency == 0
        updates = args.replay_ratio if due else 0
        for _ in range(updates):
            progress.updates += 1
            agent.stddev.fill_(stddev)
            batch = buffer.sample(args.batch_size)
            # critic and encoder, then actor and targets
            losses = update(batch)
            progress.losses = {key: value.clone() for key, value in losses.items()}
            if args.method == "redo" and progress.updates % args.redo_interval == 0:
                redo(agent, batch)

        # step and store
        obs, reward, discount, ended = env.step(action)
        require_finite(step, reward=reward)
        buffer.add(obs, action, reward, discount)
        if ended:
            progress.returns.append(env.episodic_return)
            log.scalar("charts/episodic_return", env.episodic_return, step)
            log.scalar("charts/episodic_length", env.episodic_length, step)

        # rivals that count steps
        if args.method == "reset" and step % args.reset_interval == 0 and step < last:
            reset(agent)
        if args.method == "injection" and step == args.injection_step:
            inject(agent)
            if args.compile:  # what is compiled is the networks before
                del agent.critic_gradients, agent.actor_gradients
            update = fast_update(args, agent, buffer)

        # evaluate and log
        if step % 1_000 == 0:
            log.scalar("charts/SPS", (step - start) / (time.time() - started), step)
            for key, value in progress.losses.items():
                log.scalar(f"losses/{key}", value, step)
        if step % args.eval_frequency == 0 or step == last:
            row = measure(agent, buffer, progress, eval_env, step)
            write_row(folder, row)
            log.row(row, step)
            tqdm.write(f"step {step:,}: return {row['eval/return_mean']:,.1f}")

        # episode end; no environment can be saved inside an episode
        if ended and step < last:
            if stop.signal or step - saved >= args.checkpoint_frequency:
                save(folder, args, checkpoint, step, parts)
                saved = step
            if stop.signal:
                log.close()
                stop.leave(step, folder)
            obs = env.reset()
            buffer.start_episode(obs)

    save(folder, args, checkpoint, step, parts, finished=True)
    log.close()
    print(f"finished: {folder}, {(step - start) / (time.time() - started):.0f} steps/s")


if __name__ == "__main__":
    as_script(main)
