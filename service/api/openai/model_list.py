"""GET /v1/models: the models that are served, in OpenAI's form."""

from fastapi import APIRouter, Depends, Request

from tminus.service.api.answers.openapi import path_parameter
from tminus.service.api.models import Models
from tminus.service.api.openai.answers import ModelEntries, ModelEntry
from tminus.service.api.openai.described import openai_failures
from tminus.service.api.request.reading import no_parameters
from tminus.service.api.services import Services


def model_list_routes(models: Models) -> APIRouter:
    """Make the routes."""
    router = APIRouter(prefix="/v1/models", tags=["openai"], dependencies=[Depends(no_parameters)])

    @router.get("", summary="The models that are served", responses=openai_failures(400, 401, 429))
    async def list_models() -> ModelEntries:
        return ModelEntries(data=[_entry(services) for services in models])

    @router.get(
        "/{model}",
        summary="One model",
        responses=openai_failures(400, 401, 404, 429),
        # Were it an argument of the handler, FastAPI would describe a 422 that is never answered.
        openapi_extra={"parameters": [path_parameter("model")]},
    )
    async def get_model_entry(request: Request) -> ModelEntry:
        return _entry(models.of(request))

    return router


def _entry(services: Services) -> ModelEntry:
    return ModelEntry(id=services.model.name, created=services.loaded_s)
