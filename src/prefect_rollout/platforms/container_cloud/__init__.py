"""360's container cloud: its API, its payloads, its signatures."""
