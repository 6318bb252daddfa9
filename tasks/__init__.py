"""The steps of a release, as Prefect tasks that other flows can call, too.

`workload` is the result of step 1; `target` is the block of its platform, as type-slug/name.
"""

from prefect_rollout.tasks.build_image_list import build_image_list
from prefect_rollout.tasks.check_deployment import check_deployment
from prefect_rollout.tasks.choose_rollback import choose_rollback
from prefect_rollout.tasks.find_where_live import find_where_live
from prefect_rollout.tasks.get_template import get_template
from prefect_rollout.tasks.images_that_ran import images_that_ran
from prefect_rollout.tasks.look_up_images import look_up_images
from prefect_rollout.tasks.parse_metadata import parse_metadata
from prefect_rollout.tasks.pause import pause
from prefect_rollout.tasks.plan_release import plan_release
from prefect_rollout.tasks.publish_deployment import publish_deployment
from prefect_rollout.tasks.read_baseline import read_baseline
from prefect_rollout.tasks.report_release import report_release
from prefect_rollout.tasks.restart_deployment import restart_deployment
from prefect_rollout.tasks.roll_back_deployment import roll_back_deployment
from prefect_rollout.tasks.scale_deployment import scale_deployment
from prefect_rollout.tasks.upgrade_deployment import upgrade_deployment
from prefect_rollout.tasks.wait_for_pods import wait_for_pods, wait_for_rollback

__all__ = [
    "build_image_list",
    "check_deployment",
    "choose_rollback",
    "find_where_live",
    "get_template",
    "images_that_ran",
    "look_up_images",
    "parse_metadata",
    "pause",
    "plan_release",
    "publish_deployment",
    "read_baseline",
    "report_release",
    "restart_deployment",
    "roll_back_deployment",
    "scale_deployment",
    "upgrade_deployment",
    "wait_for_pods",
    "wait_for_rollback",
]
