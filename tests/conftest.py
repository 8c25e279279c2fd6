"""What a script's main changes in the process it runs in is undone after each test."""

import gc
import os
import signal
import threading

import pytest
import torch

torch.set_num_threads(1)  # two threads per process wait for each other when cores are shared


@pytest.fixture
def one_minute():
    """What would wait for ever fails."""

    def late(*_):
        pytest.fail("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def same_process_as_before():
    rendering = os.environ.get("MUJOCO_GL")
    excepthook = threading.excepthook
    yield
    threading.excepthook = excepthook
    torch.set_flush_denormal(False)
    gc.unfreeze()
    os.environ.pop("MUJOCO_GL", None)
    if rendering is not None:
        os.environ["MUJOCO_GL"] = rendering
