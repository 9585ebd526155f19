import gc
import os

import hypothesis
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has one core: two teams of threads would wait for each other
    torch.set_num_threads(1)

hypothesis.settings.register_profile("tminus", deadline=None)  # a busy machine is no fault of the code
hypothesis.settings.load_profile("tminus")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")


def pytest_collection_finish() -> None:
    """What has been imported stays: looking through it for garbage again and again takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
