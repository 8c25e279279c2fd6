"""TD3, Reset and LayerNorm on a sequence of tasks (§5.2), rivals of Neuroplastic Expansion.

Paper: Neuroplastic Expansion in Deep Reinforcement Learning, arXiv 2410.07994.
       §, Eq. and Table refer to it; docs/ne_td3_continual.md has definitions.
Run:   python -m baselines.td3_continual --method reset    (--help lists all flags)
       in the root of the repository; about as fast as ne_td3_continual.py
With --method none it is TD3, and ne_td3_continual.py without NE (--initial-density 1
--review-floor 1) is bit-equal to it. The agent here is the witness for that: it has the plain
layers of td3_continuous.py. What is not the agent's is imported from ne_td3_continual.py.
"""

import copy
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python baselines/NAME.py

from baselines import td3_continuous
from baselines.td3_continuous import reset
from ne_td3_continual import (
    Batch,
    EnvironmentFault,
    Progress,
    ReplayBuffer,
    Run,
    RunArgs,
    TD3Args,
    as_script,
    die,
    evaluate_postponed,
    fast_updates,
    make_envs,
    measure,
    parse_args,
    print_metrics,
    restore,
    set_length,
    set_up_torch,
)


@dataclass
class MethodArgs:
    """A rival of NE."""

    method: Literal["none", "reset", "layer-norm"] = "none"
    """reset: all that learns starts anew when the task changes (§5.2); layer-norm: Linear,
    LayerNorm, ReLU in every hidden layer (Lyle et al. 2024); none: TD3"""


@dataclass
class Args(MethodArgs, TD3Args, RunArgs):
    """All flags."""

    exp_name: str = "td3_continual"


class Agent(td3_continuous.Agent):
    """TD3 in which the actions that a transition's task does not have are 0."""

    def critic_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Eq. 3 with TD3's target smoothing and clipped double Q. Returns: loss, mean Q."""
        args = self.args
        with torch.no_grad():
            noise = args.policy_noise * batch.noise  # (B, act)
            noise = noise.clamp(-args.noise_clip, args.noise_clip)
            next_actions = self.target_actor(batch.next_obs) + noise
            next_actions = next_actions.clamp(-1, 1) * batch.action_mask  # (B, act)
            next_obs_actions = torch.cat((batch.next_obs, next_actions), dim=1)
            next_q_1 = self.target_critic_1(next_obs_actions)  # (B,)
            next_q_2 = self.target_critic_2(next_obs_actions)  # (B,)
            next_q = torch.minimum(next_q_1, next_q_2)
            going_on = 1 - batch.terminated
            target_q = batch.rewards + args.gamma * going_on * next_q  # (B,)
        q_1 = self.critic_1(batch.obs_actions)  # (B,)
        q_2 = self.critic_2(batch.obs_actions)  # (B,)
        loss = F.mse_loss(q_1, target_q) + F.mse_loss(q_2, target_q)  # ()
        return loss, q_1.mean()

    def actor_loss(self, batch: Batch) -> torch.Tensor:
        """Eq. 4, deterministic policy gradient: minus the mean Q1 of its own actions."""
        actions = self.actor(batch.obs) * batch.action_mask  # (B, act)
        obs_actions = torch.cat((batch.obs, actions), dim=1)  # (B, obs + act)
        return -self.critic_1(obs_actions).mean()  # ()


