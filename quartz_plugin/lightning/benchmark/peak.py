"""A process that runs one contender, and prints its peak memory in MB."""

import json
import sys

from quartz_plugin.lightning.benchmark.memory import peak_mb, run_once

if __name__ == "__main__":
    run_once(**json.loads(sys.argv[1]))
    print(peak_mb())
