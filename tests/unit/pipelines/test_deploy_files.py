"""The cluster files, checked without a cloud: Ray's own schema, and what it lets through."""

import copy
import json
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml

from posmlp.config import load_recipe

ROOT = Path(__file__).parents[3]
RAY_UP = ["cluster.yaml", "deploy/gcp.yaml", "deploy/local.yaml"]
KUBERAY = ["deploy/raycluster.yaml", "deploy/rayjob.yaml"]
GROUPS = {"head", "decode", "gpu"}


def words(text):
    """A set of words."""
    return set(text.split())


# What the providers read (ray/autoscaler/_private/{aws,gcp,local}/config.py and node_provider.py, updater.py), but for
# keys that hold credentials: the schema takes any key.
ANY = {"type", "use_internal_ips", "use_external_head_ip", "disable_node_updaters", "disable_launch_config_check"}
CLOUD = ANY | {"region", "availability_zone", "cache_stopped_nodes"}
PROVIDER_KEYS = {
    "aws": CLOUD | {"security_group", "key_pair", "cloudwatch"},
    "gcp": CLOUD | {"project_id"},
    "local": ANY | {"head_ip", "worker_ips", "external_head_ip", "coordinator_address"},
}

# The fields of https://docs.ray.io/en/master/kuberay/references/api.html (KubeRay 1.7) that a person sets.
CLUSTER_FIELDS = words(
    "upgradeStrategy authOptions suspend managedBy autoscalerOptions headServiceAnnotations enableInTreeAutoscaling "
    "gcsFaultToleranceOptions networkPolicy tlsOptions headGroupSpec rayVersion workerGroupSpecs"
)
JOB_FIELDS = words(
    "activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata clusterSelector submitterConfig "
    "managedBy deletionStrategy entrypoint runtimeEnvYAML jobId submissionMode entrypointResources entrypointNumCpus "
    "entrypointNumGpus ttlSecondsAfterFinished preRunningDeadlineSeconds shutdownAfterJobFinishes suspend"
)
HEAD_FIELDS = words("template headService enableIngress resources labels rayStartParams serviceType")
WORKER_FIELDS = words(
    "groupName replicas minReplicas maxReplicas idleTimeoutSeconds priority resources labels rayStartParams template "
    "scaleStrategy numOfHosts"
)
AUTOSCALER_FIELDS = words(
    "resources image imagePullPolicy securityContext idleTimeoutSeconds upscalingMode version env envFrom volumeMounts"
)
AUTH_FIELDS = {"mode", "secretName", "enableK8sTokenAuth"}
# Those of https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/ that are of use here.
POD_FIELDS = words(
    "containers initContainers volumes restartPolicy nodeSelector tolerations affinity serviceAccountName "
    "imagePullSecrets priorityClassName topologySpreadConstraints terminationGracePeriodSeconds"
)
CONTAINER_FIELDS = words(
    "name image imagePullPolicy ports resources env envFrom volumeMounts securityContext lifecycle"
)

DRAIN_LIMIT = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
SECRET_NAME = re.compile(r"(password|secret|token|credential|access_key)", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN|://[^/\s:@]+:[^/\s@]+@|\b[0-9a-f]{32,}\b|"
    r"[A-Z_]*(?:PASSWORD|SECRET|TOKEN|ACCESS_KEY)=[^\s$]"
)


