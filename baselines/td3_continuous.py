"""TD3 and rivals of Neuroplastic Expansion on it, continuous control from states.

Paper: Neuroplastic Expansion in Deep Reinforcement Learning, arXiv 2410.07994.
       §, Eq. and Table refer to it; docs/baselines.md says what each method does.
Run:   python -m baselines.td3_continuous --method redo    (--help lists all flags)
       in the root of the repository; about as fast as ne_td3_continuous.py
With --method none it is TD3, and ne_td3_continuous.py without NE (--initial-density 1
--review-floor 1) is bit-equal to it. The agent here is the witness for that: it has plain
layers of its own. What is not the agent's or a method's is imported from that script.
"""

import copy
import math
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python baselines/NAME.py

import utils_topology as topology
from ne_td3_continuous import (
    Batch,
    Log,
    Progress,
    ReplayBuffer,
    RunArgs,
    Stop,
    TD3Args,
    as_script,
    die,
    fast_updates,
    make_env,
    measure,
    open_folder,
    parse_args,
    require_finite,
    restore,
    save,
    set_up,
    write_row,
)

Method = Literal["none", "reset", "redo", "regrama", "layer-norm", "injection", "recency"]


@dataclass
class MethodArgs:
    """A rival of NE, and its flags."""

    method: Method = "none"  # what acts on TD3; none: TD3
    reset_interval: int = 200_000  # reset: steps between two (Nikishin et al. 2022)
    redo_interval: int = 1_000  # redo: updates between two (Sokar et al. 2023)
    redo_tau: float = 0.1  # redo: a neuron is dormant at a score (Eq. 1) up to this
    regrama_interval: int = 1_000  # regrama: updates between two (Liu et al. 2025, their code)
    regrama_tau: float = 0.1  # regrama: inactive is a score up to this (their README)
    injection_step: int | None = None  # injection (Nikishin et al. 2024); default: half the run
    recency_horizon: int = 80_000  # recency: weight max(0.1, 1 - age / this) (Wu et al. 2026)


@dataclass
class Args(MethodArgs, TD3Args, RunArgs):
    """TD3 (Fujimoto et al. 2018) and rivals of Neuroplastic Expansion on it."""

    exp_name: str = "td3_continuous"  # part of the run's name


