"""The steps of a release, as Prefect tasks that can also be called from other flows."""

from prefect_rollout.tasks.before import note_online
from prefect_rollout.tasks.build_image_list import build_image_list
from prefect_rollout.tasks.check_deployment import check_deployment
from prefect_rollout.tasks.choose_rollback import choose_rollback, find_where_live
from prefect_rollout.tasks.get_template import get_template
from prefect_rollout.tasks.images_that_ran import images_that_ran
from prefect_rollout.tasks.parse_metadata import parse_metadata
from prefect_rollout.tasks.plan_release import check_plan, plan_release
from prefect_rollout.tasks.publish_deployment import publish_deployment
from prefect_rollout.tasks.report_release import report_release
from prefect_rollout.tasks.restart_deployment import restart_deployment
from prefect_rollout.tasks.roll_back_deployment import roll_back_deployment, wait_for_rollback
from prefect_rollout.tasks.scale_deployment import scale_deployment
from prefect_rollout.tasks.upgrade_deployment import upgrade_deployment
from prefect_rollout.tasks.wait_for_pods import wait_for_pods

__all__ = [
    "build_image_list",
    "check_deployment",
    "check_plan",
    "choose_rollback",
    "find_where_live",
    "get_template",
    "images_that_ran",
    "note_online",
    "parse_metadata",
    "plan_release",
    "publish_deployment",
    "report_release",
    "restart_deployment",
    "roll_back_deployment",
    "scale_deployment",
    "upgrade_deployment",
    "wait_for_pods",
    "wait_for_rollback",
]
