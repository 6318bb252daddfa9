"""Processes of `deploy/` and `compose.yaml` have no right, secret or route that they do not need."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.blocks.core import Block

from prefect_rollout.blocks import ReleaseWindows, TargetBlock
from prefect_rollout.runs import zombies

ROOT = Path(__file__).parent.parent
MANIFESTS = list(yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text(encoding="utf-8")))
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
HELM = yaml.safe_load((ROOT / "deploy/helm-values.yaml").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")

TOKEN = "PREFECT_ROLLOUT_MCP_TOKEN"
PODS = {
    each["metadata"]["name"]: each["spec"]["template"] for each in MANIFESTS if each["kind"] == "Deployment"
}
POLICIES = {each["metadata"]["name"]: each["spec"] for each in MANIFESTS if each["kind"] == "NetworkPolicy"}
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def containers() -> list[tuple[str, dict[str, Any]]]:
    return [(name, each) for name, pod in PODS.items() for each in pod["spec"]["containers"]]


@pytest.mark.parametrize("name", PODS)
def test_a_pod_runs_without_root_and_token(name: str) -> None:
    spec = PODS[name]["spec"]
    context = spec["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False


@pytest.mark.parametrize(("name", "container"), containers())
def test_a_container_has_no_capability_and_limits_and_probes(name: str, container: dict[str, Any]) -> None:
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} <= set(container["resources"]["limits"]) & set(
        container["resources"]["requests"]
    )
    assert {"livenessProbe", "startupProbe"} <= set(container)
    ports = {port["name"] for port in container["ports"]}
    for probe in ("livenessProbe", "startupProbe"):
        (kind,) = {"httpGet", "tcpSocket"} & set(container[probe])
        assert container[probe][kind]["port"] in ports
    # What it writes to besides.
    assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]], name


def test_only_mcp_has_the_token_of_its_clients() -> None:
    secrets = {
        name: [each["secretRef"]["name"] for each in container["envFrom"] if "secretRef" in each]
        for name, container in containers()
    }
    assert secrets == {"rollout-worker": ["rollout-api"], "rollout-mcp": ["rollout-api", "rollout-mcp"]}
    with_token = [name for name, each in SERVICES.items() if TOKEN in each.get("environment", {})]
    assert with_token == ["mcp"]


def test_each_pod_has_a_policy_for_both_directions() -> None:
    for name, pod in PODS.items():
        policy = POLICIES[name]
        assert policy["podSelector"]["matchLabels"] == pod["metadata"]["labels"]
        assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
        assert all(rule["ports"] for rule in policy["egress"])
    assert POLICIES["rollout-worker"]["ingress"] == []
    (rule,) = POLICIES["rollout-mcp"]["ingress"]
    assert rule["from"]
    assert [port["port"] for port in rule["ports"]] == [8361]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_of_compose_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert service["user"] not in {"", "0", "root"}
    assert {"mem_limit", "cpus", "pids_limit"} <= set(service)
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    jobs = {"migrate", "setup", "services", "proxy"}
    assert "healthcheck" in service or name in jobs


def test_redis_wants_a_password_and_is_reached_by_the_server_alone() -> None:
    assert "requirepass" in SERVICES["redis"]["command"]
    assert "${REDIS_PASSWORD:?}" in SERVICES["redis"]["environment"]["REDISCLI_AUTH"]
    server = SERVICES["api1"]["environment"]
    for variable in ("PREFECT_REDIS_MESSAGING_URL", "PREFECT_SERVER_DOCKET_URL"):
        assert server[variable].startswith("redis://:${REDIS_PASSWORD:?}@")
    assert COMPOSE["networks"]["database"] == {"internal": True}
    inside = {name for name, each in SERVICES.items() if "database" in each["networks"]}
    assert inside == {"postgres", "redis", "migrate", "api1", "api2", "services"}
    messaging = HELM["backgroundServices"]["messaging"]
    assert messaging["redis"]["password"] == "$(REDIS_PASSWORD)"
    assert "$(REDIS_PASSWORD)" in messaging["docket"]["url"]
    for part in ("server", "backgroundServices"):
        assert HELM[part]["extraEnvVarsSecret"] == "prefect-redis"


def test_the_chart_is_given_what_it_leaves_open() -> None:
    for context in (
        HELM["server"]["containerSecurityContext"],
        HELM["backgroundServices"]["containerSecurityContext"],
        HELM["migrations"]["securityContext"],
    ):
        assert context == {"capabilities": {"drop": ["ALL"]}}
    assert HELM["backgroundServices"]["podSecurityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert HELM["server"]["livenessProbe"]["enabled"] is True


def test_the_image_holds_what_the_lock_says_and_no_root() -> None:
    assert "uv sync --locked" in DOCKERFILE
    assert "--no-dev" in DOCKERFILE
    assert "pip install" not in DOCKERFILE
    assert re.search(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    copied = [line.split()[1] for line in DOCKERFILE.splitlines() if line.startswith("COPY ")]
    assert "." not in copied
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize("path", ["compose.yaml", "deploy/kubernetes.yaml", "deploy/helm-values.yaml"])
def test_no_secret_stands_in_a_file_and_how_to_pin_does(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert "@sha256:" in text
    for value in re.findall(r"(?:PASSWORD|TOKEN|AUTH|AUTH_STRING)(?:: |=)(\S+)", text):
        assert value[0] in "$…a", value  # a variable, an ellipsis, or admin:…


def test_the_uninstall_commands_name_everything_that_is_made_in_prefect() -> None:
    section = (ROOT / "docs/cli.md").read_text(encoding="utf-8").partition("## Uninstall")[2]
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    flows = [each["entrypoint"].rpartition(".")[2].replace("_", "-") for each in deployments]
    for flow in flows:
        assert f"`{flow}`" in section  # its runs
    named = {f"{flow}/{each['name']}" for flow, each in zip(flows, deployments, strict=True)}
    kinds: list[type[Block]] = [*TargetBlock.__subclasses__(), ReleaseWindows]
    blocks = {kind.get_block_type_slug() for kind in kinds}
    (commands,) = re.findall(r"```console\n(.*?)```", section, re.DOTALL)
    words = commands.replace('"', " ").replace(";", " ").split()
    assert named | blocks <= set(words)
    assert f'automation delete "{zombies.NAME}"' in commands
    assert f"work-pool delete {deployments[0]['work_pool']['name']}" in commands
