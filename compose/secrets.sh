#!/usr/bin/env bash
# Draws the passwords of the farm in containers, once, into compose/secrets/ (or the directory named).
# The directory is yours alone; its files can be read in the containers, which have other users.
set -euo pipefail
cd "${1:-$(dirname "$0")}"
if [ -e secrets ]; then
  echo "$PWD/secrets is there already; passwords are not drawn again" >&2
  exit 0
fi
mkdir -m 0700 secrets.new
cd secrets.new
draw() { LC_ALL=C tr -dc 'a-zA-Z0-9' < <(head -c 4096 /dev/urandom) | head -c 40 || true; }
put() { printf '%s' "$2" > "$1"; chmod 0444 "$1"; }

database=$(draw) broker=$(draw) key=$(draw) secret=$(draw) setup_key=$(draw) setup_secret=$(draw)
put postgres_password "$(draw)"
put farm_database_password "$database"
put farm_database_url "postgresql+psycopg://farm:$database@postgres/farm"
put valkey_password "$broker"
put farm_broker_url "redis://:$broker@valkey:6379/0"
put valkey_conf "requirepass $broker
dir /data
appendonly yes
appendfsync everysec
maxmemory-policy noeviction
"
put farm_s3_access_key "$key"
put farm_s3_secret_key "$secret"
put s3_setup_access_key "$setup_key"
put s3_setup_secret_key "$setup_secret"
put s3_identities "{\"identities\": [
  {\"name\": \"setup\", \"credentials\": [{\"accessKey\": \"$setup_key\", \"secretKey\": \"$setup_secret\"}],
   \"actions\": [\"Admin\"]},
  {\"name\": \"farm\", \"credentials\": [{\"accessKey\": \"$key\", \"secretKey\": \"$secret\"}],
   \"actions\": [\"Read:renders\", \"Write:renders\", \"List:renders\"]}
]}
"
cd ..
mv secrets.new secrets
echo "passwords drawn into $PWD/secrets"
