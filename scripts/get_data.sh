#!/usr/bin/env bash
# Fetches corpora into ./data: bash scripts/get_data.sh [NAME...], by default wikitext-2 and ptb.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

use_environment cpu
cd "$ROOT"
[ $# -gt 0 ] || set -- wikitext-2 ptb
exec python -m gluon_lm.download "$@"
