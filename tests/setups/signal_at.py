"""Sends the run signals while it stores given transitions: words such as 1730:SIGTERM."""

import os
import signal

script = globals()["script"]  # given by run.py
due = {}
for word in globals()["words"]:
    addition, name = word.split(":")
    due[int(addition)] = signal.Signals[name]

add = script.ReplayBuffer.add
additions = 0


def add_and_signal(*args, **kwargs):
    global additions
    additions += 1
    if additions in due:
        os.kill(os.getpid(), due[additions])
    return add(*args, **kwargs)


script.ReplayBuffer.add = add_and_signal
