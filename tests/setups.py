"""Runs a script after a set-up: python tests/setups.py MODULE SET-UP [flags of the script].

Set-ups are words in one argument: "117:SIGTERM" sends the run this signal while it stores
its 117th transition, "kill_in_saving" kills it in the middle of writing its second
checkpoint.
"""

import importlib
import os
import signal
import sys
from pathlib import Path


def signalling(add, due: dict[int, str], send=None):
    """ReplayBuffer.add, which calls `send(signal)` at the additions `due`, counted from 1."""
    additions = 0

    def add_and_signal(*args, **kwargs):
        nonlocal additions
        additions += 1
        if additions in due:
            number = signal.Signals[due[additions]]
            if send is None:
                os.kill(os.getpid(), number)
            else:
                send(number)
        return add(*args, **kwargs)

    return add_and_signal


def kill_in_saving(fsync):
    """os.fsync, which at its second checkpoint leaves half of the file and kills."""
    checkpoints = 0

    def fsync_and_die(descriptor: int) -> None:
        nonlocal checkpoints
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        checkpoints += name.endswith("checkpoint.tmp")
        if checkpoints == 2:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    return fsync_and_die


def set_up(script, words: list[str]) -> None:
    due = {}
    for word in words:
        if word == "kill_in_saving":
            os.fsync = kill_in_saving(os.fsync)
        else:
            addition, name = word.split(":")
            due[int(addition)] = name
    script.ReplayBuffer.add = signalling(script.ReplayBuffer.add, due)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    module, words, *flags = sys.argv[1:]
    script = importlib.import_module(module)
    set_up(script, words.split())
    sys.argv = [script.__file__, *flags]
    script.as_script(script.main)
