"""Files of trajectories: what is in them, and what is refused."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from tests.service.fakes import INFO, FakeEngine, fake_pixels, make_spec
from tminus.model.trajectory import Trajectory, transitions
from tminus.service.api.request.schemas import SampleCall
from tminus.service.api.sample import trajectory
from tminus.service.images.encoder import recipe
from tminus.service.images.trajectory import FORMAT, MAX_METADATA_BYTES, METADATA_KEY, pack_trajectory, read_trajectory
from tminus.service.spec import SampleSpec
from tminus.service.work import select_passes

SPEC = make_spec(n=2, steps=4, class_labels=(1, None))


def trajectory_of(spec: SampleSpec, keep: Sequence[int] | None = None) -> Trajectory:
    rng, shape, selection = np.random.default_rng(spec.seed), (spec.n, 1, 4, 6), select_passes(keep, spec, INFO)
    x_t, x_0 = (rng.standard_normal((spec.num_passes + more, *shape)).astype(np.float32) for more in (1, 0))
    plan = FakeEngine().plan(spec)
    return Trajectory(plan, x_t[list(selection.points)], x_0[list(selection.predictions)], None, selection)


def packed(spec: SampleSpec = SPEC, keep: Sequence[int] | None = None) -> bytes:
    return pack_trajectory(trajectory_of(spec, keep), fake_pixels(spec, 4), spec, INFO, recipe(spec, INFO))


def with_metadata(metadata: dict[str, str] | None) -> bytes:
    return safetensors.numpy.save({"x_t": np.zeros(3, np.float32)}, metadata)


def test_a_file_has_all_arrays_of_the_stated_shapes_and_the_recipe_of_its_pngs() -> None:
    file, trajectory = read_trajectory(packed()), trajectory_of(SPEC)
    shapes = {name: (array.dtype.name, array.shape) for name, array in file.arrays.items()}
    assert shapes == {
        "x_t": ("float32", (5, 2, 1, 4, 6)),
        "x_0": ("float32", (4, 2, 1, 4, 6)),
        "x_t_at": ("int64", (5,)),
        "x_0_at": ("int64", (4,)),
        "passes": ("int64", (3,)),
        "mean": ("float32", (3, 2, 1, 4, 6)),
        "s": ("float64", (3, 1, 1, 1, 1)),
        "log_p": ("float64", (3, 2)),
        "timesteps": ("float64", (4,)),
        "lines": ("float64", (4, 8)),
        "inputs": ("float64", (4, 2)),
        "images": ("uint8", (2, 4, 6, 1)),
        "class_labels": ("int64", (2,)),
    }
    np.testing.assert_array_equal(file.arrays["x_t"], trajectory.x_t)
    np.testing.assert_array_equal(file.arrays["log_p"], transitions(trajectory).log_p)
    np.testing.assert_array_equal(file.arrays["images"], fake_pixels(SPEC, 4))
    assert file.arrays["class_labels"].tolist() == [1, INFO.null_class]
    made_by = {"device": "a fake", "executor": "none", "precision": "float32", "exact": True}
    assert file.document == json.loads(json.dumps({"format": FORMAT, **recipe(SPEC, INFO), "made_by": made_by}))


def test_the_same_trajectory_is_the_same_bytes() -> None:
    assert len({packed() for _ in range(8)}) == 1


def test_the_etag_names_all_whose_other_version_may_make_other_bytes() -> None:
    for name, version in {"safetensors": safetensors.__version__, "numpy": np.__version__}.items():
        assert f"{name} {version}" in trajectory(make_spec(sampler="ddpm"), INFO, SampleCall()).etag_form


@pytest.mark.parametrize("share", [0.0, 0.2, 0.999])
def test_a_file_that_is_cut_off_is_refused(share: float) -> None:
    whole = packed()
    with pytest.raises(ValueError, match="not a trajectory, or truncated or damaged"):
        read_trajectory(whole[: int(share * len(whole))])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"just text, and more of it", "not a trajectory"),
        (b"\xff" * 64, "not a trajectory"),
        (with_metadata(None), "no 'tminus' in its metadata"),
        (with_metadata({METADATA_KEY: "[]"}), "no 'tminus' in its metadata"),
        (with_metadata({METADATA_KEY: "[" * 5000}), "no 'tminus' in its metadata"),
        (with_metadata({METADATA_KEY: "{}"}), "no 'tminus' in its metadata"),
        (with_metadata({METADATA_KEY: json.dumps({"format": FORMAT + 1})}), f"of format {FORMAT + 1}, and"),
        (with_metadata({METADATA_KEY: json.dumps({"format": FORMAT - 1})}), f"of format {FORMAT - 1}, and"),
        (with_metadata({METADATA_KEY: '{"format": true}'}), "of format True, and"),
        (with_metadata({METADATA_KEY: '{"format": 0}'}), "of format 0, and"),
        (with_metadata({METADATA_KEY: " " * MAX_METADATA_BYTES}), "its header takes"),
    ],
)
def test_what_is_no_trajectory_is_refused_with_the_reason(data: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_trajectory(data)
