"""GET /model, /metrics and the probes, through the app."""

from concurrent.futures import ThreadPoolExecutor

from prometheus_client.parser import text_string_to_metric_families

from tests.service.conftest import MakeSite, Site, problem
from tests.service.fakes import INFO, PATIENCE_S, wait_until
from tminus.service.work import Batch

QUICK = {"steps": 2, "seed": 5, "class_label": "cat"}


# --- probes ---


def test_before_the_warm_up_the_server_lives_but_is_not_ready(make_site: MakeSite) -> None:
    site = make_site(gate_shut=True)
    site.engine.next_begun()
    assert site.client.get("/healthz").json() == {"status": "alive"}
    for response in (site.client.get("/readyz"), site.client.get("/health"), site.post(json=QUICK)):
        problem(response, 503, "not_ready")
        assert int(response.headers["retry-after"]) >= 1
    assert [site.client.head(path).status_code for path in ("/healthz", "/readyz", "/health")] == [200, 503, 503]
    assert site.client.get("/model").status_code == 200
    assert site.client.get("/metrics").status_code == 200
    site.engine.gate.open()
    wait_until(lambda: site.client.get("/readyz").status_code == 200)
    assert site.client.get("/readyz").json() == site.client.get("/health").json() == {"status": "ready"}
    assert site.post(json=QUICK).status_code == 200


def test_a_dead_worker_fails_the_liveness_probe(make_site: MakeSite) -> None:
    def break_(_batch: Batch) -> None:
        raise RuntimeError("no kernel image")

    site = make_site(gate_shut=True)
    site.engine.on_step = break_
    site.engine.gate.open()
    wait_until(lambda: not site.worker.state.alive)
    problem(site.client.get("/healthz"), 500, "engine_failed")
    for path in ("/readyz", "/health"):
        problem(site.client.get(path), 500, "engine_failed")
    problem(site.post(json=QUICK), 500, "engine_failed")
    site.engine.jobs.clear()  # the warm-up's own slots died with the worker


# --- metrics ---


def test_metrics_count_what_happened(site: Site) -> None:
    site.post(json=QUICK | {"n": 3})
    site.post(json=QUICK | {"sampler": "ddim", "guidance": 2}, headers={"Accept": "application/zip"})
    site.post(json={"steps": 0})
    site.post(json={"stepz": 0})
    site.client.get("/nowhere")
    response = site.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    (info,) = [each for each in text_string_to_metric_families(response.text) if each.name == "tminus_model_info"]
    told = {"name": INFO.name, "weights": INFO.weights_hash[:16], "fingerprint": INFO.fingerprint}
    assert told.items() <= info.samples[0].labels.items()
    assert "process_resident_memory_bytes" in response.text
    metrics = site.metrics()
    assert metrics['tminus_images_total{"model": "fake"}'] == 4
    assert metrics['tminus_row_steps_total{"model": "fake", "sampler": "ddpm"}'] == 6
    assert metrics['tminus_row_steps_total{"model": "fake", "sampler": "ddim"}'] == 2
    assert metrics['tminus_tick_places_sum{"model": "fake"}'] == 6 + 4
    assert metrics['tminus_rejected_total{"reason": "invalid_field"}'] == 1
    assert metrics['tminus_rejected_total{"reason": "unknown_field"}'] == 1
    assert metrics['tminus_encode_duration_seconds_count{"kind": "png"}'] == 1
    assert metrics['tminus_encode_duration_seconds_count{"kind": "zip"}'] == 1
    requests = "tminus_request_duration_seconds_count"
    assert metrics[f'{requests}{{"route": "/sample", "status": "200"}}'] == 2
    assert metrics[f'{requests}{{"route": "/sample", "status": "422"}}'] == 2
    assert metrics[f'{requests}{{"route": "unmatched", "status": "404"}}'] == 1
    assert metrics["tminus_rows_waiting"] == metrics["tminus_backlog_seconds"] == 0
    assert metrics["tminus_device_memory_bytes"] == 0


def test_rows_waiting_and_active_add_up_while_work_runs(make_site: MakeSite) -> None:
    site = make_site(max_batch=4)
    site.engine.gate.shut()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(site.post, json=QUICK | {"n": 10})
        site.engine.next_begun()
        metrics = site.metrics()
        assert (metrics["tminus_rows_active"], metrics["tminus_rows_waiting"]) == (4, 6)
        assert metrics["tminus_backlog_seconds"] > 0
        site.engine.gate.open()
        running.result(PATIENCE_S)
