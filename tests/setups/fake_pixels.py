"""The fake task in place of dm_control's, then a set-up: fake_pixels signal_at 117:SIGKILL."""

import runpy
from pathlib import Path

import fake_task
import ne_drq_dmc

ne_drq_dmc.load_task = fake_task.load_task
kind, *words = globals()["words"]
path = Path(__file__).parent / f"{kind}.py"
runpy.run_path(str(path), init_globals={"script": globals()["script"], "words": words})
