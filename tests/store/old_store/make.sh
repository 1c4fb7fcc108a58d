#!/usr/bin/env bash
# Makes the store and its reports with the alignbench that is on the PATH: bash make.sh, in this folder.
set -eum # m: a job of its own heeds the interrupt
export OMP_NUM_THREADS=1
rm -rf store reports
alignbench sweep old.yaml --store store --launcher debug &
until compgen -G 'store/runs/leapalign-*/checkpoints/step_*4-*.pt' >/dev/null; do sleep 0.02; done
kill -INT $!
wait $! || true
import() { # FOLDER LABEL [--base]
  alignbench import images "store/images/$1" --prompts test.jsonl --label "$2" "${@:3}" --sweep elsewhere --store store \
    -e geneval geneval.detector=shapes
}
import 14b81870c5 Before --base
import b6ec3dcbad After # ReFL's, of seed 0
rm -rf store/locks
mkdir reports
for sweep in old.yaml elsewhere; do
  alignbench report $sweep --store store --out reports --format md,csv
  alignbench status $sweep --store store >"reports/${sweep%.yaml}-status.txt" || true
done
tar -cf - store | gzip -9 >store.tar.gz
