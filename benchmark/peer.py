"""TD3 of Stable-Baselines3 (PyTorch) or SBX (JAX), set to what ne_td3_continuous.py does: a contender of speed.py.

Run:   python benchmark/peer.py sb3|sbx ENV_ID TIMESTEPS LEARNING_STARTS BATCH_SIZE DEVICE WIDTH [WIDTH ...]

The rest of the settings that matter for speed: one update of the critics per environment step, actor and targets every
second time, a buffer of a million transitions, Gaussian noise on the actions, nothing logged.
"""

import sys

import gymnasium as gym
import numpy as np
from stable_baselines3.common.noise import NormalActionNoise


def main() -> None:
    library, env_id, device = sys.argv[1], sys.argv[2], sys.argv[6]
    timesteps, learning_starts, batch_size, *widths = map(int, [*sys.argv[3:6], *sys.argv[7:]])
    if library == "sb3":
        from stable_baselines3 import TD3
    else:
        from sbx import TD3
    env = gym.make(env_id)
    noise = NormalActionNoise(np.zeros(env.action_space.shape), 0.1 * np.ones(env.action_space.shape))
    settings = {"learning_rate": 3e-4, "batch_size": batch_size, "learning_starts": learning_starts, "verbose": 0}
    settings |= {"train_freq": 1, "gradient_steps": 1, "policy_delay": 2, "buffer_size": 1_000_000}
    if library == "sb3":
        settings["device"] = device
    TD3("MlpPolicy", env, action_noise=noise, policy_kwargs={"net_arch": widths}, **settings).learn(timesteps)


if __name__ == "__main__":
    main()
