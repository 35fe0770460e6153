#!/usr/bin/env bash
# The runs behind results.csv: bash results/tiny/evidence.sh TASK in a fresh clone. A row is an SFT run, a GRPO
# run and an evaluation; rows that results.csv holds are left out, and a run that was killed goes on. Two tasks
# can run side by side, one core each (OMP_NUM_THREADS=1).
set -euo pipefail
cd "$(dirname "$0")/../.."
task=$1; table=results/tiny/results.csv; logs=results/tiny/logs
mkdir -p runs

row() {  # row NAME "SEEDS" "SFT flags" "GRPO flags" [SFT NAME whose policies are used]
    local name=$1 seed sft run
    for seed in $2; do
        sft=runs/$task-${5:-$name}-$seed-sft run=runs/$task-$name-$seed
        if grep -q "^$task,$name,$seed,rl,ood" $table; then continue; fi
        python sft.py --task $task $3 --seed $seed --out $sft.pt --resume
        python grpo.py --ckpt $sft.pt --task $task $4 --seed $seed --eval-every 0 --out $run.pt --resume
        flock $table python eval.py --ckpt $sft.pt $run.pt --task $task --seed $seed --n 500 --results $table
        cp $sft.csv $run.csv $logs/
    done
}

row vanilla "2 3 4 5 6" "--method vanilla" ""
