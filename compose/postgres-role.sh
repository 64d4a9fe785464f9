#!/bin/sh
# Run once by the image of PostgreSQL: the farm's role owns its database and is nobody beside that.
set -eu
psql -v ON_ERROR_STOP=1 --username "${POSTGRES_USER:-postgres}" --dbname postgres \
  --set password="$(cat "${SECRETS:-/run/secrets}/farm_database_password")" <<'SQL'
CREATE ROLE farm LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION PASSWORD :'password';
CREATE DATABASE farm OWNER farm;
REVOKE ALL ON DATABASE farm FROM PUBLIC;
SQL
