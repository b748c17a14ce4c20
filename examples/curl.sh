#!/bin/sh
# curl.sh FILE: what curl gets from the daemon.
set -eu
socket=${WHISPERD_SOCKET:-/run/whisperd.sock}
url=http://whisperd/v1/audio/transcriptions

ask() {
    curl --silent --show-error --fail-with-body --no-buffer --unix-socket "$socket" "$url" "$@"
}

ask -F "file=@$1" -F response_format=text
ask -F "file=@$1" -F response_format=srt
ask -F "file=@$1" -F response_format=verbose_json -F "timestamp_granularities[]=word"
echo
ask -F "file=@$1" -F stream=true
