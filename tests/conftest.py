"""What the script's main() changes in the process it runs in is undone after each test."""

import gc
import os
import signal

import pytest
import torch


@pytest.fixture(autouse=True)
def same_process_as_before():
    rendering = os.environ.get("MUJOCO_GL")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    torch.set_flush_denormal(False)
    gc.unfreeze()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.pop("MUJOCO_GL", None)
    if rendering is not None:
        os.environ["MUJOCO_GL"] = rendering
