"""The verdict on a rollout, from the status that a platform reports. Pure."""
