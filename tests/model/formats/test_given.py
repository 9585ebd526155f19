from typing import Any

import pytest

from tminus.model.formats.given import CHOICES, FLAGS, LARGEST, Given


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"variance": "learned"}, "--variance must be fixed_small or fixed_large, got 'learned'"),
        ({"beta_schedule": "cosine"}, "--beta-schedule must be linear or"),
        ({"rescale_timesteps": "true"}, "--rescale-timesteps must be yes or no, got 'true'"),
        ({"image_size": 0}, r"--image-size must be 1\.\.4096, got 0"),
        ({"timesteps": 10**9}, r"--timesteps must be 1\.\.100000, got 1000000000"),
        ({"heads": 4, "head_width": 64}, "--heads or --head-width, not both: got 4 and 64"),
    ],
)
def test_value_out_of_bounds_is_refused_by_its_flag(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Given(**facts)


def test_each_fact_has_words_and_bounds() -> None:
    assert set(FLAGS) == set(Given.__dataclass_fields__) == set(CHOICES) | set(LARGEST)