# --- networks -----------------------------------------------------------------
class MLP(nn.Module):
    """Hidden layers (linear, LayerNorm if asked for, ReLU), then a linear layer.

    After a plasticity injection `layers` is theta_1, which learns, `frozen` is theta, which
    it was until then, and `copied` is theta_2, what theta_1 started from.
    """

    counts = {"planned": 0, "grown": 0, "pruned": 0}  # as NE's, for the same columns

    def __init__(self, sizes: list[int], method: str):
        super().__init__()
        self.layers = nn.ModuleList()
        for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
            self.layers.append(nn.Linear(n_in, n_out))
        norm = nn.LayerNorm if method == "layer-norm" else nn.Identity
        self.norms = nn.ModuleList()
        for n in sizes[1:-1]:
            self.norms.append(norm(n))
        self.injected = False
        if method == "injection":  # what is in them until then is of no account
            self.frozen = copy.deepcopy(self.layers)
            self.copied = copy.deepcopy(self.layers)

    def activations(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, sizes[0]) -> [(B, n), ...] of the hidden layers that learn."""
        hidden = []
        for layer, norm in zip(self.layers, self.norms, strict=False):  # not the last
            x = F.relu(norm(layer(x)))
            hidden.append(x)
        return hidden

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.activations(x)
        y = self.layers[-1](hidden[-1])  # (B, sizes[-1])
        if self.injected:
            return plain(self.frozen, x) + (y - plain(self.copied, x))
        return y

    def get_extra_state(self) -> bool:
        return self.injected

    def set_extra_state(self, injected: bool) -> None:
        self.injected = injected


def plain(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    """Linear layers with ReLU between them."""
    for layer in layers[:-1]:
        x = F.relu(layer(x))
    return layers[-1](x)


class Actor(MLP):
    """Deterministic tanh policy: (B, obs) -> (B, act) in [-1, 1]."""

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(obs))

    @torch.no_grad()
    def hidden(self, batch: Batch) -> list[torch.Tensor]:
        return self.activations(batch.obs)

    @torch.inference_mode()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """(obs,) -> (act,)."""
        device = self.layers[0].weight.device
        row = torch.as_tensor(obs, dtype=torch.float32, device=device)
        actions = self(row[None])  # (1, act)
        return actions[0].cpu().numpy()


class Critic(MLP):
    """One action-value function: (B, obs + act) -> (B,)."""

    def forward(self, obs_actions: torch.Tensor) -> torch.Tensor:
        return super().forward(obs_actions)[:, 0]

    @torch.no_grad()
    def hidden(self, batch: Batch) -> list[torch.Tensor]:
        return self.activations(batch.obs_actions)


# --- agent: TD3 ---------------------------------------------------------------
class Network:
    """What one optimiser trains, the actor or both critics, and their targets."""

    def __init__(self, mlps: list[MLP], targets: list[MLP], learning_rate: float):
        self.mlps = mlps
        self.targets = targets
        self.params = []
        for mlp in mlps:
            self.params += mlp.layers.parameters()
            self.params += mlp.norms.parameters()
        self.optimizer = topology.Adam(self.params, learning_rate)

    def step(self, gradients: tuple[torch.Tensor, ...]) -> None:
        """One step of Adam; `gradients` are those of `params`."""
        self.optimizer.apply(gradients)

    @torch.no_grad()
    def update_targets(self, tau: float) -> None:
        """Polyak averaging: target <- (1 - tau) * target + tau * online."""
        for mlp, target in zip(self.mlps, self.targets, strict=True):
            for p, target_p in zip(mlp.parameters(), target.parameters(), strict=True):
                target_p.lerp_(p, tau)

    def density(self) -> float:
        return 1.0

    def hidden(self, batch: Batch) -> list[torch.Tensor]:
        """Activations [(B, n), ...] of the hidden layers of all MLPs."""
        return [h for mlp in self.mlps for h in mlp.hidden(batch)]


class Agent(nn.Module):
    """Actor, twin critics and their targets; both updates are functions of a batch."""

    def __init__(self, args: Args, n_obs: int, n_act: int, method_seed: int, device):
        super().__init__()
        self.args = args
        # of all that a method draws: it must not shift exploration noise and batches
        self.rng = torch.Generator().manual_seed(method_seed)
        actor_sizes = [n_obs, *args.actor_hidden, n_act]
        critic_sizes = [n_obs + n_act, *args.critic_hidden, 1]
        self.actor = Actor(actor_sizes, args.method)
        self.critic_1 = Critic(critic_sizes, args.method)
        self.critic_2 = Critic(critic_sizes, args.method)
        self.target_actor = copy.deepcopy(self.actor)
        self.target_critic_1 = copy.deepcopy(self.critic_1)
        self.target_critic_2 = copy.deepcopy(self.critic_2)
        self.to(device)
        critics = [self.critic_1, self.critic_2]
        target_critics = [self.target_critic_1, self.target_critic_2]
        self.networks = {
            "actor": Network([self.actor], [self.target_actor], args.learning_rate),
            "critic": Network(critics, target_critics, args.learning_rate),
        }
        self.optimizers = [network.optimizer for network in self.networks.values()]

    def critic_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Eq. 3 with TD3's target smoothing and clipped double Q. Returns: loss, mean Q."""
        args = self.args
        with torch.no_grad():
            noise = args.policy_noise * batch.noise  # (B, act)
            noise = noise.clamp(-args.noise_clip, args.noise_clip)
            next_actions = self.target_actor(batch.next_obs) + noise
            next_actions = next_actions.clamp(-1, 1)  # (B, act)
            next_obs_actions = torch.cat((batch.next_obs, next_actions), dim=1)
            next_q_1 = self.target_critic_1(next_obs_actions)  # (B,)
            next_q_2 = self.target_critic_2(next_obs_actions)  # (B,)
            next_q = torch.minimum(next_q_1, next_q_2)
            discounts = args.gamma * (1 - batch.terminated)  # (B,)
            target_q = batch.rewards + discounts * next_q  # (B,)
        q_1 = self.critic_1(batch.obs_actions)  # (B,)
        q_2 = self.critic_2(batch.obs_actions)  # (B,)
        loss = F.mse_loss(q_1, target_q) + F.mse_loss(q_2, target_q)  # ()
        return loss, q_1.mean()

    def actor_loss(self, batch: Batch) -> torch.Tensor:
        """Eq. 4, deterministic policy gradient: minus the mean Q1 of its own actions."""
        actions = self.actor(batch.obs)  # (B, act)
        obs_actions = torch.cat((batch.obs, actions), dim=1)  # (B, obs + act)
        return -self.critic_1(obs_actions).mean()  # ()

    def critic_gradients(self, batch: Batch):
        """Returns: loss, mean Q, and the gradients of the critics' parameters."""
        loss, mean_q = self.critic_loss(batch)
        gradients = torch.autograd.grad(loss, self.networks["critic"].params)
        return loss.detach(), mean_q.detach(), gradients

    def actor_gradients(self, batch: Batch):
        """Returns: loss and the gradients of the actor's parameters."""
        loss = self.actor_loss(batch)
        gradients = torch.autograd.grad(loss, self.networks["actor"].params)
        return loss.detach(), gradients

    def update_critic(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns loss and mean Q before the step."""
        loss, mean_q, gradients = self.critic_gradients(batch)
        self.networks["critic"].step(gradients)
        return loss, mean_q

    def update_actor(self, batch: Batch) -> torch.Tensor:
        """One step of the policy, then of all targets. Returns the loss before."""
        loss, gradients = self.actor_gradients(batch)
        self.networks["actor"].step(gradients)
        for network in self.networks.values():
            network.update_targets(self.args.tau)
        return loss


# --- methods ------------------------------------------------------------------
def draw(layer: nn.Linear, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (out, in) and a bias (out,), as nn.Linear draws them."""
    bound = 1 / math.sqrt(layer.in_features)
    weight = torch.empty(layer.weight.shape).uniform_(-bound, bound, generator=rng)
    bias = torch.empty(layer.bias.shape).uniform_(-bound, bound, generator=rng)
    return weight.to(layer.weight.device), bias.to(layer.bias.device)


@torch.no_grad()
def draw_all(network: Network, rng: torch.Generator) -> None:
    """Draws the layers that learn and zeroes Adam's state, step counters too."""
    for mlp in network.mlps:
        for layer in mlp.layers:
            weight, bias = draw(layer, rng)
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    for state in network.optimizer.state.values():
        for value in state.values():
            value.zero_()


def reset(agent: Agent) -> None:
    """Reset (Nikishin et al. 2022): networks, targets and Adam's state start anew."""
    for network in agent.networks.values():
        draw_all(network, agent.rng)
        network.update_targets(tau=1.0)


@torch.no_grad()
def start_anew(mlp: MLP, chosen: list[torch.Tensor], optimizer, rng: torch.Generator) -> None:
    """Draws what enters the chosen neurons, zeroes what leaves them; Adam's moments are 0.

    Args:
        chosen: boolean (n,) of each hidden layer.
    """
    for layer, neurons in zip(mlp.layers[:-1], chosen, strict=True):
        weight, bias = draw(layer, rng)
        layer.weight[neurons] = weight[neurons]
        layer.bias[neurons] = bias[neurons]
        for p in (layer.weight, layer.bias):
            optimizer.state[p]["exp_avg"][neurons] = 0.0
            optimizer.state[p]["exp_avg_sq"][neurons] = 0.0
    # afterwards, so that 0 wins where the two overlap
    for layer, neurons in zip(mlp.layers[1:], chosen, strict=True):
        state = optimizer.state[layer.weight]
        for values in (layer.weight, state["exp_avg"], state["exp_avg_sq"]):
            values[:, neurons] = 0.0


def redo(agent: Agent, batch: Batch) -> None:
    """ReDo (Sokar et al. 2023): dormant neurons (Eq. 1) start anew; the targets stay."""
    for network in agent.networks.values():
        for mlp in network.mlps:
            dormant = []
            for h in mlp.hidden(batch):
                scores = topology.dormancy_scores(h)  # (n,)
                dormant.append(scores <= agent.args.redo_tau)
            start_anew(mlp, dormant, network.optimizer, agent.rng)


def neuron_gradients(mlp: MLP, loss_of, batch: Batch) -> list[torch.Tensor]:
    """Gradients [(B, n), ...] of a loss, with respect to what enters each ReLU of `mlp`.

    Behind the ReLU, the gradient of a dead neuron would not be 0.

    Args:
        loss_of: a function of a batch that calls `mlp` once.
    """
    entering = []
    handles = []
    for norm in mlp.norms:
        hook = norm.register_forward_hook(lambda norm, x, y: entering.append(y))
        handles.append(hook)
    loss = loss_of(batch)
    for handle in handles:
        handle.remove()
    return torch.autograd.grad(loss, entering)


def regrama(agent: Agent, batch: Batch) -> None:
    """ReGraMa (Liu et al. 2025, arXiv 2505.24061): ReDo with the score of a gradient.

    A neuron's score is its mean |gradient| over the batch, over the mean of that in its
    layer; the loss is the critics' for critics, the actor's for the actor. Interval and
    threshold are those of the authors' code and README; the actor, the zeroed outgoing
    weights and moments are ReDo's (ours), the code has none of the three.
    """

    def critic_loss(batch: Batch) -> torch.Tensor:
        return agent.critic_loss(batch)[0]

    losses = {"actor": agent.actor_loss, "critic": critic_loss}
    for name, network in agent.networks.items():
        for mlp in network.mlps:
            inactive = []
            for gradient in neuron_gradients(mlp, losses[name], batch):
                scores = topology.dormancy_scores(gradient)  # (n,)
                inactive.append(scores <= agent.args.regrama_tau)
            start_anew(mlp, inactive, network.optimizer, agent.rng)


@torch.no_grad()
def inject(agent: Agent) -> None:
    """Plasticity Injection (Nikishin et al. 2024): h(x) becomes h(x) + h_1(x) - h_2(x).

    h keeps its weights, h_2 those that h_1 starts from, and Adam starts anew with h_1. A
    target has an h of its own, which goes on following, and the same h_1 and h_2.
    """
    for network in agent.networks.values():
        for mlp in network.mlps + network.targets:
            mlp.frozen.load_state_dict(mlp.layers.state_dict())
            mlp.injected = True
        draw_all(network, agent.rng)
        for mlp, target in zip(network.mlps, network.targets, strict=True):
            fresh = mlp.layers.state_dict()
            for layers in (mlp.copied, target.layers, target.copied):
                layers.load_state_dict(fresh)


def recency_weights(args: Args, device: torch.device) -> torch.Tensor:
    """Sums (buffer size,) of the weights of ages 0, 1, ...; 0 is the newest transition."""
    age = torch.arange(args.buffer_size, dtype=torch.float64, device=device)
    weights = 1 - age / args.recency_horizon
    return weights.clamp_min(0.1).cumsum(0)


def sample_recent(buffer: ReplayBuffer, size: int, sums: torch.Tensor) -> Batch:
    """A batch of transitions drawn by the weights of their ages."""
    sums = sums[: buffer.size]
    u = torch.rand(size, generator=buffer.rng, dtype=sums.dtype, device=sums.device)
    age = torch.searchsorted(sums, u * sums[-1], right=True)
    age = age.clamp_max(buffer.size - 1)  # (B,), for a u that rounding takes to the end
    return buffer.batch((buffer.position - 1 - age) % len(buffer.data), buffer.rng)


# --- flags and metrics --------------------------------------------------------
def check_method(args: Args) -> None:
    """Fills in --injection-step. Raises: SystemExit(2) for a flag of another method."""
    for flag in fields(MethodArgs):
        method = flag.name.split("_")[0]
        given = getattr(args, flag.name) != flag.default
        if given and method not in ("method", args.method):
            name = "--" + flag.name.replace("_", "-")
            die(f"{name} needs --method {method}, got --method {args.method}")
    if args.method == "injection":
        if args.injection_step is None:
            args.injection_step = max(1, args.total_timesteps // 2)
        if args.injection_step > args.total_timesteps:
            last = args.total_timesteps
            die(f"--injection-step must be at most {last}, got {args.injection_step}")


def main() -> None:
    # --- setup ---
    args, checkpoint = parse_args(Args)
    check_method(args)
    device = set_up(args)
    seeds = np.random.SeedSequence(args.seed).generate_state(4).tolist()
    weight_seed, noise_seed, batch_seed, method_seed = seeds
    torch.manual_seed(weight_seed)
    noise_rng = np.random.default_rng(noise_seed)
    env = make_env(args.env_id)
    eval_env = make_env(args.env_id)
    n_obs = env.observation_space.shape[0]
    n_act = env.action_space.shape[0]
    agent = Agent(args, n_obs, n_act, method_seed, device)
    buffer = ReplayBuffer(args.buffer_size, n_obs, n_act, batch_seed, device)
    progress = Progress()
    parts = (agent, buffer, progress, noise_rng, [env])  # all that a resumed run needs
    start = 0
    obs, _ = env.reset(seed=args.seed)
    if checkpoint is not None:
        start = checkpoint["step"]
        restore(parts, checkpoint.pop("parts"))
        obs, _ = env.reset()
    folder, lock = open_folder(args, checkpoint, args.env_id)
    log = Log(args, folder, start)
    stop = Stop()
    print(f"{args.env_id}, seed {args.seed}, {device}: {folder}\nmethod: {args.method}")
    update_critic, update_actor = fast_updates(args, agent, buffer)
    weight_sums = recency_weights(args, device)

    # --- the loop ---
    saved = start
    started = time.time()
    last = args.total_timesteps
    for step in tqdm(range(start + 1, last + 1), initial=start, total=last, disable=None):
        # act
        if step <= args.learning_starts:
            action = noise_rng.uniform(-1, 1, n_act)
        else:
            noise = noise_rng.normal(0, args.exploration_noise, n_act)
            action = agent.actor.act(obs) + noise
        action = action.clip(-1, 1).astype(np.float32)

        # update; before the environment steps, so that on CUDA both run at the same time
        updates = args.replay_ratio if step > args.learning_starts else 0
        for _ in range(updates):
            progress.updates += 1
            if args.method == "recency":
                batch = sample_recent(buffer, args.batch_size, weight_sums)
            else:
                batch = buffer.sample(args.batch_size)
            # critic, then actor and targets
            losses = {}
            losses["qf_loss"], losses["qf_values"] = update_critic(batch)
            if progress.updates % args.policy_frequency == 0:
                losses["actor_loss"] = update_actor(batch)
            progress.losses |= {key: value.clone() for key, value in losses.items()}
            if args.method == "redo" and progress.updates % args.redo_interval == 0:
                redo(agent, batch)
            if args.method == "regrama" and progress.updates % args.regrama_interval == 0:
                regrama(agent, batch)

        # step and store
        require_finite(step, observation=obs, action=action)
        next_obs, reward, terminated, truncated, info = env.step(action)
        require_finite(step, observation=next_obs, reward=reward)
        buffer.add(obs, action, next_obs, reward, terminated)
        obs = next_obs
        ended = terminated or truncated
        if ended:
            episodic_return = float(info["episode"]["r"])
            progress.returns.append(episodic_return)
            log.scalar("charts/episodic_return", episodic_return, step)
            log.scalar("charts/episodic_length", info["episode"]["l"], step)

        # rivals that count environment steps
        if args.method == "reset" and step % args.reset_interval == 0 and step < last:
            reset(agent)
        if args.method == "injection" and step == args.injection_step:
            inject(agent)
            if args.compile:  # what is compiled is the networks before
                del agent.critic_gradients, agent.actor_gradients
            update_critic, update_actor = fast_updates(args, agent, buffer)

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
            obs, _ = env.reset()

    save(folder, args, checkpoint, step, parts, finished=True)
    log.close()
    print(f"finished: {folder}, {(step - start) / (time.time() - started):.0f} steps/s")


if __name__ == "__main__":
    as_script(main)
