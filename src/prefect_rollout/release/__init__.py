"""One release: its request, plan, result and report. Pure."""
