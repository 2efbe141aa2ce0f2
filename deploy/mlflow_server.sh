#!/usr/bin/env bash
# An MLflow tracking server for a cluster: runs in PostgreSQL, artifacts in an object store, a password for every user.
#
#   pip install -c constraints.txt '.[server]'
#   export MLFLOW_BACKEND_STORE_URI=postgresql://mlflow:PASSWORD@db.internal/mlflow  # a new or an existing database
#   export MLFLOW_ARTIFACTS_DESTINATION=s3://bucket/mlflow                           # credentials as for any S3 client
#   export MLFLOW_AUTH_ADMIN_PASSWORD=...                                            # of the user admin, for the first start
#   deploy/mlflow_server.sh                                                          # 127.0.0.1:5000
#   deploy/mlflow_server.sh --host 10.0.0.5 --allowed-hosts mlflow.internal:5000     # arguments go to mlflow server
#
# Secrets are only read from the environment, because every user of a machine can read its command lines. Clients set
# MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. Outside a private network, put TLS in
# front of the server.
set -euo pipefail

for name in MLFLOW_BACKEND_STORE_URI MLFLOW_ARTIFACTS_DESTINATION; do
    if [ -z "${!name:-}" ]; then
        echo "$0: $name is not set; see the head of this file" >&2
        exit 2
    fi
done

# Users and permissions are in the same database. The file has its password, so only this user can read it, and it is
# deleted when the server ends.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
(
    umask 077
    cat > "$folder/auth.ini" << INI
[mlflow]
default_permission = READ
database_uri = ${MLFLOW_BACKEND_STORE_URI//%/%%}
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
INI
)
export MLFLOW_AUTH_CONFIG_PATH="$folder/auth.ini"
# Signs browser sessions. Set it yourself if they should outlive a restart.
export MLFLOW_FLASK_SERVER_SECRET_KEY=${MLFLOW_FLASK_SERVER_SECRET_KEY:-$(head -c 32 /dev/urandom | base64)}
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=${MLFLOW_SERVER_ENABLE_JOB_EXECUTION:-false} # for GenAI; not needed here

mlflow server --app-name basic-auth --host 127.0.0.1 "$@" &
trap 'kill $! 2> /dev/null; wait $! || true; rm -rf "$folder"' EXIT INT TERM
wait $!
