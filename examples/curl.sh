#!/usr/bin/env bash
# FastServe from the shell: examples/curl.sh [http://127.0.0.1:8000]
# With keys on (fastserve serve --api-key …), set FASTSERVE_API_KEY.
set -euo pipefail

base=${1:-http://127.0.0.1:8000}
ask() {
  curl --silent --show-error --fail-with-body --no-buffer \
    -H "Content-Type: application/json" -H "Authorization: Bearer ${FASTSERVE_API_KEY:-none}" "$@"
  echo
}

echo "--- how is it?"
ask "$base/health"

echo "--- a completion; the answer's usage tells where its time went"
ask "$base/v1/completions" -d '{"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0}'

echo "--- a conversation, as it grows"
ask "$base/v1/chat/completions" -d '{
  "messages": [{"role": "user", "content": "What is the capital of France?"}],
  "max_completion_tokens": 16, "stream": true, "stream_options": {"include_usage": true}}'

echo "--- ahead of all others, and worth nothing after ten seconds"
ask "$base/v1/completions" -d '{"prompt": "The sky is", "max_tokens": 8, "priority": -1, "timeout": 10}'

echo "--- tokens"
ask "$base/tokenize" -d '{"prompt": "hello"}'

echo "--- what is it doing now?"
ask "$base/v1/fastserve/jobs"
