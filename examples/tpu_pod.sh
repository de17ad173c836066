#!/usr/bin/env bash
# Samples from (or trains) a 7B model on a slice of a Cloud TPU pod, from a machine with gcloud:
#   examples/tpu_pod.sh create
#   examples/tpu_pod.sh install
#   examples/tpu_pod.sh run > answers.jsonl
#   examples/tpu_pod.sh delete       # the TPU costs money until then
# JAX reads from the TPU's metadata which process it is.
set -euo pipefail

NAME=mistral
ZONE=us-west4-a
TYPE=v5litepod-16 # 16 chips, on 4 hosts of 4
VERSION=v2-alpha-tpuv5-lite
# An NFS share in the TPU's network, such as Filestore's, because every host must see the same files.
# It holds a converted checkpoint and the prompts, one per line.
NFS=10.0.0.2:/share
SHARED=/mnt/shared

# Runs a command on all hosts at the same time, and waits until the last one ends.
on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$*"
}

case "${1:-}" in
create)
    gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" \
        --accelerator-type="$TYPE" --version="$VERSION"
    ;;
install)
    # All hosts must run the same code, so they install one wheel, built from this repository.
    wheels=$(mktemp -d)
    python3 -m pip wheel --quiet --no-deps --wheel-dir "$wheels" "$(dirname "$0")/.."
    gcloud compute tpus tpu-vm scp "$wheels"/*.whl "$NAME": --zone="$ZONE" --worker=all
    rm -r "$wheels"
    on_all_hosts "sudo apt-get -qq update && sudo apt-get -qq install -y nfs-common"
    on_all_hosts "sudo mkdir -p $SHARED && (mountpoint -q $SHARED || sudo mount $NFS $SHARED)"
    # The image's Python is too old, so uv downloads a newer one.
    on_all_hosts "python3 -m pip install --quiet --user uv"
    on_all_hosts "test -d venv || python3 -m uv venv --quiet --python 3.12 venv"
    on_all_hosts "python3 -m uv pip install --quiet --python venv 'jax[tpu]' ./mistral_jax_flax-*.whl"
    ;;
run)
    # The `tensor` axis communicates in every layer, so it stays within a host. The `data` axis
    # hardly communicates, so it crosses hosts. Only process 0 prints.
    on_all_hosts venv/bin/python -m mistral_jax.sample \
        --checkpoint "$SHARED/mistral-7b-instruct-v0.3" \
        --sharding data_tensor --mesh data=4,tensor=4 \
        --chat --prompts-file "$SHARED/prompts.txt" --json
    # To train instead, with a recipe like configs/training/nano.toml. The same command continues a
    # stopped run from its last saved state.
    # on_all_hosts venv/bin/python -m mistral_jax.train "$SHARED/recipe.toml" \
    #     --run "$SHARED/runs/recipe" --sharding fsdp
    ;;
delete)
    gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet
    ;;
*)
    echo "usage: $0 create|install|run|delete" >&2
    exit 2
    ;;
esac
