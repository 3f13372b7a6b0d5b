"""Write the input of Kubeflow Trainer 2.3 or newer: a TrainJob, the config file, a volume for the output, and secrets.
Everything is built as data and written by a YAML library; no text is pasted together."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

import yaml

from m3i_scale.errors import ConfigError
from m3i_scale.launch import OF_SCHEDULERS, Command, Executable, LaunchFile, LaunchPlan
from m3i_scale.launch.job import Job
from m3i_scale.launch.torchrun_agent import AGENT

HONORS = OF_SCHEDULERS | {"namespace", "storage_gib", "data_claim"}
MANIFEST = "kubeflow.yaml"
RUN_FOLDER = "/m3i"
"""Folder of the config file in the containers."""
DATA = "/data"
"""Folder of the shards in the containers."""
_RUNTIME = "torch-distributed"
"""Part of Kubeflow Trainer; it passes nodes and ranks to torchrun in PET_* variables."""
_PART = "node"
"""The name of this runtime's job, and of its container."""
_MOST_CHARACTERS = 40
_GRACE_S = 600


class _Dumper(yaml.SafeDumper):
    """A YAML dumper for readable output: multi-line texts as blocks, no references."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def render(job: Job) -> LaunchPlan:
    """Return a manifest, and `kubectl apply`."""
    _check(job)
    volume = {
        "accessModes": ["ReadWriteMany"],  # all nodes write their part of a checkpoint
        "resources": {"requests": {"storage": f"{job.cluster.storage_gib}Gi"}},
    }
    run_file = {"run.yaml": yaml.safe_dump(dict(job.values), sort_keys=False)}
    secrets = {variable.name: variable.value for variable in job.secret}
    documents = [
        _object(job, "v1", "PersistentVolumeClaim", "-output", spec=volume),
        _object(job, "v1", "ConfigMap", "-run", data=run_file),
        *([_object(job, "v1", "Secret", "-secrets", type="Opaque", stringData=secrets)] if secrets else []),
        _object(job, "trainer.kubeflow.org/v1alpha1", "TrainJob", spec=_train_job(job)),
    ]
    # Non-ASCII text is escaped: U+0085 is a line break in YAML, and would become a space in plain text.
    manifest = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False)
    return LaunchPlan(
        launcher="kubeflow",
        folder=job.folder,
        files=(LaunchFile(MANIFEST, manifest, job.mode),),
        commands=(Command(("kubectl", "apply", "-f", str(job.folder / MANIFEST))),),
        workdir=job.workdir,
        waits=False,
        needs=(Executable("kubectl", "apt-get install kubernetes-client"),),
    )


def _check(job: Job) -> None:
    if job.cluster.container_image is None:
        raise ConfigError(
            "Kubeflow needs a container image",
            where="--container-image",
            fix="set --container-image to an image with this package",
        )
    name = _name(job)
    if not name or len(name) > _MOST_CHARACTERS:
        raise ConfigError(
            f"the name of the run must be a valid pod name: at most {_MOST_CHARACTERS} lowercase letters, digits and "
            f"'-', got '{job.name}'",
            where="name",
            fix="set e.g. name=first-run",
        )
    datasets = (job.values.get("data") or {}).get("datasets") or {}
    shards = [path for path in (str(dataset["path"]) for dataset in datasets.values()) if _is_mounted(path)]
    if shards and job.cluster.data_claim is None:
        raise ConfigError(
            f"the shards are in {DATA}, but nothing is mounted there",
            where=f"shards: {shards[0]}",
            fix="set --data-claim to a volume claim that has them, or use the address of a store: s3://…",
        )
    if job.cluster.data_claim is not None and _is_mounted(str(job.output_dir)):
        raise ConfigError(
            f"output_dir must not be in {DATA}, which is mounted read-only",
            where=f"output_dir: {job.output_dir}",
            fix="set output_dir=/output/first",
        )


def _is_mounted(path: str) -> bool:
    """Return whether a path is in the volume of the shards."""
    return PurePosixPath(path.removeprefix("file://")).is_relative_to(DATA)


def _name(job: Job) -> str:
    return re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")


def _object(job: Job, version: str, kind: str, suffix: str = "", **content: Any) -> dict[str, Any]:
    place = {} if job.cluster.namespace is None else {"namespace": job.cluster.namespace}
    return {"apiVersion": version, "kind": kind, "metadata": {"name": _name(job) + suffix, **place}, **content}


def _train_job(job: Job) -> dict[str, Any]:
    volumes, mounts = _volumes(job)
    pod = {
        "terminationGracePeriodSeconds": _GRACE_S,  # a step and a checkpoint
        "containers": [{"name": _PART, "volumeMounts": mounts}],
        "volumes": volumes,
    }
    part = {"name": _PART, "template": {"spec": {"template": {"spec": pod}}}}
    patch = {
        "manager": "m3i-scale.org/launch",
        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [part]}}},
    }
    return {
        "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": _RUNTIME},
        "trainer": _trainer(job),
        "runtimePatches": [patch],
    }


def _trainer(job: Job) -> dict[str, Any]:
    command = [job.python, "-m", AGENT, "--module", "m3i_scale", "train", f"{RUN_FOLDER}/run.yaml"]
    secret = {"name": f"{_name(job)}-secrets"}
    environment: list[dict[str, Any]] = [{"name": item.name, "value": item.value} for item in job.plain]
    environment += [
        {"name": item.name, "valueFrom": {"secretKeyRef": {**secret, "key": item.name}}} for item in job.secret
    ]
    limits = {}
    if job.gpus_per_node:
        limits["nvidia.com/gpu"] = str(job.gpus_per_node)
    if job.cluster.cpus_per_rank is not None:
        limits["cpu"] = str(job.cluster.cpus_per_rank * job.ranks_per_node)
    return {
        "image": job.cluster.container_image,
        "command": command,
        "numNodes": job.nodes,
        "numProcPerNode": job.ranks_per_node,
        **({"env": environment} if environment else {}),
        **({"resourcesPerNode": {"limits": limits, "requests": limits}} if limits else {}),
    }


def _volumes(job: Job) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    name = _name(job)
    volumes: list[dict[str, Any]] = [
        {"name": "output", "persistentVolumeClaim": {"claimName": f"{name}-output"}},
        {"name": "run", "configMap": {"name": f"{name}-run"}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},  # batches of loader workers
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "output", "mountPath": str(job.output_dir)},
        {"name": "run", "mountPath": RUN_FOLDER, "readOnly": True},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
    ]
    if job.cluster.data_claim is not None:
        claim = {"claimName": job.cluster.data_claim, "readOnly": True}
        volumes.append({"name": "data", "persistentVolumeClaim": claim})
        mounts.append({"name": "data", "mountPath": DATA, "readOnly": True})
    return volumes, mounts
