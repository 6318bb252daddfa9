"""The article's payloads, and the cloud of the default scenario around them.

App 3290 `qapm`, its metaData (step 2), its template (step 3) and the ids 1343169 and 1343170 are the
article's to the letter. The deployments beside `qapm-home` are made up, one for each way to fail.
"""

from collections.abc import Mapping
from typing import Any

IMAGE = "harbor.qihoo.net/qdgc-qapm/qapm-web:202407291835-ddc95a7"
OLDER_IMAGE = "harbor.qihoo.net/qdgc-qapm/qapm-web:202407221102-5c1f0e2"
OLDEST_IMAGE = "harbor.qihoo.net/qdgc-qapm/qapm-web:202407151640-a81d3b9"

HOME_ID = 20771
NEWEST_TEMPLATE = 1343169


def meta_data(name: str, clusters: Mapping[str, tuple[int, str]]) -> dict[str, Any]:
    """A deployment's metaData in the article's shape; `clusters` is `{cluster: (replicas, host group)}`."""
    return {
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxUnavailable": "25%", "maxSurge": "25%"},
        },
        "inPlace": False,
        "replicas": {cluster: replicas for cluster, (replicas, _) in clusters.items()},
        "logTopic": {cluster: {"name": cluster, "host": "xxx"} for cluster in clusters},
        "newMeta": False,
        "clusters": {
            cluster: {
                "name": cluster,
                "replica": replicas,
                "logTopic": {"name": f"k8s_deployment_qdgc_{name}", "host": "xxx"},
                "hostGroup": group,
            }
            for cluster, (replicas, group) in clusters.items()
        },
        "idcs": [
            {"area": "北京", "idcNames": [cluster.removeprefix("pub-")], "clusters": [cluster], "vpc": {}}
            for cluster in clusters
        ],
        "networkType": "classic",
    }


def template(name: str, app: str, namespace: str, images: Mapping[str, str]) -> dict[str, Any]:
    """An apps/v1 Deployment in the article's shape; `images` is `{container: image}`."""
    labels = {"app": name, "stark-app": app, "stark-ns": namespace}
    return {
        "kind": "Deployment",
        "apiVersion": "apps/v1",
        "metadata": {"name": name, "creationTimestamp": None, "labels": labels},
        "spec": {
            "selector": {"matchLabels": {"app": name, "stark-res": "Deployment"}},
            "template": {
                "metadata": {
                    "creationTimestamp": None,
                    "labels": {**labels, "stark-priority": "LS", "stark-res": "Deployment"},
                },
                "spec": {
                    "containers": [
                        {
                            "name": container,
                            "image": image,
                            "resources": {
                                "limits": {"cpu": "1", "ephemeral-storage": "30Gi", "memory": "2Gi"},
                                "requests": {"cpu": "330m", "ephemeral-storage": "1Gi", "memory": "2Gi"},
                            },
                            "imagePullPolicy": "IfNotPresent",
                            "securityContext": {},
                        }
                        for container, image in images.items()
                    ]
                },
            },
            "strategy": {},
        },
        "status": {},
    }


def apps() -> list[dict[str, Any]]:
    """The apps of the default scenario, in the scenario's format."""
    return [
        {
            "id": 3290,
            "name": "qapm",
            "namespace": "qdgc",
            "deployments": [_home(), _api(), *_failing()],
        }
    ]


def _home() -> dict[str, Any]:
    return {
        "id": HOME_ID,
        "name": "qapm-home",
        "metaData": meta_data("qapm-home", {"pub-bjwdt": (1, "default")}),
        "templates": [
            _version(1342977, OLDEST_IMAGE, "2024-07-15T16:52:10+08:00"),
            _version(1343102, OLDER_IMAGE, "2024-07-22T11:15:43+08:00"),
            _version(NEWEST_TEMPLATE, IMAGE, "2024-07-29T18:40:27+08:00"),
        ],
        "online": {"pub-bjwdt": 1343102},
    }


def _api() -> dict[str, Any]:
    image = "harbor.qihoo.net/qdgc-qapm/qapm-api"
    return {
        "id": HOME_ID + 1,
        "name": "qapm-api",
        "clusters": {"pub-bjwdt": 2, "pub-bjyt": 3},
        "templates": [
            _version(1343110, f"{image}:202407231010-77e1a04", "2024-07-23T10:21:09+08:00"),
            _version(1343161, f"{image}:202407291402-b0c9d15", "2024-07-29T14:11:58+08:00"),
        ],
        "online": {"pub-bjwdt": 1343110, "pub-bjyt": 1343110},
    }


def _failing() -> list[dict[str, Any]]:
    """One deployment for each bad ending; only the newest image fails, so that a rollback succeeds."""
    newest = "202407301200-0badbad"
    spoilt: dict[str, dict[str, Any]] = {
        "bad-image": {"kind": "image_cannot_be_pulled", "images": newest},
        "crash-loop": {"kind": "crash_loop", "images": newest},
        "never-ready": {"kind": "never_ready", "images": newest},
        "slow-start": {"kind": "slow_start", "seconds": 40, "images": newest},
        "no-pods": {"kind": "no_pods", "images": newest},
        "no-quota": {"kind": "quota_refused"},
        # One cluster of two, so that a release over both ends half done.
        "cluster-down": {"kind": "cluster_down", "clusters": ["pub-bjyt"]},
        "invalid-image": {"kind": "invalid_image", "images": newest},
        "unschedulable": {"kind": "unschedulable", "images": newest},
    }
    deployments = []
    for number, (name, behaviour) in enumerate(spoilt.items()):
        image = f"harbor.qihoo.net/qdgc-qapm/{name}"
        older, newer = 1343120 + 2 * number, 1343121 + 2 * number
        clusters = {"pub-bjwdt": 2, "pub-bjyt": 2} if name == "cluster-down" else {"pub-bjwdt": 2}
        deployments.append(
            {
                "id": HOME_ID + 2 + number,
                "name": name,
                "clusters": clusters,
                "templates": [
                    _version(older, f"{image}:202407251730-9e8d7c6", "2024-07-25T17:41:30+08:00"),
                    _version(newer, f"{image}:{newest}", "2024-07-29T17:05:12+08:00"),
                ],
                "online": dict.fromkeys(clusters, older),
                "behaviour": behaviour,
            }
        )
    return deployments


def _version(template_id: int, image: str, create_time: str) -> dict[str, Any]:
    return {"id": template_id, "image": image, "create_time": create_time}
