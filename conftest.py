"""What every test run has in common, however pytest is started.

The variables are set here, before the first import of the libraries that read them: tests use no network, and the
tokenizers' own threads neither compete with PyTorch's for the cores nor warn when a test starts a process.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
