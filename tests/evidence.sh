#!/usr/bin/env bash
# The runs behind results/tiny/results.csv. In a fresh clone:
#
#     OMP_NUM_THREADS=1 bash tests/evidence.sh igsm         # beside it, on another core: promptbench
#
# A row is an SFT run, a GRPO run and their evaluation. What results.csv holds is not run again, and a run that
# was killed goes on where it was saved: start the command again. Everything is equal but what a row names.
set -euo pipefail
cd "$(dirname "$0")/.."
task=${1:?name a task: igsm or promptbench} table=results/tiny/results.csv logs=results/tiny/logs
mkdir -p runs

row() {  # row METHOD SEED "SFT flags" "GRPO flags": the name that eval.py gives the method; behind ":" is GRPO's
    local sft=runs/$task-${1%%:*}-$2-sft run=runs/$task-${1//:/-}-$2
    if grep -qs "^$task,$1,$2,rl,ood," $table; then return; fi
    echo "== $task, $1, seed $2"
    python sft.py --task "$task" --seed "$2" $3 --out "$sft.pt" --resume
    python grpo.py --task "$task" --seed "$2" --ckpt "$sft.pt" $4 --eval-every 0 --out "$run.pt" --resume
    flock runs/lock python eval.py --task "$task" --seed "$2" --ckpt "$sft.pt" "$run.pt" --n 500 \
        --max-new-tokens 400 --results $table
    cp "$sft.csv" "$run.csv" $logs/
}

more_sft=2620 more_rl=144  # iGSM: SFT and RL tokens of bridge / those of vanilla, 1.31 and 1.20
first=2                    # seeds from here on have chosen nothing
[ "$task" = igsm ] || first=7
for seed in $(seq $first $((first + 4))); do
    row vanilla $seed "--method vanilla" ""
    row bridge $seed "" ""
done
for seed in $(seq $first $((first + 2))); do
    for behavior in subgoal analysis reflection; do
        row $behavior $seed "--behaviors $behavior" ""
    done
    [ "$task" = igsm ] || continue
    row vanilla-n$more_sft $seed "--method vanilla --n $more_sft" ""        # as many SFT tokens as bridge
    row vanilla:$more_rl-steps $seed "--method vanilla" "--steps $more_rl"  # as many RL tokens as bridge
    row pp-aug $seed "--method pp-aug" ""
    row rc-aug $seed "--method rc-aug" ""
    row bridge-p0.1 $seed "--p 0.1" ""
    row vanilla:filter $seed "--method vanilla" "--filter 1 7"
    row bridge:filter $seed "" "--filter 1 7"
done
