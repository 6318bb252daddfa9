"""Batches of releases: the plan, the waves and the result. Pure."""
