"""Rendering, then training, in one process: torch with CUDA on a machine without a GPU."""

import ctypes.util
import importlib.util
import os
import subprocess
import sys

import pytest

import helpers

RENDER_THEN_ADAM = """
import utils_topology
import torch
from dm_control import suite

suite.load("cartpole", "swingup").physics.render(8, 8)
p = torch.nn.Parameter(torch.zeros(1))
p.grad = torch.ones(1)
torch.optim.Adam([p]).step()
print("alive")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch's CPU build")
@pytest.mark.parametrize(("backend", "library"), [("egl", "EGL"), ("osmesa", "OSMesa")])
def test_adam_works_after_rendering(backend, library):
    """Mesa's LLVM, loaded before triton's, crashed the process (exit 139)."""
    if ctypes.util.find_library(library) is None:
        pytest.skip(f"no lib{library} here")
    run = subprocess.run(
        [sys.executable, "-c", RENDER_THEN_ADAM],
        cwd=helpers.ROOT,
        env=os.environ | {"MUJOCO_GL": backend},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (0, "alive\n"), run.stderr


def test_triton_is_loaded_before_mujoco():
    """The cure stands in utils_topology, which every script imports before it makes a task."""
    code = "import ne_td3_continuous, sys; sys.exit('mujoco' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=helpers.ROOT, check=True)
