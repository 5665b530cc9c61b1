"""Every test runs offline, seeded, on one thread, with shapes and types checked at each call."""

import gc
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


# Files that take a minute, or nearly. They come first, so that no process is left with one of them while others idle.
LONGEST = (
    "test_compare",
    "test_demo_run",
    "test_engine_parallel",
    "test_evaluate_run",
    "test_page_browser",
    "test_resume",
    "test_server_process",
    "test_specialist",
    "test_synthesis_kill",
    "test_training_hidden",
    "test_training_parallel",
    "test_training_specialist",
    "test_vllm_",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, else in the order of their names."""
    items.sort(key=lambda item: not item.path.name.startswith(LONGEST))


def pytest_collection_finish() -> None:
    """What imports have made stays: every search for garbage, which each examined model asks for, passes it over."""
    gc.collect()
    gc.freeze()


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
