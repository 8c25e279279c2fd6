"""That training learns: minutes, so not among the default tests."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--initial-density 1 --review-floor 1", "--growth random --layer-norm"])
def test_pendulum_is_swung_up(tmp_path, flags):
    """A random policy gets about -1200, a policy that swings the pendulum up and holds it more than -300."""
    command = (
        "--env-id Pendulum-v1 --total-timesteps 12000 --learning-starts 1000 --grow-interval 500 --review-interval 100"
    )
    command += f" --learning-rate 1e-3 --eval-frequency 2000 --no-cuda --run-dir {tmp_path / 'run'} {flags}"
    subprocess.run([sys.executable, str(ROOT / "ne_td3_continuous.py"), *command.split()], cwd=ROOT, check=True)
    rows = list(csv.DictReader((tmp_path / "run" / "results.csv").open()))
    assert max(float(row["eval/return_mean"]) for row in rows[-3:]) > -300
