#!/bin/sh
# Makes the files that docker-compose.yml mounts as secrets, where they are missing: sh deploy/secrets.sh [FOLDER]
#
# The folder is its owner's alone. The files themselves can be read by all: without Swarm, Compose mounts them as they
# are, and the users of the containers own nothing on this machine.
set -eu
folder=${1:-${STREAMFLOW_SECRETS:-secrets}}
mkdir -p "$folder"
chmod 700 "$folder"
for name in redis_password grafana_password; do
    file=$folder/$name
    if [ -s "$file" ]; then
        echo "$file is there already"
    else
        od -An -N24 -tx1 /dev/urandom | tr -d ' \n' > "$file"
        chmod 444 "$file"
        echo "$file made"
    fi
done
