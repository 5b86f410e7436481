#!/usr/bin/env bash
# dev/scripts: the trainer takes every command that they print, the batches divide, a run goes on; what the launchers are given,
# and whom they start, with stand-ins for them.
# usage: dev/test/test_scripts.sh          (after make train_remoe sample-data; 4 s)
#        TRAINER=./train_remoe may name another trainer
cd "$(dirname "$0")/../.." || exit 1
. dev/test/check.sh
trainer=$(realpath "${TRAINER:-./train_remoe}")
here=$PWD/build/test/scripts
export OMP_NUM_THREADS=1
unset DATA TOKENIZER OUT GPUS DRY_RUN LAUNCHED LAUNCHER RANK NODES HEAD HOSTFILE GPUS_PER_NODE MASTER_ADDR MASTER_PORT
rm -rf "$here"
mkdir -p "$here/bin"
pretrain=dev/scripts/pretrain.sh
# ($? is kept in a variable where the text of a check runs a command, which would change it)

# taken RANKS COMMAND: does the trainer take the options? Without a GPU, ranks or memory for the model: a rank's share of the
# step stands for all, and a last option ends the program after all others have been found right
taken() {
    local ranks=$1 words
    eval "words=($2)"
    [ "${words[1]}" != --gpus ] || words=("${words[@]:2}") # the CPU's trainer has none
    "$trainer" "${words[@]:1}" --global-batch $((512 / ranks)) --route-from none >"$here/taken.txt" 2>&1
    [ $? = 2 ] && [ $((512 % ranks)) = 0 ] && grep -q 'route-from belongs to --dump' "$here/taken.txt"
}

batch_of() { sed -E 's/.* --batch ([0-9]+) .*/\1/' <<<"$1"; }

for size in small medium large; do
    for router in dense topk relu; do
        batches=''
        for gpus in 1 2 4 8 16 64; do
            command=$(GPUS=$gpus $pretrain --dry-run $size $router)
            taken $gpus "$command"
            status=$?
            check "$size $router on $gpus: $(tail -n 2 "$here/taken.txt")" $status
            [ "$gpus" = 1 ] && flag='' || flag="--gpus $gpus "
            grep -q -- " $flag--preset $size --router $router --out runs/$size-$router " <<<"$command"
            check "$size $router on $gpus: $command" $?
            case $gpus in 1 | 2 | 8) batches+="${batches:+, }$(batch_of "$command")" ;; esac
        done
        grep -q "^| $size | $router |.*| $batches |" dev/scripts/README.md
        check "$size $router: README has other batches than $batches" $?
    done
done

command=$(LAUNCHED=1 GPUS=512 $pretrain --dry-run small relu)
taken 512 "$command" && ! grep -q -- --gpus <<<"$command"
check "512 launched ranks: $command" $?

# the above would see a mistake
command=$(GPUS=8 $pretrain --dry-run small relu --stepz 5)
taken 8 "$command"
[ $? != 0 ] && grep -q 'did you mean --steps' "$here/taken.txt"
check "a misspelled option is found" $?
command=$(GPUS=8 $pretrain --dry-run small relu --batch 48)
taken 8 "$command"
[ $? != 0 ] && grep -q 'not a multiple' "$here/taken.txt"
check "a batch that does not divide is found" $?

refused() { # refused STATUS TEXT COMMAND...
    local status=$1 text=$2
    shift 2
    "$@" >"$here/refused.txt" 2>&1
    [ $? = "$status" ] && grep -q -- "$text" "$here/refused.txt"
    status=$?
    check "refused: ${*} ($(head -n 1 "$here/refused.txt"))" $status
}
refused 2 'shared by 3 GPUs' env GPUS=3 $pretrain --dry-run small relu
refused 2 'no size' $pretrain --dry-run tiny relu
refused 2 'no router' $pretrain --dry-run small rely
refused 2 'OUT=FOLDER' env GPUS=1 $pretrain --dry-run small relu --out x
refused 2 'GPUS=N' env GPUS=1 $pretrain --dry-run small relu --gpus=2
refused 2 'GPUS=N' env GPUS=none $pretrain --dry-run small relu

