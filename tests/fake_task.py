"""Tasks without a physics engine, some of which do what an environment must not do.

For the state scripts, Gymnasium's ids `fake_task:Plain-v0` and so on, registered at the end of
the first part; for the pixel scripts `load_task`, with the interface of dm_control's suite.
"""

import functools
import random
import time
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
from dm_env import StepType, TimeStep
from gymnasium.spaces import Box, Dict, Discrete, Tuple


class Plain(gym.Env):
    """A dot pushed around, episodes of 20 steps; the reward is 1 - its distance from 0.

    The constructor has no render_mode.
    """

    length = 20

    def __init__(self, obs=Box(-1, 1, (2,), np.float32), act=Box(-1, 1, (2,), np.float32)):  # noqa: B008
        self.observation_space = obs
        self.action_space = act
        self.position = np.zeros(2, dtype=np.float32)
        self.steps = 0
        self.total_steps = 0  # over all episodes

    def draw(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.draw().astype(np.float32)
        self.steps = 0
        return self.position, {}

    def step(self, action):
        self.steps += 1
        self.total_steps += 1
        self.position = (self.position + 0.1 * action).clip(-1, 1).astype(np.float32)
        reward = 1 - float(np.abs(self.position).mean())
        return self.position, reward, self.steps == self.length, False, {}


class SameArray(Plain):
    """Returns the same array every time and changes it in place, from `reset` on."""

    def __init__(self):
        super().__init__()
        self.array = np.zeros(2, dtype=np.float32)

    def reset(self, **kwargs):
        self.array[:], info = super().reset(**kwargs)
        return self.array, info

    def step(self, action):
        self.array[:], *rest = super().step(action)
        return self.array, *rest


class Strict(Plain):
    """Refuses actions that leave its bounds, by however little."""

    def __init__(self):  # rescaling passes 0.3 by the last bit
        super().__init__(act=Box(-0.9, 0.3, (2,), np.float32))

    def step(self, action):
        assert (action >= self.action_space.low).all(), f"{action} is too low"
        assert (action <= self.action_space.high).all(), f"{action} is too high"
        return super().step(action)


class Faulty(Plain):
    """In its seventh episode, at its start or at step 130 of all, what `fault` says."""

    def __init__(self, fault: dict):
        super().__init__()
        self.fault = fault

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        if self.total_steps == 120:
            obs = np.array([obs[0], self.fault.get("start", obs[1])])
        return obs, info

    def step(self, action):
        obs, reward, *rest = super().step(action)
        if self.total_steps == 130:
            obs = np.array([obs[0], self.fault.get("obs", obs[1])])
            reward = self.fault.get("reward", reward)
        return obs, reward, *rest


class Never(Plain):
    """Its episodes do not end."""

    length = -1


class Slow(Plain):
    """Takes ten milliseconds a step, so that a signal arrives within an episode."""

    def step(self, action):
        time.sleep(0.01)
        return super().step(action)


class OldRandom(Plain):
    """Draws from a RandomState, as environments ported from Gym do; it keeps a Gaussian."""

    np_random = np.random.RandomState(0)

    def draw(self) -> np.ndarray:
        values = [self.np_random.randn(), *self.np_random.uniform(-1, 1, 2)]
        return np.tanh(values[:2])

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.np_random = np.random.RandomState(seed)
        return super().reset()


class NewRandom(Plain):
    """Makes a generator anew at each reset."""

    def reset(self, *, seed=None, options=None):
        if seed is None:
            seed = int(self.np_random.integers(2**30))
        return super().reset(seed=seed)


class GlobalRandom(Plain):
    """Draws from NumPy's and Python's global generators."""

    def draw(self) -> np.ndarray:
        return np.array([np.tanh(np.random.randn()), random.gauss(0, 0.3)])


class Parts(Plain):
    """Its observation is a Dict with a Tuple in it, of Boxes and an integer."""

    def __init__(self):
        box = Box(-1, 1, (1,), np.float64)
        pair = Tuple((box, Box(-1, 1, (1, 1), np.float32)))
        super().__init__(obs=Dict({"pair": pair, "quarter": Discrete(4)}))

    def in_parts(self, obs):
        pair = (obs[:1].astype(np.float64), obs[1:, None])
        return {"pair": pair, "quarter": np.int64(self.steps // 5 % 4)}

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return self.in_parts(obs), info

    def step(self, action):
        obs, *rest = super().step(action)
        return self.in_parts(obs), *rest


TASKS = (Plain, SameArray, Strict, Never, Slow, OldRandom, NewRandom, GlobalRandom, Parts)
for task in TASKS:
    gym.register(f"{task.__name__}-v0", task)
FAULTS = {
    "NaNObs": {"obs": np.nan},
    "InfiniteObs": {"obs": -np.inf},
    "NaNStart": {"start": np.nan},
    "NaNReward": {"reward": float("nan")},
    "HugeReward": {"reward": 1e300},  # finite, but not as float32
}
for name, fault in FAULTS.items():
    gym.register(f"{name}-v0", functools.partial(Faulty, fault))
SPACES = {
    "Pixels": {"obs": Box(0, 255, (8, 8, 3), np.uint8)},
    "Text": {"obs": gym.spaces.Text(5)},
    "Integers": {"act": Box(-3, 3, (2,), np.int64)},
    "Matrix": {"act": Box(-1, 1, (2, 2), np.float32)},
    "NoBounds": {"act": Box(-np.inf, np.inf, (2,), np.float32)},
}
for name, spaces in SPACES.items():
    gym.register(f"{name}-v0", functools.partial(Plain, **spaces))


# --- pixels -------------------------------------------------------------------
class FakeTask:
    """A dot that actions push around, drawn without OpenGL; episodes of `length` steps.

    Action bounds are asymmetric. `ends` is the discount of an episode's last step.
    """

    def __init__(self, rng: np.random.RandomState, length: int = 20, ends: float = 1.0):
        self.rng = rng
        self.length = length
        self.ends = ends
        self.actions = []
        self.physics = self
        self.position = np.zeros(2)
        self.steps = 0

    def action_spec(self) -> SimpleNamespace:
        low = np.array([-1.0, -2.0])
        high = np.array([1.0, 4.0])
        return SimpleNamespace(shape=(2,), minimum=low, maximum=high)

    def reset(self) -> None:
        self.position = self.rng.uniform(-1, 1, 2) + 0.1 * self.rng.randn(2)
        self.steps = 0

    def step(self, action: np.ndarray) -> TimeStep:
        self.actions.append(np.array(action))
        self.steps += 1
        self.position = (self.position + 0.1 * np.asarray(action)).clip(-1, 1)
        reward = 1 - np.abs(self.position).mean()  # a NumPy scalar, as dm_control has
        if self.steps == self.length:
            return TimeStep(StepType.LAST, reward, self.ends, None)
        return TimeStep(StepType.MID, reward, 1.0, None)

    def render(self, height: int, width: int, camera_id: int) -> np.ndarray:
        assert camera_id == 0
        rows = np.linspace(-1, 1, height)
        columns = np.linspace(-1, 1, width)
        places = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)
        light = 255 * np.exp(-8 * ((places - self.position) ** 2).sum(-1))
        time = np.full_like(light, 12 * self.steps % 256)
        return np.stack((light, 255 - light, time), axis=-1).astype(np.uint8)

    def control_timestep(self) -> float:
        return 0.02

    def close(self) -> None:
        pass


def load_task(env_id: str, rng: np.random.RandomState) -> tuple[FakeTask, str]:
    """In place of the script's own."""
    return FakeTask(rng), "no OpenGL"
