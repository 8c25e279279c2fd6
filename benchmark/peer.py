"""TD3 of Stable-Baselines3 (PyTorch) or SBX (JAX), set as ne_td3_continuous.py is, for speed.py.

Run:   python benchmark/peer.py sb3|sbx ENV_ID STEPS LEARNING_STARTS BATCH_SIZE DEVICE WIDTH ...

The rest of the settings that matter for speed: one update of the critics per environment step,
actor and targets every second time, a buffer of a million transitions, Gaussian noise on the
actions, nothing logged.
"""

import sys

import gymnasium as gym
import numpy as np
from stable_baselines3.common.noise import NormalActionNoise


def main() -> None:
    library, env_id, steps, learning_starts, batch_size, device, *widths = sys.argv[1:]
    settings = {
        "learning_rate": 3e-4,
        "batch_size": int(batch_size),
        "learning_starts": int(learning_starts),
        "train_freq": 1,
        "gradient_steps": 1,
        "policy_delay": 2,
        "buffer_size": 1_000_000,
        "policy_kwargs": {"net_arch": [int(width) for width in widths]},
        "verbose": 0,
    }
    if library == "sb3":
        from stable_baselines3 import TD3

        settings["device"] = device
    else:
        from sbx import TD3
    env = gym.make(env_id)
    n_act = env.action_space.shape[0]
    noise = NormalActionNoise(np.zeros(n_act), 0.1 * np.ones(n_act))
    TD3("MlpPolicy", env, action_noise=noise, **settings).learn(int(steps))


if __name__ == "__main__":
    main()
