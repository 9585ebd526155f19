"""The parameters of POST /noise, as a pydantic model. Pydantic stays here."""

import secrets
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.api.schemas import MAX_SEED, SEED_BITS, Int, refuse_unknown
from service.errors import InvalidField
from service.model_info import ModelInfo


class NoiseRequest(BaseModel):
    """How far an image is to go towards noise, and with which noise; in the query or in the form."""

    model_config = ConfigDict(extra="forbid")

    t: Int | None = Field(None, description="the timestep, 0 (least noise) .. T-1; required")
    seed: Int | None = Field(None, description="0..2^64-1; drawn if absent, always echoed")

    @classmethod
    def parse(cls, parameters: Mapping[str, Any], model: ModelInfo) -> "NoiseRequest":
        """Check names, types and bounds. Raises InvalidField or UnknownField for the first thing wrong."""
        refuse_unknown(parameters, cls.model_fields)
        bounds = {"t": f"an integer in 0..{model.num_timesteps - 1}", "seed": f"an integer in 0..{MAX_SEED}"}
        try:
            request = cls.model_validate(dict(parameters))
        except ValidationError as error:
            field = str(error.errors(include_url=False)[0]["loc"][0])
            raise InvalidField.of(field, bounds[field], parameters[field]) from None
        if request.t is None or not 0 <= request.t < model.num_timesteps:
            raise InvalidField.of("t", bounds["t"], request.t)
        if request.seed is not None and not 0 <= request.seed <= MAX_SEED:
            raise InvalidField.of("seed", bounds["seed"], request.seed)
        return request

    def seed_or_drawn(self, draw: Callable[[int], int] = secrets.randbits) -> int:
        """The seed given, or a new one."""
        return draw(SEED_BITS) if self.seed is None else self.seed
