#!/bin/sh
# Create or update the work pool and its queues. Lower numbers have priority: a rollback overtakes a batch. The limit
# on batches keeps worker slots free for their releases.
#
#   deploy/work-pool.sh [type] [batches]
set -eu
type=${1:-rollout}
prefect --no-prompt work-pool create rollout --type "$type" --overwrite
# A worker that started first has created the pool with Prefect's process type, and a pool cannot change its type.
prefect work-pool inspect rollout --output json | grep -q "\"type\": *\"$type\"" || {
  echo "The work pool rollout has another type: delete it (prefect work-pool delete rollout) and run this again." >&2
  exit 1
}
queue() {
  prefect work-queue create "$1" --pool rollout --priority "$2" >/dev/null 2>&1 || true
  prefect work-queue inspect "$1" --pool rollout >/dev/null
}
queue urgent 1
queue releases 3
queue batches 4
prefect work-queue set-concurrency-limit batches "${2:-4}" --pool rollout
