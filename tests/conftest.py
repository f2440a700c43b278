"""What tests share: an S3 server on loopback and a local Ray, each started once and only if a test asks for it."""

import atexit
import logging
import os
import shutil
import subprocess
import tempfile
import uuid

import hypothesis
import pytest

pytest_plugins = ["pytester", "tests.budget"]

# A slow machine is no fault; tests have limits. In CI, too, hypothesis draws anew each time.
hypothesis.settings.register_profile("ours", hypothesis.settings.get_profile("default"), deadline=None)
hypothesis.settings.load_profile("ours")

# Before ray is imported anywhere: what it finds here it keeps, and its workers inherit.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
os.environ["RAY_prestart_worker_first_driver"] = "0"  # noqa: SIM112 - so Ray calls it; else eight processes wait for work
os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ["RESCRIBE_CACHE"] = f"{tempfile.gettempdir()}/rescribe-cache-{uuid.uuid4().hex}"
atexit.register(shutil.rmtree, os.environ["RESCRIBE_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def s3_server():
    """The address of moto's S3 server; the environment points every client to it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    os.environ.update(settings)
    os.environ.pop("AWS_CA_BUNDLE", None)
    yield settings["AWS_ENDPOINT_URL"]
    server.stop()


@pytest.fixture
def s3(s3_server):
    """The address of an empty bucket, s3://..."""
    import s3fs

    bucket = f"test-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem(endpoint_url=s3_server).mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """An empty folder, once local and once on S3."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="session")
def ray_cluster(s3_server):
    """A local Ray of eight logical CPUs that listens on loopback; its workers find the S3 server."""
    import ray

    from infra.private import loopback

    with loopback():
        ray.init(
            address="local",  # never one that something else left running
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=300 * 2**20,
            logging_level="error",
        )
    yield
    ray.shutdown()
