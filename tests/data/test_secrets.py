"""Credentials are found by the usual chains, and never get into errors, logs, the quarantine file or the data state."""

import itertools
import json
import logging

import pytest
import s3fs
import servers

from m3i_scale.config import DataConfig, DatasetConfig
from m3i_scale.data.remote.access import Access, Url, check_access
from m3i_scale.data.remote.fetch import facts, read_range
from m3i_scale.data.remote.read_errors import ReadError
from m3i_scale.errors import DataError
from m3i_scale.text import without_secrets

SIZES = [6, 5, 7, 6]
BAD = "s-002.tar"


@pytest.fixture
def no_aws(monkeypatch, tmp_path, short_pauses):
    """An environment without credentials, and no clients that remember any."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE", "ENDPOINT_URL", "DEFAULT_REGION"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    yield monkeypatch
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(tmp_path):
    """A server that sees what it is told by way of credentials."""
    (tmp_path / "served" / "bucket").mkdir(parents=True)
    (tmp_path / "served" / "bucket" / "f.tar").write_bytes(b"0123456789")
    with servers.faulty_server(tmp_path / "served") as server:
        yield server


def by_environment(patch, folder, address):
    patch.setenv("AWS_ACCESS_KEY_ID", "KEYOFENV")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET")
    patch.setenv("AWS_ENDPOINT_URL", address)
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return "KEYOFENV"


def by_profile(patch, folder, address):
    (folder / "credentials").write_text(
        "[default]\naws_access_key_id = WRONG\naws_secret_access_key = SECRET\n"
        "[cluster]\naws_access_key_id = KEYOFPROFILE\naws_secret_access_key = SECRET\n"
    )
    (folder / "config").write_text(f"[profile cluster]\nregion = us-east-1\nendpoint_url = {address}\n")
    patch.setenv("AWS_PROFILE", "cluster")
    return "KEYOFPROFILE"


def by_default_profile(patch, folder, address):
    (folder / "credentials").write_text("[default]\naws_access_key_id = KEYOFFILE\naws_secret_access_key = SECRET\n")
    (folder / "config").write_text(f"[default]\nregion = us-east-1\nendpoint_url = {address}\n")
    return "KEYOFFILE"


@pytest.mark.parametrize("chain", [by_environment, by_profile, by_default_profile])
def test_credentials_of_s3(no_aws, bucket, tmp_path, chain):
    key = chain(no_aws, tmp_path, bucket.address)
    url, access = Url("s3://bucket/f.tar"), Access(attempts=1)
    assert facts(url, access).size == 10
    assert read_range(url, 2, 5, access) == b"234"
    assert len(bucket.credentials) >= 2
    assert all(f"Credential={key}/" in told for told in bucket.credentials)


@pytest.mark.parametrize("chain", [by_environment, by_profile])
def test_credentials_that_are_refused_are_not_told(no_aws, bucket, tmp_path, chain):
    key = chain(no_aws, tmp_path, bucket.address)
    bucket.always["bucket/f.tar"] = "403"
    with pytest.raises(ReadError) as caught:
        facts(Url("s3://bucket/f.tar"), Access(attempts=1))
    assert caught.value.reason == "access refused"
    assert key not in caught.value.detail
    assert "SECRET" not in caught.value.detail


SIGNED = "X-Amz-Credential=SECRET&X-Amz-Signature=SECRET&token=SECRET"


def test_an_address_that_a_server_signs_shows_nowhere(tools, tmp_path, short_pauses, caplog, capfd):
    """Servers answer with a redirect to a signed address; when that fails, its error has the signature in it."""
    caplog.set_level(logging.DEBUG, "m3i_scale")
    path = tmp_path / "quarantine.jsonl"
    with servers.faulty_server(tools.write_folder(tmp_path / "data", SIZES)) as server:
        source = {"s": f"{server.address}/s-{{000..003}}.tar"}
        options = {"streams": 2, "cache_gib": 0, "max_read_attempts": 2, "max_corrupt_fraction": 0.9}
        stops = tools.make_loader(source, tmp_path, **options)
        loader = tools.make_loader(source, tmp_path, bad_shards="quarantine", quarantine=path, **options)
        server.headers["Location"] = f"{server.address}/signed/{BAD}?{SIGNED}"
        server.always[BAD] = "302"
        server.always[f"signed/{BAD}?{SIGNED}"] = "403"
        for _ in itertools.islice(loader, 8):
            pass
        with pytest.raises(DataError) as caught:
            list(itertools.islice(stops, 8))
        assert str(caught.value.where).endswith("/s-002.tar")
        assert any(name.startswith("signed") for _, name, _ in server.log)
    assert BAD in path.read_text()
    output = capfd.readouterr()
    state = json.dumps(loader.state_dict())
    for told in (str(caught.value), path.read_text(), state, caplog.text, output.out, output.err):
        assert "SECRET" not in told
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"SECRET" in file.read_bytes()]


@pytest.mark.parametrize(
    "text",
    [
        "cannot reach https://name:SECRET@host/x.tar",
        "cannot reach https://name:SEC@SECRET@host/x.tar",
        "cannot reach https://name:SEC/SECRET@host/x.tar",
        "403, url='https://h/x.tar?X-Amz-Algorithm=A&X-Amz-Signature=SECRET&X-Amz-Date=1'",
        "GET /x.tar?X-Amz-Date=1&X-Amz-Signature=SECRET failed",
        "GET /x.tar?X-Goog-Credential=SECRET&X-Goog-Signature=SECRET failed",
        "GET /x.tar?Expires=1&token=SECRET failed",
        "GET /x.tar?sv=2026&sig=SECRET failed",
        "headers {'Authorization': 'Bearer SECRET', 'X-Amz-Security-Token': 'SECRET'}",
        "headers: Authorization: Basic SECRET=",
        "aws_secret_access_key = SECRET, AWSAccessKeyId=SECRET",
        "the token hf_SECRETSECRET is invalid",
        "AKIASECRETSECRETSECR is no key",
        "clone with ghp_SECRETSECRETSECRETSECRET",
        "the key sk-proj-SECRETSECRETSECRET",
    ],
)
def test_what_others_say_is_cleared_of_secrets(text):
    assert "SECRET" not in without_secrets(text)


@pytest.mark.parametrize(
    "text",
    [
        "HTTP 404: 404, message='Not Found', url='http://127.0.0.1:39407/a@b/s-003.tar'",
        "cut off: 20 of 40 bytes at 700",
        "Could not connect to the endpoint URL: http://h:9000/bucket/x.tar",
        "hf_hub_download failed on disk-0123456789abcdef0",
    ],
)
def test_what_is_no_secret_stays(text):
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    "place",
    ["https://name:SEC/SECRET@host/s.tar", "https://name:SEC@SECRET@host/s.tar", "s3://SECRET:SECRET@bucket/s.tar"],
)
def test_a_password_in_an_address_is_refused_however_it_is_written(place):
    source = {"s": DatasetConfig(path=place)}
    with pytest.raises(DataError) as caught:
        check_access(DataConfig(datasets=source), source)
    assert str(caught.value.where).endswith("/s.tar")
    assert "SECRET" not in str(caught.value)


def test_addresses_with_ports_are_no_passwords():
    for place in ("https://host:8443/s.tar", "http://[::1]:8000/s.tar", "http://[::1]/s.tar"):
        source = {"s": DatasetConfig(path=place)}
        check_access(DataConfig(datasets=source, cache_gib=0), source)
