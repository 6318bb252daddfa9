#!/bin/sh
# Makes the work pool and its queues, or puts them right. Lower numbers go first: a rollback overtakes a
# batch. No more batches than the limit run at once, so that their releases always find a worker.
#
#   deploy/work-pool.sh [type] [batches]
set -eu
type=${1:-rollout}
prefect --no-prompt work-pool create rollout --type "$type" --overwrite
# A worker that was there first has made the pool, as Prefect's process type, and a pool keeps its type.
prefect work-pool inspect rollout --output json | grep -q "\"type\": *\"$type\"" || {
  echo "The work pool rollout is of another type: delete it (prefect work-pool delete rollout) and start anew." >&2
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