# a whole run, of a small shape: the same command again goes on, a third time there is nothing left to do
export OUT=$here/run DATA=build/sample TOKENIZER=build/sample GPUS=1 TRAINER=$trainer
shape='--layers 1 --hidden=16 --heads 2 --kv_heads 1 --ffn-mult 2 --experts=4 --vocab-size 2048 --load-balance'
run() { $pretrain small relu $shape --seq-len 32 --batch 2 --global-batch 4 --sample-tokens 0 --val-batches 1 "$@" >"$here/run.txt" 2>&1; }
run --warmup-steps 1 --steps 3 && [ -f "$OUT/step_00000003/state.json" ]
status=$?
check "a run: $(tail -n 1 "$here/run.txt")" $status
grep -q '^| small | relu |' "$here/run.txt"
check "... says what it costs" $?
run --warmup-steps 1 --steps 5 && [ -f "$OUT/step_00000005/state.json" ] && [ "$(grep -c lm_loss "$OUT/log.jsonl")" = 5 ]
status=$?
check "... goes on: $(tail -n 1 "$here/run.txt")" $status
run --warmup-steps 1 --steps 5 && grep -q 'nothing is left to do' "$here/run.txt"
status=$?
check "... and is done: $(tail -n 1 "$here/run.txt")" $status
refused 1 'holds another run' $pretrain small topk
refused 1 'holds another run' $pretrain medium relu
[ "$($pretrain --dry-run small relu --experts 4 --load-balance 1 --steps=9 --eval --load-balance=0 --load x)" = \
    "$TRAINER --resume $OUT --batch 64 --steps=9 --eval " ]
check "of a resumed run's options the shape's go, no others" $?

# ... those are the trainer's: rows of SHAPE and ROUTING, and --load
decided=$(sed -nE 's/^ *OPTION\([A-Z]+, (SHAPE|ROUTING), ([a-z_]+),.*/\2/p' llmc/run/option_table.h | tr _ -)
[ "$(printf '%s\n' $decided load)" = "$(sed -nE "s/^SHAPE='(.*)'/\1/p" $pretrain | xargs -n 1)" ]
check "pretrain.sh's SHAPE is option_table.h's" $?

# a log without a checkpoint, of a run that was killed early, is put aside
OUT=$here/early
mkdir -p "$OUT"
echo '{"step": 0}' >"$OUT/log.jsonl"
run --warmup-steps 1 --steps 1 && compgen -G "$OUT/log.unsaved_*.jsonl" >/dev/null && [ -f "$OUT/step_00000001/state.json" ]
status=$?
check "a log without a checkpoint: $(tail -n 1 "$here/run.txt")" $status
unset OUT DATA TOKENIZER GPUS TRAINER

# launchers: stand-ins show their words, one a line, then start what they are told to
for launcher in srun torchrun mpirun; do
    cat >"$here/bin/$launcher" <<'EOF'
#!/usr/bin/env bash
[ "$1" != --version ] || { echo "mpirun (${MPI:-Open MPI} 5.0)" && exit; }
printf '%s\n' "$@" >"$SEEN"
echo "$LAUNCHED $GPUS ${MASTER_ADDR:-} ${OMP_NUM_THREADS:-}" >>"$SEEN"
while [ "${1:-}" != "$PROGRAM" ]; do shift || exit 9; done
[ "$PROGRAM" != dev/scripts/pretrain.sh ] || set -- "$1" --dry-run "${@:2}"
"$@"
EOF
    chmod +x "$here/bin/$launcher"
done
printf '#!/bin/sh\necho "requeued $*" >>"$SEEN.scontrol"\n' >"$here/bin/scontrol"
printf '#!/bin/sh\nprintf "%%s " "$@"\necho\n' >"$here/bin/trainer" # says its options
chmod +x "$here/bin/scontrol" "$here/bin/trainer"
export PATH=$here/bin:$PATH SEEN=$here/seen.txt

launched() { # launched WHAT RANKS: the trainer has got options that it takes, no --gpus among them
    taken "$2" "trainer $(sed 's/[*]/\\*/g' "$here/launched.txt")" && ! grep -q -- --gpus "$here/launched.txt"
    status=$?
    check "$1: $(cat "$here/launched.txt")" $status
}
seen() { # seen WHAT WORD...: the launcher's words have these in a row
    [[ " $(paste -sd ' ' "$SEEN") " == *" ${*:2} "* ]]
    status=$?
    check "$1: its words $(paste -sd ' ' "$SEEN")" $status
}

