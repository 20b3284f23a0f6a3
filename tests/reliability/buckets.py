"""A bucket of a server on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def served(name: str) -> Iterator[str]:
    """The URL of a new bucket; while it is there, the environment says where, as S3's own library reads it."""
    import boto3
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    values = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}
    try:
        with pytest.MonkeyPatch.context() as environment:
            for key, value in values.items():
                environment.setenv(f"AWS_{key}", value)
            S3FileSystem.clear_instance_cache()  # of another server, by a test before
            boto3.client("s3").create_bucket(Bucket=name)
            yield f"s3://{name}"
    finally:
        S3FileSystem.clear_instance_cache()
        server.stop()
