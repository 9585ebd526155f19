"""Routes under /models that list, load, reload and unload models while the server runs."""

from collections.abc import Awaitable, Mapping
from typing import Protocol

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field

from tminus.service.access.access import Access
from tminus.service.api.answers.documents import ModelAnswer
from tminus.service.api.answers.openapi import failures
from tminus.service.api.answers.operations import described
from tminus.service.api.edge.authentication import caller_of
from tminus.service.api.models import Models, Services
from tminus.service.api.request.reading import BARE


class Loader(Protocol):
    """Loads, reloads and unloads models while the server runs.

    Every method may raise ModelBusy, ModelNotFound, CheckpointRefused or another ServiceError.
    """

    def unloaded_models(self) -> Awaitable[Mapping[str, str]]:
        """Return the state of each model that can be loaded but is not being served, keyed by model name."""

    def state(self, services: Services) -> str:
        """Return the state of a served model: loaded, loading, unloading or unloaded."""

    def load(self, name: str) -> Awaitable[Services]:
        """Load a model into memory and serve it."""

    def reload(self, name: str) -> Awaitable[Services]:
        """Read the model's folder again and serve what it now contains."""

    def unload(self, name: str) -> Awaitable[None]:
        """Free a model's memory once its jobs have ended. Also stop serving the model, unless models load on demand."""


class ModelSummary(BaseModel):
    """One entry in the list of models."""

    name: str
    default: bool = Field(description="Whether requests that name no model use this one.")
    state: str = Field(json_schema_extra={"enum": ["loaded", "loading", "unloading", "unloaded"]})
    url: str | None = Field(description="Where its page and its whole API are; null where it is not served.")
    model: ModelAnswer | None = Field(description="As GET /model tells of it; null where it is not served.")


class ModelList(BaseModel):
    """All models of this server."""

    models: list[ModelSummary]


def admin_routes(models: Models, loader: Loader, access: Access) -> APIRouter:
    """Return a router with the routes under /models."""
    router = APIRouter(prefix="/models", tags=["models"])
    refusals = failures(401, 403, 404, 409, 422, 500, 503)

    async def only_admins(request: Request) -> None:
        access.check_admin(caller_of(request))

    admins = [Depends(only_admins), *BARE]

    def summary(request: Request, services: Services) -> ModelSummary:
        name = services.model.name
        url = f"{request.scope.get('root_path', '')}/models/{name}/"
        answer = ModelAnswer.of(services.model, services.limits)
        is_default, state = services.number == models.default.number, loader.state(services)
        return ModelSummary(name=name, default=is_default, state=state, url=url, model=answer)

    @router.get("", **described("list_models"), dependencies=BARE, responses=failures(422))
    async def get_models(request: Request) -> ModelList:
        loaded = [summary(request, services) for services in models]
        others = [
            ModelSummary(name=name, default=False, state=state, url=None, model=None)
            for name, state in (await loader.unloaded_models()).items()
        ]
        return ModelList(models=loaded + others)

    @router.get("/{model}", **described("get_model_by_name"), dependencies=BARE, responses=failures(404, 422))
    async def get_one(model: str) -> ModelAnswer:
        services = models.named(model)
        return ModelAnswer.of(services.model, services.limits)

    @router.post("/{model}/load", **described("load_model"), dependencies=admins, responses=refusals)
    async def load(request: Request, model: str) -> ModelSummary:
        return summary(request, await loader.load(model))

    @router.post("/{model}/reload", **described("reload_model"), dependencies=admins, responses=refusals)
    async def reload(request: Request, model: str) -> ModelSummary:
        return summary(request, await loader.reload(model))

    @router.post(
        "/{model}/unload",
        **described("unload_model"),
        status_code=204,
        dependencies=admins,
        responses=refusals,
    )
    async def unload(model: str) -> None:
        await loader.unload(model)

    return router
