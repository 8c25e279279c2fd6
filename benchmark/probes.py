"""Probes of plasticity: what a network can still learn, and what is known to go with losing it.

plasticity.py's runs are probed before and after priming and at the end. Nothing that training
draws from is touched.
"""

import copy
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.signal import lfilter

import utils_topology as topology


# --- trainability -------------------------------------------------------------
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


def fit(mlp: nn.Module, x: torch.Tensor, targets: torch.Tensor, steps: int, rate: float) -> float:
    """Loss of a copy of `mlp` that has learnt to add `targets` (B, n) to its output.

    At the start the loss is the mean square of the targets, in every network: what its
    outputs are, large or small, has no part in it. Masks stay.
    """
    mlp = copy.deepcopy(mlp)
    wanted = linear_output(mlp, x).detach() + targets  # (B, n)
    optimizer = torch.optim.Adam([*mlp.layers.parameters(), *mlp.norms.parameters()], rate)
    for _ in range(steps):
        loss = F.mse_loss(linear_output(mlp, x), wanted)
        optimizer.zero_grad()
        loss.backward()
        for layer in mlp.layers:
            if hasattr(layer, "mask"):
                layer.weight.grad.mul_(layer.mask)
        optimizer.step()
    return F.mse_loss(linear_output(mlp, x), wanted).item()


def trainability(mlp: nn.Module, x: torch.Tensor, steps: int, rate: float, seed: int) -> dict:
    """How well `mlp` and a fresh network fit standard normal targets; 1: equally well.

    Above 1 the trained network is left with more loss. Two fresh networks differ by 10%.
    """
    rng = torch.Generator().manual_seed(seed)
    n_out = mlp.layers[-1].out_features
    targets = torch.randn(len(x), n_out, generator=rng).to(x.device)
    with torch.random.fork_rng():  # the training's own generator must not notice
        torch.manual_seed(seed)
        fresh = fresh_copy(mlp, rng)
    own_loss = fit(mlp, x, targets, steps, rate)
    fresh_loss = fit(fresh, x, targets, steps, rate)
    ratio = own_loss / max(fresh_loss, 1e-12)
    return {"fit_ratio": ratio, "fit_loss": own_loss, "fit_loss_fresh": fresh_loss}


# --- features and weights -----------------------------------------------------
def effective_rank(features: torch.Tensor, delta: float = 0.01) -> int:
    """srank of (B, n): the fewest singular values with 1 - delta of the sum (Kumar et al. 2021)."""
    singular = torch.linalg.svdvals(features.double())
    shares = singular.cumsum(0) / singular.sum().clamp_min(1e-300)
    return int((shares < 1 - delta).sum()) + 1


def dormant_share(hidden: list[torch.Tensor], tau: float) -> float:
    """Of neurons with a score (Eq. 1) of at most tau; hidden: [(B, n), ...]."""
    scores = torch.cat([topology.dormancy_scores(h) for h in hidden])  # (neurons,)
    return float((scores <= tau).float().mean())


@torch.no_grad()
def saturated_share(actor: nn.Module, obs: torch.Tensor) -> float:
    """Of the actions (B, n) at exactly -1 or 1: their tanh passes no gradient on, in float32."""
    return float((linear_output(actor, obs).tanh().abs() == 1).float().mean())


def weight_norm(mlp: nn.Module) -> float:
    """Euclidean norm of all weights, without biases."""
    return math.sqrt(sum(float(layer.weight.detach().square().sum()) for layer in mlp.layers))


# --- values -------------------------------------------------------------------
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
        rewards.append(float(reward))
        done = terminated or truncated
    return np.array(inputs, dtype=np.float32), rewards, terminated


def discounted_returns(rewards: list[float], gamma: float) -> np.ndarray:
    """From each step of an episode on, (steps,)."""
    return lfilter([1], [1, -gamma], rewards[::-1])[::-1]


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
            kept = max(0, kept - math.ceil(math.log(0.01) / math.log(gamma)))
        x = torch.from_numpy(inputs[:kept]).to(agent.critic_1.layers[0].weight.device)
        predicted += agent.critic_1(x).tolist()
        followed += discounted_returns(rewards, gamma)[:kept].tolist()
    q = float(np.mean(predicted or math.nan))
    value = float(np.mean(followed or math.nan))
    return {"q": q, "return": value, "overestimation": q - value}


# --- all ----------------------------------------------------------------------
def probe(args, agent: nn.Module, buffer, env) -> dict[str, float]:
    """A row of probes.csv.

    {actor,critic}/fit_ratio: `trainability`, of the critics of the first. critic/srank: of its
    last hidden layer. dormant_0, _0.025, _0.1: share of hidden neurons with a score (Eq. 1) of
    at most that, of both critics. weight_norm. q, return, overestimation.

    Args:
        args: with `ProbeArgs` of priming.py.
    """
    row = {}
    batch = buffer.sample(args.probe_inputs, rng=torch.Generator().manual_seed(args.seed))
    probed = {"actor": (agent.actor, batch.obs), "critic": (agent.critic_1, batch.obs_actions)}
    for name, (mlp, x) in probed.items():
        fits = trainability(mlp, x, args.probe_fits, args.probe_learning_rate, args.seed)
        row |= {f"{name}/{key}": value for key, value in fits.items()}
        hidden = agent.networks[name].hidden(batch)
        for tau in (0.0, 0.025, 0.1):
            row[f"{name}/dormant_{tau:g}"] = dormant_share(hidden, tau)
        row[f"{name}/weight_norm"] = weight_norm(mlp)
    row["actor/saturated"] = saturated_share(agent.actor, batch.obs)
    row["critic/srank"] = effective_rank(agent.critic_1.hidden(batch)[-1])
    return row | overestimation(agent, env, args.gamma, args.probe_episodes, args.seed)
