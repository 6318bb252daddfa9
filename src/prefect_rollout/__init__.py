"""Releases applications on a container cloud as Prefect flows.

Importing this package is cheap on purpose: Prefect is imported by `prefect_rollout.blocks`,
`prefect_rollout.tasks` and `prefect_rollout.flows`, not here.
"""
