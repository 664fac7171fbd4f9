#!/bin/sh
# An MLflow server on PostgreSQL and an S3 store, with passwords; what compose.yaml starts, and what to start without containers.
# Artifacts go through the server (--serve-artifacts), so that only it knows the store's keys.
set -eu
: "${DATABASE:?postgresql+psycopg://USER:PASSWORD@HOST/DATABASE of the runs}"
: "${AUTH_DATABASE:?postgresql+psycopg://USER:PASSWORD@HOST/DATABASE of the users, another than that of the runs}"
: "${BUCKET:?s3://BUCKET of the artifacts; AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and MLFLOW_S3_ENDPOINT_URL say where}"
: "${ADMIN_PASSWORD:?of the user admin, 12 characters or more; counts when the database of users is made}"
: "${SECRET_KEY:?any long random text; keep it, it signs sessions}"
umask 077
# auth_cache_ttl_seconds: else the server hashes the password at each request, which takes it 0.1 s and more of a core
folder=$(mktemp -d)
cat > "$folder/auth.ini" <<INI
[mlflow]
default_permission = READ
database_uri = $AUTH_DATABASE
admin_username = admin
admin_password = $ADMIN_PASSWORD
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
INI
export MLFLOW_AUTH_CONFIG_PATH="$folder/auth.ini" MLFLOW_FLASK_SERVER_SECRET_KEY="$SECRET_KEY"
export MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_ENABLE_AI_GATEWAY=false
exec python -m mlflow server --app-name basic-auth --backend-store-uri "$DATABASE" \
    --serve-artifacts --artifacts-destination "$BUCKET" --default-artifact-root mlflow-artifacts:/ \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-5000}" --workers "${WORKERS:-2}" --x-frame-options DENY \
    --allowed-hosts "${ALLOWED_HOSTS:-127.0.0.1:${PORT:-5000},localhost:${PORT:-5000}}"
