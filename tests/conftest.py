"""What holds for all tests.

Triton's interpreter has to be chosen before anything imports triton. Where the tests were started in the
background of a script, they and all they start would ignore SIGINT: the tests of interruption need it.
"""

import os
import signal

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
