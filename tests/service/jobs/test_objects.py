"""Objects in an object store that answers as S3 does, and what is said of one that cannot be used."""

import asyncio
import json
import logging
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import boto3
import pytest

from tests import s3 as s3_server
from tests.s3 import BUCKET, S3
from tests.service.jobs.conftest import Bucket
from tminus.service.errors import StorageFailed
from tminus.service.jobs.store import objects as objects_module
from tminus.service.jobs.store.objects import S3Objects, open_objects

pytestmark = pytest.mark.slow

Q = TypeVar("Q")
MakeUser = Callable[..., dict[str, str]]
SECRET = "secret-of-the-tests"  # the one in S3.env


def run(call: Coroutine[Any, Any, Q]) -> Q:
    return asyncio.run(call)


def test_what_is_written_is_read_until_it_is_deleted(bucket: Bucket) -> None:
    objects = open_objects(bucket.url, "name")
    assert bucket.keys() == [], "what it tried is gone"
    data = bytes(range(256)) * 30_000  # more than a part of a multipart upload
    run(objects.put("a/b/c", data))
    assert bucket.keys() == ["name/a/b/c"]
    assert run(objects.get("a/b/c", len(data))) == data
    assert run(objects.get("a/b/c", len(data) - 1)) == b"", "what is not of the size is not read"
    assert run(objects.get("none", 1)) is None
    run(objects.put("a/b/d", b""))
    assert run(objects.get("a/b/d", 0)) == b""
    run(objects.delete(["a/b/c", "a/b/d", "none"]))
    assert bucket.keys() == []


def test_a_bucket_that_goes_is_no_object_that_is_missing(bucket: Bucket) -> None:
    objects = S3Objects(f"s3://{BUCKET}-that-is-gone", "")
    with pytest.raises(StorageFailed, match="the object store cannot read: NoSuchBucket") as caught:
        run(objects.get("a", 1))
    assert not caught.value.damaged


def test_one_that_does_not_answer_is_not_waited_for(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    with silent() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setattr(objects_module, "CALL_S", 0.2)
        with pytest.raises(StorageFailed, match=r"the object store cannot write: it has not answered for 0\.2 s"):
            run(S3Objects(bucket.url, "").put("a", b"a"))
        monkeypatch.setattr(objects_module, "START_S", 0.1)
        with pytest.raises(ValueError, match=r"it has not answered for 0\.1 s"):
            open_objects(bucket.url, "")


class silent:  # noqa: N801
    """An address that takes connections, and never answers."""

    def __enter__(self) -> str:
        self._socket = socket.create_server(("127.0.0.1", 0))
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._socket.close()


UNUSABLE: list[tuple[str, dict[str, str], str]] = [
    ("gs://bucket/jobs", {}, "must be s3://bucket or s3://bucket/prefix, got 'gs://bucket/jobs'"),
    ("s3://bucket/../b", {}, "must be s3://bucket"),
    (f"s3://key:{SECRET}@bucket", {}, "got what has an @, as credentials have"),
    ("s3://no-such-bucket", {}, "NoSuchBucket: The specified bucket does not exist"),
    (f"s3://{BUCKET}", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
    (f"s3://{BUCKET}", {"AWS_ENDPOINT_URL": "minio:9000"}, "AWS_ENDPOINT_URL must be a URL such as"),
    (f"s3://{BUCKET}", {"AWS_ENDPOINT_URL": f"http://me:{SECRET}@127.0.0.1:9"}, "without a password"),
    (f"s3://{BUCKET}", {"AWS_REGION": "eu central"}, "AWS_REGION must be a region such as"),
    (f"s3://{BUCKET}", {"AWS_ACCESS_KEY_ID": ""}, "AccessKeyId"),
]


@pytest.mark.parametrize(("url", "env", "says"), UNUSABLE)
def test_one_that_cannot_be_used_is_refused_in_a_line_without_secrets(
    bucket: Bucket,
    url: str,
    env: dict[str, str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    for name, value in env.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        open_objects(url, "name")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value) + caplog.text


@pytest.fixture
def strict() -> Iterator[S3]:
    """One that asks who they are."""
    with s3_server.running() as s3:
        yield s3


def test_wrong_credentials_and_a_lack_of_rights_are_refused_in_a_line(
    strict: S3, monkeypatch: pytest.MonkeyPatch, make_user: MakeUser
) -> None:
    user = make_user(strict, "writer", "s3:PutObject")
    other = make_user(strict, "reader", "s3:PutObject", "s3:GetObject")
    for name, value in strict.env.items():
        monkeypatch.setenv(name, value)
    strict.ask_who_they_are(0)
    with pytest.raises(ValueError, match="InvalidAccessKeyId"):
        open_objects(f"s3://{BUCKET}", "")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", user["AccessKeyId"])
    with pytest.raises(ValueError, match="SignatureDoesNotMatch") as caught:
        open_objects(f"s3://{BUCKET}", "")
    assert user["AccessKeyId"] not in str(caught.value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", user["SecretAccessKey"])
    with pytest.raises(ValueError, match="the object store cannot read: AccessDenied"):
        open_objects(f"s3://{BUCKET}", "")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", other["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", other["SecretAccessKey"])
    with pytest.raises(ValueError, match=r"the object store cannot delete: .*AccessDenied"):
        open_objects(f"s3://{BUCKET}", "")


@pytest.fixture
def make_user() -> MakeUser:
    """Makes a user who may do some things only; returns the key."""

    def make(s3: S3, user: str, *actions: str) -> dict[str, str]:
        iam = boto3.client(
            "iam", endpoint_url=s3.url, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
        )
        iam.create_user(UserName=user)
        allowed = {"Effect": "Allow", "Action": actions, "Resource": "*"}
        document = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
        iam.put_user_policy(UserName=user, PolicyName="policy", PolicyDocument=document)
        key = iam.create_access_key(UserName=user)["AccessKey"]
        iam.close()
        return {name: key[name] for name in ("AccessKeyId", "SecretAccessKey")}

    return make
