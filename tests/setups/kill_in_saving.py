"""Kills the run in the middle of writing its second checkpoint, leaving half of the file."""

import os
import signal

fsync = os.fsync
checkpoints = 0


def fsync_and_die(descriptor):
    global checkpoints
    if os.readlink(f"/proc/self/fd/{descriptor}").endswith("checkpoint.tmp"):
        checkpoints += 1
        if checkpoints == 2:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)


os.fsync = fsync_and_die
