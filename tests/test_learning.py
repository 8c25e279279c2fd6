"""That training learns: minutes, so not among the default tests."""

import pytest

from helpers import finish, launch, rows


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", ["", "--initial-density 1 --review-floor 1", "--growth random --layer-norm"]
)
def test_pendulum_is_swung_up(tmp_path, flags):
    """A random policy gets about -1200, one that swings it up and holds it more than -300."""
    command = "--env-id Pendulum-v1 --total-timesteps 12000 --learning-starts 1000 "
    command += "--grow-interval 500 --review-interval 100 --learning-rate 1e-3 "
    command += "--eval-frequency 2000 --no-cuda "
    process = launch(f"{command} {flags} --run-dir {tmp_path / 'run'}")
    code, _, err = finish(process)
    assert code == 0, err
    returns = [float(row["eval/return_mean"]) for row in rows(tmp_path / "run")]
    assert max(returns[-3:]) > -300
