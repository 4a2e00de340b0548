"""threefold: supervised fine-tuning, reward model and PPO, from one recipe, at every scale."""

import os

__version__ = "0.1.0"

# OpenMP's default is to spin while waiting for the slower threads. Where anything else uses the cores, spinning
# threads take
# the time of those they wait for: measured 8 times slower with two busy neighbours on two cores (LOG.md). Must be set
# before torch is loaded; a value that the user has set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
