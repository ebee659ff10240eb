"""For all tests: one thread per process. torch's threads spin while they wait, so processes that share cores slow each
other down by far more than a second thread gains on tiny tensors."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
