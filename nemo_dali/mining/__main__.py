"""``torchrun -m nemo_dali.mining ...``: the command ``nemo-dali mine ...`` on every rank."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "mine")
    runpy.run_module("nemo_dali", run_name="__main__")
