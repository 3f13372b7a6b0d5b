"""The manifest is one that Kubeflow and Kubernetes publish models and schemas for."""

import kubernetes_validate
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from launch_case import FIELDS, a_job

from m3i_scale.config import load_run
from m3i_scale.errors import ConfigError
from m3i_scale.launch_command import render

FULL = {
    **FIELDS["kubeflow"],
    "interface": "eth0",
    "environment": ("A=b: {c}", "HF_TOKEN"),
    "python": "/opt/venv/bin/python",
    "gpus_per_node": 4,
    "cpus_per_rank": 6,
    "namespace": "research",
    "storage_gib": 50,
    "data_claim": "shards",
}


def documents(*overrides, output_dir="/output/first", **fields):
    (manifest,) = render("kubeflow", a_job(*overrides, output_dir=output_dir, **fields)).files
    return {document["kind"]: document for document in yaml.safe_load_all(manifest.text)}


@pytest.fixture
def full(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    return documents(**FULL)


def test_kubernetes_takes_what_is_its_own(full):
    assert set(full) == {"PersistentVolumeClaim", "ConfigMap", "Secret", "TrainJob"}
    for kind in ("PersistentVolumeClaim", "ConfigMap", "Secret"):
        kubernetes_validate.validate(full[kind], "1.33", strict=True)
        assert full[kind]["metadata"]["namespace"] == "research"


@pytest.mark.parametrize("fields", [FIELDS["kubeflow"], FULL], ids=["least", "full"])
def test_kubeflow_takes_the_job(fields, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    job = documents(**fields)["TrainJob"]
    # Its models leave out what they do not know: nothing may be missing afterwards.
    assert TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job


def test_a_key_that_kubeflow_does_not_know_would_be_found(full):
    wrong = full["TrainJob"]
    wrong["spec"]["trainer"]["numNods"] = 2
    assert TrainerV1alpha1TrainJob.from_dict(wrong).to_dict() != wrong


def test_the_pod_has_what_the_command_wants(full, tmp_path):
    job = full["TrainJob"]["spec"]
    trainer, (patch,) = job["trainer"], job["runtimePatches"]
    (part,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = part["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    places = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(places) == {volume["name"] for volume in pod["volumes"]}
    assert trainer["command"][-1].startswith(places["run"] + "/")
    run_file = tmp_path / "run.yaml"
    run_file.write_text(full["ConfigMap"]["data"]["run.yaml"])
    assert str(load_run(str(run_file)).output_dir) == places["output"]
    token = next(item for item in trainer["env"] if item["name"] == "HF_TOKEN")
    secret = token["valueFrom"]["secretKeyRef"]
    assert full["Secret"]["metadata"]["name"] == secret["name"]
    assert full["Secret"]["stringData"] == {secret["key"]: "hf_x"}
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 2)


@settings(max_examples=50, deadline=None)
@given(value=st.text(st.characters(codec="utf-8", exclude_characters="\0")))
@example(value="\x85")
@example(value="a\u2028\n b")
def test_no_value_becomes_yaml(value):
    entries = documents(environment=(f"A={value}",), **FIELDS["kubeflow"])["TrainJob"]["spec"]["trainer"]["env"]
    assert entries == [{"name": "A", "value": value}]


def test_what_kubernetes_would_refuse_is_refused_here():
    with pytest.raises(ConfigError) as caught:
        documents(nodes=1, ranks_per_node=1)
    assert "--container-image" in str(caught.value.fix)
    with pytest.raises(ConfigError) as caught:
        documents(f"name={'a' * 41}", **FIELDS["kubeflow"])
    assert str(caught.value.where).startswith("name")
    with pytest.raises(ConfigError) as caught:
        documents(output_dir="/data/runs/first", data_claim="shards", **FIELDS["kubeflow"])
    assert caught.value.where == "output_dir: /data/runs/first"
