from dataclasses import replace

import pytest
import torch

from tests.service.conftest import MakeCheckpoint
from tminus.service.engine.devices import MAX_DEFAULT_ROWS, choose_device, default_max_rows, is_lost


@pytest.mark.parametrize("name", ["", "gpu", "cpu:x", "cuda:", "mps", "meta", "cuda:-1", "cuda:4096", "xpu", "CPU "])
def test_a_bad_device_name_is_refused_with_the_choice(name: str) -> None:
    with pytest.raises(ValueError, match="device") as caught:
        choose_device(name)
    assert repr(name) in str(caught.value)


def test_auto_takes_a_gpu_where_there_is_one() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_the_default_number_of_rows_fits_the_latent_budget(make_checkpoint: MakeCheckpoint) -> None:
    assert default_max_rows(make_checkpoint()) == MAX_DEFAULT_ROWS
    large = make_checkpoint(in_channels=3, out_channels=3, sample_size=512)
    assert default_max_rows(large) == 512 * 2**20 // (2 * 4 * 3 * 512 * 512)
    assert default_max_rows(replace(large, size_px=(2**16, 2**16))) == 4, "the least that --max-batch may be"


@pytest.mark.parametrize("error", [None, torch.AcceleratorError("an illegal memory access was encountered", 700)])
def test_a_gpu_is_lost_when_it_cannot_even_be_waited_for(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    def synchronize(_device: torch.device) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert is_lost(torch.device("cuda")) is (error is not None)
    assert not is_lost(torch.device("cpu"))
