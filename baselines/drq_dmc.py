"""DrQ-v2 and rivals of Neuroplastic Expansion on it, continuous control from pixels.

Paper: Neuroplastic Expansion in Deep Reinforcement Learning, arXiv 2410.07994.
       §, Eq. and Table refer to it; docs/ne_drq_dmc.md says what each method does.
Run:   python -m baselines.drq_dmc --method redo    (--help lists all flags)
       in the root of the repository, on a GPU, as ne_drq_dmc.py
With --method none it is DrQ-v2, and ne_drq_dmc.py without NE (--initial-density 1
--review-floor 1) is bit-equal to it. The agent here is the witness for that: it has plain
layers of its own. What is not the agent's or a method's is imported from that script.
"""

import contextlib
import copy
import itertools
import math
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python baselines/NAME.py

import utils_topology as topology
from ne_drq_dmc import (
    TRUNK,
    Batch,
    DrQArgs,
    Encoder,
    EnvironmentFault,
    PixelEnv,
    Policy,
    ReplayBuffer,
    Run,
    RunArgs,
    as_script,
    check_sizes,
    die,
    evaluate_postponed,
    fast_update,
    orthogonal,
    parse_args,
    policy_weights,
    require_whole_steps,
    restore,
    scale_to_task,
    set_up_torch,
)


@dataclass
class MethodArgs:
    """A rival of NE, on the MLP heads, and its flags."""

    method: Literal["none", "reset", "redo", "layer-norm", "injection"] = "none"
    """what acts on DrQ-v2; none: DrQ-v2"""
    reset_interval: int = 200_000
    """reset: frames between two (Nikishin et al. 2022)"""
    redo_interval: int = 1_000
    """redo: updates between two (Sokar et al. 2023)"""
    redo_tau: float = 0.1
    """redo: a neuron is dormant at a score (Eq. 1) of at most this"""
    injection_step: int | None = None
    """injection: frame of it (Nikishin et al. 2024); default: half the run"""


@dataclass
class Args(MethodArgs, DrQArgs, RunArgs):
    """All flags."""

    exp_name: str = "drq_dmc"


@dataclass
class Progress:
    """What a run has done so far."""

    updates: int = 0
    # returns of the episodes since the last evaluation
    returns: list[float] = field(default_factory=list)
    # of the last batch
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    # evaluations that are due, if the run is stopping: (row, weights of the policy)
    postponed: list[tuple[dict, dict]] = field(default_factory=list)


# --- networks -----------------------------------------------------------------
class Head(nn.Module):
    """Hidden layers (linear, LayerNorm if asked for, ReLU), then a linear layer.

    After a plasticity injection `layers` is theta_1, which learns, `frozen` is theta, which
    it was until then, and `copied` is theta_2, what theta_1 started from.
    """

    def __init__(self, sizes: list[int], layer_norm: bool):
        super().__init__()
        self.layers = nn.ModuleList()
        for n_in, n_out in itertools.pairwise(sizes):
            self.layers.append(nn.Linear(n_in, n_out))
        norm = nn.LayerNorm if layer_norm else nn.Identity
        self.norms = nn.ModuleList()
        for n in sizes[1:-1]:
            self.norms.append(norm(n))
        self.injected = False

    def make_room(self) -> None:
        """For an injection; what is in it until then is of no account."""
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


def make_trunk(n_features: int) -> nn.Sequential:
    """(B, features) -> (B, TRUNK)."""
    return nn.Sequential(nn.Linear(n_features, TRUNK), nn.LayerNorm(TRUNK), nn.Tanh())


class Actor(nn.Module):
    """Deterministic tanh policy: (B, features) -> (B, act) in [-1, 1]."""

    def __init__(self, args: Args, n_features: int, n_act: int):
        super().__init__()
        sizes = [TRUNK, args.hidden_dim, args.hidden_dim, n_act]
        self.trunk = make_trunk(n_features)
        head = Head(sizes, args.method == "layer-norm")
        self.heads = nn.ModuleList([head])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.heads[0](self.trunk(features)))


