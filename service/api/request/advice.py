"""What a client is told of a request that is right, but hardly gives what it wants. Pure."""

from tminus.service.model_info import ModelInfo
from tminus.service.spec import SampleSpec
from tminus.service.work import timesteps_of

MOSTLY_IMAGE = 0.5  # alpha_bar_t, the share of the image in the variance of x_t


def advice_headers(spec: SampleSpec, model: ModelInfo) -> dict[str, str]:
    """Make the header X-Warning, where there is a reason for one."""
    warning = warning_of(spec, model)
    return {} if warning is None else {"X-Warning": warning}


def warning_of(spec: SampleSpec, model: ModelInfo) -> str | None:
    """Say that noise will come out, where the first step takes x_T for an x_t that is more image than noise.

    So it is with a single step, spaced `leading` or `linspace`: both visit t = 0 alone, here as in diffusers.
    """
    if spec.strength is not None:  # it begins with an image, noised for its first step
        return None
    if spec.table is not None and not model.has_table(spec.table):  # of a job that ended before the tables were changed
        return None
    first, last = timesteps_of(spec, model)[0], model.num_timesteps - 1
    if first == last or model.alpha_bar(first) < MOSTLY_IMAGE:
        return None
    return (
        f"the first step is at timestep {first}, where x_t is more image than noise: from noise it makes noise. "
        f"timestep_spacing=trailing begins at timestep {last}"
    )
