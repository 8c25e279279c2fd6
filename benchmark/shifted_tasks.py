"""HalfCheetah with changed dynamics and rewards: ten tasks of one body, for runs in sequence.

shifts.py makes the runs. In the repository's root they are Gymnasium ids of any script, such as
benchmark.shifted_tasks:CheetahSlippery-v0; elsewhere, with PYTHONPATH at the folder benchmark,
shifted_tasks:CheetahSlippery-v0.
Observations, actions and the length of an episode are those of HalfCheetah-v5.
"""

from typing import NamedTuple

import gymnasium as gym
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv


class Shift(NamedTuple):
    direction: int  # 1: running forward is rewarded, -1: backward
    friction: float  # factor of the friction of all contacts
    gravity: float  # factor of gravity


# in the order of the run; each change turns the rewarded direction and one more thing
SHIFTS = {
    "CheetahSlippery": Shift(direction=1, friction=0.4, gravity=1.0),
    "CheetahBackward": Shift(direction=-1, friction=1.0, gravity=1.0),
    "CheetahHeavy": Shift(direction=1, friction=1.0, gravity=1.5),
    "CheetahBackwardSlippery": Shift(direction=-1, friction=0.4, gravity=1.0),
    "CheetahLight": Shift(direction=1, friction=1.0, gravity=0.6),
    "CheetahBackwardHeavy": Shift(direction=-1, friction=1.0, gravity=1.5),
    "CheetahSticky": Shift(direction=1, friction=2.5, gravity=1.0),
    "CheetahBackwardLight": Shift(direction=-1, friction=1.0, gravity=0.6),
    "CheetahSlipperyHeavy": Shift(direction=1, friction=0.4, gravity=1.5),
    "CheetahBackwardSticky": Shift(direction=-1, friction=2.5, gravity=1.0),
}
MODULE = "benchmark.shifted_tasks"
TASKS = tuple(f"{MODULE}:{name}-v0" for name in SHIFTS)


class ShiftedCheetah(HalfCheetahEnv):
    """HalfCheetah under a `Shift`."""

    def __init__(self, direction: int, friction: float, gravity: float, **kwargs):
        super().__init__(forward_reward_weight=float(direction), **kwargs)
        self.model.geom_friction *= friction  # sliding, torsional, rolling
        self.model.opt.gravity *= gravity


for _name, _shift in SHIFTS.items():
    if f"{_name}-v0" not in gym.registry:  # the module may be imported under both its names
        _options = {"max_episode_steps": 1_000, "kwargs": _shift._asdict()}  # as HalfCheetah-v5
        gym.register(f"{_name}-v0", entry_point=ShiftedCheetah, **_options)
