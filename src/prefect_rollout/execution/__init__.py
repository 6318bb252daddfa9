"""Execution of flow runs: the local server and its daemon, the worker, and continuing a run."""
