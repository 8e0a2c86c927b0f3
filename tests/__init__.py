"""The tests. Each says what a user loses if it fails; they start real servers and use real sockets.

Meaning comes from a small CLIP that is trained here on coloured pictures (red is an animal, green a landscape, ...);
its true-size sisters have seeded random weights, for which shapes and numerical agreement are real.

`conftest.py` makes models, daemons and networks, once each; the files without `test_` are what tests are made of.
"""

import os

# PyTorch's threads spin while they wait for each other. Two test processes, or a busy machine, would make the training
# of the small model ten times as expensive.
os.environ.setdefault("OMP_NUM_THREADS", "1")
