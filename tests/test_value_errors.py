"""Invalid values of a config file are explained with the rule, the value and a fix."""

import pytest

from m3i_scale.config import load_run
from m3i_scale.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "what", "fix"),
    [
        ("optim.steps=many", "'optim.steps' must be an integer, got 'many'", "optim.steps=100000 (the default)"),
        ("optim.lr=-1", "'optim.lr' must be greater than 0, got -1", "optim.lr=0.001 (the default)"),
        ("optim.betas=[0.9]", "'optim.betas.1' is missing", "optim.betas=[0.9,0.95] (the default)"),
        ("seed=null", "'seed' must be an integer, got null", "seed=0 (the default)"),
        ("log.progress=maybe", "'log.progress' must be true or false, got 'maybe'", "log.progress=true (the default)"),
        ("backbone.preset=3", "'backbone.preset' must be a string, got 3", "correct the value of backbone.preset"),
        ("output_dir=3", "'output_dir' must be a path, got 3", "correct the value of output_dir"),
        (
            "data.datasets.a={path: x, epochs: 0}",
            "'data.datasets.a.epochs' must be at least 1, got 0",
            "correct the value of data.datasets.a.epochs",
        ),
        (
            "backbone.attention_kernel=spda",
            "'backbone.attention_kernel' must be 'sdpa' or 'eager', got 'spda'",
            "did you mean 'sdpa'?",
        ),
        (
            "backbone.compile=maybe",
            "'backbone.compile' must be 'auto', true or false, got 'maybe'",
            "use one of: auto, true, false",
        ),
        (
            "data.augment.flip=yes",
            "'data.augment.flip' must be a number, got true (YAML reads on, yes as true)",
            "data.augment.flip=0.5 (the default)",
        ),
        ("seed=1e30", "'seed' must be a smaller integer, got 1e+30", "seed=0 (the default)"),
        (
            "data.augment.scale_jitter=x",  # a union of tuples
            "'data.augment.scale_jitter' must be a list, got 'x'",
            "correct the value of data.augment.scale_jitter",
        ),
        (
            "stages={1: {image_size: 64}}",  # as on the command line
            "'stages' must be a list, got {1: {'image_size': 64}}",
            "write the complete list, or set a key of one item on the command line: stages.1.NAME=VALUE",
        ),
        (
            "data.datasets.a={path: x, weight: [[0, x]]}",  # pydantic adds the union's member to the key
            "'data.datasets.a.weight.0.1' must be a number, got 'x'",
            "data.datasets.a.weight=1.0 (the default)",
        ),
        (
            "log.wandb=off",
            "'log.wandb' must be 'off', 'offline' or 'online', got false (YAML reads off, no as false)",
            "quote the value, e.g. 'log.wandb=\"off\"'",
        ),
        (
            "log.wandb=null",
            "'log.wandb' must be 'off', 'offline' or 'online', got null",
            "use one of: off, offline, online",
        ),
        (
            "data.datasets.a={path: x, epochs: yes}",
            "'data.datasets.a.epochs' must be an integer, got true (YAML reads on, yes as true)",
            "correct the value of data.datasets.a.epochs",
        ),
        (
            "data.augment.blur=[0.5, yes]",
            "'data.augment.blur.1' must be a number, got true (YAML reads on, yes as true)",
            "data.augment.blur=[0.0] (the default)",
        ),
    ],
)
def test_errors_of_values_are_in_our_words(override, what, fix):
    with pytest.raises(ConfigError) as caught:
        load_run("m3i", [override])
    assert (caught.value.what, caught.value.fix) == (what, fix)
