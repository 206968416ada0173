"""The Kubernetes manifests are what Kubeflow Trainer v2 takes, and fit together."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
SCHEMA = json.loads((ROOT / "tests/cluster/kubeflow.schema.json").read_text())
FILES = sorted((ROOT / "cluster/kubernetes").glob("*.yaml"))


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / f"cluster/kubernetes/{name}.yaml").read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_what_the_api_takes(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text()), SCHEMA)


def test_the_schema_refuses_what_the_api_would_drop_in_silence() -> None:
    for path, value in (
        (("spec", "trainer", "numProcsPerNode"), 8),
        (("spec", "trainer", "numNodes"), "two"),
        (("spec", "runtimeRef"), {}),
        (("kind",), "PyTorchJob"),
    ):
        wrong = copy.deepcopy(read("trainjob"))
        inner = wrong
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, SCHEMA)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_packages_own_models_take_it_too(path: Path) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api")
    text = yaml.safe_load(path.read_text())
    read_back = getattr(models, f"TrainerV1alpha1{text['kind']}").from_dict(text).to_dict()
    assert read_back == text, "nothing was dropped"


def test_they_fit_together() -> None:
    runtime, job = read("runtime"), read("trainjob")
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert node["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    trainer = job["spec"]["trainer"]
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert trainer["command"][:3] == ["torchrun", "-m", "distft.train"]
    recipe = Path(trainer["command"][3]).name
    assert (ROOT / "recipes" / recipe).is_file()
    assert job["metadata"]["generateName"] == f"{Path(recipe).stem}-"
