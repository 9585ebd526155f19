from collections.abc import Iterator

import pytest
import torch

from tests.model.evaluation.toys import CPU, TRAINING, toy_images
from tminus.model.evaluation.classifier import Classifier, train_classifier


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # Nets this small gain nothing from a second thread, and wait minutes for one on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def toy_classifier() -> Classifier:
    return train_classifier(toy_images(96, 0), toy_images(60, 1), TRAINING, device=CPU)
