#!/bin/sh
# Makes what stands in for the base images, of Debian's packages, where no registry of images can be reached:
#   base_images.sh PYTHON_IMAGE REDIS_IMAGE
# They get the names that the Dockerfiles and docker-compose.yml use. What is there already is left alone.
set -eu
python_image=$1 redis_image=$2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

if ! podman image exists "$python_image"; then
    # The mirror that apt is set up with, or else debootstrap's own.
    mirror=$(apt-get indextargets --format '$(SITE)' 'Codename: bookworm' | head -n 1)
    debootstrap --variant=minbase --include=python3,python3-pip,python3-venv,ca-certificates \
        bookworm "$folder/root" ${mirror:+"$mirror"}
    rm -rf "$folder"/root/var/cache/apt/archives/*.deb "$folder"/root/var/lib/apt/lists/*
    tar -C "$folder/root" -c . | podman import - "$python_image"
fi

if ! podman image exists "$redis_image"; then
    # The user and the folder of the official image.
    cat > "$folder/Containerfile" <<'FILE'
ARG BASE
FROM ${BASE}
RUN groupadd -g 999 redis && useradd -r -u 999 -g redis redis \
    && apt-get update && apt-get install -y --no-install-recommends redis-server \
    && rm -rf /var/lib/apt/lists/* && mkdir /data && chown redis:redis /data
VOLUME /data
FILE
    podman build --isolation chroot --network host --build-arg "BASE=$python_image" -t "$redis_image" "$folder"
fi
