"""Several models on fake engines, and a library that more are loaded from."""

import gc
import threading
import weakref
from collections.abc import MutableSequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.service.conftest import INSTANT, MakeSite, Site, prepare
from tests.service.fakes import INFO, LIMITS, FakeEngine
from tests.service.keys import access_of, key_line
from tminus.service.model_info import ModelInfo
from tminus.service.startup.models import Prepared
from tminus.service.startup.settings import Library

KEY = "the-admin-key-of-the-tests"
ADMIN = {"Authorization": f"Bearer {KEY}"}
COLOUR = replace(
    INFO,
    name="colour",
    channels=3,
    height_px=8,
    width_px=8,
    class_names=("red", "green"),
    null_class=2,
    num_timesteps=100,
    weights_hash="cd" * 32,
    fingerprint="fedcba9876543210",
)
QUICK: dict[str, Any] = {"steps": 2, "seed": 5, "class_label": 0}


def version_of(info: ModelInfo, version: int) -> ModelInfo:
    """Other weights under the same name."""
    return replace(info, weights_hash=f"{version:02x}" * 32, fingerprint=f"{version:016x}")


@dataclass
class Shelf:
    """What `prepare` finds in the folders of the library, by name: a model, or an error."""

    found: dict[str, ModelInfo | Exception] = field(default_factory=dict)
    engines: MutableSequence[FakeEngine] = field(default_factory=list)  # the engines that were made, in order
    freed: list[bool] = field(default_factory=list)  # of each memory that was given back: whether its engine was gone
    gate: threading.Event = field(default_factory=threading.Event)  # while it is clear, loading takes long

    def prepare(self, name: str, _folder: Path) -> Prepared:
        assert self.gate.wait(10)
        found = self.found[name]
        if isinstance(found, Exception):
            raise found
        made = FakeEngine(replace(found, name=name))
        self.engines.append(made)
        engine = weakref.ref(made)

        def release() -> None:
            gc.collect()
            self.freed.append(engine() is None)

        return replace(prepare(made, LIMITS, INSTANT), release=release)


@dataclass
class Several:
    """A site with two models, fake and colour, and a third that can be loaded."""

    site: Site
    colour: FakeEngine
    shelf: Shelf

    def post(self, path: str, **kwargs: Any) -> Any:
        return self.site.client.post(path, **kwargs)

    def get(self, path: str, **kwargs: Any) -> Any:
        return self.site.client.get(path, **kwargs)

    def change(self, name: str, what: str) -> Any:
        return self.post(f"/models/{name}/{what}", headers=ADMIN)

    def states(self) -> dict[str, str]:
        return {each["name"]: each["state"] for each in self.get("/models").json()["models"]}


def make_several(make_site: MakeSite, **kwargs: Any) -> Several:
    colour, shelf = FakeEngine(COLOUR), Shelf()
    shelf.gate.set()
    library = Library({name: Path(name) for name in ("fake", "colour", "third")})
    access = access_of(key_line("ops", KEY, "admin"), is_open=True)
    app = {"access": access, "others": [prepare(colour, LIMITS, INSTANT)], "library": library, "prepare": shelf.prepare}
    return Several(make_site(app=app, **kwargs), colour, shelf)
