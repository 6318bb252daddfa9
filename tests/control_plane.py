"""A Kubernetes control plane for tests: etcd, API server, controllers and scheduler of a real release.

`tests/kubernetes/controlplane` has the program, which plays the nodes.
"""

import asyncio
import json
import re
import ssl
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import go_programs
import httpx
import yaml

Json = dict[str, Any]

_ROLE = Path(__file__).parent.parent / "deploy" / "kubernetes-rbac.yaml"


@contextmanager
def control_plane(folder: Path) -> Iterator["ControlPlane"]:
    """Run a control plane with its files in `folder`; it takes some seconds to start."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "controlplane.log").open("wb") as log:
        process = subprocess.Popen(
            [go_programs.control_plane(), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=folder,
        )
    assert process.stdin
    assert process.stdout
    try:
        said = process.stdout.readline().decode()
        assert said.startswith("ready"), (folder / "controlplane.log").read_text()
        with ControlPlane(folder) as made:
            yield made
    finally:
        process.stdin.close()
        process.wait(30)


class ControlPlane:
    """A control plane that runs, as its administrator sees it.

    Attributes:
        url: address of the API server.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        cluster = yaml.safe_load(self.kubeconfig("admin").read_text("utf-8"))["clusters"][0]["cluster"]
        self.url = str(cluster["server"])
        self.trusted = ssl.create_default_context(cafile=cluster["certificate-authority"])
        self._http = httpx.Client(
            base_url=self.url, verify=self.trusted, headers={"Authorization": "Bearer admin"}, timeout=60
        )

    def __enter__(self) -> "ControlPlane":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def kubeconfig(self, user: str) -> Path:
        """Return the kubeconfig of a user: `admin`, or `releaser`, who has the rights that RBAC grants."""
        return self.folder / f"{user}.kubeconfig"

    def call(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Json:
        """Send a request as the administrator."""
        content = None if body is None else json.dumps(body).encode()
        answer = self._http.request(method, path, content=content, headers={"Content-Type": kind})
        assert answer.is_success, answer.text
        return dict(answer.json())

    def audit(self, namespace: str, user: str = "releaser") -> list[Json]:
        """Return the requests of a user in a namespace, in the order of their answers."""
        found: list[Json] = []
        with (self.folder / "audit.log").open(encoding="utf-8") as lines:
            for line in lines:
                if not line.endswith("\n") or f'"namespace":"{namespace}"' not in line:
                    continue
                each = json.loads(line)
                if each["user"]["username"] == user and each["stage"] != "ResponseStarted":
                    found.append(each)
        return found


class Namespace:
    """A namespace in which the releaser has the Role of `deploy/kubernetes-rbac.yaml`.

    Args:
        plane: the control plane.
        name: the namespace's name.
        without: `(resource, verb)` that the Role does not grant here.
        unblock: grant what the Role has in a comment, for releases that unblock StatefulSets.
    """

    def __init__(
        self,
        plane: ControlPlane,
        name: str,
        *,
        without: tuple[str, str] | None = None,
        unblock: bool = False,
    ) -> None:
        self.plane, self.name = plane, name
        plane.call("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        text = _ROLE.read_text("utf-8")
        if unblock:
            text = re.sub(r"^  # ( *-? \w+:)", r"  \1", text, flags=re.MULTILINE)
        role, binding = yaml.safe_load_all(text)
        role["rules"] = [
            {"apiGroups": rule["apiGroups"], "resources": [resource], "verbs": verbs}
            for rule in role["rules"]
            for resource in rule["resources"]
            if (verbs := [verb for verb in rule["verbs"] if (resource, verb) != without])
        ]
        binding["subjects"] = [{"kind": "User", "name": "releaser", "apiGroup": "rbac.authorization.k8s.io"}]
        for plural, each in (("roles", role), ("rolebindings", binding)):
            self.plane.call("POST", f"/apis/rbac.authorization.k8s.io/v1/namespaces/{name}/{plural}", each)

    # ---- what is there ----------------------------------------------------------------------

    def path(self, kind: str, name: str = "") -> str:
        """Return the path of an object, or of a list: `deployments`, `pods`, and so on."""
        group = {
            "deployments": "apis/apps/v1",
            "statefulsets": "apis/apps/v1",
            "daemonsets": "apis/apps/v1",
            "replicasets": "apis/apps/v1",
            "horizontalpodautoscalers": "apis/autoscaling/v2",
        }.get(kind, "api/v1")
        return f"/{group}/namespaces/{self.name}/{kind}" + (f"/{name}" if name else "")

    def get(self, kind: str, name: str) -> Json:
        return self.plane.call("GET", self.path(kind, name))

    def items(self, kind: str) -> list[Json]:
        return list(self.plane.call("GET", self.path(kind))["items"])

    def create(self, kind: str, body: Json) -> Json:
        return self.plane.call("POST", self.path(kind), body)

    def patch(self, kind: str, name: str, body: Json) -> Json:
        """Merge `body` into an object as somebody else would."""
        return self.plane.call("PATCH", self.path(kind, name), body, "application/strategic-merge-patch+json")

    def set_image(self, kind: str, name: str, image: str) -> Json:
        """Change the image as `kubectl set image` does."""
        containers = [{"name": "app", "image": image}]
        return self.patch(kind, name, {"spec": {"template": {"spec": {"containers": containers}}}})

    def image(self, kind: str, name: str) -> str:
        """Return the image that a workload was asked for."""
        return str(self.get(kind, name)["spec"]["template"]["spec"]["containers"][0]["image"])

    def running(self, image: str) -> int:
        """Return the number of ready pods with that image, which are not being deleted."""
        return sum(
            any(
                each["type"] == "Ready" and each["status"] == "True"
                for each in pod["status"].get("conditions", [])
            )
            for pod in self.items("pods")
            if pod["spec"]["containers"][0]["image"] == image and "deletionTimestamp" not in pod["metadata"]
        )

    def writes(self, resource: str = "") -> list[str]:
        """Return the releaser's writes that the API server accepted, such as `patch deployments/web`.

        Dry runs are not among them.
        """
        return [
            f"{each['verb']} {each['objectRef']['resource']}"
            + (f"/{each['objectRef']['subresource']}" if "subresource" in each["objectRef"] else "")
            + f"/{each['objectRef']['name']}"
            for each in self.plane.audit(self.name)
            if each["verb"] not in {"get", "list", "watch"}
            and "dryRun=All" not in each["requestURI"]
            and each["responseStatus"]["code"] < 300
            and resource in each["objectRef"]["resource"]
        ]

    # ---- workloads --------------------------------------------------------------------------

    async def deploy(
        self,
        name: str = "web",
        image: str = "shop/web:1",
        replicas: int = 2,
        *,
        kind: str = "deployments",
        probed: bool = True,
        pod: Mapping[str, Any] | None = None,
        **spec: Any,
    ) -> None:
        """Create a workload and wait until its pods are ready; with a probe unless `probed` is false."""
        container: Json = {"name": "app", "image": image}
        if probed:
            container["readinessProbe"] = {"httpGet": {"port": 8080}}
        template = {
            "metadata": {"labels": {"app": name}},
            "spec": {"containers": [container], "terminationGracePeriodSeconds": 1, **(pod or {})},
        }
        body: Json = {
            "metadata": {"name": name},
            "spec": {"selector": {"matchLabels": {"app": name}}, "template": template, **spec},
        }
        if kind != "daemonsets":
            body["spec"]["replicas"] = replicas
        self.create(kind, body)
        count = NODES if kind == "daemonsets" else replicas
        async with asyncio.timeout(60):
            while self.running(image) < count:  # noqa: ASYNC110 - it comes true elsewhere
                await asyncio.sleep(0.2)


NODES = 2
"""Nodes of a control plane."""
