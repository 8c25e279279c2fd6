"""TD3, Reset and LayerNorm on a sequence of tasks (§5.2), rivals of Neuroplastic Expansion.

Paper: Neuroplastic Expansion in Deep Reinforcement Learning, arXiv 2410.07994.
       §, Eq. and Table refer to it; docs/ne_td3_continual.md has definitions.
Run:   python -m baselines.td3_continual --method reset    (--help lists all flags)
       in the root of the repository; about as fast as ne_td3_continual.py
With --method none it is TD3, and ne_td3_continual.py without NE (--initial-density 1
--review-floor 1) is bit-equal to it. The agent here is the witness for that: it has the plain
layers of td3_continuous.py. What is not the agent's is imported from ne_td3_continual.py.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python baselines/NAME.py

from baselines import td3_continuous
from baselines.td3_continuous import reset
from ne_td3_continual import (
    Batch,
    Log,
    Progress,
    ReplayBuffer,
    RunArgs,
    Stop,
    TD3Args,
    as_script,
    evaluate_tasks,
    fast_updates,
    make_envs,
    open_folder,
    parse_args,
    print_metrics,
    require_finite,
    restore,
    save,
    set_up,
)


@dataclass
class MethodArgs:
    """A rival of NE."""

    method: Literal["none", "reset", "layer-norm"] = "none"
    """reset: all that learns starts anew when the task changes (§5.2); layer-norm: in
    every hidden layer (Lyle et al. 2024); none: TD3"""


@dataclass
class Args(MethodArgs, TD3Args, RunArgs):
    """TD3 (Fujimoto et al. 2018) and rivals of NE on a sequence of tasks."""

    exp_name: str = "td3_continual"  # part of the run's name


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
            discounts = args.gamma * (1 - batch.terminated)  # (B,)
            target_q = batch.rewards + discounts * next_q  # (B,)
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
    device = set_up(args)
    seeds = np.random.SeedSequence(args.seed).generate_state(4).tolist()
    weight_seed, noise_seed, batch_seed, method_seed = seeds
    torch.manual_seed(weight_seed)
    noise_rng = np.random.default_rng(noise_seed)
    envs = make_envs(args.tasks)
    eval_envs = make_envs(args.tasks)
    n_obs = envs[0].observation_space.shape[0]
    n_act = envs[0].action_space.shape[0]
    agent = Agent(args, n_obs, n_act, method_seed, device)
    buffer = ReplayBuffer(args.buffer_size, n_obs, n_act, batch_seed, device)
    progress = Progress()
    parts = (agent, buffer, progress, noise_rng, envs)  # all that a resumed run needs
    start = 0
    starts = [env.reset(seed=args.seed) for env in envs]
    obs, _ = starts[0]
    if checkpoint is not None:
        start = checkpoint["step"]
        restore(parts, checkpoint.pop("parts"))
        obs, _ = envs[progress.stretches % len(envs)].reset()
    folder, lock = open_folder(args, checkpoint, "+".join(args.tasks))
    log = Log(args, folder, start)
    stop = Stop()
    print(f"{' '.join(args.tasks)}, seed {args.seed}, {device}: {folder}\nmethod: {args.method}")
    update_critic, update_actor = fast_updates(args, agent, buffer)
    if start == 0:
        evaluate_tasks(agent, buffer, progress, eval_envs, 0, folder, log)

    # --- the loop ---
    saved = start
    started = time.time()
    last = args.total_timesteps
    for step in tqdm(range(start + 1, last + 1), initial=start, total=last, disable=None):
        env = envs[progress.stretches % len(envs)]

        # act
        if step <= args.learning_starts:
            action = noise_rng.uniform(-1, 1, n_act)
        else:
            noise = noise_rng.normal(0, args.exploration_noise, n_act)
            action = agent.actor.act(obs) + noise
        action = action.clip(-1, 1).astype(np.float32) * env.action_mask

        # update; before the environment steps, so that on CUDA both run at the same time
        # and, after the buffer was cleared, not until it holds a batch again
        enough = buffer.size >= min(args.batch_size, args.learning_starts)
        updates = args.replay_ratio if step > args.learning_starts and enough else 0
        for _ in range(updates):
            progress.updates += 1
            batch = buffer.sample(args.batch_size)
            # critic, then actor and targets
            losses = {}
            losses["qf_loss"], losses["qf_values"] = update_critic(batch)
            if progress.updates % args.policy_frequency == 0:
                losses["actor_loss"] = update_actor(batch)
            progress.losses |= {key: value.clone() for key, value in losses.items()}

        # step and store
        require_finite(step, observation=obs, action=action)
        next_obs, reward, terminated, truncated, info = env.step(action)
        require_finite(step, observation=next_obs, reward=reward)
        buffer.add(obs, action, next_obs, reward, terminated, env.action_mask)
        obs = next_obs
        ended = terminated or truncated
        if ended:
            episodic_return = float(info["episode"]["r"])
            progress.returns.append(episodic_return)
            log.scalar("charts/episodic_return", episodic_return, step)
            log.scalar("charts/episodic_length", info["episode"]["l"], step)
            progress.episodes += 1
        if args.episodes_per_task is None:
            switch = step % args.steps_per_task == 0
        else:
            switch = progress.episodes == args.episodes_per_task
        if switch and progress.stretches + 1 == args.cycles * len(envs):
            last = step  # of episodes, there may be fewer steps

        # evaluate and log
        if step % 1_000 == 0:
            log.scalar("charts/SPS", (step - start) / (time.time() - started), step)
            for key, value in progress.losses.items():
                log.scalar(f"losses/{key}", value, step)
        if step % args.eval_frequency == 0 or switch:
            evaluate_tasks(agent, buffer, progress, eval_envs, step, folder, log)

        # episode end, or the task's, which may cut an episode
        if step == last:
            break
        if switch:
            progress.stretches += 1
            progress.episodes = 0
            if args.clear_buffer:
                buffer.clear()
            if args.method == "reset":
                reset(agent)
        # no environment can be saved inside an episode
        if ended or switch:
            if stop.signal or step - saved >= args.checkpoint_frequency:
                save(folder, args, checkpoint, step, parts)
                saved = step
            if stop.signal:
                log.close()
                stop.leave(step, folder)
            obs, _ = envs[progress.stretches % len(envs)].reset()

    save(folder, args, checkpoint, step, parts, finished=True)
    log.close()
    print(f"finished: {folder}, {(step - start) / (time.time() - started):.0f} steps/s")
    print_metrics(folder)


if __name__ == "__main__":
    as_script(main)
