"""HalfCheetah with changed dynamics and rewards: ten tasks of one body, for runs in sequence.

Run:   python benchmark/shifted_tasks.py    lists the tasks and the commands of the runs

In the repository's root they are Gymnasium ids as they stand, of any script:

    python ne_td3_continual.py --tasks benchmark.shifted_tasks:CheetahSlippery-v0 ...

Elsewhere, with PYTHONPATH at the folder benchmark, the module is called shifted_tasks:
    PYTHONPATH=/path/to/benchmark python ... --tasks shifted_tasks:CheetahSlippery-v0
Observations, actions and the length of an episode are those of HalfCheetah-v5.
"""

from typing import NamedTuple

import gymnasium as gym
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv

EPISODE = 1_000  # steps, as HalfCheetah-v5


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

# of all runs on these tasks; 5,000 random steps, since a task has only 50,000
SEQUENCE = "--steps-per-task 50000 --cycles 1 --clear-buffer"
COMMON = "--learning-starts 5000 --eval-frequency 10000 --eval-episodes 2"
NE = "ne_td3_continual.py"
TD3 = "-m baselines.td3_continual"
ARMS = {  # name of the run's folder: what follows `python`
    "td3": TD3,
    "ne": NE,
    "ne_no_review": f"{NE} --review-floor 1",
    "reset": f"{TD3} --method reset",
    "layer_norm": f"{TD3} --method layer-norm",
}
FRESH = "-m baselines.td3_continuous --total-timesteps 50000"


class ShiftedCheetah(HalfCheetahEnv):
    """HalfCheetah under a `Shift`."""

    def __init__(self, direction: int, friction: float, gravity: float, **kwargs):
        super().__init__(forward_reward_weight=float(direction), **kwargs)
        self.model.geom_friction *= friction  # sliding, torsional, rolling
        self.model.opt.gravity *= gravity


def register() -> None:
    for name, shift in SHIFTS.items():
        env_id = f"{name}-v0"
        if env_id not in gym.registry:  # the module may be imported under both its names
            gym.register(
                env_id,
                entry_point=ShiftedCheetah,
                max_episode_steps=EPISODE,
                kwargs=shift._asdict(),
            )


def sequence_command(arm: str, seed: str) -> str:
    folder = f"runs/shifts/{arm}_seed{seed}"
    flags = f"{SEQUENCE} {COMMON} --seed {seed} --run-dir {folder}"
    return f"python {ARMS[arm]} {flags} --tasks $tasks"


def fresh_command(name: str, seed: str) -> str:
    """The yardstick: a new TD3 on one of the tasks, with as many steps."""
    folder = f"runs/shifts/fresh_{name}_seed{seed}"
    return f"python {FRESH} {COMMON} --seed {seed} --run-dir {folder} --env-id {MODULE}:{name}-v0"


def main() -> None:
    print(f"{'task':26} {'rewarded':9} {'friction':>8} {'gravity':>8}")
    for name, shift in SHIFTS.items():
        rewarded = "forward" if shift.direction > 0 else "backward"
        print(f"{name + '-v0':26} {rewarded:9} {shift.friction:8g} {shift.gravity:8g}")
    print("\nOne agent through all of them, a line per arm; in the repository's root:\n")
    print(f'tasks="{" ".join(TASKS)}"')
    for arm in ARMS:
        print(sequence_command(arm, seed="1"))
    print("\nThe yardstick, a new TD3 on each with as many steps:\n")
    for name in SHIFTS:
        print(fresh_command(name, seed="1"))


register()

if __name__ == "__main__":
    main()
