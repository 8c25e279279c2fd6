"""Tasks without a physics engine, some of which do what an environment must not do.

For the state scripts, Gymnasium's ids `fake_task:Plain-v0` and so on (TASKS lists them);
for the pixel scripts `load_task`, with the interface of dm_control's suite.
"""

import random
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
from dm_env import StepType, TimeStep

BOUNDED = gym.spaces.Box(-0.9, 0.3, (2,), np.float32)  # rescaling passes 0.3 by the last bit


class Plain(gym.Env):
    """A dot pushed around, episodes of 20 steps; the reward is 1 - its distance from 0.

    The constructor takes no argument, not even render_mode.
    """

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    length = 20

    def __init__(self):
        self.position = np.zeros(2, dtype=np.float32)
        self.steps = 0
        self.total_steps = 0  # over all episodes
        self.episodes = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        self.steps = 0
        self.episodes += 1
        return self.position, {}

    def step(self, action):
        self.steps += 1
        self.total_steps += 1
        self.position = (self.position + 0.1 * action).clip(-1, 1).astype(np.float32)
        reward = 1 - float(np.abs(self.position).mean())
        return self.position, reward, self.steps == self.length, False, {}


class SameArray(Plain):
    """Returns the same array every time and changes it in place."""

    def step(self, action):
        before = self.position
        obs, *rest = super().step(action)
        before[:] = obs
        self.position = before
        return before, *rest

    def reset(self, **kwargs):
        before = self.position
        obs, info = super().reset(**kwargs)
        before[:] = obs
        self.position = before
        return before, info


class Integers(Plain):
    """Integer actions."""

    action_space = gym.spaces.Box(-3, 3, (2,), np.int64)


class IntegerObs(Plain):
    """Integer observations."""

    observation_space = gym.spaces.Box(-3, 3, (2,), np.int64)


class NoWidth(Plain):
    """An action whose bounds are the same."""

    low = np.array([-1, 0.5], dtype=np.float32)
    high = np.array([1, 0.5], dtype=np.float32)
    action_space = gym.spaces.Box(low, high)


class NoSize(Plain):
    action_space = gym.spaces.Box(-1, 1, (0,), np.float32)


class NoBounds(Plain):
    action_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)


class Strict(Plain):
    """Refuses actions that leave its bounds, by however little."""

    action_space = BOUNDED

    def step(self, action):
        assert (action >= self.action_space.low).all(), f"{action} is too low"
        assert (action <= self.action_space.high).all(), f"{action} is too high"
        assert action.dtype == np.float32
        return super().step(action)


class Faulty(Plain):
    """Does what `fault` says at step 130 of its life, in its seventh episode."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        if self.total_steps == 130:
            obs, reward = self.fault(obs.copy(), reward)
        return obs, reward, terminated, truncated, info


class NaNObs(Faulty):
    def fault(self, obs, reward):
        obs[1] = np.nan
        return obs, reward


class InfiniteObs(Faulty):
    def fault(self, obs, reward):
        obs[1] = -np.inf
        return obs, reward


class LongObs(Faulty):
    def fault(self, obs, reward):
        return np.append(obs, 1), reward


class NaNReward(Faulty):
    def fault(self, obs, reward):
        return obs, float("nan")


class InfiniteReward(Faulty):
    def fault(self, obs, reward):
        return obs, float("inf")


class TwoRewards(Faulty):
    def fault(self, obs, reward):
        return obs, np.array([reward, reward])


class NoReward(Faulty):
    def fault(self, obs, reward):
        return obs, None


class Raises(Faulty):
    def fault(self, obs, reward):
        raise ValueError("the simulation\nexploded")


class NoNumbers(Faulty):
    def fault(self, obs, reward):
        return {"position": obs}, reward


class Complex(Faulty):
    def fault(self, obs, reward):
        return obs + 1j, reward


class HugeReward(Faulty):
    """Finite, but not as float32."""

    def fault(self, obs, reward):
        return obs, 1e300


class Exits(Faulty):
    def fault(self, obs, reward):
        sys.exit()


class TwoEnds(Plain):
    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        if self.total_steps == 130:
            terminated = np.array([True, False])
        return obs, reward, terminated, truncated, info


class RaisesInReset(Plain):
    """Its eighth episode does not start."""

    def reset(self, **kwargs):
        if self.episodes == 7:
            raise ValueError("no start")
        return super().reset(**kwargs)


class NeverStarts(Plain):
    def reset(self, **kwargs):
        raise ValueError("no start")


class ArrayReward(Plain):
    """The reward is an array of one element, as in environments of old."""

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, np.array([reward], dtype=np.float32), *rest


class Never(Plain):
    """Its episodes do not end."""

    length = -1


class OldRandom(Plain):
    """Draws from a RandomState, as environments ported from Gym do."""

    def __init__(self):
        super().__init__()
        self.old = np.random.RandomState(0)

    @property
    def np_random(self):
        return self.old

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.old = np.random.RandomState(seed)
        self.steps = 0
        self.position = self.old.uniform(-1, 1, 2).astype(np.float32)
        return self.position, {}


class NewRandom(Plain):
    """Makes a generator anew at each reset."""

    def reset(self, *, seed=None, options=None):
        if seed is None:
            seed = int(self.np_random.integers(2**30))
        return super().reset(seed=seed)


class ForeignRandom(Plain):
    """Draws from what cannot be saved."""

    np_random = random.Random(0)

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, dtype=np.float32), {}


class Slow(Plain):
    """Takes ten milliseconds a step, so that a signal arrives within an episode."""

    def step(self, action):
        import time

        time.sleep(0.01)
        return super().step(action)


TASKS = [
    Plain,
    SameArray,
    Integers,
    IntegerObs,
    NoWidth,
    NoSize,
    NoBounds,
    Strict,
    NaNObs,
    InfiniteObs,
    LongObs,
    NaNReward,
    InfiniteReward,
    TwoRewards,
    NoReward,
    Raises,
    NoNumbers,
    Complex,
    HugeReward,
    Exits,
    TwoEnds,
    RaisesInReset,
    NeverStarts,
    ArrayReward,
    Never,
    OldRandom,
    NewRandom,
    ForeignRandom,
    Slow,
]
for task in TASKS:
    gym.register(f"{task.__name__}-v0", task)


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
