#!/bin/sh
# Makes the files that docker-compose.yml mounts as secrets.
#
# Passwords that are there already stay; to exchange one, delete its file and run this again. The users of Redis are
# written anew each time, with what the processes of this version may do.
#
# The folder is its owner's alone. The files themselves can be read by all: without Swarm, Compose mounts them as they
# are, and the users of the containers own nothing on this machine.
set -eu
LC_ALL=C
export LC_ALL
here=$(dirname "$0")
users="gateway encoder denoiser decoder administrator"
usage="usage: sh deploy/secrets.sh [FOLDER]

Makes users of Redis and passwords for docker-compose.yml. Passwords that are there already stay.
FOLDER: where the files go; by default what STREAMFLOW_SECRETS says, in the environment or in ./.env, or else ./secrets."

refuse() {
    echo "$1" >&2
    exit 1
}

case ${1:-} in
    -h | --help)
        echo "$usage"
        exit
        ;;
    -*) refuse "$usage" ;;
esac
[ $# -le 1 ] || refuse "$usage"
folder=${1:-${STREAMFLOW_SECRETS:-}}
if [ -z "$folder" ] && [ -f .env ]; then
    folder=$(sed -n 's/^STREAMFLOW_SECRETS=//p' .env | tail -n 1)
    # Compose knows quotes, comments and variables there, and this does not.
    case $folder in
        *[!A-Za-z0-9_./-]*) refuse "STREAMFLOW_SECRETS in .env: got $folder; name the folder yourself: $usage" ;;
    esac
fi
# The argument may be any folder; what Compose reads, only what it does not take for the name of a volume.
case ${1:+given}$folder in
    given* | /* | ./* | ../* | "") ;;
    *) refuse "STREAMFLOW_SECRETS: got $folder; allowed: a path that begins with / or ./, such as ./$folder" ;;
esac
folder=${folder:-secrets}
# In `access` the operator puts what the gateway asks of clients: keys, a certificate.
mkdir -p "$folder"
chmod 700 "$folder"
if [ ! -d "$folder/access" ]; then
    mkdir "$folder/access"
    chmod 755 "$folder/access"
elif [ ! -w "$folder/access" ]; then
    echo "$folder/access is not yours, as Docker made it; sudo chown $(id -u) $folder/access makes it so" >&2
fi

password() {
    if [ -e "$1" ]; then
        text=$(cat "$1")
        case $text in
            # Who reads it may take a blank at its end as part of it, or not.
            *[[:space:][:cntrl:]]*) refuse "$1: got a blank or a control character; delete it, and it is made" ;;
        esac
        [ ${#text} -ge 16 ] || refuse "$1 has ${#text} characters; allowed: 16 or more; delete it, and it is made"
        echo "$1 is there already"
    else
        text=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
        [ ${#text} -eq 48 ] || refuse "$1: no random bytes"
        # Never there in part.
        printf %s "$text" > "$1.new"
        chmod 444 "$1.new"
        mv "$1.new" "$1"
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
    hash=$(printf %s "$text" | sha256)
    [ ${#hash} -eq 64 ] || refuse "no hash of $folder/redis_$user"
    hashes="$hashes s/<$user>/$hash/;"
done
password "$folder/grafana_password"
lines=$(sed "$hashes" "$here/redis/users.acl.template")
# Written into, rather than replaced: a container that has it mounted sees the new text.
printf '%s\n' "$lines" > "$folder/redis_users"
chmod 644 "$folder/redis_users"
echo "$folder/redis_users written"
