"""threefold: supervised fine-tuning, reward model and PPO, from one recipe, at every scale."""

import os

__version__ = "0.1.0"

# GNU OpenMP's default is to spin for milliseconds while waiting for the slower threads. Where anything else uses the
# cores,
# spinning threads take the time of those they wait for: a small model's step was measured many times slower beside
# two busy
# processes. Spinning for some microseconds costs nothing alone and avoids that (LOG.md, benchmarks/openmp_wait.py).
# It must
# be set before torch is loaded; a choice of the user's stays.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "5000"