export PROGRAM=$here/bin/trainer TRAINER=$here/bin/trainer OUT=$here/cluster
echo node0 >"$here/hosts"
NODES=2 GPUS_PER_NODE=8 HOSTFILE=$here/hosts MASTER_ADDR=node0 dev/scripts/mpirun.sh large relu --steps 7 >"$here/launched.txt" 2>/dev/null
launched 'Open MPI' 16
seen 'Open MPI' -np 16 --hostfile "$here/hosts" --map-by ppr:8:node --bind-to none -x MASTER_ADDR
seen 'Open MPI' 1 16 node0
MPI=HYDRA GPUS_PER_NODE=4 dev/scripts/mpirun.sh small topk >"$here/launched.txt" 2>/dev/null
launched 'MPICH' 4
seen 'MPICH' -n 4 -ppn 4 -genv MASTER_ADDR "$(hostname)"
refused 2 HOSTFILE env NODES=2 GPUS_PER_NODE=8 dev/scripts/mpirun.sh small relu
refused 2 GPUS_PER_NODE env GPUS_PER_NODE=0 dev/scripts/torchrun.sh small relu

slurm() { # as sbatch runs it: a copy, from elsewhere
    cp dev/scripts/slurm.sbatch "$here/slurm_script"
    rm -f "$SEEN.scontrol"
    SLURM_SUBMIT_DIR=$PWD SLURM_JOB_NUM_NODES=2 SLURM_NTASKS_PER_NODE=8 SLURM_CPUS_PER_TASK=6 SLURM_JOB_ID=42 \
        bash "$here/slurm_script" "$@" >"$here/launched.txt" 2>"$here/slurm.txt"
}
mkdir -p "$OUT/step_00000100"
ln -s step_00000100 "$OUT/latest"
state() { printf '{\n  "step": %s,\n  "options": {"preset": "medium", "router": "relu", "warmup_steps": -1, "steps": 60000, "lr": 1}\n}\n' "$1" >"$OUT/latest/state.json"; }
state 100
slurm medium relu --experts 8 && [ "$(cat "$here/launched.txt")" = "--resume $OUT --batch 32 " ] && grep -sqx "requeued requeue 42" "$SEEN.scontrol"
status=$?
check "Slurm: unfinished, so resumed and requeued: $(cat "$here/launched.txt" "$here/slurm.txt")" $status
seen 'Slurm' --kill-on-bad-exit=1 --gpu-bind=none --mpi=none "$PROGRAM"
state 60000
slurm medium relu && [ ! -e "$SEEN.scontrol" ]
check "Slurm: finished, so not requeued" $?
state 100
PROGRAM=false TRAINER=false slurm medium relu
[ $? != 0 ] && [ ! -e "$SEEN.scontrol" ]
check "Slurm: failed, so not requeued" $?
OUT=$here/new slurm small dense --steps 9
launched 'Slurm, a new run' 16

PROGRAM=dev/scripts/pretrain.sh OUT=$here/new NODES=4 HEAD=node0 GPUS_PER_NODE=2 OMP_NUM_THREADS='' dev/scripts/torchrun.sh medium topk --steps 9 >"$here/launched.txt" 2>&1
sed -i "s|^$here/bin/trainer ||; s/\\\\//g" "$here/launched.txt"
launched 'torchrun' 8
seen 'torchrun' --nnodes 4 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint node0:29500 --rdzv-id remoe --max-restarts 3 --no-python

# what sbatch reads are comments before the first command, each an option that it has
[ "$(sed -n '/^[^#]/q; /^#SBATCH/p' dev/scripts/slurm.sbatch | wc -l)" = "$(grep -c '^#SBATCH' dev/scripts/slurm.sbatch)" ]
check "slurm.sbatch: every #SBATCH is where sbatch looks for it" $?

if command -v shellcheck >/dev/null; then
    shellcheck dev/scripts/*.sh dev/scripts/*.sbatch
    check "shellcheck" $?
else
    skipped=$((skipped + 1))
    echo "skipped shellcheck, which is not installed"
fi

echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
