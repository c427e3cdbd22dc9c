#!/usr/bin/env bash
# Checks and figures of a machine with a GPU, in steps of at most five minutes each.
#   STEPS=a,b   only these (default: all of them)     OUT=DIR   where figures go (default: gpu-results)
#   SMALL=1     sizes for a CPU, to try the script    PYTHON=   the interpreter that has fastlt
# Each step has a limit of its own, writes its figures as it ends, and does not stop the next one.
# Exit code 1 where a step failed.
set -u
cd "$(dirname "$0")/.."
[ -n "${PYTHON:-}" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python || PYTHON=python3; }
OUT=${OUT:-gpu-results}
SMALL=${SMALL:-}
DATA=${FASTLT_SHARED:-../shared}/data
WORK=${WORK:-$(mktemp -d)}
mkdir -p "$OUT"
failed=()

fastlt() { "$PYTHON" -m fastlt "$@"; }

step() {  # NAME SECONDS WHAT COMMAND...
    local name=$1 limit=$2 what=$3; shift 3
    case ",${STEPS:-$name}," in *",$name,"*) ;; *) return ;; esac
    printf '\n== %s: %s (at most %s s)\n' "$name" "$what" "$limit"
    local began=$SECONDS
    if timeout "$limit" "$@" > >(tee "$OUT/$name.log") 2>&1; then
        printf '== %s: passed in %s s\n' "$name" $((SECONDS - began))
    else
        printf '== %s: FAILED after %s s\n' "$name" $((SECONDS - began))
        failed+=("$name")
    fi
}

cifar() {  # METHOD [section.key=value]...: published protocol, 200 epochs
    local method=$1; shift
    local pack=$WORK/cifar100-lt epochs=${SMALL:+1}
    [ -d "$DATA/cifar100" ] || { echo "no CIFAR-100 at $DATA/cifar100: set FASTLT_SHARED"; return 1; }
    [ -d "$pack" ] || fastlt pack "cifar100:$DATA/cifar100" --task cifar100-lt --out "$pack" || return 1
    fastlt train cifar100-lt --method "$method" --data "$pack" --out "$WORK/cifar-$method" \
        train.epochs="${epochs:-200}" train.eval_every="${epochs:-20}" ${SMALL:+model.name=resnet8} "$@" &&
        cp "$WORK/cifar-$method/result.json" "$OUT/cifar-$method.json"
}

finetune() {  # rows of the study of fine-tuning, one after another, so that those which end in time are kept
    local weights=$DATA/weights/tf_efficientnet_lite0.safetensors row column only rows
    [ -f "$weights" ] || { echo "no weights at $weights: set FASTLT_SHARED"; return 1; }
    if [ -n "$SMALL" ]; then rows=norm; else rows="norm full lora last:2 head"; fi
    for row in $rows; do
        only=()
        for column in 'none*' neighbours 'silenced*'; do only+=(--only "$row | $column"); done
        fastlt reproduce finetune --data "grocery:$DATA/grocery" --out "$WORK/finetune" "${only[@]}" \
            --csv "$OUT/finetune.csv" --epochs "${SMALL:-30}" data.size=$([ -n "$SMALL" ] && echo 32 || echo 128) \
            model.weights="$weights" || return 1
    done
}
export -f fastlt cifar finetune
export PYTHONSAFEPATH=1  # what is installed, with its compiled parts, not the working folder
export PYTHON SMALL DATA WORK OUT

steps="doctor kernels engines loss train finetune cifar-ce cifar-ldam-drw cifar-balanced-softmax"
balanced="lcreg come propheter dlsa dropclass fate"  # by balanced softmax, as in their papers
related="$balanced angular attentive"
for method in $related; do steps="$steps cifar-$method"; done
for name in ${STEPS//,/ }; do
    case " $steps " in *" $name "*) ;; *) echo "there is no step '$name': $steps" >&2; exit 2 ;; esac
done

step doctor 60 "versions, GPU, engines" "$PYTHON" -m fastlt doctor
step kernels 280 "the Triton kernels against the reference" \
    "$PYTHON" -m pytest tests/kernels/test_triton.py -q -p no:cacheprovider -o addopts=--import-mode=importlib ${SMALL:+-k "any_logits and dtype0-whole"}
step engines 200 "every engine trains the same pack to the same loss" \
    "$PYTHON" -m fastlt_benchmarks.engines --epochs "$([ -n "$SMALL" ] && echo 2 || echo 8)" --csv "$OUT/engines.csv"
if [ -n "$SMALL" ]; then sizes=(--quick); else
    sizes=(--rows 4096 --classes 10000 --classes 100000 --width 768); fi
step loss 280 "the losses and their peers" "$PYTHON" -m fastlt bench-loss "${sizes[@]}" --out "$OUT"
step train 280 "the loop against bare steps" \
    "$PYTHON" -m fastlt bench-train cifar100-lt --csv "$OUT/train.csv" --rounds 3 ${SMALL:+--steps 5 model.name=resnet8}
step finetune 180 "how much of a pretrained backbone to train" bash -c finetune
for method in ce ldam-drw balanced-softmax; do
    step "cifar-$method" 290 "CIFAR-100-LT, $method" bash -c "cifar $method"
done

# The related systems take minutes each: they are run where STEPS names them. One that its time ends goes
# on with the next call that is given the same WORK.
for method in $related; do
    case ",${STEPS:-}," in *",cifar-$method,"*) ;; *) continue ;; esac
    case " $balanced " in *" $method "*) own=loss.name=balanced-ce ;; *) own=loss.name=ce ;; esac
    step "cifar-$method" 290 "CIFAR-100-LT, $method" bash -c "cifar $method $own"
done

printf '\n%s\n' "figures: $OUT"
[ ${#failed[@]} = 0 ] || { printf 'failed: %s\n' "${failed[*]}"; exit 1; }
