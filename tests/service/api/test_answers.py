"""The JSON documents of the API: their members are a contract, and OpenAPI describes them."""

import json
from dataclasses import asdict, replace
from typing import Any

from jsonschema import Draft202012Validator

from tests.service.conftest import TABLES_OF_50, MakeSite, Site
from tests.service.fakes import INFO, wait_until
from tminus.model.catalogue import SAMPLER_FACTS, SAMPLERS, Recommended
from tminus.service.model_info import LatentInfo

JOB = [
    "id", "model", "state", "durable", "step", "steps", "n", "sampler", "seed", "position", "eta_s",
    "age_s", "created", "finished", "fingerprint", "parameters", "problem", "webhook",
]  # fmt: skip
PAGE = ["jobs", "next"]
MODEL: dict[str, Any] = {
    "name": "fake",
    "architecture": "UNet2DModel",
    "num_parameters": 123,
    "height_px": 4,
    "width_px": 6,
    "channels": 1,
    "alpha": False,
    "shown_channels": 1,
    "value_range": [-1.0, 1.0],
    "latent": None,
    "num_timesteps": 1000,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "timestep_spacings": dict(INFO.timestep_spacings),
    "steps_offset": 0,
    "clip": True,
    "samplers": list(SAMPLERS),
    "sampler_details": {
        name: {
            "when": facts.when,
            "source": facts.source,
            "good_steps": facts.good_steps,
            "max_steps": {"heun": 500, "plms": 999, "pndm": 991}.get(name, 1000),
            "passes_per_step": 2 if name == "heun" else 1,
            "passes_to_start": {"plms": 1, "pndm": 9}.get(name, 0),
            "steps_to_start": 3 if name == "pndm" else 1,
        }
        for name, facts in SAMPLER_FACTS.items()
        if name in SAMPLERS
    },
    "tables": [],
    "refused_tables": [],
    "student": None,
    "folded_guidance": 1.0,
    "default_sampler": "ddpm",
    "recommended": {"sampler": "dpmpp_2m", "steps": 20, "guidance": 1.0},
    "ladder": [
        {
            "sampler": "dpmpp_2m",
            "steps": steps,
            "guidance": 1.0,
            "passes": steps,
            "model": None,
            "distance": None,
            "pixel_distance": None,
        }
        for steps in (20, 10, 5)
    ],
    "conditional": True,
    "class_names": ["cat", "dog", "3d-print"],
    "null_class": 3,
    "weights_hash": "ab" * 32,
    "fingerprint": "0123456789abcdef",
    "device": "a fake",
    "executor": "none",
    "precision": "float32",
    "executor_details": "colours by arithmetic",
    "exact": True,
    "limits": {
        "max_n": 64,
        "max_batch": 8,
        "max_rows": 256,
        "max_jobs": 16,
        "max_backlog_s": 1e9,
        "max_body_bytes": 4096,
        "max_image_bytes": 8 * 2**20,
        "result_cache_bytes": 0,
        "keep_jobs_s": 86_400.0,
        "keep_jobs_bytes": 2**30,
        "max_streams": 2048,
        "max_streams_per_address": 64,
    },
}
SCHEDULE = ["alpha_bar", "beta"]
STATUS = ["status"]
COMPONENTS = {
    "JobAnswer": JOB, "JobPage": PAGE, "ModelAnswer": [*MODEL], "LimitsAnswer": [*MODEL["limits"]],
    "RecommendedAnswer": ["sampler", "steps", "guidance"],
    "LatentAnswer": ["autoencoder", "channels", "height", "width", "scaling_factor"],
    "ScheduleAnswer": SCHEDULE, "StatusAnswer": STATUS,
}  # fmt: skip


