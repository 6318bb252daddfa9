"""Prints the JSON Schema of a plan, by which editors complete and check one.

.venv/bin/python docs/plan_schema.py > docs/plan.schema.json
"""

import json

from prefect_rollout.plan import Plan


def schema() -> str:
    """The schema as the text of its file."""
    content = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Plan.model_json_schema(),
        "title": "Plan of a batch of releases",
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
