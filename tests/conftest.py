"""Triton's interpreter has to be chosen before anything imports triton, so it is chosen for all tests."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