class Critic(nn.Module):
    """Two action-value functions on one trunk: (B, features), (B, act) -> (B,), (B,)."""

    def __init__(self, args: Args, n_features: int, n_act: int):
        super().__init__()
        sizes = [TRUNK + n_act, args.hidden_dim, args.hidden_dim, 1]
        self.trunk = make_trunk(n_features)
        self.heads = nn.ModuleList()
        for _ in range(2):
            self.heads.append(Head(sizes, args.method == "layer-norm"))

    def forward(self, features: torch.Tensor, actions: torch.Tensor):
        x = torch.cat((self.trunk(features), actions), dim=1)  # (B, TRUNK + act)
        q_1 = self.heads[0](x)[:, 0]
        q_2 = self.heads[1](x)[:, 0]
        return q_1, q_2


# --- agent: DrQ-v2 ------------------------------------------------------------
class Agent(Policy):
    """Encoder, actor, twin critics and their targets; the update is a function of a batch."""

    def __init__(self, args: Args, n_act: int, method_seed: int, device):
        encoder = Encoder(args)
        super().__init__(encoder, Actor(args, encoder.n_features, n_act))
        self.args = args
        # all that a method draws: it must not shift exploration noise and batches
        self.method_rng = torch.Generator().manual_seed(method_seed)
        self.critic = Critic(args, self.encoder.n_features, n_act)
        self.apply(orthogonal)
        if args.method == "injection":
            for head in self.critic.heads:
                head.make_room()
        self.target_critic = copy.deepcopy(self.critic)
        # of the action noise
        self.register_buffer("stddev", torch.tensor(args.stddev[0]))
        self.to(device)
        self.encoder.to(memory_format=torch.channels_last)
        self.params = {"encoder": list(self.encoder.parameters())}
        for name, module in (("actor", self.actor), ("critic", self.critic)):
            self.params[name] = list(module.trunk.parameters())
            for head in module.heads:
                self.params[name] += head.layers.parameters()
                self.params[name] += head.norms.parameters()
        self.optimizers = {}
        for name, params in self.params.items():
            self.optimizers[name] = topology.Adam(params, args.learning_rate)

    def precision(self):
        """For losses: bfloat16 where autocast holds that to be safe, if asked for."""
        if not self.args.bf16:
            return contextlib.nullcontext()
        device = self.stddev.device.type
        return torch.autocast(device, torch.bfloat16, cache_enabled=False)

    def noisy_actions(self, features: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """(B, features), (B, act) -> (B, act) in [-1, 1].

        The gradient passes the bounds as if there were none.
        """
        clip = self.args.noise_clip
        actions = self.actor(features) + (self.stddev * noise).clamp(-clip, clip)
        return actions + (actions.clamp(-1, 1) - actions).detach()

    def critic_gradients(self, batch: Batch):
        """Eq. 3 over n steps with clipped double Q; it trains the encoder, too.

        Returns: loss, mean Q, the features (B, features) of the observations without a
            graph, and the gradients of the encoder's and of the critic's parameters.
        """
        with self.precision():
            features = self.encoder.augmented(batch.obs, batch.shifts[:, 0])  # (B, features)
            with torch.no_grad():
                next_features = self.encoder.augmented(batch.next_obs, batch.shifts[:, 1])
                next_actions = self.noisy_actions(next_features, batch.noise[:, 0])
                next_q_1, next_q_2 = self.target_critic(next_features, next_actions)
                next_q = torch.minimum(next_q_1, next_q_2)  # (B,)
                target_q = batch.rewards + batch.discounts * next_q  # (B,)
            q_1, q_2 = self.critic(features, batch.actions)  # (B,), (B,)
            loss = F.mse_loss(q_1, target_q) + F.mse_loss(q_2, target_q)  # ()
        params = self.params["encoder"] + self.params["critic"]
        gradients = torch.autograd.grad(loss, params)
        of_encoder = gradients[: len(self.params["encoder"])]
        of_critic = gradients[len(self.params["encoder"]) :]
        return loss.detach(), q_1.mean().detach(), features.detach(), of_encoder, of_critic

    def actor_gradients(self, batch: Batch, features: torch.Tensor):
        """Eq. 4 with clipped double Q, on the features (B, features) of the critic's pass.

        Returns: loss and the gradients of the actor's parameters.
        """
        with self.precision():
            actions = self.noisy_actions(features, batch.noise[:, 1])  # (B, act)
            q_1, q_2 = self.critic(features, actions)  # (B,), (B,)
            loss = -torch.minimum(q_1, q_2).mean()  # ()
        gradients = torch.autograd.grad(loss, self.params["actor"])
        return loss.detach(), gradients

    def step(self, name: str, gradients: tuple[torch.Tensor, ...]) -> None:
        """One step of Adam."""
        in_layout = []  # of the parameters; the encoder's are channels last
        for p, gradient in zip(self.params[name], gradients, strict=True):
            in_layout.append(torch.empty_like(p).copy_(gradient))
        self.optimizers[name].apply(in_layout)

    def update(self, batch: Batch) -> dict[str, torch.Tensor]:
        """One step of critic and encoder, of the policy, and of the targets.

        Returns: the losses before.
        """
        qf_loss, mean_q, features, of_encoder, of_critic = self.critic_gradients(batch)
        self.step("critic", of_critic)
        self.step("encoder", of_encoder)
        actor_loss, of_actor = self.actor_gradients(batch, features)
        self.step("actor", of_actor)
        self.update_targets()
        return {"qf_loss": qf_loss, "qf_values": mean_q, "actor_loss": actor_loss}

    @torch.no_grad()
    def update_targets(self) -> None:
        """Polyak averaging: target <- (1 - tau) * target + tau * online."""
        targets = self.target_critic.parameters()
        for p, target in zip(self.critic.parameters(), targets, strict=True):
            target.lerp_(p, self.args.tau)

    @torch.no_grad()
    def hidden(self, batch: Batch) -> dict[str, list[list[torch.Tensor]]]:
        """Activations [(B, n), ...] of the hidden layers of each head of each network."""
        features = self.encoder.augmented(batch.obs, batch.shifts[:, 0])
        of_actor = self.actor.trunk(features)
        of_critic = torch.cat((self.critic.trunk(features), batch.actions), dim=1)
        return {
            "actor": [head.activations(of_actor) for head in self.actor.heads],
            "critic": [head.activations(of_critic) for head in self.critic.heads],
        }


# --- methods, on the heads ----------------------------------------------------
def draw(layer: nn.Linear, rng: torch.Generator) -> torch.Tensor:
    """A weight (out, in), as `orthogonal` draws it; the bias is 0."""
    weight = torch.empty(layer.weight.shape)
    nn.init.orthogonal_(weight, generator=rng)
    return weight.to(layer.weight.device)


@torch.no_grad()
def draw_all(head: Head, optimizer: torch.optim.Adam, rng: torch.Generator) -> None:
    """Draws the layers that learn and zeroes Adam's state of them, step counters too."""
    for layer in head.layers:
        layer.weight.copy_(draw(layer, rng))
        layer.bias.zero_()
        for p in (layer.weight, layer.bias):
            for value in optimizer.state[p].values():
                value.zero_()


def reset(agent: Agent) -> None:
    """Reset (Nikishin et al. 2022): heads, their targets and Adam's state start anew."""
    for name, module in (("actor", agent.actor), ("critic", agent.critic)):
        for head in module.heads:
            draw_all(head, agent.optimizers[name], agent.method_rng)
    agent.target_critic.heads.load_state_dict(agent.critic.heads.state_dict())


@torch.no_grad()
def start_anew(head: Head, chosen: list[torch.Tensor], optimizer, rng: torch.Generator) -> None:
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
    for name, module in (("actor", agent.actor), ("critic", agent.critic)):
        for head, hidden in zip(module.heads, hidden_of[name], strict=True):
            dormant = []
            for h in hidden:
                dormant.append(topology.dormancy_scores(h) <= agent.args.redo_tau)  # (n,)
            start_anew(head, dormant, agent.optimizers[name], agent.method_rng)


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
        draw_all(head, agent.optimizers["critic"], agent.method_rng)
        fresh = head.layers.state_dict()
        for layers in (head.copied, target.layers, target.copied):
            layers.load_state_dict(fresh)


# --- flags and metrics --------------------------------------------------------
def check_method(args: Args) -> None:
    """Raises: SystemExit(2) for a flag that needs another method, or does not fit the run."""
    for flag in fields(MethodArgs):
        value = getattr(args, flag.name)
        method = flag.name.split("_")[0]
        name = "--" + flag.name.replace("_", "-")
        if flag.name != "method" and value != flag.default and args.method != method:
            die(f"{name} needs --method {method}, got --method {args.method}")
        if flag.name.endswith("_interval") and value < 1:
            die(f"{name} must be at least 1, got {value}")
    if args.method == "reset":
        require_whole_steps(args, "reset_interval")
    if args.method == "injection":
        if args.injection_step is None:
            half = args.total_timesteps // args.action_repeat // 2
            args.injection_step = max(1, half) * args.action_repeat
        require_whole_steps(args, "injection_step")
        if args.injection_step > args.total_timesteps:
            last = args.total_timesteps
            die(f"--injection-step must be at most {last}, got {args.injection_step}")


def reset_steps(args: Args) -> range:
    """Frames of the resets; there is none at the last step."""
    if args.method != "reset":
        return range(0)
    return range(args.reset_interval, args.total_timesteps, args.reset_interval)


def method_plan(args: Args) -> str:
    """One line that says what to expect."""
    if args.method == "reset":
        return f"method: reset, {len(reset_steps(args))} times"
    if args.method == "injection":
        return f"method: injection, at frame {args.injection_step:,}"
    return f"method: {args.method}"


def measure(agent: Agent, batch: Batch, progress: Progress, step: int) -> dict[str, float]:
    """A row of results.csv, its returns still empty, with the columns of the NE script."""
    row = {"step": step, "eval/return_mean": math.nan, "eval/return_std": math.nan}
    row["charts/episodic_return"] = float(np.mean(progress.returns or math.nan))
    for key in ("qf_loss", "qf_values"):
        row[f"losses/{key}"] = float(progress.losses.get(key, math.nan))
    for name, hidden_of_heads in agent.hidden(batch).items():
        hidden = list(itertools.chain(*hidden_of_heads))
        values = {"density": 1.0} | topology.activity(hidden)
        values |= {"planned": 0, "grown": 0, "pruned": 0}
        for key, value in values.items():
            row[f"ne/{name}/{key}"] = value
    row["ne/review_epsilon"] = 1.0
    row["ne/review_share"] = 0.0
    return row


def main() -> None:
    # --- setup ---
    args, checkpoint = parse_args(Args)
    scale_to_task(args)
    check_sizes(args)
    check_method(args)
    device = set_up_torch(args)
    seeds = np.random.SeedSequence(args.seed).generate_state(4).tolist()
    weight_seed, noise_seed, batch_seed, method_seed = seeds
    torch.manual_seed(weight_seed)
    noise_rng = np.random.default_rng(noise_seed)
    env = PixelEnv(args)
    eval_env = PixelEnv(args)
    agent = Agent(args, env.n_act, method_seed, device)
    buffer = ReplayBuffer(args, env.n_act, batch_seed, device)
    batch = buffer.new_batch(args.batch_size)
    metrics_batch = buffer.new_batch(args.batch_size)
    progress = Progress()

    # all that a resumed run needs
    parts = {"agent": agent, "buffer": buffer, "progress": progress}
    parts["method_rng"] = agent.method_rng
    parts["noise_rng"] = noise_rng
    parts["env_rng"] = env.rng
    for name, optimizer in agent.optimizers.items():
        parts[f"{name}_optimizer"] = optimizer
    if checkpoint is not None:
        restore(parts, checkpoint)
    run = Run(args, args.env_id, args.total_timesteps, checkpoint)
    print(f"{args.env_id}, seed {args.seed}, {device}: {run.folder}\n{method_plan(args)}")
    size = f"{args.frame_stack} frames of {args.frame_size}x{args.frame_size}"
    print(f"{env.n_act} actions, {size}, {env.backend}")
    evaluate_postponed(run, progress, agent, eval_env, args)
    update = fast_update(args, agent, batch)

    # --- the loop ---
    resets = reset_steps(args)
    episodic_return = 0.0
    episodic_length = 0
    started = time.time()
    start = run.saved
    obs = env.reset()
    buffer.start_episode(obs)
    first = start + args.action_repeat
    for step in range(first, args.total_timesteps + 1, args.action_repeat):
        # act
        agent_step = step // args.action_repeat
        stddev = np.interp(agent_step, (0, args.stddev_duration), args.stddev)
        if step <= args.learning_starts:
            action = noise_rng.uniform(-1, 1, env.n_act)
        else:
            action = agent.act(obs) + noise_rng.normal(0, stddev, env.n_act)
            run.require_finite(step, action)
        action = action.clip(-1, 1).astype(np.float32)

        # update; before the environment steps, so that on CUDA both run at the same time
        if step > args.learning_starts and agent_step % args.update_frequency == 0:
            progress.updates += 1
            agent.stddev.fill_(stddev)
            buffer.sample(batch)
            # critic and encoder, then actor and targets
            losses = update(batch)
            for key, value in losses.items():
                progress.losses[key] = value.clone()
            if args.method == "redo" and progress.updates % args.redo_interval == 0:
                redo(agent, batch)

        # step and store
        try:
            obs, reward, discount, done = env.step(action)
        except EnvironmentFault as fault:
            run.fail(step, str(fault))
        buffer.add(obs, action, reward, discount)
        episodic_return += reward
        episodic_length += args.action_repeat
        if done:
            run.log(step, "charts/episodic_return", episodic_return)
            run.log(step, "charts/episodic_length", episodic_length)
            progress.returns.append(episodic_return)

        # rivals that count frames
        if step in resets:
            reset(agent)
        if args.method == "injection" and step == args.injection_step:
            inject(agent)
            if args.compile:  # what is compiled is the networks before
                del agent.critic_gradients, agent.actor_gradients
            update = fast_update(args, agent, batch)

        # evaluate and log
        run.bar.update(args.action_repeat)
        if step % 1_000 == 0:
            run.log(step, "charts/SPS", (step - start) / (time.time() - started))
            for key, value in progress.losses.items():
                run.log(step, f"losses/{key}", value)
        last = step == args.total_timesteps
        if step % args.eval_frequency == 0 or last:
            run.require_finite(step, *agent.parameters())
            buffer.sample(metrics_batch, rng=torch.Generator().manual_seed(step))
            row = measure(agent, metrics_batch, progress, step)
            progress.returns = []
            progress.postponed.append((row, policy_weights(agent)))
            evaluate_postponed(run, progress, agent, eval_env, args, last)

        # episode end
        if done:
            # no environment can be saved inside an episode
            stopping = run.stop_signal is not None
            due = step - run.saved >= args.checkpoint_frequency
            if (due or stopping) and not last:
                run.require_finite(step, *agent.parameters())
                run.save(step, parts)
                if stopping:
                    run.leave(step)
            episodic_return = 0.0
            episodic_length = 0
            obs = env.reset()
            buffer.start_episode(obs)

    run.require_finite(step, *agent.parameters())
    del parts["buffer"]  # a finished run needs it no more
    run.save(step, parts, finished=True)
    run.close()
    print(f"finished: {run.folder}, {(step - start) / (time.time() - started):.0f} frames/s")
    for name in ("actor", "critic"):
        print(f"{name}: active neurons {row[f'ne/{name}/active_ratio']:.1%}")


if __name__ == "__main__":
    as_script(main)
