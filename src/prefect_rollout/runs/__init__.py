"""The lifecycle of flow runs on Prefect: lock, steps, approval, endings, events, history."""
