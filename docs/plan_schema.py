"""Print the JSON Schema of a plan, which editors use to complete and check plans.

.venv/bin/python docs/plan_schema.py > docs/plan.schema.json
"""

import json

from prefect_rollout.batch.plan import Plan


def schema() -> str:
    """Return the schema as JSON text."""
    content = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Plan.model_json_schema(),
        "title": "Plan of a batch of releases",
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
