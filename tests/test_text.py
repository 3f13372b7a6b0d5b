"""What is shown of sizes, durations, texts and settings."""

from __future__ import annotations

from typing import Any

import pytest

from m3i_scale.text import GIB, HIDDEN, duration_text, is_secret, redact, short_differences, size_text, table_lines


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "AWS_REGION", "aws_profile", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MY_SECRET_ID"),
        *("api_key", "hf_token", "password", "HTTP_AUTH", "X_TOKENS"),
    ],
)
def test_a_secret_is_one_by_its_name(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        *("HOME", "NCCL_DEBUG", "OMP_NUM_THREADS", "SAWS_X", "SSH_AUTH_SOCK", "TOKENIZERS_PARALLELISM", "XAUTHORITY"),
        *("tokens", "max_tokens", "tokenizer", "GIT_AUTHOR_NAME"),
    ],
)
def test_other_names_are_none(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("https://me:hunter2@host:80/a.tar", "https://…@host:80/a.tar"),
        ("https://host/{00..09}.tar?X-Signature=abc", "https://host/{00..09}.tar?…"),
        ("pipe:curl -H 'Authorization: Bearer abc' https://host/a", "pipe:…"),
        ("curl -H 'Authorization: abc' https://host/a", "curl -H 'Authorization: …' https://host/a"),
        ("aws --token=abc s3://bucket/a", "aws --token=… s3://bucket/a"),
        ("tool --api-key abc s3://bucket/a", "tool --api-key … s3://bucket/a"),
        ("the tokens of a batch", "the tokens of a batch"),
        ("/data/cc12m/{00000..01242}.tar", "/data/cc12m/{00000..01242}.tar"),
        (
            {"api_key": "abc", "hf_token": ["x"], "password": 7},
            dict.fromkeys(("api_key", "hf_token", "password"), HIDDEN),
        ),
        ({"tokens": "masked", "max_tokens": 64, "tokenizer": "t"},) * 2,
        ({"monkey": {"weight": 1.0}},) * 2,  # a source of that name
        ([("s3://k:s@b/x", 1)], [["s3://…@b/x", 1]]),
    ],
)
def test_a_log_has_no_secrets(value: Any, wanted: Any) -> None:
    assert redact(value, names=True) == wanted


def test_elsewhere_a_name_hides_nothing() -> None:
    assert redact({"key_width": 8, "a": "hf_abcdefghij1"}) == {"key_width": 8, "a": "…"}


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (318, "5.3 minutes"),
        (0.864, "0.864 seconds"),
        (43_200, "12 hours"),
        (129_600, "36 hours"),
        (751_680, "8.7 days"),
        (106_660_800, "1,234 days"),
    ],
)
def test_a_duration_has_a_unit_that_a_person_would_take(seconds: float, said: str) -> None:
    assert duration_text(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.50 KiB"), (2**20, "1.00 MiB"), (80 * GIB, "80.00 GiB")],
)
def test_a_size_has_a_unit_that_suits_it(count: int, said: str) -> None:
    assert size_text(count) == said


def test_long_values_that_differ_at_their_end_are_told_apart() -> None:
    first, second = [0] * 80 + [1], [0] * 80 + [2]
    ((_, was, present),) = short_differences("betas", {"all": str(first)}, {"all": str(second)})
    assert was != present


def test_columns_of_a_table_are_aligned() -> None:
    rows = [("cut off", 3), ("key in two shards", 120)]
    assert table_lines(("reason", "count"), rows) == [
        "reason             count",
        "cut off            3",
        "key in two shards  120",
    ]
