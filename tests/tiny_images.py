"""Tiny OCI images, made in memory, and their push to a registry."""

import hashlib
import json
from typing import Any, NamedTuple

import httpx

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


class Content(NamedTuple):
    """Content of a registry, with its digest."""

    media_type: str
    content: bytes

    @property
    def digest(self) -> str:
        return f"sha256:{hashlib.sha256(self.content).hexdigest()}"

    def descriptor(self, **fields: Any) -> dict[str, Any]:
        size = len(self.content)
        return {"mediaType": self.media_type, "digest": self.digest, "size": size, **fields}


class TinyImage(NamedTuple):
    """An image: the content of its tag, then its manifests, and its blobs."""

    manifests: list[Content]
    blobs: list[Content]

    @property
    def digest(self) -> str:
        return self.manifests[0].digest

    @property
    def size(self) -> int:
        """Bytes of a single-platform image."""
        return sum(len(blob.content) for blob in self.blobs)


def written(media_type: str, value: dict[str, Any]) -> Content:
    return Content(media_type, json.dumps(value).encode())


def image(
    platform: str = "linux/amd64", created: str | None = "2026-11-20T10:00:00Z", text: str = "x"
) -> TinyImage:
    """Return an image for one platform."""
    os, architecture, *variant = platform.split("/")
    fields = {"os": os, "architecture": architecture, "rootfs": {"type": "layers", "diff_ids": []}}
    fields |= {"variant": variant[0]} if variant else {}
    config = written(CONFIG, fields | ({"created": created} if created else {}))
    layer = Content(LAYER, text.encode())
    manifest = written(
        MANIFEST,
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.descriptor(),
            "layers": [layer.descriptor()],
        },
    )
    return TinyImage([manifest], [config, layer])


def index(*platforms: str) -> TinyImage:
    """Return an image for several platforms, with an attestation as `docker buildx` adds it."""
    images = {platform: image(platform, text=platform) for platform in platforms}
    entries = []
    for platform, each in images.items():
        os, architecture, *variant = platform.split("/")
        described = {"os": os, "architecture": architecture} | ({"variant": variant[0]} if variant else {})
        entries.append(each.manifests[0].descriptor(platform=described))
    attestation = image("unknown/unknown", text="attestation")
    unknown = {"os": "unknown", "architecture": "unknown"}
    entries.append(attestation.manifests[0].descriptor(platform=unknown))
    parts = [*images.values(), attestation]
    whole = written(INDEX, {"schemaVersion": 2, "mediaType": INDEX, "manifests": entries})
    return TinyImage(
        [whole, *(each.manifests[0] for each in parts)], [blob for each in parts for blob in each.blobs]
    )


OLD, NEW = image(text="old"), image(text="new", created="2026-11-25T10:00:00Z")


def push(http: httpx.Client, repository: str, image: TinyImage, *tags: str) -> None:
    """Push an image to the registry of `http`, whose base is `…/v2/`."""
    for blob in image.blobs:
        started = http.post(f"{repository}/blobs/uploads/").raise_for_status()
        place = httpx.URL(started.headers["Location"]).copy_merge_params({"digest": blob.digest})
        headers = {"Content-Type": "application/octet-stream"}
        http.put(place, content=blob.content, headers=headers).raise_for_status()
    for manifest in reversed(image.manifests):
        names = tags if manifest is image.manifests[0] else [manifest.digest]
        for name in names:
            headers = {"Content-Type": manifest.media_type}
            url = f"{repository}/manifests/{name}"
            http.put(url, content=manifest.content, headers=headers).raise_for_status()
