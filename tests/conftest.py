"""What holds for all tests.

Triton's interpreter has to be chosen before anything imports triton. Where the tests were started in the
background of a script, they and all they start would ignore SIGINT: the tests of interruption need it.

Workers of pytest-xdist, and the processes they start, compute with one thread each: there is a worker for each
core, and OpenMP's threads spin at every barrier while the core that they wait for belongs to another worker. A
test of 4 s took over 300 s on a busy machine.
"""

import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
