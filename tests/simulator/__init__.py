"""Tests of the simulated container cloud."""
