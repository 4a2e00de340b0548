"""Loading, making and saving models; what a forward pass means for each of the three roles."""

import logging

# Where it is installed, peft imports it, and it warns of a kernel that is not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
