"""What service/ray_serve/ relies on in Ray: interfaces that Ray calls alpha, or does not document."""

import inspect

import pytest
import ray
from ray import serve
from ray.serve import context
from ray.serve._private import constants, replica
from ray.serve._private.client import ServeControllerClient
from ray.serve._private.common import RequestMetadata
from ray.serve.config import AutoscalingContext
from ray.serve.request_router import RequestRouter, RunningReplica

from tminus.service.ray_serve.app import options
from tminus.service.ray_serve.policy import Context
from tminus.service.ray_serve.replica import Replica
from tminus.service.ray_serve.router import BacklogRouter
from tminus.service.ray_serve.settings import RaySettings

CHANGED = f"Ray {ray.__version__} has changed what service/ray_serve/ is made of: "
EXTENDED = sorted(name for name, member in vars(BacklogRouter).items() if inspect.isfunction(member) and name[0] != "_")


@pytest.mark.parametrize("name", EXTENDED)
def test_what_the_router_extends_is_called_by_ray_with_the_same_parameters(name: str) -> None:
    theirs = getattr(RequestRouter, name, None)
    assert theirs is not None, f"{CHANGED}there is no RequestRouter.{name}"
    assert [*inspect.signature(theirs).parameters] == [*inspect.signature(getattr(BacklogRouter, name)).parameters], (
        f"{CHANGED}RequestRouter.{name}"
    )


def test_a_router_is_told_what_a_replica_tells() -> None:
    assert isinstance(inspect.getattr_static(RunningReplica, "routing_stats"), property), (
        f"{CHANGED}RunningReplica.routing_stats"
    )
    assert "internal_request_id" in inspect.signature(RequestMetadata).parameters, f"{CHANGED}RequestMetadata"


def test_ray_calls_a_replica_by_these_names() -> None:
    called = {
        replica.SERVE_BUILD_ASGI_APP_METHOD,
        constants.HEALTH_CHECK_METHOD,
        constants.REQUEST_ROUTING_STATS_METHOD,
    }
    for name in called:
        assert name in vars(Replica), f"{CHANGED}it calls {name}"
    assert "record_autoscaling_stats" in inspect.getsource(replica), f"{CHANGED}record_autoscaling_stats is not called"


def test_a_policy_is_told_what_it_reads() -> None:
    there = {*inspect.signature(AutoscalingContext).parameters, *dir(AutoscalingContext)}
    read = {*Context.__annotations__, "aggregated_metrics"}
    assert read <= there, f"{CHANGED}AutoscalingContext has no {read - there}"


def test_serve_takes_the_options_of_the_deployment() -> None:
    told = options(RaySettings())
    missing = told.keys() - inspect.signature(serve.deployment).parameters.keys()
    assert not missing, f"{CHANGED}serve.deployment has no {missing}"


def test_an_application_is_deleted_without_waiting_for_it() -> None:
    assert "_blocking" in inspect.signature(serve.delete).parameters, f"{CHANGED}serve.delete"


def test_serve_knows_the_address_where_it_listens() -> None:
    assert callable(context._get_global_client), f"{CHANGED}serve.context"
    assert isinstance(inspect.getattr_static(ServeControllerClient, "root_url"), property), (
        f"{CHANGED}ServeControllerClient.root_url"
    )
