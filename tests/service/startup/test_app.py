"""The app as a whole: with the real engine, and twice in one process. tests/service/api/ has its routes."""

import io
import json
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from starlette.testclient import TestClient

from tests.service.conftest import MakeSite, create_app, pixels, prepare
from tests.service.fakes import INFO, LIMITS, make_spec, wait_until
from tminus.model.checkpoint import Checkpoint
from tminus.service.engine.engine import Engine
from tminus.service.engine.executors import EagerExecutor
from tminus.service.engine.protocol import sample_locally
from tminus.service.images.encoder import contact_sheet
from tminus.service.jobs.store.sqlite_store import SqliteStore
from tminus.service.spec import SampleSpec

QUICK = {"steps": 2, "seed": 5, "class_label": "cat"}


def test_the_real_engine_serves_what_it_samples_without_a_server(tiny: Checkpoint) -> None:
    def make_engine() -> Engine:
        device = torch.device("cpu")
        return Engine(tiny, EagerExecutor(tiny.net, device, sizes=(1,)), device, max_rows=16, max_jobs=4)

    spec = make_spec(n=3, steps=8, seed=3, guidance=2.0, class_labels=(0, 1, 2))
    expected = sample_locally(make_engine(), spec, 8, lambda rows: None)
    limits = replace(LIMITS, max_rows=16, max_jobs=4)
    prepared = prepare(make_engine(), limits, ((1, 0.001),))
    app = create_app([prepared], lambda _: SqliteStore(None)).app
    with TestClient(app, base_url="http://localhost") as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        body = {"n": 3, "steps": 8, "seed": 3, "guidance": 2, "class_label": ["cat", 1, "2"]}
        response = client.post("/sample", json=body)
        info = client.get("/model").json()
    sheet = contact_sheet(expected)[:, :, 0]
    np.testing.assert_array_equal(pixels(response.content), sheet)
    with Image.open(io.BytesIO(response.content)) as image:
        image.load()
        recipe = json.loads(image.text["tminus"])  # type: ignore[attr-defined]
    labels = tuple(recipe["spec"]["class_labels"])
    assert SampleSpec(**recipe["spec"] | {"class_labels": labels}) == spec
    assert info["exact"] is True
    assert recipe["weights"] == info["weights_hash"] == tiny.weights_hash
    assert recipe["fingerprint"] == info["fingerprint"] == response.headers["x-fingerprint"]


def test_two_apps_in_one_process_share_nothing(make_site: MakeSite) -> None:
    one, other = make_site(), make_site()
    one.post(json=QUICK)
    images = f"tminus_images_total{json.dumps({'model': INFO.name})}"
    assert one.metrics()[images] == 1
    assert images not in other.metrics()