@cache
def as_json(name):
    """A cluster file as JSON, in which anchors are copies."""
    return json.dumps(yaml.load((ROOT / name).read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def read(name):
    """A cluster file, parsed anew, so that it can be changed."""
    return json.loads(as_json(name))


def prepared(config):
    """A file of `ray up`, with Ray's defaults filled in; no provider is called."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(copy.deepcopy(config))


def ray_version():
    """Ray's version in constraints.txt."""
    return re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


def image_problems(images):
    """What is wrong with names of images: another Ray, another Python than the project's, or not for CPU or GPU."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = project["requires-python"].removeprefix(">=").replace(".", "")
    good = {f"rayproject/ray:{ray_version()}-py{python}-{device}" for device in ("cpu", "gpu")}
    return [f"image {image} is not one of {', '.join(sorted(good))}" for image in images if image not in good]


def secret_problems(tree, path=""):
    """Values that look like secrets, and keys of secrets that have a value of their own."""
    if isinstance(tree, dict):
        problems = []
        name = tree.get("name")
        if isinstance(name, str) and SECRET_NAME.search(name) and "value" in tree:
            problems.append(f"{path}: {name} has a value in the file")
        for key, value in tree.items():
            where = f"{path}.{key}".lstrip(".")
            if SECRET_NAME.search(key) and isinstance(value, str) and not value.startswith("~/"):
                problems.append(f"{where} has a value in the file")
            problems += secret_problems(value, where)
        return problems
    if isinstance(tree, list):
        return [problem for item in tree for problem in secret_problems(item, path)]
    return [f"{path} looks like a secret"] if isinstance(tree, str) and SECRET_VALUE.search(tree) else []


# Files of `ray up`: each check returns the problems that it finds.


def schema_problems(config):
    """What Ray's schema refuses."""
    import jsonschema
    from ray.autoscaler._private.util import validate_config

    try:
        validate_config(prepared(config))
    except (jsonschema.ValidationError, ValueError) as error:
        return [str(error).splitlines()[0]]
    return []


def resource_problems(config):
    """Resources that are not whole numbers, or do not say how many CPUs a machine has."""
    problems = []
    for name, node in config.get("available_node_types", {}).items():
        resources = node["resources"]
        problems += [f"{name}: {key} {n!r} is no whole number" for key, n in resources.items() if type(n) is not int]
        problems += [] if "CPU" in resources else [f"{name}: CPU is missing"]
    return problems


def size_problems(config):
    """Numbers of machines that cannot be."""
    top, problems = prepared(config)["max_workers"], []
    types = prepared(config)["available_node_types"]
    for name, node in types.items():
        if not 0 <= node["min_workers"] <= node["max_workers"]:
            problems.append(f"{name}: min_workers is not within 0 and max_workers")
        if node["max_workers"] > top:
            problems.append(f"{name}: max_workers is above the cluster's {top}")
    if sum(node["max_workers"] for node in types.values()) > top:
        problems.append(f"the types' max_workers are together above the cluster's {top}")
    return problems


def head_problems(config):
    """A head that is not one of the types, or that takes tasks."""
    types, head = config.get("available_node_types"), config.get("head_node_type")
    if types is None:  # provider local: one type, made by Ray
        starts = [command for command in config["head_start_ray_commands"] if "ray start" in command]
        return [] if all("--num-cpus=0" in start for start in starts) else ["the head takes tasks"]
    if head not in types:
        return [f"head_node_type {head} is none of the types"]
    return [] if types[head]["resources"].get("CPU") == 0 else ["the head takes tasks"]


def provider_problems(config):
    """Keys that the provider does not know."""
    known = PROVIDER_KEYS[config["provider"]["type"]]
    return [f"provider: unknown key {key}" for key in config["provider"] if key not in known]


def docker_problems(config):
    """Images of another Ray, /dev/shm left to chance, a type with GPUs and no image for them."""
    docker, problems = config["docker"], []
    images = [docker.get("image", "")]
    head = docker.get("run_options", []) + docker.get("head_run_options", [])
    options = {"head": head}
    for name, node in config.get("available_node_types", {}).items():
        own = node.get("docker", {})
        images.append(own.get("worker_image", docker.get("image", "")))
        if name != config.get("head_node_type"):
            options[name] = docker.get("run_options", []) + own.get("worker_run_options", [])
        if node["resources"].get("GPU") and not images[-1].endswith("-gpu"):
            problems.append(f"{name}: has GPUs, and the image {images[-1]}")
    for name, said in options.items():
        if not any(option.startswith("--shm-size=") for option in said):
            problems.append(f"{name}: no --shm-size")
        if "--env RAY_AUTH_MODE=token" not in said:
            problems.append(f"{name}: Ray asks for no token")
    return problems + image_problems(images)


def dashboard_problems(config):
    """Commands that start Ray with a dashboard for all."""
    problems = []
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for command in prepared(config)[key]:
            host = re.search(r"--dashboard-host[= ](\S+)", command)
            if "ray start --head" in command and not host:
                problems.append(f"{key}: does not say --dashboard-host")
            if host and host[1] not in ("127.0.0.1", "localhost"):
                problems.append(f"{key}: the dashboard listens on {host[1]}")
    return problems


def label_problems(config):
    """Machines that a label selector cannot tell apart, or that the autoscaler would not start for one."""
    if config["provider"]["type"] == "local":  # Ray hands no labels to these, so the commands do
        starts = " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
        missing = [] if starts.count("--labels=ray.io/node-group=") == 2 else ["--labels=ray.io/node-group is missing"]
        return missing + [f"no machine is {name}" for name in sorted(GROUPS) if f"group={name}" not in starts]
    types = config["available_node_types"]
    problems = [f"no type {name}" for name in sorted(GROUPS - set(types))]
    for name, node in types.items():
        if node.get("labels", {}).get("ray.io/node-group") != name:
            problems.append(f"{name}: its label ray.io/node-group is not {name}")
    return problems


def install_problems(config):
    """Set-up that does not install this project at the versions of constraints.txt, or downloads from a hub."""
    commands = " ".join(config["setup_commands"])
    problems = [] if "pip install -q -c constraints.txt ." in commands else ["setup does not install the project"]
    if "." not in config["file_mounts"].values():
        problems.append("the checkout is not copied")
    return problems + (["setup downloads from a hub"] if re.search("huggingface|hf_hub|torch.hub", commands) else [])


def notice_problems(config):
    """Spot machines whose cloud's notice Ray does not get."""
    if not re.search("spot", json.dumps(config.get("available_node_types")), re.IGNORECASE):
        return []
    script = f"deploy/spot_notice.py {config['provider']['type']} $RAY_HEAD_IP:6379"
    (folder,) = (there for there, here in config["file_mounts"].items() if here == ".")
    said = any(f"python {folder}/{script}" in command for command in config["worker_start_ray_commands"])
    return [] if said and (ROOT / script.split()[0]).exists() else ["no machine waits for the cloud's notice"]


RAY_UP_CHECKS = [
    schema_problems,
    resource_problems,
    size_problems,
    head_problems,
    provider_problems,
    docker_problems,
    dashboard_problems,
    label_problems,
    install_problems,
    notice_problems,
    secret_problems,
]


@pytest.mark.parametrize("check", RAY_UP_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_file_is_sound(name, check):
    assert check(read(name)) == []


@pytest.mark.parametrize("name", RAY_UP + KUBERAY)
def test_no_secret_is_in_a_comment(name):
    assert not SECRET_VALUE.search((ROOT / name).read_text())


def put(key, value):
    """A change of a parsed file: ``a|b|0|c`` gets the value; None takes it out."""

    def change(tree):
        *path, last = [int(part) if part.isdigit() else part for part in key.split("|")]
        for part in path:
            tree = tree[part]
        if value is None:
            del tree[last]
        else:
            tree[last] = value

    return change


@pytest.mark.parametrize(
    ("check", "change", "problem"),
    [
        (schema_problems, put("max_workerz", 3), "max_workerz"),
        (schema_problems, put("available_node_types|gpu|node_config", None), "node_config"),
        (schema_problems, put("available_node_types|gpu|min_workers", 13), "smaller than the sum of `min_workers`"),
        (schema_problems, put("head_node_type", "boss"), "head_node_type"),
        (resource_problems, put("available_node_types|gpu|resources|GPU", 0.5), "gpu: GPU 0.5 is no whole number"),
        (resource_problems, put("available_node_types|gpu|resources|GPU", "4"), "gpu: GPU '4' is no whole number"),
        (resource_problems, put("available_node_types|decode|resources|CPU", None), "decode: CPU is missing"),
        (size_problems, put("available_node_types|gpu|max_workers", 13), "gpu: max_workers is above"),
        (size_problems, put("available_node_types|gpu|max_workers", 5), "together above"),
        (size_problems, put("available_node_types|gpu|max_workers", None), "together above"),
        (size_problems, put("available_node_types|gpu|min_workers", 5), "gpu: min_workers is not within"),
        (head_problems, put("head_node_type", "boss"), "none of the types"),
        (head_problems, put("available_node_types|head|resources|CPU", 2), "the head takes tasks"),
        (provider_problems, put("provider|regoin", "us-east-1"), "unknown key regoin"),
        (provider_problems, put("provider|aws_credentials", {}), "unknown key aws_credentials"),
        (docker_problems, put("docker|image", "rayproject/ray:2.9.0-py311-cpu"), "image rayproject/ray:2.9.0"),
        (docker_problems, put("docker|image", "rayproject/ray:latest-py311-cpu"), "image rayproject/ray:latest"),
        (docker_problems, put("docker|image", f"rayproject/ray:{ray_version()}-py312-cpu"), "py312"),
        (docker_problems, put("available_node_types|gpu|docker|worker_image", None), "gpu: has GPUs"),
        (docker_problems, put("available_node_types|decode|docker", None), "decode: no --shm-size"),
        (docker_problems, put("docker|run_options", []), "gpu: Ray asks for no token"),
        (dashboard_problems, put("head_start_ray_commands|1", "ray start --head"), "does not say"),
        (dashboard_problems, put("head_start_ray_commands|1", "ray start --head --dashboard-host=0.0.0.0"), "0.0.0.0"),
        (dashboard_problems, put("head_start_ray_commands", None), "0.0.0.0"),  # Ray's default
        (label_problems, put("available_node_types|decode|labels", None), "decode: its label"),
        (label_problems, put("available_node_types|decode", None), "no type decode"),
        (install_problems, put("setup_commands", ["pip install posmlp-video"]), "does not install the project"),
        (install_problems, put("file_mounts", {}), "the checkout is not copied"),
        (notice_problems, put("worker_start_ray_commands", ["ray start"]), "no machine waits"),
        (secret_problems, put("provider|aws_credentials", {"aws_secret_access_key": "x"}), "aws_secret_access_key"),
        (secret_problems, put("setup_commands|0", "export A=https://me:word@mlflow.example.com"), "setup_commands"),
        (secret_problems, put("setup_commands|0", "export KEY=AKIA" + "A" * 16), "setup_commands"),
        (secret_problems, put("docker|run_options|1", "--env MLFLOW_TRACKING_TOKEN=x"), "run_options"),
    ],
)
def test_each_check_sees_what_it_is_for(check, change, problem):
    config = read("cluster.yaml")
    change(config)
    assert problem in "\n".join(check(config))


def test_local_file_without_labels_or_with_a_working_head_is_refused():
    config = read("deploy/local.yaml")
    config["head_start_ray_commands"] = ["ray start --head"]
    assert label_problems(config) == ["--labels=ray.io/node-group is missing", "no machine is head"]
    assert head_problems(config) == ["the head takes tasks"]


# Files of KubeRay.


def cluster_of(tree):
    """The cluster of a RayCluster or a RayJob."""
    return tree["spec"]["rayClusterSpec"] if tree["kind"] == "RayJob" else tree["spec"]


def groups_of(tree):
    """All groups by name; the head's is head."""
    cluster = cluster_of(tree)
    workers = {group.get("groupName", f"group {i}"): group for i, group in enumerate(cluster["workerGroupSpecs"])}
    return {"head": cluster["headGroupSpec"]} | workers


def unknown(where, tree, fields):
    """Keys that are not among the fields."""
    return [f"{where}: unknown field {key}" for key in tree if key not in fields]


def field_problems(tree):
    """Fields that KubeRay does not know; it would drop them without a word."""
    problems = unknown("top", tree, {"apiVersion", "kind", "metadata", "spec"})
    if tree["apiVersion"] != "ray.io/v1":
        problems.append(f"apiVersion {tree['apiVersion']}")
    if tree["kind"] == "RayJob":
        problems += unknown("job", tree["spec"], JOB_FIELDS)
    cluster = cluster_of(tree)
    problems += unknown("cluster", cluster, CLUSTER_FIELDS)
    problems += unknown("autoscalerOptions", cluster.get("autoscalerOptions", {}), AUTOSCALER_FIELDS)
    problems += unknown("authOptions", cluster.get("authOptions", {}), AUTH_FIELDS)
    for name, group in groups_of(tree).items():
        problems += unknown(name, group, HEAD_FIELDS if name == "head" else WORKER_FIELDS)
        problems += unknown(f"{name}: template", group["template"], {"metadata", "spec"})
        problems += unknown(f"{name}: pod", group["template"]["spec"], POD_FIELDS)
        for container in group["template"]["spec"]["containers"]:
            problems += unknown(f"{name}: container", container, CONTAINER_FIELDS)
        params = group["rayStartParams"]
        problems += [f"{name}: rayStartParams {key} is no text" for key in params if not isinstance(params[key], str)]
        if "labels" in params:  # the operator refuses it
            problems.append(f"{name}: labels belong beside rayStartParams")
    return problems


def group_problems(tree):
    """Groups that are missing, without their label, or of impossible sizes."""
    groups = groups_of(tree)
    problems = [f"no group {name}" for name in sorted(GROUPS - set(groups))]
    for name, group in groups.items():
        if group.get("labels", {}).get("ray.io/node-group") != name:
            problems.append(f"{name}: its label ray.io/node-group is not {name}")
        if name != "head" and not 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            problems.append(f"{name}: replicas are not within minReplicas and maxReplicas")
    if groups["head"]["rayStartParams"].get("num-cpus") != "0":
        problems.append("the head takes tasks")
    return problems


def pod_problems(tree):
    """Containers of another Ray, with more memory than reserved, without /dev/shm, or started again as they are."""
    images, problems = [], []
    for name, group in groups_of(tree).items():
        pod = group["template"]["spec"]
        memory = {
            volume["name"] for volume in pod.get("volumes", ()) if "Memory" in volume.get("emptyDir", {}).values()
        }
        if pod.get("restartPolicy") != "Never":
            problems.append(f"{name}: restartPolicy is not Never, which autoscaler v2 needs")
        for container in pod["containers"]:
            images.append(container["image"])
            asked = {kind: container["resources"].get(kind, {}) for kind in ("requests", "limits")}
            if not asked["limits"].get("memory") or asked["requests"] != asked["limits"]:
                problems.append(f"{name}: requests and limits are not the same")
            if bool(asked["limits"].get("nvidia.com/gpu")) != container["image"].endswith("-gpu"):
                problems.append(f"{name}: the image does not go with its GPUs")
            shm = {mount["name"] for mount in container.get("volumeMounts", ()) if mount["mountPath"] == "/dev/shm"}
            if not shm & memory:
                problems.append(f"{name}: /dev/shm is no volume in memory")
    if cluster_of(tree).get("rayVersion") != ray_version():
        problems.append(f"rayVersion is not {ray_version()}")
    return problems + image_problems(images)


def access_problems(tree):
    """A dashboard for all, and secrets that do not come from a Secret."""
    cluster, problems = cluster_of(tree), []
    head = cluster["headGroupSpec"]
    if cluster.get("authOptions") != {"mode": "token"}:  # the reason why the dashboard may listen on all interfaces
        problems.append("Ray asks for no token")
    if head.get("serviceType") != "ClusterIP" or head.get("enableIngress"):
        problems.append("the head can be reached from outside")
    for name, group in groups_of(tree).items():
        for container in group["template"]["spec"]["containers"]:
            for variable in container.get("env", ()):
                if variable["name"] != DRAIN_LIMIT and "secretKeyRef" not in variable.get("valueFrom", {}):
                    problems.append(f"{name}: {variable['name']} does not come from a Secret")
    return problems


def ending_problems(tree):
    """Pods that Kubernetes kills while Ray still waits for runs to save, or that leave them too little time."""
    problems = []
    for name, group in groups_of(tree).items():
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        waits = [float(each["value"]) for each in container["env"] if each["name"] == DRAIN_LIMIT]
        if not waits or not 60 <= waits[0] <= pod.get("terminationGracePeriodSeconds", 30) - 10:
            problems.append(f"{name}: {DRAIN_LIMIT} is not well below terminationGracePeriodSeconds")
    return problems


def autoscaler_problems(tree):
    """The autoscaler off, or the old one."""
    cluster = cluster_of(tree)
    on = cluster.get("enableInTreeAutoscaling") is True
    return [] if on and cluster.get("autoscalerOptions", {}).get("version") == "v2" else ["autoscaler v2 is not on"]


def job_problems(tree):
    """A job that cannot run as it is written, or whose cluster would stay."""
    if tree["kind"] != "RayJob":
        return []
    spec, problems = tree["spec"], []
    if not spec.get("shutdownAfterJobFinishes") or "ttlSecondsAfterFinished" not in spec:
        problems.append("the cluster stays after the run")
    command, verb, recipe, *overrides = spec["entrypoint"].split()
    if (command, verb) != ("posmlp", "train"):
        return [*problems, f"unknown command {command} {verb}"]
    config = load_recipe(recipe, overrides)
    limits = groups_of(tree)["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    if config.scaling.workers > groups_of(tree)["gpu"]["replicas"] * int(limits["nvidia.com/gpu"]):
        problems.append("scaling.workers are more than the GPUs that the run starts with")
    if not re.match(r"\w+://", config.train.storage):
        problems.append("train.storage is not shared by the pods")
    packages = yaml.safe_load(spec["runtimeEnvYAML"])["pip"]["packages"]
    if packages != [
        f"{flag}${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}{file}" for flag, file in [("-c ", "/constraints.txt"), ("", "")]
    ]:
        problems.append("the runtime environment does not install the project")
    return problems


KUBERAY_CHECKS = [
    field_problems,
    group_problems,
    pod_problems,
    access_problems,
    ending_problems,
    autoscaler_problems,
    job_problems,
    secret_problems,
]


@pytest.mark.parametrize("check", KUBERAY_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_file_is_sound(name, check):
    assert check(read(name)) == []


CLUSTER = "spec|rayClusterSpec"
GPU = f"{CLUSTER}|workerGroupSpecs|1"
POD = f"{GPU}|template|spec"
CONTAINER = f"{POD}|containers|0"


@pytest.mark.parametrize(
    ("check", "change", "problem"),
    [
        (field_problems, put("apiVersion", "ray.io/v1alpha1"), "apiVersion ray.io/v1alpha1"),
        (field_problems, put("spec|ttlSeconds", 5), "job: unknown field ttlSeconds"),
        (field_problems, put(f"{CLUSTER}|shm", 1), "cluster: unknown field shm"),
        (field_problems, put(f"{CLUSTER}|autoscalerOptions|idleTimeout", 1), "unknown field idleTimeout"),
        (field_problems, put(f"{GPU}|minWorkers", 1), "gpu: unknown field minWorkers"),
        (field_problems, put(f"{POD}|shmSize", "1Gi"), "gpu: pod: unknown field shmSize"),
        (field_problems, put(f"{CONTAINER}|gpu", 1), "gpu: container: unknown field gpu"),
        (field_problems, put(f"{GPU}|rayStartParams|num-cpus", 4), "num-cpus is no text"),
        (field_problems, put(f"{GPU}|rayStartParams|labels", "a=b"), "labels belong beside"),
        (group_problems, put(f"{GPU}|groupName", "cuda"), "no group gpu"),
        (group_problems, put(f"{GPU}|groupName", None), "no group gpu"),
        (group_problems, put(f"{GPU}|labels", None), "gpu: its label"),
        (group_problems, put(f"{GPU}|replicas", 5), "gpu: replicas are not within"),
        (group_problems, put(f"{GPU}|minReplicas", 3), "gpu: replicas are not within"),
        (group_problems, put(f"{CLUSTER}|headGroupSpec|rayStartParams|num-cpus", None), "the head takes tasks"),
        (pod_problems, put(f"{CLUSTER}|rayVersion", "2.9.0"), "rayVersion is not"),
        (pod_problems, put(f"{CONTAINER}|image", "rayproject/ray:2.9.0-py311-gpu"), "image rayproject/ray:2.9.0"),
        (pod_problems, put(f"{CONTAINER}|image", "rayproject/ray:2.60.0-py311-cpu"), "does not go with its GPUs"),
        (pod_problems, put(f"{CONTAINER}|resources|requests|memory", "1Gi"), "gpu: requests and limits"),
        (pod_problems, put(f"{CONTAINER}|resources|limits", None), "gpu: requests and limits"),
        (pod_problems, put(f"{CONTAINER}|volumeMounts", []), "gpu: /dev/shm"),
        (pod_problems, put(f"{POD}|volumes|0|emptyDir|medium", None), "gpu: /dev/shm"),
        (pod_problems, put(f"{POD}|restartPolicy", "Always"), "gpu: restartPolicy"),
        (access_problems, put(f"{CLUSTER}|authOptions", None), "no token"),
        (access_problems, put(f"{CLUSTER}|headGroupSpec|serviceType", "LoadBalancer"), "from outside"),
        (access_problems, put(f"{CONTAINER}|env", [{"name": "MLFLOW_TRACKING_URI", "value": "x"}]), "from a Secret"),
        (
            ending_problems,
            put(f"{POD}|terminationGracePeriodSeconds", None),
            f"gpu: {DRAIN_LIMIT}",
        ),
        (ending_problems, put(f"{CONTAINER}|env|0|value", "115"), f"gpu: {DRAIN_LIMIT}"),
        (ending_problems, put(f"{CONTAINER}|env", []), f"gpu: {DRAIN_LIMIT}"),
        (autoscaler_problems, put(f"{CLUSTER}|autoscalerOptions|version", "v1"), "not on"),
        (autoscaler_problems, put(f"{CLUSTER}|enableInTreeAutoscaling", None), "not on"),
        (job_problems, put("spec|shutdownAfterJobFinishes", None), "the cluster stays"),
        (job_problems, put("spec|entrypoint", "python train.py k400_s16"), "unknown command python"),
        (job_problems, put("spec|entrypoint", "posmlp train k400_s16"), "not shared"),
        (job_problems, put(f"{GPU}|replicas", 1), "scaling.workers are more"),
        (job_problems, put("spec|runtimeEnvYAML", "pip: {packages: [torch]}"), "does not install the project"),
        (secret_problems, put(f"{CONTAINER}|env", [{"name": "MLFLOW_TRACKING_TOKEN", "value": "x"}]), "TRACKING_TOKEN"),
    ],
)
def test_each_kuberay_check_sees_what_it_is_for(check, change, problem):
    tree = read("deploy/rayjob.yaml")
    change(tree)
    assert problem in "\n".join(check(tree))


def test_job_and_cluster_differ_only_in_what_they_start_with():
    job, cluster = (cluster_of(read(f"deploy/{name}.yaml")) for name in ("rayjob", "raycluster"))
    for group in (*job["workerGroupSpecs"], *cluster["workerGroupSpecs"]):
        group.pop("replicas")
    assert job == cluster


# What Ray's own autoscaler makes of the files.


@pytest.mark.parametrize("name", ["cluster.yaml", "deploy/gcp.yaml"])
def test_autoscaler_knows_labels_and_images_before_there_is_a_machine(name):
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    config = AutoscalingConfig(prepared(read(name)), skip_content_hash=True)
    types = config.get_node_type_configs()
    assert {name: node.labels["ray.io/node-group"] for name, node in types.items()} == {name: name for name in GROUPS}
    images = {name: config.get_docker_config(name)["image"].rpartition("-")[2] for name in types}
    assert images == {"head": "cpu", "decode": "cpu", "gpu": "gpu"}


@pytest.mark.parametrize("name", KUBERAY)
def test_autoscaler_reads_the_groups_as_meant(name):
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    metadata = {"name": "posmlp", "namespace": "default"}
    types = _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": cluster_of(read(name))})
    types = types["available_node_types"]
    found = {name: (node["labels"]["ray.io/node-group"], node["max_workers"]) for name, node in types.items()}
    assert found == {"headgroup": ("head", 0), "decode": ("decode", 8), "gpu": ("gpu", 4)}
    has = {name: (node["resources"]["CPU"], node["resources"].get("GPU", 0)) for name, node in types.items()}
    assert has == {"headgroup": (0, 0), "decode": (15, 0), "gpu": (46, 4)}
