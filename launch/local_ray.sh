#!/usr/bin/env bash
# Trains with several workers under Ray Train on this machine: launch/local_ray.sh CONFIG [WORKERS] [KEY=VALUE]...
set -euo pipefail
config=${1:?usage: launch/local_ray.sh CONFIG [WORKERS] [KEY=VALUE]...} workers=${2:-2}
shift $(($# < 2 ? $# : 2))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec gentrain train "$config" cluster.place=ray cluster.workers="$workers" "$@"
