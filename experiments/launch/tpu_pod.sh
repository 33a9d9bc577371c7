#!/usr/bin/env bash
# One run on all hosts of a Cloud TPU slice, or on a single TPU VM; to be called where gcloud is:
#
#   TPU=my-tpu ZONE=europe-west4-b REPOSITORY=https://host/blogjax.git \
#     experiments/launch/tpu_pod.sh experiments.ddpm \
#     --config=configs/ddpm.py:cifar10 --workdir=/mnt/shared/runs/cifar10
#
# The first call fetches the repository (BRANCH, default main) to every host and makes its .venv. A
# slice of several hosts needs a folder that all see, for example Filestore over NFS, mounted at the
# same path; on a single host any folder does. jax finds the other hosts by itself. PYTHON, default
# python3, is a program of the hosts, 3.11 or newer; that of Ubuntu 22.04 is 3.10. The command ends
# when the run has. Nothing starts it again: the same command goes on with a run that was broken off,
# also on another slice.
set -eu
: "${TPU:?name of the TPU}" "${ZONE:?zone of the TPU}" "${REPOSITORY:?where git finds blogjax}"
[ $# -gt 0 ] || { echo "usage: TPU=.. ZONE=.. REPOSITORY=.. $0 experiments.NAME --config=.. --workdir=.." >&2; exit 2; }

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

on_all_hosts "set -e
[ -d blogjax ] || git clone -q $(printf %q "$REPOSITORY") blogjax
cd blogjax
git fetch -q origin $(printf %q "${BRANCH:-main}")
git checkout -q --detach FETCH_HEAD
if [ ! -x .venv/bin/pip ]; then
  ${PYTHON:-python3} -c 'import sys; sys.exit(sys.version_info < (3, 11) and \"PYTHON= must name a Python of 3.11 or newer\")'
  ${PYTHON:-python3} -m venv --clear .venv
fi
.venv/bin/pip install -q -c requirements.txt '.[train,tpu]'"
on_all_hosts "cd blogjax && exec .venv/bin/python -m $(printf '%q ' "$@")"
