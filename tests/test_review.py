"""Experience review in whole runs of the NE scripts: batches that are reviews are those that are counted as such."""

import sys

import pytest

import fake_task
import ne_drq_dmc
import ne_td3_continual
import ne_td3_continuous
from helpers import rows

ALL = "--batch-size 8 --eval-frequency 400 --eval-episodes 1 --no-cuda "
ALL += "--review-interval 10 --review-floor 0 --review-decay 1 "  # the threshold is the last reduction, mostly 0
TD3 = "--learning-starts 100 --actor-hidden 8 --critic-hidden 8 "
SCRIPTS = [
    (ne_td3_continuous, f"{TD3} --env-id Pendulum-v1 --total-timesteps 400 "),
    (ne_td3_continual, f"{TD3} --tasks Pendulum-v1 --cycles 1 --steps-per-task 400 "),
    (ne_drq_dmc, "--total-timesteps 400 --learning-starts 60 --frame-size 16 --channels 4 --hidden-dim 16 "),
]


@pytest.mark.parametrize(("script", "flags"), SCRIPTS, ids=[script.__name__ for script, _ in SCRIPTS])
def test_reviews_are_drawn_from_the_oldest_share_and_other_batches_from_all(script, flags, tmp_path, monkeypatch):
    shares, sample = [], script.ReplayBuffer.sample

    def noted(buffer, oldest: float = 1.0, rng=None):
        if rng is None:  # a batch for an update
            shares.append(oldest)
        return sample(buffer, oldest, rng)

    monkeypatch.setattr(ne_drq_dmc, "load_task", fake_task.load_task)
    monkeypatch.setattr(script.ReplayBuffer, "sample", noted)
    arguments = f"{flags} {ALL} --review-fraction 0.3 --buffer-size 500 --run-dir {tmp_path / 'run'}"
    monkeypatch.setattr(sys, "argv", [script.__file__, *arguments.split()])
    script.main()
    assert set(shares) == {0.3, 1.0} and shares[0] == 1.0
    assert float(rows(tmp_path / "run")[-1]["ne/review_share"]) == shares.count(0.3) / len(shares)
