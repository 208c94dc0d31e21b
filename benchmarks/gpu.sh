#!/usr/bin/env bash
# What a GPU does with cnnjax, in at most 8 minutes, as one file of JSON.
#
#   bash benchmarks/gpu.sh OUT.json            # on a machine with a GPU and JAX's build for it
#   bash benchmarks/gpu.sh OUT.json --smoke    # the same commands on a CPU, as short as they get
#
# It installs nothing: a peer that is not there (PyTorch) is reported as missing. Measured are LeNet-5,
# ResNet-18 at 32x32 and ResNet-50 at 224x224 in bfloat16 beside plain Flax, PyTorch eager and
# torch.compile on the same card; the seconds to 99% on MNIST; a population of 64 LeNet-5 beside one;
# and, where CIFAR-10 is prepared, the speed run. Each stage has a limit of its own, and one that fails
# or runs out leaves what it said; the others go on.
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { sed -n '2,11s/^# \?//p' "$0"; exit 2; }
out=$(realpath -m "$1") smoke=${2:-}
case $smoke in "" | --smoke) ;; *) echo "error: unknown flag $smoke: only --smoke is known" >&2; exit 2 ;; esac
mkdir -p "$(dirname "$out")" || exit 2
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

stage() { # stage NAME SECONDS COMMAND ...: runs it, and notes how it ended and how long it took.
  local name=$1 limit=$2 began=$SECONDS code
  shift 2
  echo "== $name (at most $limit s): $*"
  timeout --kill-after=10 "$limit" "$@" > "$parts/$name.log" 2>&1
  code=$?
  tail -n 25 "$parts/$name.log"
  printf '%s\n' "$code" "$((SECONDS - began))" "$*" > "$parts/$name.end"
  echo "== $name ended with $code after $((SECONDS - began)) s"
}

peers=(python benchmarks/peers.py --contenders cnnjax flax-scan torch torch-compile --no-mnist --patience 100)
if [ -n "$smoke" ]; then
  short=(--rounds 1 --seconds 0.1 --device cpu --contenders cnnjax flax-scan --modes train)
  stage facts 60 python -m cnnjax doctor --json
  stage lenet5 120 "${peers[@]}" "${short[@]}" --workloads lenet5 --batch-size 8 --json "$parts/lenet5.json"
  stage resnet18 200 "${peers[@]}" "${short[@]}" --workloads resnet18 --batch-size 2 --json "$parts/resnet18.json"
  stage mnist99 120 python -m experiments.mnist_lenet --smoke --run-dir "$parts/mnist99"
  stage population 120 python benchmarks/population.py --smoke --json "$parts/population.json"
else
  stage facts 30 python -m cnnjax doctor --json
  stage lenet5 60 "${peers[@]}" --rounds 3 --seconds 0.7 --workloads lenet5 --precisions float32 --json "$parts/lenet5.json"
  stage resnet18 80 "${peers[@]}" --rounds 3 --seconds 0.7 --workloads resnet18 --precisions bf16 --json "$parts/resnet18.json"
  stage resnet50 110 "${peers[@]}" --rounds 3 --seconds 1 --workloads resnet50 --precisions bf16 --json "$parts/resnet50.json"
  stage mnist99 60 python -c "import json, sys
sys.path.insert(0, 'benchmarks')
from peers import report_mnist
json.dump(report_mnist('gpu'), open(sys.argv[1], 'w'))" "$parts/mnist99.json"
  stage population 90 python benchmarks/population.py --members 64 --rounds 3 --steps 100 \
    --ways vmap loop --json "$parts/population.json"
  if compgen -G "${TFDS_DATA_DIR:-$HOME/tensorflow_datasets}/cifar10/*" > /dev/null; then
    stage speedrun 60 python -m experiments.cifar10_speedrun --run-dir "$parts/speedrun"
  fi
fi

python - "$parts" "$out" <<'PY'
import json, pathlib, sys

parts, out = map(pathlib.Path, sys.argv[1:])
result = {}
for end in sorted(parts.glob("*.end")):
    code, seconds, command = end.read_text().split("\n", 2)
    log = end.with_suffix(".log").read_text(errors="replace")
    found = end.with_suffix(".json")
    content = None
    if found.exists():
        content = json.loads(found.read_text())
    elif end.stem == "facts":
        content = json.loads(log[log.index("{") :]) if "{" in log else None
    elif (parts / end.stem / "summary.json").exists():
        content = json.loads((parts / end.stem / "summary.json").read_text())
    result[end.stem] = {
        "command": command.strip().replace(str(parts), "PARTS"),
        "code": int(code),
        "seconds": int(seconds),
        "log": log[-4000:].replace(str(parts), "PARTS"),
        "result": content,
    }
out.write_text(json.dumps(result, indent=1) + "\n")
failed = [name for name, each in result.items() if each["code"]]
print(f"wrote {out}: {len(result)} stages" + (f"; failed: {', '.join(failed)}" if failed else ""))
sys.exit(bool(failed))
PY
