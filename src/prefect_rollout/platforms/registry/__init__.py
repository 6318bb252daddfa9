"""Image registries, by the OCI distribution API. Read only."""
