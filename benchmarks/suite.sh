#!/usr/bin/env bash
# The GPU tests and the benchmarks, by parts, from a plain checkout:
#
#   bash benchmarks/suite.sh tests sanitize            is the code right on this GPU         6 minutes on an H200
#   bash benchmarks/suite.sh scan profile reads blocks how fast are the kernels              8
#   bash benchmarks/suite.sh tiles own                 every tile; our own denoiser alone    6
#   bash benchmarks/suite.sh models pictures training  whole models, pictures, training     25
#   bash benchmarks/suite.sh two-gpus                  on two GPUs                           4
#   bash benchmarks/suite.sh fsdp2-on-one              two processes of FSDP2 on one GPU      2
#   bash benchmarks/suite.sh ablations mixers          models compared, trained here        20 and 25
#
# Results go to OUT (benchmarks/results), where rows that are not measured again stay; logs to LOGS (runs/suite), which
# also holds what the studies trained: cut off, they go on where they were. COMMIT is recorded where there is no git
# history. The studies need DATA (data/emoji, made by scripts/prepare_emoji.py). Exits with 1 if anything failed.
set -u
[ $# -gt 0 ] || { sed -n '3,15s/^# \{0,1\}//p' "$0"; exit 2; }
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
PYTHON=${PYTHON:-python3} OUT=${OUT:-benchmarks/results} LOGS=${LOGS:-runs/suite} DATA=${DATA:-data/emoji}
GPU=$($PYTHON -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())') || exit 1
mkdir -p "$OUT" "$LOGS"
failed=$LOGS/failed
rm -f "$failed"

# run NAME SECONDS COMMAND...: the log's end is shown
run() {
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout "$limit" "$@" > "$LOGS/$name.log" 2>&1
  local status=$?
  printf '\n==> %s: exit %s after %s s\n' "$name" $status $((SECONDS - start))
  tail -n 12 "$LOGS/$name.log" | cut -c 1-400
  [ $status = 0 ] || echo "$name" >> "$failed"
}
# measure NAME SECONDS RESULT PROGRAM OPTIONS...: adds to a result file of this GPU
measure() {
  local name=$1 limit=$2 target=$OUT/$3-$GPU.json
  shift 3
  [ -f "$target" ] || cp "benchmarks/results/${target##*/}" "$target" 2> /dev/null
  run "$name" "$limit" "$@" --out "$target" ${COMMIT:+--commit "$COMMIT"}
}
on_two() { $PYTHON -m torch.distributed.run --nproc-per-node 2 "$@"; }  # measure calls it in a shell of its own
export -f on_two
export PYTHON
sanitize() {  # in three processes, as most of the time is the host's
  for share in 1/3 2/3 3/3; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$1-${share%/*}" 300 compute-sanitizer --tool "$1" --error-exitcode 1 \
      "$PYTHON" scripts/sanitize_kernels.py --share $share &
  done
  wait
}
models() { measure "models-$1" 240 models "$PYTHON" benchmarks/models.py --families "$@" --time-limit 180; }
train() { measure "training-$1" 200 training "$PYTHON" benchmarks/training.py "${@:2}"; }
# study NAME STEPS WARMUP AT_ONCE [OPTIONS]
study() {
  [ -f "$OUT/$1.json" ] || cp "benchmarks/results/$1.json" "$OUT/" 2> /dev/null
  run "$1" "${LIMIT:-7200}" "$PYTHON" scripts/compare_mixers.py train --study "$1" --steps "$2" --at_once "$4" \
    --data "$DATA" --sprite_cache "$LOGS/sprites" --work "$LOGS" --results "$OUT" ${COMMIT:+--commit "$COMMIT"} \
    "${@:5}" -- --bank_size 32768 --warmup_steps "$3" --trackers none
}

for part in "$@"; do
  case $part in
    tests)
      run tests-ops 300 "$PYTHON" -m pytest -q -m gpu -n 6 tests/ops &
      run tests-rest 400 "$PYTHON" -m pytest -q -m gpu -n 4 tests --ignore tests/ops
      wait ;;
    sanitize)
      sanitize memcheck
      sanitize racecheck ;;
    scan) measure line-scan 330 line_scan "$PYTHON" benchmarks/line_scan.py ;;
    reads) measure scan-reads 90 scan_reads "$PYTHON" benchmarks/scan_reads.py ;;
    profile) measure profile 240 profile "$PYTHON" benchmarks/profile_scan.py ;;
    tiles)
      measure tiles 180 tiles "$PYTHON" benchmarks/tiles.py
      measure tiles-plane 90 tiles-plane "$PYTHON" benchmarks/tiles.py --kernels plane --seconds 40 ;;
    blocks) measure blocks 90 block_kernels "$PYTHON" benchmarks/block_kernels.py ;;
    own) models own-pixart ;;
    models)
      for family in own-pixart pixart sana; do models $family; done
      models sdxl --sizes 1024 4096
      models sdxl --sizes 16384 --variants gspn2 none ;;
    pictures)
      measure pictures 120 high-resolution "$PYTHON" benchmarks/high_resolution.py --quick --pictures "$LOGS/pictures"
      measure picture-16384 300 high-resolution "$PYTHON" benchmarks/high_resolution.py --sizes 16384 \
        --pictures "$LOGS/pictures" ;;
    training)
      train long --pixels 512 2048 --compile no
      train short --pixels 256 1024 --compile no
      train compiled --pixels 512 2048 --compile yes --models embedded ;;
    two-gpus)
      ddp="--models embedded --pixels 256 --mixers gspn2 --compile no"
      measure two-gpus 120 several-gpus bash -c 'on_two "$@"' - benchmarks/two_gpus.py
      train one $ddp
      measure training-two 120 training bash -c 'on_two "$@"' - benchmarks/training.py $ddp
      train capped-one --capped
      measure training-fsdp2 120 training "$PYTHON" -m accelerate.commands.launch \
        --config_file configs/accelerate/fsdp2.yaml benchmarks/training.py --capped ;;
    fsdp2-on-one)
      train capped-one --capped
      ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_RESHARD_AFTER_FORWARD=true FSDP_OFFLOAD_PARAMS=false \
        GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} \
        measure training-fsdp2 120 training bash -c 'on_two "$@"' - benchmarks/training.py --capped --share_gpu ;;
    ablations) study ablations 400 50 4 --no-evaluate ${VARIANTS:+--variants "$VARIANTS"} ;;
    mixers) study mixers 1500 100 1 ${VARIANTS:+--variants "$VARIANTS"} ;;
    *) echo "no part $part; without arguments all are listed" >&2; exit 2 ;;
  esac
done
if [ -f "$failed" ]; then
  echo "failed: $(tr '\n' ' ' < "$failed")"
  exit 1
fi
