"""Every test runs offline, seeded, on one thread, with shapes and types checked at each call."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random

import jaxtyping
import numpy as np
import pytest
import torch
import transformers

# Before any import of the package: the hook checks only what is imported under it.
jaxtyping.install_import_hook("ultrafuser", "typechecker.check_calls")

torch.set_num_threads(1)


def pytest_report_header() -> str:
    """Says which versions were tested; fails when the oldest transformers was asked for and another one loaded."""
    expected = os.environ.get("ULTRAFUSER_EXPECT_TRANSFORMERS", "")
    if not transformers.__version__.startswith(expected):
        raise pytest.UsageError(f"transformers is {transformers.__version__}, the test asks for {expected}")
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
