"""Sites that send webhooks to receivers on this machine."""

from dataclasses import replace
from typing import Any

from tests.receivers import SECRET
from tests.service.conftest import MakeSite, Site
from tminus.service.jobs.webhooks.deliverer import Rules
from tminus.service.jobs.webhooks.sender import read_secrets


def rules(allow: str = "127.0.0.1", retry_s: float = 86_400.0) -> Rules:
    return replace(Rules.of(read_secrets(SECRET), allow), retry_s=retry_s)


def make_telling(make_site: MakeSite, **kwargs: Any) -> Site:
    app = {"webhooks": rules(), **kwargs.pop("app", {})}
    return make_site(app=app, **kwargs)