def main() -> None:
    # --- setup ---
    args, checkpoint = parse_args(Args)
    envs = make_envs(args)
    eval_envs = make_envs(args)
    set_length(args)
    if args.batch_size > args.buffer_size:
        die(f"--batch-size must be at most {args.buffer_size}, got {args.batch_size}")
    device = set_up_torch(args)
    seeds = np.random.SeedSequence(args.seed).generate_state(4).tolist()
    weight_seed, noise_seed, batch_seed, method_seed = seeds
    torch.manual_seed(weight_seed)
    noise_rng = np.random.default_rng(noise_seed)
    n_obs = envs[0].n_obs
    n_act = envs[0].n_act
    agent = Agent(args, n_obs, n_act, device, method_seed)
    buffer = ReplayBuffer(args.buffer_size, n_obs, n_act, batch_seed, device)
    batch = buffer.new_batch(args.batch_size)
    metrics_batch = buffer.new_batch(args.batch_size)
    progress = Progress.of(agent)
    starts = [env.reset(seed=args.seed) for env in envs]
    obs, _ = starts[0]

    # all that a resumed run needs
    parts = {"agent": agent, "buffer": buffer, "progress": progress}
    parts["method_rng"] = agent.method_rng
    parts["noise_rng"] = noise_rng
    for task, env in zip(args.tasks, envs, strict=True):
        parts[f"{task} rng"] = env
    for name, network in agent.networks.items():
        parts[f"{name}_optimizer"] = network.optimizer
    if checkpoint is not None:
        restore(parts, checkpoint)
        obs, _ = envs[progress.stretches % len(envs)].reset()
    total_steps = args.total_timesteps
    if args.episodes_per_task is not None:
        total_steps = None  # not known in advance
    run = Run(args, "+".join(args.tasks), total_steps, checkpoint)
    print(f"{' '.join(args.tasks)}, seed {args.seed}, {device}: {run.folder}")
    print(f"method: {args.method}")
    if checkpoint is None:
        row = measure(args, agent, metrics_batch, progress, step=0)  # the untrained policy
        weights = copy.deepcopy(agent.actor.state_dict())
        progress.postponed.append((row, weights))
    evaluate_postponed(run, progress, agent.actor, eval_envs, args)
    update_critic, update_actor = fast_updates(args, agent, batch)

    # --- the loop ---
    episodic_return = 0.0
    episodic_length = 0
    started = time.time()
    first = run.saved + 1
    for step in itertools.count(first):
        task = progress.stretches % len(envs)
        env = envs[task]

        # act
        if step <= args.learning_starts:
            action = noise_rng.uniform(-1, 1, n_act)
        else:
            noise = noise_rng.normal(0, args.exploration_noise, n_act)
            action = agent.actor.act(obs) + noise
            run.require_finite(step, action)
        action = action.clip(-1, 1).astype(np.float32) * env.action_mask

        # update; before the environment steps, so that on CUDA both run at the same time
        # and, after the buffer was cleared, not until it holds a batch again
        enough = buffer.size >= min(args.batch_size, args.learning_starts)
        if step > args.learning_starts and enough:
            progress.updates += 1
            buffer.sample(batch)
            # critic, then actor and targets
            losses = {}
            losses["qf_loss"], losses["qf_values"] = update_critic(batch)
            if progress.updates % args.policy_frequency == 0:
                losses["actor_loss"] = update_actor(batch)
            for key, value in losses.items():
                progress.losses[key] = value.clone()

        # step and store
        try:
            next_obs, reward, terminated, truncated, _ = env.step(action)
        except EnvironmentFault as fault:
            run.fail(step, str(fault))
        buffer.add(obs, action, next_obs, reward, terminated, env.action_mask)
        obs = next_obs
        episodic_return += reward
        episodic_length += 1
        ended = terminated or truncated
        if ended:
            run.log(step, "charts/episodic_return", episodic_return)
            run.log(step, "charts/episodic_length", episodic_length)
            progress.returns.append(episodic_return)
            progress.episodes += 1
        switch = progress.episodes == args.episodes_per_task
        if args.episodes_per_task is None:
            switch = step % args.steps_per_task == 0
        last = switch and progress.stretches + 1 == args.cycles * len(envs)

        # evaluate and log
        run.bar.update()
        if step % 1_000 == 0:
            run.log(step, "charts/SPS", (step - first + 1) / (time.time() - started))
            for key, value in progress.losses.items():
                run.log(step, f"losses/{key}", value)
        if step % args.eval_frequency == 0 or switch:
            run.require_finite(step, *agent.parameters())
            buffer.sample(metrics_batch, rng=torch.Generator().manual_seed(step))
            row = measure(args, agent, metrics_batch, progress, step)
            progress.returns = []
            weights = copy.deepcopy(agent.actor.state_dict())
            progress.postponed.append((row, weights))
            evaluate_postponed(run, progress, agent.actor, eval_envs, args, last)

        # episode end, or the task's, which may cut an episode
        if last:
            break
        if switch:
            progress.stretches += 1
            progress.episodes = 0
            if args.clear_buffer:
                buffer.clear()
            if args.method == "reset":
                reset(agent)
        if ended or switch:
            # no environment can be saved inside an episode
            stopping = run.stop_signal is not None
            due = step - run.saved >= args.checkpoint_frequency
            if due or stopping:
                run.require_finite(step, *agent.parameters())
                run.save(step, parts)
                if stopping:
                    run.leave(step)
            episodic_return = 0.0
            episodic_length = 0
            obs, _ = envs[progress.stretches % len(envs)].reset()

    run.require_finite(step, *agent.parameters())
    del parts["buffer"]  # a finished run needs it no more
    run.save(step, parts, finished=True)
    run.close()
    print(f"finished: {run.folder}, {(step - first + 1) / (time.time() - started):.0f} steps/s")
    for name in agent.networks:
        print(f"{name}: active neurons {row[f'ne/{name}/active_ratio']:.1%}")
    print_metrics(run.folder)


if __name__ == "__main__":
    as_script(main)
