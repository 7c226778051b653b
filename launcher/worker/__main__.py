"""`python -m launcher.worker RUN_DIR` is one rank of a run: what `accelerate launch` starts."""

import gc
import sys
from typing import NoReturn


def run() -> NoReturn:
    """Load the engines and be a rank.

    Modules are made of a million objects and hardly any garbage. To look for some among them takes a quarter
    of the time they load in, and would go on in every step.
    """
    gc.disable()
    from launcher.worker.leaving import leave
    from launcher.worker.main import main

    gc.freeze()
    gc.enable()
    leave(main(sys.argv[1:]))


run()
