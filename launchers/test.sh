#!/usr/bin/env bash
# Install what the tests need, then lint, build the pages, check types and run the tests. Arguments go to pytest.
#
#   bash launchers/test.sh [--rest | --all] [pytest argument …]
#
# Without option: the default tier, 15 minutes on two cores. --rest: the tests marked slow, without lint, pages and
# types. --all: all tests, those of benchmarks/ too. If no file is named, two files run at a time: first those that compute, then those that measure
# silence and time-outs. JUnit reports stay: test-report*.xml, of --rest test-rest*.xml.
# Exit code: pytest's; 1 where all tests pass but lint, pages or types do not. PYTHON: the Python to make .venv with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launchers/_environment.sh

# On a build machine (root, CI=true) missing system packages are installed; elsewhere they are only named.
install_system_packages() {
  local missing=()
  command -v "${CXX:-g++}" >/dev/null 2>&1 || missing+=(g++)
  PATH="$PATH:/usr/sbin" command -v nginx >/dev/null 2>&1 || missing+=(nginx-light) # serves shards to tests
  local pair
  for pair in tc:iproute2 sshd:openssh-server ssh:openssh-client pdsh:pdsh mpirun:openmpi-bin pkill:procps; do # hosts in tests/cluster, and a ready file
    PATH="$PATH:/usr/sbin:/sbin" command -v "${pair%%:*}" >/dev/null 2>&1 || missing+=("${pair#*:}")
  done
  command -v chromium >/dev/null 2>&1 || missing+=(chromium) # opens the report of a run
  PATH="$PATH:/usr/sbin" command -v slurmctld >/dev/null 2>&1 || missing+=(slurm-wlm munge) # a cluster of two nodes
  [ ${#missing[@]} -eq 0 ] && return 0
  apt-get update -qq >&2
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
}

if [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ]; then install_system_packages; fi
find_python
check_venv
check_compiler
if [ -x .venv/bin/pytest ]; then check_disk 1; else check_disk 6; fi
report_errors
install_into_venv test -e '.[emoji,report,tensorboard,test]'

export PATH="$PWD/.venv/bin:$PATH" # ninja, for DeepSpeed's build
build_extensions
python tests/fake_cuda/fake_library.py >&2 # puts an idle GPU into torch, for tests/fake_cuda
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # tests start several ranks at a time
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

chosen=(-m "not slow and not bench")
reports=test-report
case "${1:-}" in
  --rest) chosen=(-m "slow and not bench") reports=test-rest && shift ;;
  --all) chosen=() && shift ;;
esac

passed=()
failed=()
check() {
  local name=$1
  shift
  echo "== $name: $*" >&2
  if "$@"; then passed+=("$name"); else failed+=("$name"); fi
}
if [ "$reports" = test-report ]; then
  check lint ruff check .
  check format ruff format --check .
  check spelling codespell m3i_scale docs README.md tests recipes protocols launchers examples benchmarks
  python launchers/style.py | tail -2 >&2 # marker words in pages and in the package, for information
  site=$(mktemp -d)
  check docs env NO_MKDOCS_2_WARNING=1 mkdocs build --strict --site-dir "$site" # dead links and anchors fail
  rm -rf "$site"
  types=$(mktemp)
  mypy >"$types" 2>&1 & # it takes a minute of one core
  types_pid=$!
  trap 'kill "$types_pid" 2>/dev/null || true; rm -f "$types"' EXIT
fi

code=5 # pytest's where it finds no test, which one of two calls may
rm -f "$reports"*.xml
run_tests() {
  local report=$1 result=0
  shift
  echo "== tests: pytest $*" >&2
  : >"$report" # pytest writes it at its end
  pytest --junitxml="$report" "${chosen[@]}" "$@" || result=$?
  if [ "$code" -eq 5 ] || { [ "$result" -ne 0 ] && [ "$result" -ne 5 ]; }; then code=$result; fi
}

of_hosts=(tests/cluster tests/doctor tests/launching)
named=no
for argument in "$@"; do
  if [ -e "${argument%%::*}" ]; then named=yes; fi
done
if [ "$named" = yes ]; then
  if [ "$reports" = test-report ]; then chosen=(); fi # named files run whatever their tier
  run_tests "$reports.xml" "$@"
else
  interrupted=no
  trap 'interrupted=yes' INT # pytest ends by itself, and the rest is not wanted either
  : >"$reports-hosts.xml"
  run_tests "$reports.xml" -n 2 --dist loadfile --no-loadscope-reorder "${of_hosts[@]/#/--ignore=}" "$@"
  if [ "$interrupted" = no ]; then run_tests "$reports-hosts.xml" -n 2 --dist loadfile "${of_hosts[@]}" "$@"; fi
fi

mypy_result() {
  local code=0
  wait "$types_pid" || code=$?
  cat "$types"
  return "$code"
}
if [ -n "${types_pid:-}" ]; then check types mypy_result; fi
echo "passed checks: ${passed[*]:-none}; failed checks: ${failed[*]:-none}"
python launchers/_count.py "$reports"*.xml
if [ "$code" -eq 0 ] && [ ${#failed[@]} -gt 0 ]; then code=1; fi
exit "$code"
