"""launch/jobset.yaml: fields that Kubernetes and JobSet know, and what its pods are told."""

import json
import re
from pathlib import Path

import pytest
import yaml

from comi_jax.devices import cluster
from comi_jax.devices.cluster import Member

ROOT = Path(__file__).resolve().parents[1]
TYPES = {"string": str, "integer": int}


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())


def faults(value, known, place=""):
    """Where ``value`` has a field, or a value, that ``known`` (tests/jobset_fields.json) does not."""
    if isinstance(known, dict):
        if not isinstance(value, dict):
            return [f"{place} has no fields"]
        strange = [f"{place}.{name} is unknown" for name in value if name not in known]
        return strange + [
            fault for name in value if name in known for fault in faults(value[name], known[name], f"{place}.{name}")
        ]
    if isinstance(known, list):
        if not isinstance(value, list):
            return [f"{place} is no list"]
        return [fault for i, one in enumerate(value) for fault in faults(one, known[0], f"{place}[{i}]")]
    if known.startswith("= "):
        return [] if value in known[2:].split(" | ") else [f"{place} is {value!r}"]
    return [] if type(value) is TYPES[known] else [f"{place} is {value!r}, not of type {known}"]


def job_of(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def test_its_fields_are_known_ones(jobset):
    known = json.loads((ROOT / "tests" / "jobset_fields.json").read_text())
    assert faults(jobset, known) == []
    wrong = json.loads(json.dumps(jobset))
    job_of(wrong)["template"]["spec"]["containers"][0]["environment"] = job_of(wrong)["backoffLimit"] = []
    assert len(faults(wrong, known)) == 2


@pytest.mark.parametrize("version", ["1.27", "1.30", "1.33", "1.36"])
def test_kubernetes_takes_its_job(jobset, version):
    validate = pytest.importorskip("kubernetes_validate", reason="needs pip install kubernetes-validate")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "comi-worker-0"}, "spec": job_of(jobset)}
    validate.validate(job, version, strict=True)


def test_its_pods_know_who_they_are(jobset):
    """With the annotations that JobSet and its Job give to the third pod."""
    job = job_of(jobset)
    where = jobset["spec"]["coordinator"]
    name, worker = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"][0]["name"]
    assert where == {"replicatedJob": worker, "jobIndex": 0, "podIndex": 0}
    annotations = {
        "jobset.sigs.k8s.io/coordinator": f"{name}-{worker}-0-0.{name}",
        "batch.kubernetes.io/job-completion-index": "2",
    }
    environment = {}
    for variable in job["template"]["spec"]["containers"][0]["env"]:
        text = variable.get("value")
        if text is None:
            text = annotations[re.fullmatch(r"metadata.annotations\['(.*)'\]", field_of(variable))[1]]
        environment[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], text)
    count = job["parallelism"]
    assert count == job["completions"]
    assert cluster.find(environment) == Member(f"{name}-{worker}-0-0.{name}:1234", count, 2)


def field_of(variable):
    return variable["valueFrom"]["fieldRef"]["fieldPath"]


def test_only_what_the_user_has_to_mend_fails_at_once(jobset):
    """Status 1 and 2 fail the job, for a reason at which the JobSet fails; 75, 85 and kills start it again."""
    job = job_of(jobset)
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [1, 2]
    assert rule["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    assert job["template"]["spec"]["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
