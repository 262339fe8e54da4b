#!/bin/sh
# Makes the files that docker-compose.yml mounts as secrets: sh deploy/secrets.sh [FOLDER]
#
# Passwords that are there already stay; to exchange one, delete its file and run this again. The users of Redis are
# written anew each time, with what the processes of this version may do.
#
# The folder is its owner's alone. The files themselves can be read by all: without Swarm, Compose mounts them as they
# are, and the users of the containers own nothing on this machine.
set -eu
here=$(dirname "$0")
folder=${1:-${STREAMFLOW_SECRETS:-secrets}}
users="gateway encoder denoiser decoder administrator"
mkdir -p "$folder"
chmod 700 "$folder"

password() {
    if [ -s "$1" ]; then
        echo "$1 is there already"
    else
        od -An -N24 -tx1 /dev/urandom | tr -d ' \n' > "$1"
        chmod 444 "$1"
        echo "$1 made"
    fi
}

sha256() {
    if command -v sha256sum > /dev/null; then sha256sum; else shasum -a 256; fi | cut -c 1-64
}

hashes=
for user in $users; do
    password "$folder/redis_$user"
    # Without the line break that an editor puts at the end.
    hashes="$hashes s/<$user>/$(printf %s "$(cat "$folder/redis_$user")" | sha256)/;"
done
password "$folder/grafana_password"
# Written into, rather than replaced: a container that has it mounted sees the new text.
sed "$hashes" "$here/redis/users.acl.template" > "$folder/redis_users"
chmod 644 "$folder/redis_users"
echo "$folder/redis_users written"
