"""A small task with the interface of dm_control's: a dot that actions push around, drawn without OpenGL."""

from types import SimpleNamespace

import numpy as np
from dm_env import StepType, TimeStep


class FakeTask:
    """Episodes of `length` steps. Action bounds are asymmetric. `ends` is the discount of an episode's last step."""

    def __init__(self, rng: np.random.RandomState, length: int = 20, ends: float = 1.0):
        self.rng, self.length, self.ends, self.actions, self.physics = rng, length, ends, [], self
        self.position, self.steps = np.zeros(2), 0

    def action_spec(self) -> SimpleNamespace:
        return SimpleNamespace(shape=(2,), minimum=np.array([-1.0, -2.0]), maximum=np.array([1.0, 4.0]))

    def reset(self) -> None:
        self.position, self.steps = self.rng.uniform(-1, 1, 2) + 0.1 * self.rng.randn(2), 0

    def step(self, action: np.ndarray) -> TimeStep:
        self.actions.append(np.array(action))
        self.steps += 1
        self.position = (self.position + 0.1 * np.asarray(action)).clip(-1, 1)
        last = self.steps == self.length
        reward, discount = (
            1 - np.abs(self.position).mean(),
            self.ends if last else 1.0,
        )  # a NumPy scalar, as dm_control has
        return TimeStep(StepType.LAST if last else StepType.MID, reward, discount, None)

    def render(self, height: int, width: int, camera_id: int) -> np.ndarray:
        assert camera_id == 0
        places = np.stack(np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij"), axis=-1)
        light = 255 * np.exp(-8 * ((places - self.position) ** 2).sum(-1))
        image = np.stack((light, 255 - light, np.full_like(light, 12 * self.steps % 256)), axis=-1)
        return image.astype(np.uint8)

    def control_timestep(self) -> float:
        return 0.02

    def close(self) -> None:
        pass


def load_task(env_id: str, rng: np.random.RandomState) -> tuple[FakeTask, str]:
    """In place of the script's own."""
    return FakeTask(rng), "no OpenGL"
