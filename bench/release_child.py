"""One release in this process; prints the id of its run."""

import asyncio
import json

from prefect_rollout.flows import deploy_latest_image


async def main() -> None:
    """Releases app 1."""
    result = await deploy_latest_image(app_id="1", deployment="web", images={"web": "r/app:2"})
    print(json.dumps({"run": result.release_id}))


if __name__ == "__main__":
    asyncio.run(main())