class Described:
    """A site, and what its OpenAPI document says."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.document = site.client.get("/openapi.json").json()
        self.components = self.document["components"]["schemas"]
        for component in self.components.values():
            if "properties" in component:  # and an answer has no others
                component["additionalProperties"] = False

    def answer(self, method: str, path: str, route: str = "", status: int = 200, **kwargs: Any) -> dict[str, Any]:
        """Ask, and check the answer against the schema of its route and status."""
        response = self.site.client.request(method, path, **kwargs)
        assert response.status_code == status, response.text
        operation = self.document["paths"][route or path][method.lower()]
        schema = operation["responses"][str(status)]["content"]["application/json"]["schema"]
        document: dict[str, Any] = response.json()
        self.check(document, schema)
        return document

    def check(self, document: Any, schema: dict[str, Any]) -> None:
        Draft202012Validator({**schema, "components": self.document["components"]}).validate(document)

    def wait_for(self, job_id: str, state: str) -> None:
        wait_until(lambda: self.site.client.get(f"/jobs/{job_id}").json()["state"] == state)


def test_openapi_describes_every_answer_with_all_its_members(site: Site) -> None:
    components = Described(site).components
    for name, members in COMPONENTS.items():
        assert list(components[name]["properties"]) == components[name]["required"] == members


def test_the_model_is_told_with_its_limits_and_fits_its_schema(site: Site) -> None:
    document = Described(site).answer("GET", "/model")
    assert document == MODEL
    assert (list(document), list(document["limits"])) == (list(MODEL), list(MODEL["limits"])), "in this order"


def test_models_of_other_kinds_fit_the_schema_too(make_site: MakeSite) -> None:
    latent = LatentInfo("VQModel", 3, 2, 3, 1.0)
    recommended = Recommended("dpmpp_2m", 20, 1.5)
    info = replace(INFO, latent=latent, recommended=recommended, tables=TABLES_OF_50[:1])
    document = Described(make_site(info=info)).answer("GET", "/model")
    assert document["latent"] == asdict(latent)
    assert document["recommended"] == {"sampler": "dpmpp_2m", "steps": 20, "guidance": 1.5}
    assert document["tables"][0]["table"] == TABLES_OF_50[0].hash
    plain = make_site(info=replace(INFO, conditional=False, class_names=(), null_class=None))
    document = Described(plain).answer("GET", "/model")
    assert (document["class_names"], document["null_class"]) == ([], None)


def test_a_job_is_told_by_the_same_document_everywhere(site: Site) -> None:
    described = Described(site)
    accepted = described.answer("POST", "/jobs", status=202, json={"steps": 2, "seed": 5, "class_label": "cat"})
    path = f"/jobs/{accepted['id']}"
    described.wait_for(accepted["id"], "done")
    one = described.answer("GET", path, "/jobs/{job_id}")
    page = described.answer("GET", "/jobs")
    cancelled = described.answer("POST", f"{path}/cancel", "/jobs/{job_id}/cancel")
    events = site.client.get(f"{path}/events").text
    last = json.loads(next(line for line in events.splitlines() if line.startswith("data: "))[6:])
    assert list(page) == PAGE
    told = [accepted, one, page["jobs"][0], cancelled, last]
    assert all(list(document) == JOB for document in told)
    described.check(last, described.components["JobAnswer"])
    assert all(document | {"age_s": 0} == one | {"age_s": 0} for document in told[1:])
    assert (accepted["finished"], one["position"], one["eta_s"], one["problem"]) == (None, None, None, None)


def test_jobs_that_wait_run_or_fail_fit_the_schema(make_site: MakeSite) -> None:
    site = make_site(max_batch=2)
    site.engine.gate.shut()
    described = Described(site)
    ids = [described.answer("POST", "/jobs", status=202, json={"n": 2, "steps": k})["id"] for k in (3, 400)]
    site.engine.next_begun()
    site.engine.gate.let()  # a job runs once it has taken a step
    described.wait_for(ids[0], "running")
    assert {job["state"] for job in described.answer("GET", "/jobs")["jobs"]} == {"running", "waiting"}

    def fail(_batch: object) -> None:
        raise RuntimeError("no kernel image")

    site.engine.on_step = fail
    site.engine.gate.open()
    described.wait_for(ids[1], "failed")
    assert described.answer("GET", f"/jobs/{ids[1]}", "/jobs/{job_id}")["problem"]["code"] == "engine_failed"
