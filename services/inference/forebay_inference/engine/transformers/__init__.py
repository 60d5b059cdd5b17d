"""Models of the Transformers library in one continuous batch. Its modules import torch and more; this one does not."""

import os

# torch's threads wait for each other hundreds of times in a pass. They spin by default, which starves whatever else
# wants the CPUs and then waits for it: eight times slower beside a busy process. Read once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
