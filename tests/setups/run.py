"""Runs a script after a set-up: python run.py MODULE "SET-UP WORDS" [flags of the script].

A set-up is a module of this folder. It is run with the script's module as `script` and
the words that follow its name as `words`.
"""

import importlib
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

if __name__ == "__main__":
    name, setup = sys.argv[1:3]
    sys.path.insert(0, str(ROOT))
    script = importlib.import_module(name)
    sys.argv = [script.__file__, *sys.argv[3:]]
    kind, *words = setup.split()
    runpy.run_path(str(HERE / f"{kind}.py"), init_globals={"script": script, "words": words})
    script.as_script(script.main)
