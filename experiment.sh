#!/usr/bin/env bash
# The experiment of EXPERIMENTS.md: what each part of DiFFPO does, on both tasks. Plain commands.
#
#   bash experiment.sh list grid       prints a part's runs, a line each: folder and flags
#   bash experiment.sh tune grid       makes them, JOBS (2) at a time, one thread each
#
# A finished run is skipped, a stopped one goes on. What they say: python claims.py compare runs/grid/*
set -euo pipefail
export OMP_NUM_THREADS=1

declare -A ROW=(  # what a row changes of the default, which is DiFFPO
  [mean-field]="--num_stages 1 --is_cap 0"        [mean-field-w]="--num_stages 1"
  [two-stage]="--num_stages 2 --is_cap 0"         [two-stage-w]="--num_stages 2"
  [four-stage]="--num_stages 4 --is_cap 0"        [four-stage-w]="--num_stages 4"
  [exact]="--num_stages 20 --is_cap 0"            [no-price]="--speed_weight 0"
  [sampler]="--train sampler"                     [two-stage-w-policy]="--train policy"
  [mean-field-policy]="--num_stages 1 --is_cap 0 --train policy"
  [d1]="--num_stages 1 --is_cap 0 --train policy --speed_weight 0 --scale_by_std false --normalise_by text --inner_updates 12 --clip_eps 0.5 --kl_beta 0.04 --prompt_hide_probability 0.15 --weight_decay 0.1 --grad_clip 0.2 --lora_dropout 0.05"
)
# 500 sudoku problems are as good as 1,000: there are 51 grids.
declare -A TASK=([countdown]="--eval_problems 1000" [sudoku]="--eval_problems 500")

tune() {  # three rates a row, one seed, on validation problems
  local row task rate rates flag
  for rate in 1 2 0; do for row in two-stage-w mean-field exact two-stage mean-field-w d1 sampler; do
    for task in countdown sudoku; do
      flag=learning_rate rates=(1e-3 2e-3 4e-3)
      [ $task = sudoku ] && rates=(5e-4 1e-3 2e-3)
      [ $row = d1 ] && rates=(2.5e-4 5e-4 1e-3)  # it makes 12 updates a step
      [ $row = sampler ] && flag=head_learning_rate rates=(5e-3 1e-2 2e-2)
      echo "runs/tune/$task/$row-${rates[rate]} --task $task --seed 10 ${ROW[$row]}" \
        "--$flag ${rates[rate]} --eval_split validation --eval_problems 300"
    done
  done; done
}

# What tuning chose; rows that were not tuned have their likelihood's rate.
declare -A RATE=(
  [countdown/mean-field]=2e-3 [sudoku/mean-field]=1e-3
)

row() {  # FOLDER TASK ROW SEED FLAGS: a run at its row's rate
  local folder=$1 task=$2 row=$3 seed=$4; shift 4
  echo "$folder --task $task --seed $seed ${ROW[$row]} ${TASK[$task]} ${RATE[$task/$row]} $*"
}

grid() {  # every row, five seeds
  for seed in 0 1 2 3 4; do for name in two-stage-w mean-field exact two-stage mean-field-w \
      four-stage-w four-stage mean-field-policy two-stage-w-policy sampler no-price d1; do
    for task in countdown sudoku; do row "runs/grid/$task/$name-$seed" $task $name $seed; done
  done; done
}

large() {  # four times the prompts a step, three seeds: less noise, the same bias
  local -A prompts=([sudoku]=64 [countdown]=128)
  for task in sudoku countdown; do for seed in 0 1 2; do
    for name in two-stage-w mean-field two-stage mean-field-w; do
      row "runs/large/$task/$name-$seed" $task $name $seed --prompts_per_step ${prompts[$task]} --steps 80
    done
  done; done
}

two() {  # both tasks in one run, five seeds
  for seed in 0 1 2 3 4; do
    echo "runs/two/joint-$seed --task countdown,sudoku --seed $seed --eval_problems 1000"
  done
}

states() {  # half-way to the grid's ends, for claims.py gradient and surrogate
  for name in two-stage-w mean-field; do
    row runs/states/countdown/$name countdown $name 0 --steps 60
    row runs/states/sudoku/$name sudoku $name 0 --steps 70
  done
}

caps() {  # other caps and the other normalisation, two seeds; C = 1 is the grid's
  for seed in 0 1; do for task in countdown sudoku; do
    for cap in 2 5 1e9; do
      row "runs/caps/$task/cap-$cap-$seed" $task two-stage-w $seed --is_cap $cap
    done
    row "runs/caps/$task/text-$seed" $task two-stage-w $seed --normalise_by text
  done; done
}

one() {  # FOLDER FLAGS
  local folder=$1 log=${1/runs/runs\/logs}; shift
  grep -qs '"trained"' "$folder/eval.json" && return
  mkdir -p "$(dirname "$log")"
  if [ -e "$folder/config.json" ]; then set -- --resume; else rm -rf "$folder"; fi
  python train.py "$@" --run_dir "$folder" > "$log.txt" 2>&1 || echo "failed: $log.txt" >&2
}
export -f one

[ "$#" -gt 0 ] || { echo "usage: bash experiment.sh [list] PART ...: tune, grid" >&2; exit 2; }
if [ "$1" = list ]; then shift; for part in "$@"; do $part; done; exit; fi
for part in "$@"; do $part; done | xargs -P "${JOBS:-2}" -L 1 bash -c 'one "$@"' _
